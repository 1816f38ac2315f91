"""The commands that list what there is: ops, passes, models."""

from __future__ import annotations

import click

from .cli import cli, json_option
from .ui import emit_json


@cli.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print docs/ops.md.")
@json_option
def ops(name: str | None, markdown: bool, as_json: bool) -> int:
    """List the ops of the IR, or show one.

    A card has the op's form, its formula, and where each part of it is in the source.

    \b
    dsc ops
    dsc ops matmul
    """
    from .catalog import describe_op, describe_ops, ops_page

    if markdown:
        print(ops_page(), end="")
        return 0
    value, text = describe_op(name) if name else describe_ops()
    emit_json(value) if as_json else print(text)
    return 0


@cli.command()
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> int:
    """List the passes and their options, or show one.

    What is shown of one pass is its rule, with a program before and after it.

    \b
    dsc passes
    dsc passes autodiff
    """
    from .catalog import describe_pass, describe_passes

    value, text = describe_pass(name) if name else describe_passes()
    emit_json(value) if as_json else print(text)
    return 0


@cli.command()
@json_option
def models(as_json: bool) -> int:
    """List the models that dsc ships configurations of.

    \b
    dsc models
    dsc models --json
    """
    from .catalog import describe_models

    value, text = describe_models()
    emit_json(value) if as_json else print(text)
    return 0

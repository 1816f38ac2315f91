"""`dsc diff`: compare two programs, two backends, or every value of one decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..ir.errors import require
from .cli import PATH, cli, inputs_option, json_option, weights_option
from .ui import emit_json, progress


@cli.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH, required=False)
@click.option(
    "--backends", default="numpy", metavar="NAME[,NAME]", help="One backend for both, or two to compare on one artifact. Default: numpy."
)
@weights_option
@inputs_option
@click.option(
    "--tolerance", type=float, default=0.0, metavar="REL", help="Relative L2 difference that still counts as the same. Default: 0."
)
@click.option("--all", "everything", is_flag=True, help="Show every op, not only those that differ most.")
@click.option(
    "--sweep", "axis", metavar="AXIS", help="Quantise A in every way an axis has: recipe, tile, format, scale, accumulate, promote."
)
@click.option("--recipe", default="deepseek-v3", help="The recipe whose decision --sweep varies. Default: deepseek-v3.")
@click.option("--plot", type=PATH, metavar="FILE.png", help="Draw SQNR by layer for each value of the swept axis.")
@json_option
def diff(
    a: Path,
    b: Path | None,
    backends: str,
    weights: str | None,
    inputs: str | None,
    tolerance: float,
    everything: bool,
    axis: str | None,
    recipe: str,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Compare two artifacts, or one under two backends, op by op.

    With one that is sharded its results are compared, from all ranks in this process.

    Exit code 0 the same, 1 different, 2 an error. Two artifacts are the same when every op gives the same bits (or
    differs by at most --tolerance); two backends when each op, on the same operands, stays within its rounding bound.

    \b
    dsc diff out out --backends numpy,numpy-f64
    dsc diff bf16 f32 --tolerance 0.01
    dsc diff out sharded --tolerance 0.01
    dsc diff out --sweep recipe --plot sqnr.png
    """
    from ..ir.walk import executed
    from .artifact import load
    from .diff import diff as compare
    from .report_diff import show
    from .run import check_writable, say_defaults

    if axis or plot:
        require(b is None, "--sweep and --plot quantise one artifact: give A alone")
        if plot:
            require(plot.suffix == ".png", f"--plot {plot}: expected a name that ends in .png")
            check_writable(plot)
        return _sweep(load(a), axis or "recipe", recipe, weights, inputs, plot, as_json)
    names = tuple(n for n in backends.split(",") if n)
    first = load(a)
    second = first if b is None or b.resolve() == a.resolve() else load(b)
    with progress("comparing", 2 * executed(first.module)) as step:
        report = compare(first, second, backends=names, weights=weights, inputs=inputs, tolerance=tolerance, on_step=step)
    say_defaults([first, second], weights, inputs)
    if as_json:
        emit_json(report.to_dict())
    else:
        print(show(report, everything))
    return 0 if report.same else 1


def _sweep(program: Any, axis: str, recipe: str, weights: str | None, inputs: str | None, file: Path | None, as_json: bool) -> int:
    from . import sweep
    from .run import say_defaults

    with progress("sweeping", len(sweep.pipelines(axis, recipe))) as step:
        found = sweep.sweep(program, axis, recipe=recipe, weights=weights, inputs=inputs, on_step=step)
    if file:
        sweep.plot(found, file)
    say_defaults([program], weights, inputs)
    if as_json:
        emit_json(found.to_dict())
    else:
        print(sweep.show(found))
        if file:
            print(f"\n{file}: SQNR by layer")
    return 0

"""`dsc golden`: golden tensors for whoever builds hardware, and the check of their results."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..ir.errors import require
from .cli import PATH, cli, json_option
from .ui import emit_json, plural, progress, size, table

SHOWN = 10
"""Cases that are not the same, of which a line each is printed."""


@cli.command()
@click.argument("op", required=False)
@click.option("-o", "--out", default="golden", type=PATH, metavar="FOLDER", help="Folder to write. Default: golden.")
@click.option("--seed", type=int, default=0, help="Of the numbers. Default: 0.")
@click.option("--samples", type=int, default=1, help="How often each call is drawn, with other numbers. Default: 1.")
@click.option("--format", default="npz", metavar="npz|safetensors", help="What a case is written as. Default: npz.")
@click.option("--check", nargs=2, type=PATH, metavar="FOLDER RESULTS", help="Hold the results of a device against FOLDER.")
@json_option
def golden(op: str | None, out: Path, seed: int, samples: int, format: Any, check: tuple[Path, Path] | None, as_json: bool) -> int:
    """Write golden tensors of OP, or of every op.

    A case has operands, results and the permitted difference of each element, in a file that NumPy alone reads; golden.json says the
    types, the formula and the IR text of each. --check compares RESULTS, files of the same names with arrays result.0, ...: exit code 0
    where all are within their bounds, 1 where one is not or is missing, 2 an error.

    \b
    dsc golden scaled_matmul -o golden
    dsc golden -o golden --samples 3 --format safetensors
    dsc golden --check golden results
    """
    from . import golden as tensors

    if check:
        require(op is None, "--check reads a folder that is there: give no OP with it")
        return _check(*check, as_json)
    with progress("writing", len(tensors.cases(op))) as step:
        made = tensors.write(out, op, seed=seed, draws=samples, format=format, on_step=step)
    if as_json:
        emit_json({"folder": str(made.folder), "format": format, "seed": seed, "bytes": made.bytes, "cases": made.cases})
        return 0
    print(f"{made.folder}: {plural(sum(made.cases.values()), 'case')} of {plural(len(made.cases), 'op')}, {size(made.bytes)}")
    return 0


def _check(folder: Path, results: Path, as_json: bool) -> int:
    from . import golden as tensors

    with progress("checking") as step:
        found = tensors.check(folder, results, step)
    if as_json:
        cases = [asdict(c) | {"share": c.share if c.share < float("inf") else None} for c in found.cases]
        emit_json({"same": found.same, "cases": cases})
        return 0 if found.same else 1
    ops = list(dict.fromkeys(c.op for c in found.cases))
    rows = []
    for op in ops:
        mine = [c for c in found.cases if c.op == op]
        counts = [str(sum(c.status == status for c in mine)) for status in ("same", "different", "missing")]
        rows.append([op, *counts, f"{max(c.share for c in mine):.3g}"])
    print(table(("op", "same", "different", "missing", "worst / bound"), rows))
    wrong = [c for c in found.cases if c.status != "same"]
    for c in wrong[:SHOWN]:
        beyond = f"; {plural(c.beyond, 'element')} beyond" if c.beyond else ""
        print(f"\n{c.file}: {c.name}\n  {c.status}: {c.reason}{beyond}")
    if len(wrong) > SHOWN:
        print(f"\nand {len(wrong) - SHOWN} more; --json has all")
    print(f"\n{plural(len(found.cases), 'case')}: {'all within their bounds' if found.same else f'{len(wrong)} not the same'}")
    return 0 if found.same else 1

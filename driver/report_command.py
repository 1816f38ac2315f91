"""`dsc report`: the page of an artifact, made again, with the numerics of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..ir.errors import require
from ..models.json_file import present
from .cli import PATH, cli, json_option
from .ui import emit_json, progress


@cli.command()
@click.argument("out", metavar="OUT", type=PATH)
@click.option("-o", "--out", "file", type=PATH, metavar="FILE.html", help="Where to write it. Default: report.html in OUT.")
@click.option("--diff", "other", type=PATH, metavar="OTHER", help="Compare OUT with this artifact, and show it op by op.")
@click.option("--numerics", type=PATH, metavar="FILE.json", help="Show a comparison that dsc diff --json has printed.")
@click.option("--timeline", type=PATH, metavar="FILE.json", help="A trace to show, as of dsc schedule or dsc plan.")
@json_option
def report(out: Path, file: Path | None, other: Path | None, numerics: Path | None, timeline: Path | None, as_json: bool) -> int:
    """Show an artifact as one page for a browser.

    The page is one file, which opens without a network. dsc compile has written it already, as report.html in OUT; here it is
    made again, with the numerics of a comparison, or with the schedule of a pipeline.

    \b
    dsc report out --diff bf16
    dsc report out --numerics diff.json -o page.html
    dsc report out --timeline plan/timeline.json
    """
    from .artifact import REPORT, load
    from .report import write
    from .run import check_writable

    require(other is None or numerics is None, "--diff runs a comparison and --numerics reads one: give one of the two")
    program = load(out)
    target = file or program.path / REPORT
    require(target.suffix in (".html", ".htm"), f"{target}: expected a name that ends in .html")
    check_writable(target)
    if timeline:
        present(timeline, "a trace as JSON")
    found = _compared(program, other) if other else None
    if numerics:
        from .report.numerics import read

        found = read(numerics, program.module)
    written = write(program, target, found, timeline)
    if as_json:
        emit_json({"report": str(target), "bytes": written, "numerics": found is not None})
    else:
        print(f"{target}: {written / 1e6:.1f} MB, opens in a browser")
    return 0


def _compared(program: Any, other: Path) -> dict[str, Any]:
    """What `dsc diff OUT OTHER --json` prints."""
    from ..ir.walk import executed
    from .artifact import load
    from .diff import diff
    from .run import say_defaults

    second = load(other)
    with progress("comparing", 2 * executed(program.module)) as step:
        found = diff(program, second, on_step=step)
    say_defaults([program, second], None, None)
    return found.to_dict()

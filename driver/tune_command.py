"""The command that measures tiles on the GPU of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from .cli import PATH, cli, json_option
from .ui import emit_json, progress, table


@cli.command()
@click.argument("out", metavar="OUT", type=PATH)
@click.option("-o", "--out", "file", required=True, type=PATH, metavar="FILE.toml", help="File of tiles to add to.")
@json_option
def tune(out: Path, file: Path, as_json: bool) -> int:
    """Measure the tiles of matrix products on this machine's GPU.

    The fastest of each product goes into FILE, beside those of other devices and shapes. Programs take tiles from the file that
    DSC_TILES names; without it they are chosen by shape and device.

    \b
    dsc tune out -o tiles.toml
    DSC_TILES=tiles.toml dsc run out --backend triton
    """
    from .artifact import load
    from .kernels import tune_tiles
    from .run import check_writable

    program = load(out)
    check_writable(file)
    with progress("measuring") as step:
        device, found = tune_tiles(program.module, file, step)
    if as_json:
        seconds = {m.key: [{**vars(tile), "seconds": each} for tile, each in m.seconds.items()] for m in found}
        emit_json({"device": device, "file": str(file), "seconds": seconds})
        return 0
    rows = []
    for m in found:
        by_shape, best = next(iter(m.seconds.values())), m.seconds[m.best]
        tile = f"{m.best.m}x{m.best.n}x{m.best.k}, {m.best.num_warps} warps{', specialised' if m.best.specialized else ''}"
        rows.append([m.op, m.key.partition(" ")[2], tile, f"{best * 1e6:.1f}", f"{by_shape / best:.2f}"])
    print(table(("op", "for", "fastest tile", "us", "of the chosen"), rows, left=3))
    print(f"{file}: {len(found)} tiles for {device}")
    return 0

"""The commands about machines: which clusters dsc knows, how well published tables are met, and measuring the machine at hand."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .cli import PATH, cli, json_option
from .ui import emit_json, progress

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Where NumPy's libraries are told how many threads to use."""


@cli.command()
@click.argument("name", metavar="[NAME|FILE.toml]", required=False)
@click.option("--tables", is_flag=True, help="Published tables of kernels and exchanges, and what the cost model says of each row.")
@json_option
def devices(name: str | None, tables: bool, as_json: bool) -> int:
    """List known clusters and devices, or show the figures of one.

    A file that says what it changes of a cluster (base = "h800") is a cluster too.

    \b
    dsc devices
    dsc devices h800
    dsc devices h800 --tables
    """
    from .machines import describe_cluster, describe_clusters, describe_tables

    if tables:
        value, text = describe_tables(name or "h800")
    else:
        value, text = describe_cluster(name) if name else describe_clusters()
    emit_json(value) if as_json else print(text)
    return 0


@cli.command()
@click.option("-o", "--out", type=PATH, metavar="FILE.toml", help="Cluster file to write. Default: only print.")
@click.option("--name", metavar="NAME", help="Name of the cluster. Default: the machine's.")
@click.option("--quick", is_flag=True, help="Fewer shapes and runs, for a first look.")
@click.option("--threads", type=click.IntRange(min=1), default=1, metavar="N", help="Threads of a rank on a CPU. Default: 1.")
@json_option
def calibrate(out: Path | None, name: str | None, quick: bool, threads: int, as_json: bool) -> int:
    """Measure this machine, and write it as a cluster file.

    Matrix products by dtype and shape, memory, attention, kernels along rows and the time of a launch, on the GPU through torch
    if there is one, else on the CPU through dsc's reference backend; with one thread by its CPU time, which other work on the
    machine does not lengthen. Under torchrun the links between its processes as well.

    \b
    dsc calibrate -o my.toml
    torchrun --nproc-per-node 2 -m dsc calibrate -o my.toml
    """
    os.environ.update(dict.fromkeys(THREADS, str(threads)))  # read when NumPy is loaded, which this command has not done yet
    from .calibrate import calibrated
    from .ranks import is_first
    from .run import check_writable

    if out is not None:
        check_writable(out)
    with progress("measuring") as step:
        found = calibrated(name, quick, threads, step)
    if not is_first():
        return 0
    if out is not None:
        found.write(out)
    if as_json:
        emit_json(found.record() | ({"file": str(out)} if out else {}))
        return 0
    print(found.text())
    if out is not None:
        print(f"{out}: {found.name}, measured {found.when}")
    return 0

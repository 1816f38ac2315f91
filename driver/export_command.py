"""`dsc export`: a compiled program as an ONNX model."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from .cli import PATH, cli, json_option
from .ui import emit_json, plural, progress, size


@cli.command()
@click.argument("out", metavar="OUT", type=PATH)
@click.option("--onnx", "file", required=True, type=PATH, metavar="FILE.onnx", help="The model to write.")
@click.option("--profile", default="standard", metavar="standard|ort|compact", help="What stays a function. Default: standard.")
@click.option("--weights", default="none", metavar="none|reference|copy", help="Inputs, shards, or a file beside. Default: none.")
@click.option("--checkpoint", metavar="DIR|random:SEED", help="Whose weights. Default: those that OUT was compiled with.")
@click.option("--func", metavar="NAME", help="Export this function instead of the first.")
@click.option("--opset", type=int, help="Version of the standard ops, 23 to 26. Default: 24.")
@click.option("--opaque", is_flag=True, help="Leave an op without a mapping as a custom op instead of refusing it.")
@json_option
def export(out: Path, file: Path, profile: str, as_json: bool, **options: Any) -> int:
    """Export a compiled program as an ONNX model.

    standard: each op is a function of domain ai.dsc with a body of standard ops. ort: standard ops only. compact: a node for each layer,
    whose function holds its ops. Weights by reference point into the checkpoint's own shards: write the model into its folder.

    \b
    dsc export out --onnx model.onnx
    dsc export out --onnx checkpoint/model.onnx --profile ort --weights reference --checkpoint checkpoint
    dsc export out --onnx layer.onnx --func decoder_layer
    """
    from ..ir.walk import weights as weights_of
    from .artifact import load
    from .export import export as write

    program = load(out)
    start = time.perf_counter()
    with progress("copying", len(weights_of(program.module))) as step:
        made = write(program, file, profile=profile, on_step=step, **options)
    seconds = time.perf_counter() - start
    if as_json:
        fields = dataclasses.asdict(made)
        emit_json(fields | {"file": str(made.file), "data": str(made.data) if made.data else None, "profile": profile, "seconds": seconds})
        return 0
    graph = f"{plural(made.nodes, 'node')}, {plural(made.functions, 'function')}"
    print(f"{profile}: {graph}, {plural(made.inputs, 'input')}, {plural(made.initializers, 'initializer')}")
    print(f"runs in {made.runs}")
    if made.opaque:
        print(f"left to a runtime of its own: {', '.join(made.opaque)}")
    beside = f", weights in {made.data} ({size(made.data.stat().st_size)})" if made.data else ""
    print(f"{made.file}: {size(made.bytes)}{beside}, written in {seconds:.1f} s")
    return 0

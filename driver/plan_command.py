"""`dsc plan`: how long a step takes on a cluster that nobody has rented yet, what it costs, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..ir.errors import require
from .cli import cli, json_option, recompute_option
from .ui import emit_json, progress

if TYPE_CHECKING:
    from .plan_inputs import Inputs
    from .plan_search import Planner
    from .plan_train import Training

BATCH = {"deepseek-v3": 15360}
"""Sequences of a step that are published: DeepSeek-V3 report, section 4.2. Others: 8 micro-batches on every stage."""
SHOWN = 4
"""Alternatives in the report."""


@cli.command()
@click.argument("source", metavar="SRC")
@click.option("--cluster", "cluster_name", default="h800", metavar="FILE|NAME", help="A cluster by name or as a .toml file. Default: h800.")
@click.option("--gpus", type=int, required=True, help="How many GPUs there are.")
@click.option(
    "--mode", type=click.Choice(["train", "prefill", "decode"]), default="train", help="A training step, or serving. Default: train."
)
@click.option("--mesh", default="auto", metavar="pp=16,ep=64|auto", help="How ranks are laid out. Default: auto, the best that is found.")
@click.option(
    "--schedule", default="auto", metavar="NAME|auto", help="The pipeline's schedule (see dsc schedule). Default: auto, the best of them."
)
@click.option("--batch", type=int, help="Sequences of an optimiser's step. Default: 15360 for deepseek-v3, else 8 for each GPU.")
@click.option("--micro", type=int, help="Sequences of a micro-batch on each rank along dp. Default: 1; in prefill 2, in decode 64.")
@click.option("--seq", type=int, help="Tokens of a sequence. Default: 4096, of context in decode 4989, or what the model takes.")
@click.option("--replicas", type=int, metavar="N", help="In serving: slots for experts, some of them in several. Default: as ep needs.")
@click.option(
    "--shared-expert",
    type=click.Choice(["apart", "routed"]),
    default="apart",
    help="In serving: the shared expert on every rank, or in slots as one more routed expert. Default: apart.",
)
@click.option("--speculate", is_flag=True, help="In decode: the MTP module proposes a second token (serve.accepted of them are right).")
@click.option("--recipe", metavar="NAME|none", default="deepseek-v3", help="How products are quantised. Default: deepseek-v3.")
@recompute_option("deepseek")
@click.option(
    "--dispatch",
    type=click.Choice(["auto", "direct", "two-hop", "forwarded"]),
    default="auto",
    help="How tokens reach experts on other nodes, as in dsc compile. Default: auto, forwarded where ep spans nodes, direct in decode.",
)
@click.option("--assume", multiple=True, metavar="KEY=NUMBER", help="Another value for an assumption, in its unit without prefix.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the model's configuration.")
@click.option("--tornado/--no-tornado", default=True, help="What each assumption does to the total. Default: yes.")
@click.option(
    "--recommendations", is_flag=True, help="What each change of hardware would buy: the clusters whose names begin with this one's."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg|png", help="Draw the schedule and the memory of each rank.")
@click.option(
    "-o",
    "--out",
    "out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write plan.json, schedule.csv and timeline.json, for Perfetto.",
)
@json_option
def plan(
    source: str,
    cluster_name: str,
    gpus: int,
    mode: Literal["train", "prefill", "decode"],
    mesh: str,
    schedule: str,
    batch: int | None,
    micro: int | None,
    seq: int | None,
    replicas: int | None,
    shared_expert: str,
    speculate: bool,
    recipe: str,
    recompute: str,
    dispatch: str,
    assume: Sequence[str],
    overrides: Sequence[str],
    tornado: bool,
    recommendations: bool,
    plot: Path | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Predict training or serving on a cluster.

    Says time, cost and memory, and what they rest on. The program is compiled for the ranks of each mesh that is tried; its ops are
    costed on the cluster, placed on the stages of a pipeline, and simulated.

    \b
    dsc plan deepseek-v3 --gpus 2048 --mesh pp=16,ep=64 --schedule dualpipe
    dsc plan deepseek-v2-lite --cluster my.toml --gpus 64 --plot plan.svg -o plan
    dsc plan deepseek-v3 --gpus 32 --mode prefill --replicas 288
    """
    from ..hardware.cluster import cluster, clusters
    from ..schedule.generate import NAMES
    from .artifact import check_target
    from .plan_flops import model_flops
    from .plan_inputs import Inputs, own_figures
    from .plan_program import Compiler, config_of
    from .plan_report import describe, document
    from .plan_search import Planner
    from .plan_trace import draw
    from .run import check_writable

    for option, number in {"gpus": gpus, "batch": batch, "micro": micro, "seq": seq, "replicas": replicas}.items():
        require(number is None or number > 0, f"--{option} is {number}, expected 1 or more")
    require(schedule in ("auto", *NAMES), f"unknown schedule {schedule}, expected auto or one of {', '.join(NAMES)}")
    if plot:
        require(plot.suffix in (".svg", ".png"), f"{plot}: expected a name that ends in .svg or .png")
        check_writable(plot)
    if out and not (out / "plan.json").is_file():  # an earlier plan is replaced
        check_target(out)
    inputs = Inputs(cluster(cluster_name), own_figures(gpus))
    config = config_of(source, overrides)
    if mode != "train":
        from .plan_serve import serving_inputs

        inputs = serving_inputs(inputs, mode, micro, seq, config["max_position_embeddings"], speculate).assume(assume)
        placed = replicas, shared_expert
        return _serving(source, inputs, config, gpus, mode, mesh, placed, speculate, recipe, dispatch, overrides, tornado, as_json)
    slots = replicas is not None or shared_expert != "apart" or speculate
    require(not slots, "--replicas, --shared-expert and --speculate are for serving: they need --mode prefill or decode")
    inputs, micro = inputs.assume(assume), micro or 1
    seq = seq or min(4096, config["max_position_embeddings"])
    batch = batch or BATCH.get(source) or 8 * gpus * micro
    again = "recompute" if recompute == "deepseek" else ""
    compiler = Compiler(source, None if recipe == "none" else recipe, seq, again, overrides, dispatch=dispatch)
    planner = Planner(compiler, inputs)
    names = NAMES if schedule == "auto" else (schedule,)
    best, *rest = _found(planner, config, gpus, mesh, names, batch, seq, micro)
    effects = []
    if tornado:
        with progress("assumptions") as advance:
            effects = planner.effects(best, advance)
    others = [(f"{p.setup.mesh}, {p.setup.order}", p) for p in rest]
    if recommendations:
        others += [
            (v.name, planner.on(best, replace(inputs, cluster=v)))
            for v in map(cluster, clusters())
            if v.name.startswith(f"{inputs.cluster.name} +")
        ]
    flops = model_flops(best.stages.program, micro * seq, best.setup.mesh.tp)
    if out:
        _write(out, best, document(source, best, flops, inputs, effects, others))
    if plot:
        draw(best, plot)
    if as_json:
        emit_json(document(source, best, flops, inputs, effects, others))
    else:
        print(describe(source, best, flops, inputs, effects, others))
    for file in filter(None, (out, plot)):
        click.echo(f"dsc: wrote {file}", err=True)
    return 0


def _serving(
    source: str,
    inputs: Inputs,
    config: Mapping[str, Any],
    gpus: int,
    mode: Literal["prefill", "decode"],
    mesh: str,
    placed: tuple[int | None, str],
    speculate: bool,
    recipe: str,
    dispatch: str,
    overrides: Sequence[str],
    ranges: bool,
    as_json: bool,
) -> int:
    """Prefill and decode. On its own the mesh spreads attention and experts over all GPUs, or over as many as divide what there is."""
    from ..ir.mesh import parse_mesh
    from .compile import placing_pass
    from .plan_program import Compiler, lanes
    from .plan_serve import Effects, describe, document, effects, serve

    node, experts = inputs.cluster.node, config.get("n_routed_experts") or 1
    spread = gpus <= 2 * experts > 2 and (gpus % node == 0 or gpus < node)
    text = f"ep={gpus if spread else gcd(gpus, experts)}" if mesh == "auto" else mesh
    given = parse_mesh(text if "node" in text else f"{text},node={node}", gpus)
    require(given.pp == 1, f"mesh {given}: serving is planned without a pipeline, expected pp=1")
    replicas, shared = placed
    slots = experts + (shared == "routed")
    if replicas is None and slots % given.ep:
        replicas = -(-slots // given.ep) * given.ep
    if speculate:
        depths = config.get("num_nextn_predict_layers") or 0
        require(mode == "decode" and depths > 0, f"--speculate needs --mode decode and a model with MTP modules, found {mode} and {depths}")
        overrides = [*overrides, f"num_hidden_layers={config['num_hidden_layers'] + 1}"]
    compiler = Compiler(source, None if recipe == "none" else recipe, None, "", overrides, mode, dispatch=dispatch, lanes=lanes([given]))
    compiler.placing = placing_pass(str(given), replicas, None, shared)
    plan = serve(compiler, inputs, mode, given)
    found = Effects()
    if ranges:
        with progress("assumptions") as advance:
            found = effects(plan, compiler, advance)
    if as_json:
        emit_json(document(source, plan, found))
    else:
        print(describe(source, plan, found))
    return 0


def _write(out: Path, plan: Training, document: Mapping[str, Any]) -> None:
    """The folder of a plan, complete or not at all."""
    import json

    from ..schedule.simulate import lower
    from .artifact import beside
    from .plan_trace import write_trace

    with beside(out) as folder:
        (folder / "plan.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "schedule.csv").write_text(str(lower(plan.timeline)), encoding="utf-8")
        write_trace(plan, folder / "timeline.json")


def _found(
    planner: Planner, config: Mapping[str, Any], gpus: int, mesh: str, names: Sequence[str], batch: int, seq: int, micro: int
) -> list[Training]:
    """The best steps: on the mesh that is given, else on all, with tp above 1 only where nothing fits without it."""
    from ..ir.mesh import parse_mesh
    from .plan_program import lanes, meshes, roomy
    from .plan_search import best_of

    node = planner.inputs.cluster.node
    best: list[Training] = []
    for tp in ((1,), (2,), (4,), (8,)) if mesh == "auto" else ((),):
        tried = meshes(gpus, node, config, batch, tp) if tp else [parse_mesh(mesh if "node" in mesh else f"{mesh},node={node}", gpus)]
        planner.compiler.lanes = max(planner.compiler.lanes, lanes(tried))
        if tp:
            tried = roomy(tried, planner.compiler.trace(planner.compiler.lanes * micro), planner.inputs.cluster.device.memory.mid)
        with progress("meshes", len(tried)) as advance:
            every: list[Training] = []
            for one in tried:
                every += planner.candidates([one], names, batch, seq, micro)
                advance(str(one))
        with progress("schedules") as advance:
            found = best_of(every, 1 + SHOWN, advance)
        best = found or best
        if found and found[0].fits:
            break
    why = f": {planner.refusal}" if planner.refusal else ""
    require(bool(best), f"no schedule of {', '.join(names)} exists for {gpus} GPUs on mesh {mesh} with a batch of {batch}{why}")
    return best

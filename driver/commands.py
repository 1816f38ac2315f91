"""The commands that make, run and show programs: compile, run, inspect, opt, convert.

A command is a thin face of a function that Python users call too; imports are inside, so that help is quick. Others are in diff_command.py,
list_commands.py and train_command.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import require
from .cli import PATH, budget_option, cli, inputs_option, json_option, pipeline_options, recompute_option, resumed, weights_option
from .ui import count, emit_json, note, plural, progress, size, table

if TYPE_CHECKING:
    from ..backends import Site
    from ..ir.core import Module
    from .ranks import Ranks

PASSES_HELP = 'Pipeline, e.g. "simplify,recompute{budget-gb=60}" (see dsc passes).'


@cli.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", required=True, type=PATH, help="Artifact folder to write.")
@click.option("--mode", default="forward", metavar="forward|train|prefill|decode", help="What the program does. Default: forward.")
@click.option("--batch", type=int, help="Sequences per micro-batch. Default: 1.")
@click.option("--seq", type=int, help="Tokens per sequence. Default: 4096, 64 for a -tiny model.")
@click.option("--context", type=int, help="Cache length of decode. Default: as --seq.")
@click.option("--passes", metavar="TEXT", help=f"{PASSES_HELP} Default: simplify; in train mode autodiff, with --target fuse.")
@click.option("--recipe", metavar="NAME|FILE.toml", help="Quantise by this recipe (deepseek-v3, ...), within the default pipeline.")
@click.option("--mesh", metavar="dp=4,ep=4,tp=1", help="What one rank of this mesh runs; --batch then counts all ranks' sequences.")
@click.option(
    "--dispatch",
    type=click.Choice(["auto", "direct", "two-hop", "forwarded"]),
    default="auto",
    help="How tokens reach experts on other nodes: once for each expert, or once for each node and on from there, in an exchange for each "
    "hop or forwarded by one kernel. Default: auto, forwarded where ep spans nodes, direct in decode mode.",
)
@pipeline_options
@recompute_option("none")
@budget_option
@click.option("--replicas", type=int, metavar="N", help="Slots for experts in all, more than experts: evenly popular ones, over ep.")
@click.option("--placement", metavar="FILE.json", help="Slots for experts as dsc place -o wrote them.")
@click.option(
    "--shared-expert",
    "shared",
    type=click.Choice(["apart", "routed"]),
    default="apart",
    help="With slots: the shared expert on every rank, or as one more routed expert. Default: apart.",
)
@click.option("--until", metavar="STAGE", help="Stop before a pass that leaves this stage behind.")
@click.option(
    "--weights", default="none", metavar="none|DIR|random:SEED", help="What dsc run takes; a folder is checked now. Default: none."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the model's config.")
@click.option("--target", metavar="sm_90,gfx942,...", help="Also compile the kernels for these GPUs, none of which need be here.")
@click.option("--allow-dequant", is_flag=True, help="For a target without FP8: kernels that widen FP8 to BF16.")
@click.option("--why", is_flag=True, help="Say what the passes decided and why: each matrix product, and what was declined.")
@json_option
def compile(source: str, out: Path, as_json: bool, target: str | None, allow_dequant: bool, why: bool, **options: Any) -> int:
    """Compile SRC into an artifact folder.

    SRC is a shipped model (dsc models), a config.json, a checkpoint folder, file.py:factory (a function that returns a
    module and its inputs), or a .dsc file.

    \b
    dsc compile deepseek-v3 -o out
    dsc compile deepseek-v3 -o out --recipe deepseek-v3
    dsc compile deepseek-v3 -o out --recipe deepseek-v3 --target sm_90,sm_100,gfx942
    dsc compile deepseek-v3-tiny -o out --mode decode --context 128
    dsc compile deepseek-v3 -o out --recipe deepseek-v3 --mesh dp=128,ep=64
    dsc compile deepseek-v3-tiny -o out --mode train --mesh pp=2,dp=2,ep=2 --schedule zb1p --microbatches 8
    dsc compile path/to/config.json -o out --set num_hidden_layers=4 --seq 512
    """
    from .compile import compile as build
    from .compile import tiles_of
    from .kernels import compile_kernels, parse_targets

    targets = parse_targets(target, allow_dequant) if target else ()  # first: a wrong name should not cost a compilation
    start = time.perf_counter()
    kernels: list[dict[str, Any]] = []
    with ExitStack() as bars:

        def bar(title: str, total: int | None = None) -> Callable[[str], None]:
            bars.close()  # one at a time
            return bars.enter_context(progress(title, total))

        def add_kernels(module: Module, folder: Path) -> None:
            kernels.extend(compile_kernels(module, folder, targets, lambda n: bar("compiling kernels", n)))

        command, add = click.get_current_context().obj, add_kernels if targets else None
        made = build(source, out, command=command, on_step=bar("compiling"), fuse=bool(targets), add=add, **options)
    seconds = time.perf_counter() - start
    from ..ir.sharding import whole_weights
    from ..ir.stages import is_staged
    from ..ir.walk import parameters
    from .inspect import held_by_stage, held_in_words

    counted = parameters(made.module, whole_weights(made.module)).values()
    total, active = sum(c.total for c in counted), sum(c.active for c in counted)
    held = sum(c.total for c in parameters(made.module).values())
    stages = held_by_stage(made.module) if is_staged(made.module) else ()
    ops = made.manifest.passes[-1].ops
    if as_json:
        own = {"parameters_of_a_rank_by_stage": stages} if stages else {"parameters_of_a_rank": held}
        sizes = {"parameters": total, "active": active} | own
        numbers = {"seconds": seconds, **sizes} | ({"kernels": kernels} if targets else {})
        emit_json({"out": str(out), **numbers, **made.manifest.model_dump(mode="json")})
        return 0
    made_of = f"{plural(len(made.module.funcs), 'function')}, {plural(ops, 'op')}, {count(total)} parameters"
    print(f"{source}: {made_of} ({f'{held_in_words(held, stages)}, ' if held != total or stages else ''}{count(active)} active per token)")
    rows = [(p.name, p.file if p.changed else "unchanged", f"{p.seconds:.2f} s", f"{p.ops:,}") for p in made.manifest.passes]
    print(table(("step", "result", "time", "ops"), rows, left=2))
    if kernels:
        lines = [
            [k["target"], f"kernels/{k['target']}/kernels.txt", ", ".join(k["matrix"]) or "-"]
            + [str(k[counts]) for counts in ("kernels", "cached", "spilling")]
            for k in kernels
        ]
        print(table(("target", "table", "matrix instructions", "kernels", "cached", "spilling"), lines, left=3))
    if why:
        from .quantization import describe_quantization

        notes = [(p.name, line) for p in made.manifest.passes for line in p.notes]
        print(f"\n{describe_quantization(made.module, made.manifest.reasons)[1]}\n")
        print("".join(f"{name}: {line}\n" for name, line in notes if name != "quantize-fp8"), end="")
    for line in tiles_of(line for p in made.manifest.passes for line in p.notes):
        note(f"dsc: {line}")
    print(f"{out}: compiled in {seconds:.1f} s")
    return 0


@cli.command()
@click.argument("out", metavar="OUT", type=PATH)
@weights_option
@inputs_option
@click.option("-o", "--out", "file", type=PATH, metavar="FILE.npz", help="Write the results, BF16 and FP8 widened to float32.")
@click.option("--backend", default="numpy", help="Who runs it. Default: numpy.")
@click.option("--routing-stats", type=PATH, metavar="FILE.json", help="Add up here how many tokens chose each expert.")
@click.option(
    "--ranks", type=click.Choice(["local", "torchrun"]), help="Where a sharded program runs. Default: torchrun where it started us."
)
@click.option(
    "--timeout", type=float, default=600.0, metavar="SECONDS", help="Under torchrun: how long a rank waits for others. Default: 600."
)
@click.option("--schedule", metavar="NAME|auto|FILE.csv", help="Of a pipeline: its schedule (see dsc schedule). Default: as compiled.")
@click.option("--microbatches", type=int, help="Of a pipeline: how many micro-batches. Default: as compiled.")
@json_option
def run(
    out: Path,
    weights: str | None,
    inputs: str | None,
    file: Path | None,
    backend: str,
    routing_stats: Path | None,
    ranks: Ranks | None,
    timeout: float,
    schedule: str | None,
    microbatches: int | None,
    as_json: bool,
) -> int:
    """Run a compiled program; a sharded one on all its ranks.

    One that is cut into stages runs for all micro-batches of a step.

    \b
    dsc run out
    dsc run out --weights path/to/checkpoint --inputs tokens.npz --out logits.npz
    dsc run sharded --ranks local
    torchrun --nproc-per-node 4 -m dsc run sharded
    """
    from ..ir.mesh import mesh_of
    from ..ir.walk import executed
    from .artifact import load
    from .measure import flat
    from .ranks import is_first, started_by_torchrun
    from .routing_stats import Recorder
    from .run import GRADIENT, array_types, check_writable, chosen_schedule, norm, save, say_defaults, summarise
    from .run import run as execute

    program = load(out)
    for target in filter(None, (file, routing_stats)):
        check_writable(target)
    ranks = ranks or ("torchrun" if started_by_torchrun() else None)
    together = mesh_of(program.module).world if ranks else 1
    require(not (routing_stats and ranks), "--routing-stats counts the tokens of one program: run the one that is not sharded")
    recorder = Recorder(program.module, routing_stats) if routing_stats else None
    start = time.perf_counter()
    order = chosen_schedule(program, schedule, microbatches) if ranks else None
    runs = Fraction(together if ranks == "local" else 1, mesh_of(program.module).pp if order else 1) * (order.microbatches if order else 1)
    with progress("running", int(executed(program.module) * runs)) as step:

        def observe(site: Site, *seen: Any) -> None:
            step(str(site))
            if recorder:
                recorder(site, *seen)

        results = flat(
            execute(program, weights, inputs, backend, observe, ranks, timeout, order or schedule, None if order else microbatches)
        )
    seconds = time.perf_counter() - start
    if ranks == "torchrun" and not is_first():
        return 0
    if recorder:
        recorder.save()
    names = list(array_types(program.module))
    if file:
        save(file, names, results)
    found = {name: summarise(array) for name, array in zip(names, results, strict=True)}
    gradients = [array for name, array in zip(names, results, strict=True) if name.endswith(GRADIENT)]
    say_defaults([program], weights, inputs)
    if as_json:
        emit_json({"backend": backend, "ranks": together, "seconds": seconds, "results": found, "file": str(file) if file else None})
        return 0
    rows = [
        [name, f"{s['dtype']}{s['shape']}", *(f"{s[k]:.5g}" if k in s else "-" for k in ("min", "max", "mean", "std"))]
        for name, s in found.items()
        if not name.endswith(GRADIENT)
    ]
    print(table(("result", "type", "min", "max", "mean", "std"), rows, left=2))
    if gradients:
        print(f"and {plural(len(gradients), 'gradient')} of norm {norm(gradients):.5g} in all: each with --json, their values with --out")
    for name, stats in found.items():
        if stats["not_finite"]:
            note(f"dsc: {name} has {plural(stats['not_finite'], 'value')} that are infinite or not a number")
    where = f"{backend}, {plural(together, 'rank')}{' in one process' if ranks == 'local' else ''}," if ranks else backend
    print(f"ran on {where} in {seconds:.2f} s{f'; results in {file}' if file else ''}")
    return 0


@cli.command()
@click.argument("source", metavar="OUT|SRC")
@click.option("--after", metavar="PASS", help="The program after this pass (traced: before any).")
@click.option("--func", metavar="NAME", help="Print the IR of one function.")
@click.option("--params", is_flag=True, help="Parameters by part, total and active per token.")
@click.option("--memory", is_flag=True, help="Bytes of weights, of what training keeps, and of live values by function.")
@click.option("--plot", type=PATH, metavar="FILE", help="With --memory: draw live bytes over the run (png, svg, pdf).")
@click.option("--comm", is_flag=True, help="What a rank of a mesh sends: every collective, its bytes, and those that leave the node.")
@click.option("--overlap", is_flag=True, help="What of the communication computation hides, by function and the costs of a cluster.")
@click.option("--cluster", metavar="NAME|FILE", help="With --overlap: on which. Default: that of the pass overlap, or h800.")
@click.option("--quantization", is_flag=True, help="Every matrix product: its formats, or why it is not quantised.")
@json_option
def inspect(
    source: str,
    after: str | None,
    func: str | None,
    params: bool,
    memory: bool,
    plot: Path | None,
    comm: bool,
    overlap: bool,
    cluster: str | None,
    quantization: bool,
    as_json: bool,
) -> int:
    """Show what a program is made of.

    OUT is an artifact; anything that compiles is traced first.

    \b
    dsc inspect out
    dsc inspect out --after traced --func moe_layer
    dsc inspect deepseek-v3 --params
    dsc inspect out --memory --plot memory.png
    dsc inspect out --overlap --cluster h100
    """
    from . import artifact
    from .comm import describe_comm
    from .compile import read
    from .hiding import describe_overlap, overlap_of
    from .inspect import describe_parameters, describe_program
    from .memory import describe_memory, plot_memory
    from .quantization import describe_quantization
    from .run import check_writable, chosen_schedule

    require(plot is None or memory, "--plot draws memory: give --memory too")
    require(cluster is None or overlap, "--cluster says where communication is hidden: give --overlap too")
    if plot:
        kinds = (".png", ".svg", ".pdf")
        require(plot.suffix in kinds, f"--plot {plot}: expected a name that ends in {', '.join(kinds)}")
        check_writable(plot)

    reasons: dict[str, str] = {}
    passes: tuple[str, ...] = ()
    update = order = None
    if artifact.is_artifact(Path(source)) or (Path(source).is_dir() and not (Path(source) / "config.json").exists()):
        program = artifact.load(source)
        module, update = program.after(after) if after else program.module, program.update if comm else None
        reasons = program.manifest.reasons
        passes = tuple(record.text for record in program.manifest.passes)
        order = chosen_schedule(program) if comm and not after else None
    else:
        require(after in (None, "traced"), f"--after {after} needs an artifact; {source} is not one")
        module = read(source)[1]
    if func:
        text = str(module[func.removeprefix("@")])
        emit_json({"func": func, "text": text}) if as_json else print(text, end="")
        return 0
    if after and not (params or memory or comm or overlap or quantization or as_json):
        print(module, end="")
        return 0
    found = [("program", *describe_program(module))] if not (params or memory or comm or overlap or quantization) else []
    found += [("parameters", *describe_parameters(module))] if params else []
    found += [("memory", *describe_memory(module))] if memory else []
    if plot:
        plot_memory(module, plot)
    found += [("comm", *describe_comm(module, update, order))] if comm else []
    found += [("overlap", *describe_overlap(module, overlap_of(passes, cluster)))] if overlap else []
    found += [("quantization", *describe_quantization(module, reasons))] if quantization else []
    if as_json:
        emit_json({name: value for name, value, _ in found})
    else:
        print("\n\n".join(text for _, _, text in found))
    return 0


@cli.command()
@click.argument("file", type=PATH)
@click.option("-p", "--passes", default="", metavar="PIPELINE", help=PASSES_HELP)
@click.option("--until", metavar="STAGE", help="Stop before a pass that leaves this stage behind.")
@click.option("--print-after", metavar="PASS|all", help="Also print the program after this pass, on standard error.")
@click.option("--time", "timing", is_flag=True, help="Say how long each pass took, on standard error.")
@click.option("--why", is_flag=True, help="Say what each pass declined to do and why, on standard error.")
@click.option("--bisect", is_flag=True, help="Find the first pass that changes the results, on random weights and seeded inputs.")
@json_option
def opt(file: Path, passes: str, until: str | None, print_after: str | None, timing: bool, why: bool, bisect: bool, as_json: bool) -> int:
    """Run passes over a .dsc file and print the result.

    With no passes the file is checked and printed as it is. The file - is standard input.

    \b
    dsc opt program.dsc -p simplify
    dsc inspect out --after traced | dsc opt - -p simplify
    dsc opt program.dsc -p "simplify,raise-moe" --print-after simplify --why
    """
    from ..ir.parser import parse
    from ..passes.manager import bisect as first_bad
    from ..passes.manager import parse_pipeline, run_pipeline
    from .compile import read
    from .run import same_results

    piped = str(file) == "-"
    require(piped or file.suffix == ".dsc", f"{file}: expected a .dsc file, or - for standard input")
    pipeline = parse_pipeline(passes)
    names = [p.name for p in pipeline]
    known = ", ".join(("all", *names))
    require(print_after in (None, "all", *names), f"--print-after {print_after} is not in the pipeline; expected one of {known}")
    text = sys.stdin.read() if piped else ""
    module = parse(text, "standard input") if piped else read(file)[1]
    if not pipeline and not as_json:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode() if piped else file.read_bytes())
        return 0
    if bisect:
        culprit = first_bad(module, pipeline, same_results(module))
        emit_json({"first": culprit}) if as_json else print(
            f"{culprit} is the first to change the results" if culprit else "no pass changes the results"
        )
        return 1 if culprit else 0

    def snapshot(record: Any, after: Any) -> None:
        if print_after in ("all", record.name):
            note(f"// after {record.options}\n{after}")
        if timing:
            change = f"{record.ops_before:,} -> {record.ops_after:,} ops" if record.changed else "unchanged"
            note(f"{record.name}: {record.seconds:.3f} s, {change}")
        if why:
            for declined in record.declined:
                note(f"{record.name}: {declined}")

    result = run_pipeline(module, pipeline, until=until, on_snapshot=snapshot)
    if as_json:
        records = [{**vars(r), "declined": [str(d) for d in r.declined]} for r in result.records]
        emit_json({"passes": records, "stage": result.module.stage, "text": str(result.module)})
    else:
        print(result.module, end="")
    return 0


@resumed("the same command goes on where it was")
@cli.command()
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("target", metavar="DST", type=PATH)
@click.option("--to", required=True, metavar="bf16|fp8", help="The form of the Linear weights in DST.")
@json_option
def convert(source: Path, target: Path, to: Any, as_json: bool) -> int:
    """Convert a checkpoint folder between BF16 and FP8.

    FP8 is the form of the released DeepSeek-V3 weights: f8e4m3 codes with a float32 scale for each 128x128 block. Interrupted,
    the same command goes on where it was.

    \b
    dsc convert path/to/checkpoint checkpoint-fp8 --to fp8
    dsc convert checkpoint-fp8 checkpoint-bf16 --to bf16
    """
    from ..models.convert import Conversion

    conversion = Conversion(source, target, to)
    with progress("converting", conversion.tensors) as step:
        done = conversion.run(step)
    if done.left_out:
        note(f"dsc: left out {', '.join(done.left_out)}: weights that the checkpoint does not list")
    if as_json:
        emit_json({"out": str(target), "to": to, **vars(done), "megabytes_per_second": done.megabytes_per_second})
        return 0
    kept = f" ({done.kept:,} kept from before)" if done.kept else ""
    rate = f"{done.megabytes_per_second:,.0f} MB/s"
    print(f"{target}: {plural(done.shards, 'shard')}{kept}, {size(done.bytes_read)} in, {size(done.bytes_written)} out, {rate}")
    return 0

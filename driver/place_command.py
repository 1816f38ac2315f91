"""`dsc place`: placements of experts from a routing histogram, compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..ir.errors import require
from .cli import PATH, cli, json_option
from .ui import emit_json, plural, size, table

POLICIES = ("balanced", "eplb-hierarchical", "eplb-global")


@cli.command()
@click.argument("file", metavar="FILE", type=PATH)
@click.option("--gpus", type=int, required=True, help="GPUs that hold the experts of a layer.")
@click.option("--replicas", type=int, required=True, help="Slots for experts in all, redundant ones included.")
@click.option("--nodes", type=int, default=1, help="Nodes that the GPUs are in. Default: 1.")
@click.option("--policy", type=click.Choice(POLICIES), default=POLICIES[0], help="Whose placement -o writes. Default: balanced.")
@click.option(
    "--shared-expert",
    "shared",
    type=click.Choice(["apart", "routed"]),
    default="apart",
    help="The shared expert on every GPU, or as one more routed expert, which every token goes to. Default: apart.",
)
@click.option("--previous", type=PATH, metavar="FILE", help="A placement in use: what would have to be copied?")
@click.option("-o", "--out", type=PATH, metavar="FILE.json", help="Write the placement.")
@json_option
def place(
    file: Path, gpus: int, replicas: int, nodes: int, policy: str, shared: str, previous: Path | None, out: Path | None, as_json: bool
) -> int:
    """Place experts on GPUs by how many tokens they got.

    FILE is a routing histogram that dsc run --routing-stats wrote. Balancedness is the mean load of a GPU over that of the fullest,
    averaged over layers. Copies are sent to other nodes, one for each that a token goes to.

    \b
    dsc run out --routing-stats routing.json
    dsc place routing.json --gpus 32 --replicas 288 --nodes 4 -o placement.json
    """
    from ..passes.place_experts import read as read_placement
    from ..passes.placement import Placement, balanced, balancedness, best_balancedness, cross_node_copies, eplb_global, hierarchical, moved
    from .artifact import replacing
    from .routing_stats import read
    from .run import check_writable

    if out:
        check_writable(out)
    stats = read(file)
    rule = stats.rule
    groups, more = rule["groups"], int(shared == "routed")
    loads = [(*layer.counts, *[layer.tokens] * more) for layer in stats.layers.values()]
    require(not (more and policy == "eplb-hierarchical"), "eplb-hierarchical places groups of experts, and the shared one is in none")
    old, placed = read_placement(previous) if previous else (None, stats.layers)
    require(list(placed) == list(stats.layers), f"{previous} places other layers than {file} counts")
    makers: dict[str, Callable[[], Placement]] = {
        "balanced": lambda: balanced(loads, replicas, gpus, nodes, old),
        "eplb-hierarchical": lambda: hierarchical(loads, replicas, gpus, nodes, groups),
        "eplb-global": lambda: eplb_global(loads, replicas, gpus, nodes),
    }
    if more or (groups % nodes and policy != "eplb-hierarchical"):
        del makers["eplb-hierarchical"]
    made = {name: make() for name, make in makers.items()}

    def score(placement: Placement) -> dict[str, Any]:
        even = balancedness(loads, placement)
        copies = cross_node_copies(loads, placement, rule["top_k"], groups, rule["top_groups"], bool(more))
        found = {
            "balancedness": sum(even) / len(even),
            "worst": min(even),
            "cross_node_copies": sum(copies) / len(copies),
            "duplicates": placement.wasted,
        }
        copied = sum(moved(placement, old)) if old else None
        return found | ({} if copied is None else {"moved": copied, "moved_bytes": copied * rule["expert_bytes"]})

    scores = {name: score(placement) for name, placement in made.items()}
    bounds = best_balancedness(loads, replicas, gpus)
    bound = sum(bounds) / len(bounds)
    chosen = made[policy]
    if out:
        slots = dict(zip(stats.layers, chosen.slots, strict=True))
        sizes = {"experts": chosen.experts, "gpus": gpus, "nodes": nodes}
        record = {"format": "dsc-placement", "version": 1, "policy": policy, **sizes, "layers": slots}
        with replacing(out) as stream:
            stream.write(f"{json.dumps(record)}\n".encode())
    if as_json:
        layers = {
            name: {"balancedness": even, "bound": best, "slots": chosen.slots[i]}
            for i, (name, even, best) in enumerate(zip(stats.layers, balancedness(loads, chosen), bounds, strict=True))
        }
        emit_json({"policy": policy, "bound": bound, "policies": scores, "layers": layers, "file": str(out) if out else None})
        return 0
    tokens = max(layer.tokens for layer in stats.layers.values())
    on = f"{replicas:,} replicas on {plural(gpus, 'GPU')} in {plural(nodes, 'node')}"
    beside = " and the shared one" if more else ""
    print(f"{plural(len(loads), 'layer')} of {rule['experts']} experts{beside}, {plural(tokens, 'token')}; {on}\n")
    head = ["policy", "balancedness", "worst layer", "copies to other nodes", "duplicates", *(["experts to copy", "bytes"] if old else [])]
    rows = []
    for name, s in scores.items():
        row = [f"{name} *" if name == policy and out else name, f"{s['balancedness']:.4f}", f"{s['worst']:.4f}"]
        row += [f"{s['cross_node_copies']:.3f}", f"{s['duplicates']:,}", *([f"{s['moved']:,}", size(s["moved_bytes"])] if old else [])]
        rows.append(row)
    rows.append(["upper bound", f"{bound:.4f}", f"{min(bounds):.4f}", *[""] * (len(head) - 3)])
    print(table(head, rows))
    if out:
        print(f"\n{out}: the placement marked *")
    return 0

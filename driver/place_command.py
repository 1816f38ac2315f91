"""`dsc place`: placements of experts from a routing histogram, compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..ir.errors import require
from .cli import cli, json_option
from .ui import emit_json, plural, size, table

POLICIES = ("balanced", "eplb-hierarchical", "eplb-global")


@cli.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--gpus", type=int, required=True, help="GPUs that hold the experts of a layer.")
@click.option("--replicas", type=int, required=True, help="Slots for experts in all, redundant ones included.")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes that the GPUs are in.")
@click.option("--policy", type=click.Choice(POLICIES), default=POLICIES[0], show_default=True, help="Whose placement -o writes.")
@click.option("--previous", type=click.Path(path_type=Path), metavar="FILE", help="A placement in use: what would have to be copied?")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the placement.")
@json_option
def place(file: Path, gpus: int, replicas: int, nodes: int, policy: str, previous: Path | None, out: Path | None, as_json: bool) -> int:
    """Place experts on GPUs by how many tokens they got.

    FILE is a routing histogram that dsc run --routing-stats wrote. Balancedness is the mean load of a GPU over that of the fullest,
    averaged over layers. Copies are sent to other nodes, one for each that a token goes to.

    \b
    dsc run out --routing-stats routing.json
    dsc place routing.json --gpus 32 --replicas 288 --nodes 4 -o placement.json
    """
    from ..passes.placement import Placement, balanced, balancedness, best_balancedness, cross_node_copies, eplb_global, hierarchical, moved
    from .routing_stats import PlacementFile, RoutingStats, read, write
    from .run import check_writable

    if out:
        check_writable(out)
    stats = read(file, RoutingStats)
    rule = stats.rule
    experts, groups = rule["experts"], rule["groups"]
    loads = [layer.counts for layer in stats.layers.values()]
    before = read(previous, PlacementFile) if previous else None
    require(before is None or list(before.layers) == list(stats.layers), f"{previous}: places other layers than {file} counts")
    old = before.placement if before else None
    makers: dict[str, Callable[[], Placement]] = {
        "balanced": lambda: balanced(loads, replicas, gpus, nodes, old),
        "eplb-hierarchical": lambda: hierarchical(loads, replicas, gpus, nodes, groups),
        "eplb-global": lambda: eplb_global(loads, replicas, gpus, nodes),
    }
    if groups % nodes and policy != "eplb-hierarchical":
        del makers["eplb-hierarchical"]
    made = {name: make() for name, make in makers.items()}

    def score(placement: Placement) -> dict[str, Any]:
        even = balancedness(loads, placement)
        copies = cross_node_copies(loads, placement, rule["top_k"], groups, rule["top_groups"])
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
        write(out, PlacementFile(policy=policy, experts=experts, gpus=gpus, nodes=nodes, layers=slots))
    if as_json:
        layers = {
            name: {"balancedness": even, "bound": best, "slots": chosen.slots[i]}
            for i, (name, even, best) in enumerate(zip(stats.layers, balancedness(loads, chosen), bounds, strict=True))
        }
        emit_json({"policy": policy, "bound": bound, "policies": scores, "layers": layers, "file": str(out) if out else None})
        return 0
    tokens = max(layer.tokens for layer in stats.layers.values())
    on = f"{replicas:,} replicas on {plural(gpus, 'GPU')} in {plural(nodes, 'node')}"
    print(f"{plural(len(loads), 'layer')} of {experts} experts, {plural(tokens, 'token')}; {on}\n")
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

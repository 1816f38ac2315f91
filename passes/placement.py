"""Which GPU holds which expert, and how often: placements made from how many tokens each expert got, and what they are worth.

Three policies. `hierarchical` and `eplb_global` are those of DeepSeek's EPLB (github.com/deepseek-ai/EPLB), slot for slot. `balanced`
never puts an expert on one GPU twice, and exchanges experts between GPUs for as long as that lowers the load of the fullest. All take
loads as `loads[layer][expert]`, in any unit: a routing histogram (`dsc run --routing-stats`) counts tokens. An expert's tokens are shared
evenly by its replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from importlib.util import find_spec

from ..ir.errors import require

Loads = Sequence[Sequence[float]]
GOOD_ENOUGH = 1e-3
"""`balanced` stops exchanging where the fullest GPU is within this part of the least that is possible."""


@dataclass(frozen=True)
class Placement:
    """`slots[layer][s]` is the expert in slot s. GPU g has the s-th share of the slots, in order, and node n that of the GPUs.

    Raises `DscError` where shares are uneven, an expert is unknown, or one has no slot.
    """

    slots: tuple[tuple[int, ...], ...]
    experts: int
    gpus: int
    nodes: int = 1

    def __post_init__(self) -> None:
        for i, layer in enumerate(self.slots):
            _check_shares(len(layer), self.gpus, self.nodes)
            unknown = sorted({e for e in layer if not 0 <= e < self.experts})
            require(not unknown, f"placement, layer {i}: there is no expert {unknown[:1]}, expected 0 to {self.experts - 1}")
            missing = sorted(set(range(self.experts)).difference(layer))
            require(not missing, f"placement, layer {i}: expert {missing[:1]} of {self.experts} has no slot")

    def on_gpus(self, layer: int) -> list[tuple[int, ...]]:
        """The experts of each GPU."""
        return _split(self.slots[layer], self.gpus)

    def on_nodes(self, layer: int) -> list[tuple[int, ...]]:
        """The experts of each node."""
        return _split(self.slots[layer], self.nodes)

    def replicas(self, layer: int) -> list[int]:
        """How many slots each expert has."""
        found = [0] * self.experts
        for expert in self.slots[layer]:
            found[expert] += 1
        return found

    @property
    def wasted(self) -> int:
        """Slots that hold what another slot of the same GPU holds, over all layers."""
        return sum(len(held) - len(set(held)) for layer in range(len(self.slots)) for held in self.on_gpus(layer))


def hierarchical(loads: Loads, replicas: int, gpus: int, nodes: int, groups: int) -> Placement:
    """EPLB's policy for node-limited routing: a group of experts lies on one node, so a token goes to no more nodes than it has groups.

    Groups are packed onto nodes; within a node the experts of highest load per replica get one more, one at a time; replicas are packed
    onto the node's GPUs. Packing takes items from the heaviest, each to the lightest bin with room.
    """
    experts = _check(loads, replicas, gpus, nodes)
    require(
        groups > 0 and groups % nodes == 0 and experts % groups == 0,
        f"{groups} expert groups of {experts} experts over {nodes} nodes: expected equal groups, equally many on each node",
    )
    size, here = experts // groups, gpus // nodes
    layers = []
    for load in loads:
        slots: list[int] = []
        for held in _pack([sum(load[g * size : (g + 1) * size]) for g in range(groups)], nodes):
            members = [g * size + i for g in held for i in range(size)]
            local = [load[e] for e in members]
            physical = _add_replicas(local, replicas // nodes)
            counts = [0] * len(members)
            for i in physical:
                counts[i] += 1
            packed = _pack([local[i] / counts[i] for i in physical], here)
            slots += [members[physical[item]] for gpu in packed for item in gpu]
        layers.append(tuple(slots))
    return Placement(tuple(layers), experts, gpus, nodes)


def eplb_global(loads: Loads, replicas: int, gpus: int, nodes: int = 1) -> Placement:
    """EPLB's other policy: `hierarchical` with one node and one group. `nodes` only says how the GPUs are arranged."""
    _check(loads, replicas, gpus, nodes)
    found = hierarchical(loads, replicas, gpus, 1, 1)
    return Placement(found.slots, found.experts, gpus, nodes)


def balanced(loads: Loads, replicas: int, gpus: int, nodes: int = 1, previous: Placement | None = None) -> Placement:
    """Replicas in proportion to load, no expert twice on a GPU, then exchanges between the fullest GPU and lighter ones while they help.

    GPUs are numbered by their experts, so that those of a group come to lie on few nodes. With `previous`, they are numbered so that as
    many experts as possible stay where they were (an assignment problem; needs scipy).
    """
    experts = _check(loads, replicas, gpus, nodes)
    require(replicas <= experts * gpus, f"{replicas} replicas of {experts} experts: at most {experts * gpus} differ on {gpus} GPUs")
    layers = []
    for i, load in enumerate(loads):
        share = _shares(load, replicas, gpus)
        held = _spread(share, gpus, replicas // gpus)
        weight = dict(share)
        _exchange(held, weight, _least(load, share, gpus) * (1 + GOOD_ENOUGH))
        held = sorted(held, key=sum) if previous is None else _stay(held, previous.on_gpus(i))
        layers.append(tuple(expert for gpu in held for expert in sorted(gpu)))
    return Placement(tuple(layers), experts, gpus, nodes)


def balancedness(loads: Loads, placement: Placement) -> list[float]:
    """The mean load of a GPU over that of the fullest, for each layer: 1 is even."""
    found = []
    for i, load in enumerate(loads):
        counts = placement.replicas(i)
        on_gpus = [sum(load[e] / counts[e] for e in held) for held in placement.on_gpus(i)]
        fullest = max(on_gpus)
        found.append(sum(on_gpus) / len(on_gpus) / fullest if fullest else 1.0)
    return found


def best_balancedness(loads: Loads, replicas: int, gpus: int) -> list[float]:
    """A bound on `balancedness` for each layer: the fullest GPU has at least the mean, and the largest share that a replica must have."""
    _check(loads, replicas, gpus, 1)
    found = []
    for load in loads:
        least = _least(load, _shares(load, replicas, gpus), gpus)
        found.append(sum(load) / gpus / least if least else 1.0)
    return found


def moved(placement: Placement, previous: Placement) -> list[int]:
    """How many experts have to be copied to a GPU that did not hold them in `previous`, for each layer."""
    require(
        (placement.gpus, placement.experts, len(placement.slots)) == (previous.gpus, previous.experts, len(previous.slots)),
        f"the previous placement has {len(previous.slots)} layers of {previous.experts} experts on {previous.gpus} GPUs, "
        f"expected {len(placement.slots)} of {placement.experts} on {placement.gpus}",
    )
    return [
        sum(len(set(new).difference(old)) for new, old in zip(placement.on_gpus(i), previous.on_gpus(i), strict=True))
        for i in range(len(placement.slots))
    ]


def cross_node_copies(
    loads: Loads, placement: Placement, top_k: int, groups: int = 1, top_groups: int = 1, shared: bool = False
) -> list[float]:
    """How many other nodes a token is expected to be sent to, for each layer; a node that it is sent to gets one copy.

    A histogram does not say which experts are chosen together. Assumed is that a token takes `top_groups` of the groups and `top_k`
    experts in them, each such choice as likely as the product of its experts' loads, that any replica of an expert may serve it, and that
    tokens start on all nodes alike. For equal loads this is the expectation under uniform routing: 256 experts on 8 nodes give 3.629
    nodes where 4 of 8 groups are taken, 5.295 without groups, the token's own among them. With `shared` the last expert is one that every
    token goes to beside its `top_k`.
    """
    experts, nodes = placement.experts - shared, placement.nodes
    require(
        experts % groups == 0 and top_k <= top_groups * (experts // groups) and top_groups <= groups,
        f"top {top_k} of {experts} experts in {top_groups} of {groups} groups is no choice of experts",
    )
    found = []
    for i, load in enumerate(loads):
        counts, mean = placement.replicas(i), sum(load[:experts]) / experts
        weight = [w / mean if mean else 1.0 for w in load[:experts]]
        every = _choices(weight, top_k, groups, top_groups)
        require(every > 0, f"layer {i}: no {top_k} experts in {top_groups} of {groups} groups have a load")
        reached = 0.0
        for held in placement.on_nodes(i):
            elsewhere = [*weight, 1.0]
            for expert in held:
                elsewhere[expert] -= (weight[expert] if expert < experts else 1.0) / counts[expert]
            reached += 1 - elsewhere.pop() * _choices(elsewhere, top_k, groups, top_groups) / every
        found.append(reached * (1 - 1 / nodes))
    return found


def _check_shares(replicas: int, gpus: int, nodes: int) -> None:
    for what, number in (("replicas", replicas), ("GPUs", gpus), ("nodes", nodes)):
        require(number > 0, f"{number} {what}: expected 1 or more")
    below = replicas // gpus * gpus
    near = f"{below} or {below + gpus}" if below else str(gpus)
    require(replicas % gpus == 0, f"{replicas} replicas do not make equal shares for {gpus} GPUs: {near} would")
    fits = [str(n) for n in range(1, gpus + 1) if gpus % n == 0]
    require(gpus % nodes == 0, f"{gpus} GPUs do not make equal shares for {nodes} nodes: {', '.join(fits)} would")


def _check(loads: Loads, replicas: int, gpus: int, nodes: int) -> int:
    """The number of experts."""
    _check_shares(replicas, gpus, nodes)
    sizes = sorted({len(load) for load in loads})
    require(len(sizes) == 1, f"expected as many experts in every layer, found {', '.join(map(str, sizes)) or 'no layer'}")
    require(replicas >= sizes[0] > 0, f"{replicas} replicas cannot hold {sizes[0]} experts: {-(-sizes[0] // gpus) * gpus} or more would")
    for i, load in enumerate(loads):
        require(all(0 <= w < float("inf") for w in load), f"layer {i}: expected loads of 0 or more, found {min(load)} to {max(load)}")
    return sizes[0]


def _split(slots: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    size = len(slots) // parts
    return [slots[p * size : (p + 1) * size] for p in range(parts)]


def _pack(weights: Sequence[float], bins: int) -> list[list[int]]:
    """EPLB's balanced packing: the items of each bin, equally many, in the order in which they came; equals in order of their number."""
    size = len(weights) // bins
    if size == 1:
        return [[item] for item in range(bins)]
    held: list[list[int]] = [[] for _ in range(bins)]
    open_bins = [(0.0, b) for b in range(bins)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        total, lightest = heappop(open_bins)
        held[lightest].append(item)
        if len(held[lightest]) < size:
            heappush(open_bins, (total + weights[item], lightest))
    return held


def _add_replicas(load: Sequence[float], slots: int) -> list[int]:
    """EPLB's replication: each expert once, then again and again the one with most load per replica, the first among equals."""
    counts = [1] * len(load)
    heap = [(-w, e) for e, w in enumerate(load)]
    heapify(heap)
    found = list(range(len(load)))
    while len(found) < slots:
        _, expert = heappop(heap)
        found.append(expert)
        counts[expert] += 1
        heappush(heap, (-load[expert] / counts[expert], expert))
    return found


def _shares(load: Sequence[float], replicas: int, gpus: int) -> list[tuple[int, float]]:
    """(expert, load of one replica) for every replica, the heaviest first. No expert has more replicas than there are GPUs.

    Giving the next replica to whoever has most per replica makes the largest share as small as can be.
    """
    counts = [1] * len(load)
    heap = [(-w, e) for e, w in enumerate(load)] if gpus > 1 else []
    heapify(heap)
    for _ in range(replicas - len(load)):
        _, expert = heappop(heap)
        counts[expert] += 1
        if counts[expert] < gpus:
            heappush(heap, (-load[expert] / counts[expert], expert))
    shares = [(expert, load[expert] / count) for expert, count in enumerate(counts) for _ in range(count)]
    return sorted(shares, key=lambda share: -share[1])


def _least(load: Sequence[float], share: Sequence[tuple[int, float]], gpus: int) -> float:
    """What the fullest GPU has at least."""
    return max(sum(load) / gpus, share[0][1])


def _spread(shares: Sequence[tuple[int, float]], gpus: int, size: int) -> list[set[int]]:
    """The experts of each GPU, all different: each replica to the lightest GPU that has room and lacks its expert.

    Where all that have room hold it, one of them, g, takes another expert from a full GPU h that lacks it, and h takes the replica. There
    is such an expert: h holds `size` experts without this one, g fewer than `size` with it. And such an h: no expert has more replicas
    than there are GPUs.
    """
    held: list[set[int]] = [set() for _ in range(gpus)]
    weight = dict(shares)
    open_gpus = [(0.0, g) for g in range(gpus)]
    for expert, share in shares:
        passed = []
        while open_gpus and expert in held[open_gpus[0][1]]:
            passed.append(heappop(open_gpus))
        if open_gpus:
            total, g = heappop(open_gpus)
            held[g].add(expert)
            total += share
        else:
            total, g = passed.pop(0)
            h = next(h for h in range(gpus) if expert not in held[h])
            given = min(held[h] - held[g])
            held[h] = (held[h] - {given}) | {expert}
            held[g].add(given)
            total += weight[given]
        for entry in (*passed, *([(total, g)] if len(held[g]) < size else [])):
            heappush(open_gpus, entry)
    return held


def _exchange(held: list[set[int]], weight: dict[int, float], enough: float) -> None:
    """Exchange experts of the fullest GPU for lighter ones of another, in place, until it has `enough` or no exchange helps it."""
    totals = [sum(weight[e] for e in gpu) for gpu in held]
    while max(totals) > enough:
        g = max(range(len(held)), key=totals.__getitem__)
        for h in sorted(range(len(held)), key=totals.__getitem__):
            gap = totals[g] - totals[h]
            pairs = ((weight[a] - weight[b], a, b) for a in held[g] - held[h] for b in held[h] - held[g])
            gain, difference, a, b = max(((min(d, gap - d), d, a, b) for d, a, b in pairs), default=(0.0, 0.0, -1, -1))
            if gain > 1e-9 * totals[g]:  # less than that is rounding, and could go on for ever
                break
        else:
            return
        held[g] = (held[g] - {a}) | {b}
        held[h] = (held[h] - {b}) | {a}
        totals[g] -= difference
        totals[h] += difference


def _stay(held: Sequence[set[int]], before: Sequence[tuple[int, ...]]) -> list[set[int]]:
    """`held` in the order that leaves most experts on the GPU that had them before."""
    require(len(held) == len(before), f"the previous placement is for {len(before)} GPUs, expected {len(held)}")
    require(find_spec("scipy") is not None, "to stay near a previous placement needs scipy: pip install 'dsc[plan]'")
    from scipy.optimize import linear_sum_assignment

    common = [[len(gpu.intersection(old)) for gpu in held] for old in before]
    return [held[i] for i in linear_sum_assignment(common, maximize=True)[1]]


def _choices(weight: Sequence[float], top_k: int, groups: int, top_groups: int) -> float:
    """The sum, over every choice of `top_groups` groups and `top_k` experts in them, of the product of the experts' weights.

    It is a coefficient of a generating polynomial: z marks an expert, and the list index a group that was taken.
    """
    taken = [[1.0], *([0.0] for _ in range(top_groups))]
    for members in _groups(weight, groups):
        inside = [1.0]
        for w in members:
            inside = [a + w * b for a, b in zip([*inside, 0.0], [0.0, *inside], strict=True)][: top_k + 1]
        for j in range(top_groups, 0, -1):
            product = _times(taken[j - 1], inside)[: top_k + 1]
            taken[j] = [a + b for a, b in zip(_padded(taken[j], len(product)), _padded(product, len(taken[j])), strict=True)]
    return taken[top_groups][top_k]


def _groups(weight: Sequence[float], groups: int) -> Iterator[Sequence[float]]:
    size = len(weight) // groups
    return (weight[g * size : (g + 1) * size] for g in range(groups))


def _times(a: Sequence[float], b: Sequence[float]) -> list[float]:
    found = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] += x * y
    return found


def _padded(a: Sequence[float], length: int) -> list[float]:
    return [*a, *[0.0] * (length - len(a))]

"""How long ranks take to exchange bytes: latency and bandwidth, inside a scale-up domain and between domains at once.

A group of n ranks lies in `nodes` domains, `local` ranks in each. Every rank drives its own network card, and what is meant for another
domain goes to the rank of the same index there and on over the domain's links (DeepSeek-V3 report, section 3.2.2; the hierarchical
collectives of NCCL move the same bytes). The two legs run side by side, so the longer counts. A collective starts once for each of its
steps, of which n ranks need log2 n.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from ..ir.routing import Routing
from .cluster import Cluster, Link


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: in how many domains they lie, and how many in each."""

    nodes: int
    local: int

    @property
    def size(self) -> int:
        return self.nodes * self.local


def group(ranks: tuple[int, ...], node: int) -> Group:
    """The group that these ranks are, of consecutive domains of `node` ranks."""
    nodes = len({rank // node for rank in ranks})
    return Group(nodes, -(-len(ranks) // nodes))


@dataclass(frozen=True)
class Legs:
    """Bytes that one rank sends between domains and inside its own, and how often it starts over."""

    inter: float
    intra: float
    steps: float = 1.0


def gathered(group: Group, part: float) -> Legs:
    """All-gather of `part` bytes per rank; a reduce-scatter that leaves `part` bytes to each rank is the same backwards."""
    return Legs((group.nodes - 1) * part, (group.size - group.nodes) * part, _steps(group))


def reduced(group: Group, whole: float) -> Legs:
    """All-reduce of `whole` bytes: a reduce-scatter and an all-gather."""
    half = gathered(group, whole / group.size)
    return Legs(2 * half.inter, 2 * half.intra, 2 * half.steps)


def exchanged(group: Group, whole: float) -> Legs:
    """All-to-all of `whole` bytes per rank, an equal part to each rank."""
    part = whole / group.size
    return Legs((group.size - group.local) * part, (group.local - 1) * part)


def forwarded(routing: Routing, ranks: Group, tokens: float, row: float) -> Legs:
    """Bytes per rank of `tokens` whose copies cross the network once per distinct domain and a domain's links once per distinct rank, by a
    kernel that keeps both busy at once."""
    nodes, gpus = routing.distinct(ranks.nodes), routing.distinct(ranks.size)
    away, beside = (ranks.nodes - 1) / ranks.nodes, (ranks.local - 1) / ranks.local
    return Legs(tokens * nodes * away * row, tokens * gpus * beside * row)


def _steps(group: Group) -> float:
    return max(1.0, log2(group.size)) if group.size > 1 else 0.0


def seconds(cluster: Cluster, legs: Legs) -> tuple[float, bool]:
    """How long the longer leg takes, and whether bytes rather than latency are most of it."""
    found = [_leg(link, sent, legs.steps) for link, sent in ((cluster.inter, legs.inter), (cluster.intra, legs.intra)) if sent > 0]
    if not found:
        return 0.0, False
    moving, waiting = max(found, key=sum)
    return moving + waiting, moving >= waiting


def _leg(link: Link, sent: float, steps: float) -> tuple[float, float]:
    return sent / (link.bandwidth.mid * link.efficiency.mid), steps * link.latency.mid


def tpot_bound(
    cluster: Cluster,
    *,
    ranks: int,
    tokens: int,
    copies: int,
    hidden: int,
    layers: int,
    sent: tuple[float, float] = (1.0, 2.0),
    micro_batches: int = 2,
) -> float:
    """Seconds per output token below which no decoding over `ranks` can come, by the bytes of dispatch and combine alone.

    A GPU sends `copies` copies of each of its `tokens` tokens per micro-batch, `sent` bytes per element there and back (FP8, BF16), at
    the bandwidth of the link between domains, or inside one that holds all ranks; `micro_batches` take turns. Latency is left out, and so
    is the share of bandwidth that kernels reach. Insights into DeepSeek-V3 (arXiv 2505.09343), section 2.3.2.
    """
    link = cluster.intra if ranks <= cluster.node else cluster.inter
    exchange = sum(sent) * tokens * copies * hidden / link.bandwidth.mid
    return layers * micro_batches * exchange

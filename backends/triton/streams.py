"""On which stream a rank computes and communicates, and what waits for what.

What a collective does, from packing what is sent to adding up what came, is issued between `begin` and `end`; `join` makes computation wait
for it. `ONE` has one stream, on which everything runs in the order in which it is issued. `SideStreams` has one beside it for each axis of
the mesh, ordered by events, and the host waits for none of them. An operand stays in memory until the `done` of its collective, as
`ir.ops.collective.reads` tells whoever plans memory, so nothing but these waits is needed to keep it.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist

from . import INTERPRET

Mark: TypeAlias = Any
"""A point in what a stream has been given."""


class Streams(Protocol):
    """What is issued where. `aside` says whether all that a collective does can be issued at its start, nobody waiting on the host."""

    aside: bool

    def begin(self, axis: str) -> None:
        """What follows is issued to the stream of `axis`, and runs after all that computation has been given so far."""
        ...

    def end(self) -> Mark:
        """What follows is computation again. The mark stands behind what the stream of the axis has been given."""
        ...

    def join(self, mark: Mark) -> None:
        """What computation is given from now on runs after `mark`."""
        ...


class OneStream:
    """Everything in the order in which it is issued."""

    aside = False

    def begin(self, axis: str) -> None: ...
    def end(self) -> Mark: ...
    def join(self, mark: Mark) -> None: ...


class SideStreams:
    """CUDA streams: computation on the one that is current, and one for each axis, of higher priority, since others wait for its work."""

    aside = True

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda
        self._sides: dict[str, Any] = {}
        self._compute: Any = None

    def begin(self, axis: str) -> None:
        if axis not in self._sides:
            self._sides[axis] = self.cuda.Stream(priority=-1)
        self._compute = self.cuda.current_stream()
        self._sides[axis].wait_event(self._compute.record_event())
        self.cuda.set_stream(self._sides[axis])

    def end(self) -> Mark:
        mark = self.cuda.current_stream().record_event()
        self.cuda.set_stream(self._compute)
        return mark

    def join(self, mark: Mark) -> None:
        self.cuda.current_stream().wait_event(mark)


ONE = OneStream()
_SIDE = SideStreams()


def streams_here() -> Streams:
    """Side streams where this process is one rank on a GPU. Ranks in lockstep share one stream, which orders what they hand each other."""
    return ONE if INTERPRET or not dist.is_initialized() else _SIDE

"""How routed experts are named: one matrix each on disk, stacked in programs, gate and up fused by `transformers` 5.

One layer's experts appear under three spellings, E experts of inner width I and hidden width H:

    on disk           model.layers.3.mlp.experts.{0..E-1}.gate_proj.weight   [I, H]      (up_proj [I, H], down_proj [H, I])
    dsc programs      model.layers.3.mlp.experts.gate_proj                   [E, I, H]   (up_proj [E, I, H], down_proj [E, H, I])
    transformers 5    model.layers.3.mlp.experts.gate_up_proj                [E, 2I, H]  (gate above up; down_proj [E, H, I])

each with `_scale_inv` appended for the block scales of an FP8 checkpoint. The shared expert, on disk `mlp.shared_experts.gate_proj.weight`,
may stand in a stack as well: `SHARED` is its number. `parts` takes any tensor apart into the matrices that
the disk names, so two spellings are brought together by the names of their parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STACKED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)(?P<scale>_scale_inv)?")
SHARED = -1
"""The number of the shared expert in a stack."""
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Part:
    """One on-disk tensor's place in a tensor: `tensor[index]` has `shape` and is called `name` on disk."""

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]

    @property
    def fused(self) -> bool:
        """Whether this is one half, gate or up, of a fused `gate_up_proj`."""
        return len(self.index) == 2


def parts(name: str, shape: tuple[int, ...], experts: Sequence[int] | None = None) -> tuple[Part, ...]:
    """The on-disk tensors that make up the tensor `name` of `shape`: the matrices of a stack of experts, else the tensor itself.

    `experts` are the experts that the stack's rows stand for, by default 0 to shape[0] - 1. A fused tensor with an odd number
    of rows has no halves and counts as a tensor of its own.
    """
    match = _STACKED.fullmatch(name)
    if match is None or len(shape) != 3 or (match["projection"] == "gate_up_proj" and shape[1] % 2):
        return (Part(name, (), shape),)
    stem, suffix = match["experts"], ".weight" + (match["scale"] or "")
    numbers = range(shape[0]) if experts is None else experts
    if match["projection"] != "gate_up_proj":
        return tuple(Part(f"{_one(stem, n)}.{match['projection']}{suffix}", (e,), shape[1:]) for e, n in enumerate(numbers))
    half = shape[1] // 2
    return tuple(
        Part(f"{_one(stem, n)}.{projection}{suffix}", (e, rows), (half, shape[2]))
        for e, n in enumerate(numbers)
        for projection, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, 2 * half)))
    )


def _one(stem: str, number: int) -> str:
    """The name of one expert, those of its matrices being below it."""
    return f"{stem.removesuffix('experts')}shared_experts" if number == SHARED else f"{stem}.{number}"


def any_expert(name: str) -> str:
    """`name` with the number of its expert replaced by `*`, so that the experts of one stack share it."""
    return _EXPERT.sub("*", name)


def collapse(names: Iterable[str]) -> list[str]:
    """`names` with those that differ only in the expert's number written as one: `mlp.experts.{0..3,7}.gate_proj.weight`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(any_expert(name), []).append(name)
    return [members[0] if len(members) == 1 else _EXPERT.sub(_ranges(members), members[0]) for members in groups.values()]


def _ranges(names: Sequence[str]) -> str:
    numbers = sorted(int(match.group()) for name in names if (match := _EXPERT.search(name)))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(f"{first}..{last}" if first < last else str(first) for first, last in spans) + "}"

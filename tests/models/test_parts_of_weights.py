"""A part of a weight is what the whole has there, however it is stored: plain, converted, dequantised by blocks, stacked, fused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.models.random_weights import RandomWeights
from dsc.models.state_dict import StateDict
from dsc.models.weights import NUMPY_DTYPES, Wanted, part_of

STACK = "model.layers.3.mlp.experts.{}"


def drawn(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return RandomWeights(7).get(Wanted(name, dtype, shape))


def stored(kind: str) -> dict[str, np.ndarray]:
    """A [300, 200] matrix, and 4 experts of [150, 200] for gate and up, as one kind of checkpoint has them."""
    if kind == "fused":
        return {STACK.format("gate_up_proj"): drawn("a", "bf16", (4, 300, 200)), "w": drawn("w", "bf16", (300, 200))}
    dtype = {"plain": "f32", "bf16": "bf16", "fp8": "f8e4m3"}[kind]
    names = {"w": (300, 200)} | {STACK.format(f"{e}.{p}_proj.weight"): (150, 200) for e in range(4) for p in ("gate", "up")}
    found = {name: drawn(name, dtype, shape) for name, shape in names.items()}
    if kind == "fp8":
        scales = {f"{n}_scale_inv": (-(-s[0] // 128), -(-s[1] // 128)) for n, s in names.items()}
        found |= {name: drawn(name, "f32", shape) for name, shape in scales.items()}
    return found


@pytest.mark.parametrize("kind", ["plain", "bf16", "fp8", "fused"])
@given(data=st.data())
def test_a_part_is_what_the_whole_has_there(kind: str, data: Any) -> None:
    source = StateDict(stored(kind))
    shapes = {"w": (300, 200), STACK.format("up_proj"): (4, 150, 200), STACK.format("gate_up_proj"): (4, 300, 200)}
    if kind == "fp8":
        del shapes[STACK.format("gate_up_proj")]  # 150 rows of gate are no whole blocks: it is refused, as a whole too
    name, shape = data.draw(st.sampled_from(sorted(shapes.items())))
    wanted = Wanted(name, data.draw(st.sampled_from(["f32", "bf16"])), shape)
    index = []
    for extent in shape[: data.draw(st.integers(0, len(shape)))]:
        first = data.draw(st.integers(0, extent - 1))
        index.append(slice(first, data.draw(st.integers(first + 1, extent))))
    found, whole = part_of(source, wanted, tuple(index)), source.get(wanted)
    assert found.dtype == NUMPY_DTYPES[wanted.dtype]
    assert np.array_equal(found, whole[tuple(index)])


@given(first=st.integers(0, 3), row=st.integers(0, 5))
def test_random_weights_have_parts(first: int, row: int) -> None:
    source, wanted = RandomWeights(3), Wanted(STACK.format("down_proj"), "f32", (4, 6, 5))
    index = (slice(first, 4), slice(row, 6))
    assert np.array_equal(part_of(source, wanted, index), source.get(wanted)[index])


def test_a_source_without_parts_gives_them_too() -> None:
    class Mine:
        def get(self, wanted: Wanted) -> np.ndarray:
            return np.arange(12.0).reshape(3, 4)

        def check(self, wanted: Any, *, strict: bool = True) -> None: ...

        def describe(self) -> str:
            return "mine"

    assert part_of(Mine(), Wanted("w", "f64", (3, 4)), (slice(1, 2),)).tolist() == [[4.0, 5.0, 6.0, 7.0]]

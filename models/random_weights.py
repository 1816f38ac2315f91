"""Random weights that are a function of (seed, name) alone, so that ranks, backends and spellings of a program agree on them.

Every on-disk tensor has a counter-based generator of its own: Philox (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), keyed by SHA-256 of the seed and the name. Each 16 bits of its stream pick one of 65,536 equally likely
quantiles of the normal distribution; the largest is 4.3 standard deviations. This is faster than NumPy's own normal
variates and, unlike them, bound to stay the same from one NumPy version to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from ..ir.errors import DscError
from ..numerics.formats import FORMATS, round_to
from .expert_names import parts
from .weights import FLOATS, FP8, NUMPY_DTYPES, Wanted, type_text

_CHUNK = 1 << 16  # values drawn at a time, a multiple of 4: one 64-bit word of the stream makes four
_BLOCK = 128
_CODE_DEVIATION = 32.0  # of FP8 codes: far above E4M3's least normal number 2^-6, far below its largest 448


@dataclass(frozen=True)
class RandomWeights:
    """Weights drawn at random by name; see the module's docstring for how, and `_draw` for which distribution.

    An FP8 tensor and its `_scale_inv` (128x128 blocks) multiply to about the same values that the name has in BF16. With
    `initializer_range` they are what training begins with: matrices of that standard deviation, norms 1, other vectors 0.
    """

    seed: int
    initializer_range: float | None = None

    def get(self, wanted: Wanted) -> np.ndarray:
        """The tensor that `wanted` names. Raises `DscError` if it is not of a float type."""
        self.check([wanted])
        out = np.empty(wanted.shape, NUMPY_DTYPES[wanted.dtype])
        for part in parts(wanted.name, wanted.shape, wanted.experts):
            self._draw(part.name, wanted.dtype, out[(*part.index, ...)])
        return out

    def part(self, wanted: Wanted, index: tuple[slice, ...]) -> np.ndarray:
        """`get(wanted)[index]`. Of a stack of experts no other matrices are drawn."""
        if not index or parts(wanted.name, wanted.shape)[0].name == wanted.name or wanted.experts is not None:
            return self.get(wanted)[index]
        rows = range(wanted.shape[0])[index[0]]
        some = Wanted(wanted.name, wanted.dtype, (len(rows), *wanted.shape[1:]), tuple(rows))
        return self.get(some)[(slice(None), *index[1:])]

    def check(self, wanted: Sequence[Wanted], *, strict: bool = True) -> None:
        """Raise `DscError` for every wanted tensor that is not of a float type; nothing is ever missing or left over."""
        faults = [
            f"random weights: {item.name}: found {type_text(item.dtype, item.shape)}, expected one of {', '.join((*FLOATS, *FP8))}"
            for item in wanted
            if item.dtype not in (*FLOATS, *FP8)
        ]
        if faults:
            raise DscError("\n".join(faults))

    def _distribution(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of the tensor called `name`."""
        if self.initializer_range is None:
            return _distribution(name, shape)
        return (0.0, self.initializer_range) if len(shape) >= 2 else (1.0 if _is_norm(name) else 0.0, 0.0)

    def _draw(self, name: str, dtype: str, out: np.ndarray) -> None:
        """Fill `out` (contiguous) so that activations stay of order 1.

        Matrices have standard deviation 1 / sqrt(columns), embeddings 1; norm weights are 1 + 0.1 N(0, 1), the gate's correction
        bias 0.01 N(0, 1), other vectors 0.02 N(0, 1).
        """
        if name.endswith("_scale_inv"):
            out[...] = self._scales(name, out.shape)
        elif dtype in FP8:
            self._draw_fp8(name, dtype, out)
        else:
            mean, deviation = self._distribution(name, out.shape)
            flat = out.reshape(-1)
            for first, normal in self._normal(name, flat.size, _CHUNK):
                normal *= np.float32(deviation)
                normal += np.float32(mean)
                flat[first : first + normal.size] = normal if dtype == "f64" else round_to(normal, FORMATS[dtype])

    def _draw_fp8(self, name: str, dtype: str, out: np.ndarray) -> None:
        rows, columns = out.shape if out.ndim == 2 else (1, out.size)
        scales = self._scales(f"{name}_scale_inv", (-(-rows // _BLOCK), -(-columns // _BLOCK)))
        mean, deviation = self._distribution(name, out.shape)
        flat = out.reshape(rows, columns)
        for first, normal in self._normal(name, out.size, _BLOCK * columns):
            row = first // columns
            values = normal.reshape(-1, columns) * np.float32(deviation) + np.float32(mean)
            values /= np.repeat(scales[row // _BLOCK], _BLOCK)[:columns]
            flat[row : row + _BLOCK] = round_to(values, FORMATS[dtype])

    def _scales(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 scales that vary by up to 2 from block to block; their mean brings codes to `_CODE_DEVIATION`."""
        columns = _BLOCK * shape[-1] if shape else 1
        count = math.prod(shape)
        words = self._generator(name).random_raw(-(-count // 4)).view(np.uint16)[:count].reshape(shape)
        return np.asarray((words / 65536 + 0.75) / (_CODE_DEVIATION * math.sqrt(columns)), np.float32)

    def _normal(self, name: str, count: int, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
        """`count` normal values by `chunk`, each chunk with the position of its first; the values do not depend on `chunk`."""
        generator, quantiles = self._generator(name), _normal_quantiles()
        for first in range(0, count, chunk):
            size = min(chunk, count - first)
            yield first, quantiles.take(generator.random_raw(-(-size // 4)).view(np.uint16)[:size])

    def _generator(self, name: str) -> np.random.Philox:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations of order 1."""
    if len(shape) >= 2:
        return 0.0, 1.0 if name.endswith("embed_tokens.weight") else 1 / math.sqrt(max(1, shape[-1]))
    if _is_norm(name):
        return 1.0, 0.1
    return 0.0, 0.01 if name.endswith("e_score_correction_bias") else 0.02


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[0].rpartition(".")[2] and name.endswith(".weight")


@cache
def _normal_quantiles() -> np.ndarray:
    """The medians of 65,536 equally likely slices of N(0, 1), float32 [65536]."""
    upper = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    return np.array([-value for value in reversed(upper)] + upper, np.float32)

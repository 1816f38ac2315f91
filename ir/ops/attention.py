"""Attention over a whole sequence and its gradients, and attention of one new token over a cache."""

from __future__ import annotations

from ..core import Op, Trait, Value, op
from ..errors import require
from ..types import DType, Tensor, Type, bound
from .rules import broadcast, require_float, require_int


@op("attention", Trait.STRIDED)
class Attention(Op):
    """softmax(q k^T * scale + mask) v, scores and probabilities in float32, rounded once.

    q is [..., Hq, S, Dk], k [..., Hkv, L, Dk], v [..., Hkv, L, Dv], with Hq a multiple of Hkv (query head h reads head
    h / (Hq / Hkv)). Where `causal`, query i sees keys 0 .. i. `mask` broadcasts to [..., Hq, S, L]: added where it is a
    float, kept where it is bool and true. Or it is integers [n + 1] in rising order, the boundaries of n documents packed along
    the tokens (cu_seqlens): a query of document d, one of mask[d] .. mask[d + 1] - 1, sees that document's keys only, and S = L.
    A query that sees no key, or is in no document, gives 0. DeepSeek-V3 report, equations 10 and 11.
    """

    q: Value
    k: Value
    v: Value
    mask: Value | None = None
    scale: float = 1.0
    causal: bool = False

    def infer(self) -> tuple[Type, ...]:
        q, k, v = self.q.tensor, self.k.tensor, self.v.tensor
        require_float(self.q, self.k, self.v)
        require(q.rank == k.rank == v.rank >= 3, f"expected [..., heads, tokens, width], found {q}, {k} and {v}")
        require(q.dtype is k.dtype is v.dtype, f"dtypes differ: {q}, {k} and {v}")
        require(q.shape[-1] == k.shape[-1], f"widths differ: q is {q}, but k is {k}")
        require(k.shape[:-1] == v.shape[:-1] and q.shape[:-3] == k.shape[:-3], f"leading dimensions differ: q {q}, k {k}, v {v}")
        check_heads(q, k, -3)
        if self.mask is not None and self.mask.dtype.is_int:
            fits = self.mask.tensor.rank == 1 and self.mask.shape[0] != 0 and q.shape[-2] == k.shape[-2]
            require(fits, f"boundaries are {self.mask.type}, expected integers [n + 1] and as many queries as keys, found {q} and {k}")
        elif self.mask is not None:
            scores = (*q.shape[:-1], k.shape[-2])
            require(broadcast(self.mask.shape, scores) == scores, f"mask is {self.mask.type}, expected to broadcast to {list(scores)}")
            require(self.mask.dtype is DType.bool or self.mask.dtype.is_float, f"mask is {self.mask.type}, expected bool, float or integer")
        return (Tensor(q.dtype, (*q.shape[:-1], v.shape[-1])),)

    def flops(self) -> int:
        """Of the lower triangle only where causal, as FlashAttention counts."""
        pairs = self.q.tensor.size // max(1, bound(self.q.shape[-1])) * bound(self.k.shape[-2])
        full = 2 * pairs * (bound(self.q.shape[-1]) + bound(self.v.shape[-1]))
        return full // 2 if self.causal else full


@op("attention_backward", Trait.STRIDED)
class AttentionBackward(Op):
    """The gradients of `attention` by q, k and v, given its result `out` and the gradient `dout`. Probabilities are computed again.

    With P = softmax(q k^T * scale + mask) and D the sum of dout * out over Dv: dS = P * (dout v^T - D), dq = scale dS k,
    dk = scale dS^T q, dv = P^T dout, the latter two summed over the query heads that share a key head, all in float32 and rounded
    once (FlashAttention-2, arXiv 2307.08691, section 2.3.2). Shapes and `mask` are those of `attention`.
    """

    q: Value
    k: Value
    v: Value
    out: Value
    dout: Value
    mask: Value | None = None
    scale: float = 1.0
    causal: bool = False

    def infer(self) -> tuple[Type, ...]:
        expected = Attention(self.q, self.k, self.v, self.mask, self.scale, self.causal).result.type
        for name, given in (("out", self.out), ("dout", self.dout)):
            require(given.type == expected, f"{name} is {given.type}, expected {expected}")
        return self.q.type, self.k.type, self.v.type

    def flops(self) -> int:
        """Five products, of the lower triangle only where causal."""
        pairs = self.q.tensor.size // max(1, bound(self.q.shape[-1])) * bound(self.k.shape[-2])
        full = 2 * pairs * (3 * bound(self.q.shape[-1]) + 2 * bound(self.v.shape[-1]))
        return full // 2 if self.causal else full


@op("attention_decode", Trait.STRIDED)
class AttentionDecode(Op):
    """Attention of one token per sequence over a cache: key j of sequence b is seen where j <= positions[b].

    q is [B, Hq, Dk], k [B, N, Hkv, Dk], v [B, N, Hkv, Dv], positions i64[B]; gives [B, Hq, Dv]. Absorbed MLA is the case
    Hkv = 1 with Dk = 576 and v the first 512 of k (DeepSeek-V2 report, section 2.1.2). With `pages` i32[B, n] the cache is paged:
    k [P, size, Hkv, Dk] and v [P, size, Hkv, Dv] are P pages, N = n size, and key j of sequence b is k[pages[b, j / size], j % size]
    (PagedAttention, arXiv 2309.06180); entries of pages past the position are not read.
    """

    q: Value
    k: Value
    v: Value
    positions: Value
    scale: float
    pages: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        q, k, v = self.q.tensor, self.k.tensor, self.v.tensor
        require_float(self.q, self.k, self.v)
        require_int(self.positions)
        require(q.rank == 3 and k.rank == v.rank == 4, f"expected q [B, H, D], k and v [B, N, H, D], found {q}, {k} and {v}")
        require(q.dtype is k.dtype is v.dtype, f"dtypes differ: {q}, {k} and {v}")
        sequences = q.shape[0] if self.pages is not None else k.shape[0]
        require(k.shape[:3] == v.shape[:3] and q.shape[0] == sequences, f"leading dimensions differ: q {q}, k {k}, v {v}")
        if self.pages is not None:
            require_int(self.pages)
            fits = self.pages.tensor.rank == 2 and self.pages.shape[0] == q.shape[0]
            require(fits, f"pages are {self.pages.type}, expected [{q.shape[0]}, n], a row for each sequence")
        require(q.shape[-1] == k.shape[-1], f"widths differ: q is {q}, but k is {k}")
        require(
            self.positions.shape == q.shape[:1], f"positions are {self.positions.type}, expected one for each of {q.shape[0]} sequences"
        )
        check_heads(q, k, -2)
        return (Tensor(q.dtype, (*q.shape[:2], v.shape[-1])),)

    def flops(self) -> int:
        """Of the whole cache."""
        heads = bound(self.q.shape[0]) * bound(self.q.shape[1])
        return 2 * heads * self.keys * (bound(self.q.shape[-1]) + bound(self.v.shape[-1]))

    @property
    def keys(self) -> int:
        """N, the most keys that a sequence can have."""
        return bound(self.k.shape[1]) * (1 if self.pages is None else bound(self.pages.shape[1]))


def check_heads(q: Tensor, k: Tensor, axis: int) -> None:
    """Every key head serves the same number of query heads."""
    heads, kv = bound(q.shape[1] if axis == -2 else q.shape[axis]), bound(k.shape[axis])
    require(kv > 0 and heads % kv == 0, f"{heads} query heads are not a multiple of {kv} key heads")

"""Shard a program: from what all ranks do together to what one of them runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..ir.core import Func, Module, Op, Phase, Value
from ..ir.errors import DscError, require
from ..ir.gradients import bundles
from ..ir.mesh import ATTRIBUTE, Mesh, parse_mesh
from ..ir.ops.attention import Attention, AttentionBackward, AttentionDecode
from ..ir.ops.control import Call, Param
from ..ir.ops.elementwise import Cast
from ..ir.ops.linalg import GroupedMatmul
from ..ir.ops.moe import Dispatch as ToExperts
from ..ir.ops.quant import GroupedScaledMatmul, Quantize
from ..ir.ops.shape import Reshape, Transpose
from ..ir.sharding import INPUTS, RESULTS, Split
from ..ir.slots import slots_of
from ..ir.stages import is_staged, stages_of
from ..ir.types import Bundle, Type, bound
from ..ir.walk import communicating
from .manager import Declined, Pass, register
from .rewrite import unused
from .sharding import experts, losses, products, rules  # noqa: F401 - they fill RULES
from .sharding.body import RULES, Body, Dispatch
from .sharding.layout import Layout, Placement, from_split, placed, settled, to_split
from .sharding.tiles import told
from .sharding.zero import Handout
from .simplify import drop_unused

TILES = "tiles"
"""What the note is on that says where tiles are others than on one rank."""


@register
@dataclass(frozen=True)
class ShardExperts(Pass):
    """Turn a program of all ranks into the one that each rank of a mesh runs.

    Experts are split over ep, sequences over dp, heads of attention and, elsewhere, the positions of a sequence over tp. Collectives stand
    where a value is wanted elsewhere than it is (passes/sharding/); dispatch and combine become exchanges of rows along ep. With
    `dispatch=forwarded`, which is the default where ep spans nodes, except in decoding, a token crosses the network once for each node that
    holds one of its experts, and one kernel sends it on to them inside the node; sums of its experts' results are formed, and rounded, on
    the way back. `dispatch=two-hop` does the same by an exchange for each hop. With `dispatch=direct` a token goes once for each expert.
    Sums over what is split, gradients and losses among them, are added up where they are read: gradients and metrics at the end of main,
    or in the `end` of a pipeline's stage, which a rank runs once for all micro-batches; every stage is sharded alike. The module carries
    its mesh, and says how its weights, inputs and results are split (ir/sharding.py). Tiles of quantised values begin anew on each rank,
    and a note says where that gives others than on one rank; weights that are stored so keep their scales (sharding/tiles.py).

    With `zero=1` the sums of gradients end scattered: each of the ranks that hold a weight together gets an equal part of its gradient,
    and keeps the optimiser's state for that part alone (ZeRO-1, arXiv 1910.02054, section 5.1). Those are the ranks of dp, for experts
    those of edp. A gradient is cut along its first dimension that divides; where none does, it is whole on every rank (`--why`).

    Before `shard-experts{mesh="dp=2,ep=2"}`:

        func @f(%x: bf16[4, 8], %ids: i32[4, 2], %weights: f32[4, 2]) {
          %rows: bf16[8, 8], %counts: i32[6], %handle: bundle{i32[8]} = dispatch([%x], %ids, experts=6)  @ f#1 F
          %w: bf16[6, 8, 8] = param("experts.up_proj")                                  @ f#2 F
          %y: bf16[8, 8] = grouped_matmul(%rows, %w, %counts)                           @ f#3 F
          %out: bf16[4, 8] = combine(%y, %handle, %weights)                             @ f#4 F
          return %out
        }

    after:

        module { stage=sharded,
          mesh={pp=1, dp=2, ep=2, tp=1, node=8}, inputs=[["dp"], ["dp"], ["dp"]], results=[["dp"]] }

        func @f(%x: bf16[2, 8], %ids: i32[2, 2], %weights: f32[2, 2]) {
          %rows: bf16[4, 8], %counts: i32[6], %handle: bundle{i32[4]} = dispatch([%x], %ids, experts=6)  @ f#1.1 F
          %sent: i32[2, 3] = reshape(%counts, shape=[2, 3])  @ f#1.2 F
          %received: i32[2, 3] = all_to_all(%sent, axis="ep", size=2)  @ f#1.3 F
          %send: i32[2] = sum(%sent, axes=[1])  @ f#1.4 F
          %rows_1: bf16[rows<=8, 8] = all_to_all_rows([%rows], %send, %received, axis="ep", size=2, rows={name="rows", bound=8})  @ f#1 F
          %counts_1: i32[3] = sum(%received, axes=[0])  @ f#1.5 F
          %handle_1: bundle{bundle{i32[4]}, i32[2], i32[2, 3]} = pack([%handle, %send, %received])  @ f#1.6 F
          %w: bf16[3, 8, 8] = param("experts.up_proj", shard=["ep"])  @ f#2 F
          %y: bf16[rows<=8, 8] = grouped_matmul(%rows_1, %w, %counts_1)  @ f#3 F
          %order: bundle{i32[4]}, %send_1: i32[2], %received_1: i32[2, 3] = unpack(%handle_1)  @ f#4.1 F
          %y_1: bf16[4, 8] = all_to_all_rows([%y], %received_1, %send_1, axis="ep", size=2, rows=4)  @ f#4.2 F
          %out: bf16[2, 8] = combine(%y_1, %order, %weights)  @ f#4 F
          return %out
        }
    """

    name: ClassVar[str] = "shard-experts"
    requires: ClassVar[str] = "..quantized"
    ensures: ClassVar[str | None] = "sharded"

    mesh: str
    dispatch: Literal["auto", "direct", "two-hop", "forwarded"] = "auto"
    zero: Literal[0, 1] = 1

    def __post_init__(self) -> None:
        parse_mesh(self.mesh)

    def __call__(self, module: Module) -> Module:
        mesh = parse_mesh(self.mesh)
        if is_staged(module):
            count = len(stages_of(module))
            fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            require(count % mesh.pp == 0, f"mesh {mesh}: pp={mesh.pp} does not divide {count} stages; pp = {fits} would fit")
        else:
            require(mesh.pp == 1, f"mesh {mesh}: the program is not cut into stages, as split-stages{{stages={mesh.pp}}} does")
        _check(module, mesh)
        handout = Handout(module, mesh, bool(self.zero))
        sharding = _Sharding(module, mesh, self._dispatch(module, mesh))
        made = sharding.module([_input(module, p, mesh) for p in module.main.params], handout)
        self.declined.extend(handout.declined)
        if where := told({op: sharding.restarts[op] for func in made.funcs for op in func.ops if op in sharding.restarts}):
            self.declined.append(
                Declined(made.main.name, TILES, f"of FP8 begin anew on each rank {where}: their scales are not those of one rank")
            )
        return made

    def _dispatch(self, module: Module, mesh: Mesh) -> Dispatch:
        """How tokens go to their experts; refused where there is no such way."""
        nodes = mesh.size("ep.node")
        if self.dispatch == "auto":
            return "forwarded" if nodes > 1 and module.attributes.get("mode") != "decode" else "direct"
        if self.dispatch != "direct" and nodes == 1:
            least = f"ep={2 * mesh.node} or {'node=1' if mesh.ep <= 2 else f'node={mesh.ep // 2}'}"
            raise DscError(
                f"mesh {mesh}: ep={mesh.ep} lies within a node of {mesh.node} ranks, so no dispatch is {self.dispatch}; {least} would fit"
            )
        return self.dispatch


def spread_program(module: Module, mesh: Mesh, inputs: Sequence[Split], results: Mapping[int, Split]) -> Module:
    """What one rank runs of a program whose inputs lie as `inputs` says, and results where `results` says, else where they are made.

    It is for what stands beside a sharded program, such as the optimiser's update: `shard-experts` chooses the splits itself.
    """
    types, sizes = [r.type for r in module.main.results], _sizes(mesh)
    wanted = {i: _placement(types[i], split, sizes) for i, split in results.items()}
    return _Sharding(module, mesh).module(inputs, lambda i, have: wanted.get(i) or settled(have))


class _Sharding:
    """One sharding of a module. A function is made once for each way in which its arguments are placed."""

    def __init__(self, module: Module, mesh: Mesh, dispatch: Dispatch = "direct") -> None:
        self.before = module
        self.mesh = mesh
        self.dispatch = dispatch
        self.made: dict[tuple[str, tuple[Placement, ...]], tuple[str, tuple[Placement, ...]]] = {}
        self.funcs: dict[str, list[Func]] = {func.name: [] for func in module.funcs}
        self.names = set(self.funcs)
        self.restarts: dict[Op, list[tuple[str, str]]] = {}
        self.settle: Callable[[int, Placement], Placement] = lambda i, have: settled(have)
        returned = enumerate(module.main.results) if is_staged(module) else ()
        self.returned = {(str(v.owner.callee), v.index): i for i, v in returned if isinstance(v.owner, Call)}
        """The results of main that functions of stages hand out, by function and index."""

    def module(self, inputs: Sequence[Split], settle: Callable[[int, Placement], Placement]) -> Module:
        """The program of a rank. Its inputs are split as given; `settle` says where result i, which lies somewhere, is handed out."""
        main, self.settle = self.before.main, settle
        given = tuple(_placement(p.type, split, _sizes(self.mesh), p.name) for p, split in zip(main.params, inputs, strict=True))
        body = self.body(main, given)
        results, placements = [], []
        replaced = {result: param for param, result in main.updates.items()}
        for i, value in enumerate(main.results):
            have = body.layouts[value]
            done = isinstance(value.owner, Call) and (str(value.owner.callee), value.index) in self.returned
            want = given[replaced[i]] if i in replaced else have if done else settle(i, have)
            start = len(body.ops)
            made = body.bring(body.form(value), have, want)
            if made is not body.form(value):  # the result keeps its name
                for part in (body.form(value), *(r for op in body.ops[start:] for r in op.results if r is not made)):
                    part.name += "_part" if part.name == made.name else ""
            results.append(made)
            placements.append(want)
        _number(body, main, Phase.F)
        attributes = {
            **self.before.attributes,
            ATTRIBUTE: self.mesh.record(),
            INPUTS: tuple(_split(p) for p in given),
            RESULTS: tuple(_split(p) for p in placements),
        }
        funcs = (body.finish(main.name, results), *(func for made in self.funcs.values() for func in made))
        sharded = self.before.replace(funcs=funcs, stage="sharded", attributes=attributes)
        pinned = communicating(sharded)
        return sharded.map(lambda func: drop_unused(func, pinned))

    def body(self, func: Func, given: Sequence[Placement]) -> Body:
        body = Body(func, self.mesh, self.lower, _experts(func), self.dispatch)
        body.run(given, RULES, rules.default)
        self.restarts |= body.restarts
        return body

    def lower(self, name: str, given: tuple[Placement, ...]) -> tuple[str, tuple[Placement, ...]]:
        """See `Body.lower`."""
        key = name, given
        if key not in self.made:
            func = self.before[name]
            body = self.body(func, given)
            results = []
            placements = []
            replaced = {result: param for param, result in func.updates.items()}
            for i, value in enumerate(func.results):
                have = body.layouts[value]
                handed = self.returned.get((name, i))
                want = given[replaced[i]] if i in replaced else have if handed is None else self.settle(handed, have)
                results.append(body.bring(body.form(value), have, want))
                placements.append(want)
            _number(body, func, Phase.W if bundles(self.before) else Phase.F)
            own = unused(name, self.names) if self.funcs[name] else name
            self.funcs[name].append(body.finish(own, results))
            self.made[key] = own, tuple(placements)
        return self.made[key]


def _number(body: Body, func: Func, phase: Phase) -> None:
    """Give ids to what stands at the end of a function, where no op asked for it. Without ops before it is of `phase`."""
    taken = {op.id for op in body.ops}
    count = 0
    for op in body.ops:
        if not op.id:
            count += 1
            while f"{func.name}.results#{count}" in taken:
                count += 1
            object.__setattr__(op, "id", f"{func.name}.results#{count}")
            object.__setattr__(op, "phase", phase)
        phase = op.phase


def _sizes(mesh: Mesh) -> dict[str, int]:
    return {axis: mesh.size(axis) for axis in mesh.axes}


def _placement(type: Type, split: Split, sizes: Mapping[str, int], name: str = "") -> Placement:
    """Where a value lies that is split so; a bundle is whole."""
    return placed(type) if isinstance(type, Bundle) else from_split(Value(type, name), split, sizes)


def _split(placement: Placement) -> Split:
    if isinstance(placement, tuple):
        return tuple(map(_split, placement))
    found = to_split(placement) if isinstance(placement, Layout) else None
    assert found is not None
    return found


def _input(module: Module, param: Value, mesh: Mesh) -> Split:
    """How an input is split: sequences over dp; positions of token ids over tp, in decoding sequences over both."""
    if isinstance(param.type, Bundle) or param.tensor.rank == 0:
        return ()
    batch = module.attributes.get("batch", param.shape[0])
    if param.shape[0] != batch:
        return ()
    least = -(-bound(param.shape[0]) // mesh.dp) * mesh.dp
    require(least == param.shape[0], f"a batch of {param.shape[0]} does not divide over dp={mesh.dp}; a batch of {least} would fit")
    ids = param.dtype.is_int and param.tensor.rank == 2
    if ids and mesh.tp > 1:
        fits = bound(param.shape[1]) % mesh.tp == 0
        require(fits, f"%{param.name} has {param.shape[1]} positions, which do not divide over tp={mesh.tp}")
    return ("dp" if mesh.dp > 1 else "", "tp" if ids and mesh.tp > 1 else "")


def _check(module: Module, mesh: Mesh) -> None:
    """One line for a mesh that the program does not fit."""
    ops = [op for func in module.funcs for op in func.ops]
    sent = next((op for op in ops if isinstance(op, ToExperts)), None)
    if sent is None:
        require(mesh.ep == 1, f"mesh {mesh}: the program has no experts to shard; ep=1 would fit")
    else:
        fits = ", ".join(str(n) for n in range(1, sent.experts + 1) if sent.experts % n == 0)
        require(sent.experts % mesh.ep == 0, f"mesh {mesh}: ep={mesh.ep} does not divide {sent.experts} experts; ep = {fits} would fit")
    slots = slots_of(module)
    if slots is not None:
        require(
            mesh.ep == slots.ranks,
            f"mesh {mesh}: experts have slots on {slots.ranks} ranks, found ep={mesh.ep}; ep={slots.ranks} would fit",
        )
    attending = [op for op in ops if isinstance(op, Attention | AttentionBackward | AttentionDecode)]
    require(mesh.tp == 1 or bool(attending), f"mesh {mesh}: the program has no attention to split over tp; tp=1 would fit")
    for op in attending:
        heads = bound(op.q.shape[1] if isinstance(op, AttentionDecode) else op.q.shape[-3])
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        require(heads % mesh.tp == 0, f"mesh {mesh}: tp={mesh.tp} does not divide {heads} heads; tp = {fits} would fit")


def _experts(func: Func) -> frozenset[str]:
    """The weights that grouped products read, and their scales."""
    found = set()
    for op in func.ops:
        if isinstance(op, GroupedMatmul | GroupedScaledMatmul):
            for value in (op.w, op.w_scales) if isinstance(op, GroupedScaledMatmul) else (op.w,):
                owner = value.owner
                while isinstance(owner, Quantize | Transpose | Cast | Reshape):
                    owner = owner.operands[0].owner
                if isinstance(owner, Param):
                    found.add(owner.path)
    return frozenset(found)

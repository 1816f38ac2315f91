"""One function as one rank runs it: its ops, where its values are, and the collectives that bring them where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, TypeVar
from typing import Literal as OneOf

from ...ir.core import Func, Op, OpT, Value
from ...ir.errors import DscError
from ...ir.mesh import Mesh
from ...ir.ops.collective import AllGather, AllReduce, OwnPart, ReduceScatter
from ...ir.ops.control import Literal, Pack, Param, Unpack
from ...ir.ops.elementwise import Cast
from ...ir.ops.quant import Quantize
from ...ir.ops.shape import Broadcast, Reshape, Transpose
from ...ir.types import DType
from ..rewrite import inherit
from .layout import Dim, Factor, Layout, Placement, Rows, factors, local_type, reshaped, spread, whole
from .tiles import Tile, cut, finer, scale_layout

if TYPE_CHECKING:
    from .hops import Way

Dispatch = OneOf["direct", "two-hop", "forwarded"]
"""A row for each expert in one exchange of all ranks, or a copy for each node, in an exchange for each hop or forwarded by one kernel."""

Lower = Callable[[str, tuple[Placement, ...]], tuple[str, tuple[Placement, ...]]]
"""(function, where its arguments are) -> the name of the function that a rank runs, and where its results are."""


@dataclass
class Body:
    """The function being made. `form` gives what stands for a value of the program, `get` the same where it is wanted."""

    func: Func
    mesh: Mesh
    lower: Lower
    experts: frozenset[str]
    """The weights of this function that grouped products read, by relative name."""
    dispatch: Dispatch = "direct"
    """How tokens go to experts on other ranks."""
    ops: list[Op] = field(default_factory=list)
    forms: dict[Value, dict[Placement, Value]] = field(default_factory=dict)
    layouts: dict[Value, Placement] = field(default_factory=dict)
    pairs: dict[tuple[Value, Layout], tuple[Value, Value, Tile]] = field(default_factory=dict)
    restarts: dict[Op, list[tuple[str, str]]] = field(default_factory=dict)
    """Of a quantisation whose tiles are not those of the whole: along which axes, and what lies together on a rank."""
    handles: dict[Value, tuple[Value, ...]] = field(default_factory=dict)
    ways: dict[Value, Way] = field(default_factory=dict)
    """Of a handle of a dispatch over nodes what it carries, once it was unpacked (hops.py)."""

    def run(self, given: Sequence[Placement], rules: Mapping[type[Op], Rule], default: Callable[[Op], Rule]) -> None:
        """Make every op, the parameters being where `given` says."""
        taken = {op.id for op in self.func.ops}
        for param, placement in zip(self.func.params, given, strict=True):
            self.set(param, placement, Value(local_type(param.type, placement), param.name))
        for op in self.func.ops:
            start = len(self.ops)
            try:
                (rules.get(type(op)) or default(op))(self, op)
            except DscError as error:
                raise DscError(f"{op.name} {op.id} of @{self.func.name}: {error}") from None
            for made in self.ops[start:]:
                if made is not op:
                    object.__setattr__(made, "id", "")  # copies of `op` among them: which one is its heir is seen now
            inherit(op, [self.form(v) for v in op.results], self.ops[start:], taken)

    def finish(self, name: str, results: Sequence[Value]) -> Func:
        """The function, under another name."""
        return Func(name, tuple(self.form(p) for p in self.func.params), tuple(self.ops), tuple(results), self.func.updates)

    def emit(self, op: OpT) -> OpT:
        """Append an op."""
        self.ops.append(op)
        return op

    def number(self, value: float, dtype: DType = DType.f32) -> Value:
        """A scalar."""
        return self.emit(Literal((float(value),), (), dtype)).result

    @property
    def over_nodes(self) -> bool:
        """Whether tokens go once to each node of their experts."""
        return self.dispatch != "direct"

    # Where values are

    def set(self, value: Value, placement: Placement, made: Value) -> None:
        """Let `made` stand for `value`."""
        self.layouts[value] = placement
        self.forms[value] = {placement: made}

    def form(self, value: Value) -> Value:
        """What stands for `value`, wherever it is."""
        return self.forms[value][self.layouts[value]]

    def layout(self, value: Value) -> Layout:
        """Where a tensor is."""
        found = self.layouts[value]
        if not isinstance(found, Layout):
            raise DscError(f"%{value.name} is {value.type}, which has no place of its own")
        return found

    def dims(self, value: Value) -> tuple[Dim, ...]:
        """How the dimensions of a tensor lie."""
        return self.layout(value).dims

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.mesh.size(axis)

    # Bringing values where they are wanted

    def get(self, value: Value, want: Layout) -> Value:
        """`value` where it is wanted: views are taken of what is there, anything else is brought."""
        known = self.forms[value]
        if want not in known:
            known[want] = self._derived(value, want) or self.convert(self.form(value), self.layout(value), want)
        return known[want]

    def whole(self, value: Value) -> Value:
        """`value` whole on every rank."""
        return self.get(value, whole(value.shape))

    def _derived(self, value: Value, want: Layout) -> Value | None:
        """A view or a number, made again in another place."""
        match value.owner:
            case Literal(values=(_,)) as op if not want.partial:
                return self.emit(op.copy(shape=_static(want), id="")).result
            case Transpose(x=x, perm=perm) as op:
                dims: list[Dim] = [()] * len(perm)
                for to, source in enumerate(perm):
                    dims[source] = want.dims[to]
                return self._view(op, x, Layout(tuple(dims), want.partial))
            case Reshape(x=x) as op if x.tensor.is_static and (inner := reshaped(want, _extents(x))):
                return self._view(op, x, inner, shape=_static(want))
            case Broadcast(x=x) as op:
                kept = want.dims[len(want.dims) - x.tensor.rank :]
                dims = [() if d == 1 else dim for d, dim in zip(x.shape, kept, strict=True)]
                return self._view(op, x, Layout(tuple(dims), want.partial), shape=_static(want))
            case Cast(x=x) as op if x.dtype.bits <= op.dtype.bits and not want.partial:
                return self._view(op, x, want)
        return None

    def _view(self, op: Op, x: Value, inner: Layout, **changes: object) -> Value | None:
        if not inner.partial <= self.layout(x).partial:
            return None
        made = self.get(x, inner)
        return self.emit(op.copy(x=made, id="", **changes)).result

    def convert(self, x: Value, have: Layout, want: Layout) -> Value:
        """Gather what is spread too far, add up what is partial, and keep the own part of what ranks hold together."""
        if have == want:
            return x
        there, wanted = have.places(), want.places()
        for axis in [a for a, place in there.items() if wanted.get(a) != place]:
            x, have = self._gather(x, have, axis)
        for axis, (i, before) in wanted.items():
            if axis in have.partial - want.partial:
                x, have = self._cut(x, have, ReduceScatter, axis, i, before)
        if missing := have.partial - want.partial:
            for axis in ["stage"] if missing in ({"dp", "tp"}, {"ep", "edp"}) else sorted(missing):
                x = self.emit(AllReduce(x, axis, self.size(axis), names=(x.name,))).result
            have = Layout(have.dims, have.partial - missing)
        for axis, (i, before) in wanted.items():
            if axis not in have.places():
                x, have = self._cut(x, have, OwnPart, axis, i, before)
        if have != want:
            raise DscError(f"%{x.name}, {x.type} on each rank, cannot be brought where the op needs it: its parts do not divide")
        return x

    def _gather(self, x: Value, have: Layout, axis: str) -> tuple[Value, Layout]:
        i, _ = have.places()[axis]
        dim = factors(have.dims[i])
        at = [f.axis for f in dim].index(axis)
        size, before, after = self.size(axis), _held(dim[:at]), _held(dim[at + 1 :])
        shape = [*_static(have)]
        if before == 1:
            x = self.emit(AllGather(x, axis, size, i, names=(x.name,))).result
        else:
            apart = self.emit(Reshape(x, (*shape[:i], before, after, *shape[i + 1 :]))).result
            all = self.emit(AllGather(apart, axis, size, i + 1)).result
            x = self.emit(Reshape(all, (*shape[:i], before * size * after, *shape[i + 1 :]), names=(x.name,))).result
        return x, have.without({axis})

    def _cut(self, x: Value, have: Layout, cls: type[ReduceScatter | OwnPart], axis: str, i: int, before: int) -> tuple[Value, Layout]:
        """What `cls` keeps of dimension `i` along `axis`, `before` elements of the whole standing before it; `x` where it cannot be."""
        size = self.size(axis)
        dim = spread(have.dims[i], axis, size, before)
        if dim is None:
            return x, have
        at = [f.axis for f in factors(dim)].index(axis)
        lead, shape = _held(factors(dim)[:at]), [*_static(have)]
        if lead == 1:
            made = self.emit(cls(x, axis, size, i, names=(x.name,))).result
        else:
            apart = self.emit(Reshape(x, (*shape[:i], lead, shape[i] // lead, *shape[i + 1 :]))).result
            kept = self.emit(cls(apart, axis, size, i + 1)).result
            made = self.emit(Reshape(kept, (*shape[:i], shape[i] // size, *shape[i + 1 :]), names=(x.name,))).result
        return made, Layout((*have.dims[:i], dim, *have.dims[i + 1 :]), have.partial - {axis})

    def bring(self, made: Value, have: Placement, want: Placement) -> Value:
        """As `convert`, of bundles too."""
        if have == want:
            return made
        if isinstance(have, Layout) and isinstance(want, Layout):
            return self.convert(made, have, want)
        if not (isinstance(have, tuple) and isinstance(want, tuple)):
            raise DscError(f"%{made.name}, {made.type}, has no place of its own")
        names = tuple(f"{made.name}_{i}" for i in range(len(have)))
        fields = made.owner.values if isinstance(made.owner, Pack) else self.emit(Unpack(made, names=names)).results
        brought = tuple(self.bring(v, h, w) for v, h, w in zip(fields, have, want, strict=True))
        return self.emit(Pack(brought, names=(made.name,))).result

    def quantize(self, op: Quantize, have: Layout) -> Quantize:
        """`op` on what each rank has of its operand where it lies so."""
        made = self.emit(op.copy(x=self.get(op.x, have), counts=op.counts and self.form(op.counts), id=""))
        found = [(along, f"{together} {('rows', 'columns')[i]}") for i, along, together in cut(have, op.tile)]
        if isinstance(have.dims[-2], Rows) and op.tile[0] > 1 and self.size("edp") > 1:
            found.append(("edp", "the rows of an expert"))
        if found:
            self.restarts[made] = found
        return made

    def quantized(self, codes: Value, scales: Value, want: Layout, tile: Tile) -> tuple[Value, Value, Tile]:
        """Codes and their scales where they are wanted, and the tiles that these are for.

        What is quantised along a dimension that has to be gathered is quantised there.
        """
        key = codes, want
        if key not in self.pairs:
            self.pairs[key] = self._quantized(codes, scales, want, tile)
        return self.pairs[key]

    def _quantized(self, codes: Value, scales: Value, want: Layout, tile: Tile) -> tuple[Value, Value, Tile]:
        have = self.layout(codes)
        if have == want:
            return self.form(codes), *finer(self, scales, have, tile)
        changed = [i for i, (a, b) in enumerate(zip(have.dims, want.dims, strict=True)) if a != b]
        rank = len(have.dims)
        if all(i < rank - 2 or tile[i - rank] == 1 for i in changed):
            return self.get(codes, want), self.get(scales, scale_layout(want, tile)), tile
        match codes.owner, scales.owner:
            case Transpose(x=inner, perm=perm) as first, Transpose(x=inner_scales) as second if perm == second.perm:
                dims: list[Dim] = [()] * rank
                for to, source in enumerate(perm):
                    dims[source] = want.dims[to]
                found = self.quantized(inner, inner_scales, Layout(tuple(dims)), tile[::-1])
                return self.emit(first.copy(x=found[0], id="")).result, self.emit(second.copy(x=found[1], id="")).result, found[2][::-1]
            case Quantize() as op, _ if op is scales.owner:
                made = self.quantize(op, want).results
                return made[0], made[1], tile
        return self.get(codes, want), self.get(scales, scale_layout(want, tile)), tile

    def is_weight(self, value: Value) -> bool:
        """Whether a value is a weight, quantised and turned as it may be."""
        owner = value.owner
        while isinstance(owner, Quantize | Transpose | Cast | Reshape):
            owner = owner.operands[0].owner
        return isinstance(owner, Param)


Rule = Callable[[Body, Op], None]
RULES: dict[type[Op], Rule] = {}
"""How each op is run by a rank."""

RuleT = TypeVar("RuleT", bound=Callable[..., None])


def sharding(*classes: type[Op]) -> Callable[[RuleT], RuleT]:
    """Make the function below the rule of these ops. A second one raises TypeError."""

    def attach(rule: RuleT) -> RuleT:
        for cls in classes:
            if cls in RULES:
                raise TypeError(f"op {cls.name!r} has two sharding rules")
            RULES[cls] = rule
        return rule

    return attach


def _static(layout: Layout) -> tuple[int, ...]:
    shape = layout.shape
    if not all(isinstance(d, int) for d in shape):
        raise DscError("the rows of experts differ from rank to rank, and cannot be moved as a whole")
    return tuple(d for d in shape if isinstance(d, int))


def _held(some: Sequence[Factor]) -> int:
    return prod(f.size for f in some if not f.axis)


def _extents(x: Value) -> tuple[int, ...]:
    return tuple(d for d in x.shape if isinstance(d, int))

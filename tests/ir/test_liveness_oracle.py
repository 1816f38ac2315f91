"""Liveness against its definition, applied without any cleverness to random programs."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from dsc.ir.core import Builder, Func, Module, Op, Symbol, Trait, Value
from dsc.ir.liveness import last_uses, live_bytes
from dsc.ir.ops.collective import AllGather, Done
from dsc.ir.ops.control import Call, Pack, Param, Unpack
from dsc.ir.ops.elementwise import Add, Neg
from dsc.ir.ops.reduce import TopK
from dsc.ir.ops.shape import Broadcast, Reshape
from dsc.ir.types import Bundle, DType, Ragged, Tensor
from dsc.ir.verify import verify

ROWS = (2, 3, 8, Ragged("rows", 5))


def draw_func(name: str, random: Random, callees: tuple[Func, ...]) -> Func:
    """A function of matrices, views of them, bundles and calls; some values are never read, some are returned twice."""
    b = Builder(name, name)
    values = [b.param(f"p{i}", Tensor(DType.f32, (random.choice(ROWS), 4))) for i in range(random.randint(1, 3))]
    flying: list[AllGather] = []
    for _ in range(random.randint(0, 14)):
        x = random.choice(values)
        if isinstance(x.type, Bundle):
            values.extend(b.emit(Unpack(x)).results)
            continue
        same = [v for v in values if v.type == x.type]
        made: list[Op] = [Neg(x), Add(x, random.choice(same)), Pack(tuple(random.choices(values, k=random.randint(0, 3))))]
        made += [Param("w", (x.type,)), TopK(x, k=2)]
        started = [v for v in values if v.type == x.type and not isinstance(v.owner, Done)] if x.tensor.is_static else []
        if started and random.random() < 0.3:
            flying.append(b.emit(AllGather(random.choice(started), "dp", 1, start=True)))
        if flying and random.random() < 0.3:
            values.extend(b.emit(Done(flying.pop(0).results)).results)
        made += [Reshape(x, (x.tensor.size,)), Broadcast(Reshape(x, (1, x.tensor.size)).x, x.shape)] if x.tensor.is_static else []
        for callee in callees:
            fitting = [[v for v in values if v.type == p.type] for p in callee.params]
            if all(fitting):
                made.append(Call(Symbol(callee.name), tuple(map(random.choice, fitting)), tuple(r.type for r in callee.results)))
        values.extend(b.emit(random.choice(made)).results)
    for op in flying:
        values.extend(b.emit(Done(op.results)).results)
    return b.finish(random.choices(values, k=random.randint(0, 3)))


def draw_module(random: Random) -> Module:
    leaf = draw_func("leaf", random, ())
    middle = draw_func("middle", random, (leaf,))
    return verify(Module((draw_func("main", random, (leaf, middle)), middle, leaf)))


def touched(func: Func, value: Value) -> list[int]:
    """The ops that define or read a value, one that is sent until it is done, and one past the end where it is returned."""
    found = [i for i, op in enumerate(func.ops) if value in op.operands or value in op.results]
    found += [i for i, op in enumerate(func.ops) if isinstance(op, Done) and op.started and value in op.started.operands]
    found.sort()
    return [*found, len(func.ops)] if value in func.results else found


def buffers(func: Func) -> dict[Value, set[Value]]:
    """Each value that memory is set aside for, with all that lies in that memory."""
    found: dict[Value, set[Value]] = {}
    for op in func.ops:
        views = Trait.VIEW in op.traits
        for result in op.results:
            if views:
                for members in found.values():
                    if members & set(op.operands):
                        members.add(result)
            elif Trait.SOURCE not in op.traits:
                found[result] = {result}
    return found


def bytes_at(module: Module, func: Func) -> list[int]:
    alive = [0] * len(func.ops)
    for root, members in buffers(func).items():
        born = next(i for i, op in enumerate(func.ops) if root in op.results)
        dies = max(i for member in members for i in touched(func, member))
        for i in range(len(func.ops)):
            alive[i] += root.type.bytes if born <= i <= dies else 0
    for i, op in enumerate(func.ops):
        if isinstance(op, Call):
            inside = max(bytes_at(module, module[op.callee]), default=0)
            alive[i] += max(0, inside - sum(r.type.bytes for r in op.results))  # its results are counted already
    return alive


@given(st.randoms(use_true_random=False))
def test_bytes_alive_at_each_op(random: Random) -> None:
    module = draw_module(random)
    for func in module.funcs:
        live, expected = live_bytes(module, func), bytes_at(module, func)
        assert list(live.after) == expected
        assert live.peak == max(expected, default=0)
        assert not expected or live.after[live.at] == live.peak


@given(st.randoms(use_true_random=False))
def test_last_uses(random: Random) -> None:
    for func in draw_module(random).funcs:
        dead = last_uses(func)
        assert len(dead) == len(func.ops)
        for op in func.ops:
            for value in op.results:
                ends = [i for i, values in enumerate(dead) if value in values]
                assert ends == ([] if value in func.results else [max(touched(func, value))])
        assert not {v for values in dead for v in values} & set(func.params)


def test_the_programs_are_worth_it() -> None:
    """The generator reaches what the laws are about; otherwise they would hold for want of cases."""
    modules = [draw_module(Random(seed)) for seed in range(200)]
    names = {op.name for module in modules for func in module.funcs for op in func.ops}
    assert names == {"neg", "add", "pack", "unpack", "param", "topk", "reshape", "broadcast", "call", "all_gather", "done"}
    calls = [op for module in modules for op in module.main.ops if isinstance(op, Call)]
    assert {op.callee for op in calls} == {"middle", "leaf"}

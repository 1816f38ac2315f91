"""`rebuild`: what is shared, what replaces what, and which ids the new ops bear."""

from __future__ import annotations

import pytest
from hypothesis import given

import dsc
from dsc.ir.core import Builder, Func, Module, Op, Value
from dsc.ir.ops.control import Call, Unpack
from dsc.ir.ops.elementwise import Add, Cast, Exp, Mul, Neg, Sigmoid, Silu
from dsc.ir.ops.reduce import TopK
from dsc.ir.types import DType
from dsc.ir.verify import verify
from dsc.passes.rewrite import rebuild
from dsc.testing.programs import programs

FUNC = dsc.parse("""
module { stage=differentiated }

func @f(%x: f32[4, 4], %s: f32[4, 4]) updates {%s=1} {
  %a: f32[4, 4] = silu(%x)  @ mlp#3 I
  %b: f32[4, 4] = neg(%a)  @ mlp#4 W
  %c: f32[4, 4] = exp(%s)  @ mlp#5 F
  return %b, %c, %a
}
""").main


def split(op: Op, b: Builder) -> tuple[Value, ...] | None:
    """silu as x * sigmoid(x)."""
    match op:
        case Silu(x=x):
            gate = b.emit(Sigmoid(x)).result
            return b.emit(Mul(x, gate)).results
    return None


def text(func: Func) -> str:
    return str(func).partition("{\n")[2].partition("  return")[0]


def test_the_first_result_decides_who_keeps_the_id() -> None:
    found = rebuild(FUNC, split)
    assert text(found) == (
        "  %sigmoid: f32[4, 4] = sigmoid(%x)  @ mlp#3.1 I\n"
        "  %a: f32[4, 4] = mul(%x, %sigmoid)  @ mlp#3 I\n"
        "  %b: f32[4, 4] = neg(%a)  @ mlp#4 W\n"
        "  %c: f32[4, 4] = exp(%s)  @ mlp#5 F\n"
    )
    assert str(found).split("\n")[0] == str(FUNC).split("\n")[0]
    assert str(found).split("\n")[-3] == "  return %b, %c, %a"


def test_ops_that_do_not_change_are_shared() -> None:
    found = rebuild(FUNC, split)
    assert found.ops[-1] is FUNC.ops[-1]
    assert found.ops[-2] is not FUNC.ops[-2]  # it reads a new value
    assert found.params == FUNC.params
    assert rebuild(FUNC, lambda op, b: None) is FUNC
    assert rebuild(FUNC, lambda op, b: op.results) is FUNC


def test_ids_already_taken_are_passed_over() -> None:
    def again(op: Op, b: Builder) -> tuple[Value, ...] | None:
        match op:
            case Mul(a=x, b=gate):
                return b.emit(Mul(b.emit(Neg(x)).result, b.emit(Neg(gate)).result)).results
            case Sigmoid(x=x):
                return b.emit(Sigmoid(b.emit(Neg(b.emit(Neg(x)).result)).result)).results
        return None

    found = rebuild(rebuild(FUNC, split), again)
    assert [op.id for op in found.ops] == ["mlp#3.1.1", "mlp#3.1.2", "mlp#3.1", "mlp#3.2", "mlp#3.3", "mlp#3", "mlp#4", "mlp#5"]
    assert [op.phase.name for op in found.ops] == list("IIIIIIWF")
    verify(Module((found,), "differentiated"))


def test_a_value_that_was_there_already_needs_no_new_op() -> None:
    found = rebuild(FUNC, lambda op, b: (op.x,) if isinstance(op, Silu | Neg) else None)
    assert [op.id for op in found.ops] == ["mlp#5"]
    assert found.results == (FUNC.params[0], FUNC.ops[2].result, FUNC.params[0])


def test_extra_ops_beside_an_old_value_are_numbered() -> None:
    found = rebuild(FUNC, lambda op, b: (b.emit(Exp(op.x)).result and op.x,) if isinstance(op, Silu) else None)
    assert [op.id for op in found.ops] == ["mlp#3.1", "mlp#4", "mlp#5"]


def test_ops_that_bring_an_id_keep_it() -> None:
    found = rebuild(FUNC, lambda op, b: b.emit(op.copy(x=FUNC.params[1])).results if isinstance(op, Neg) else None)
    assert [op.id for op in found.ops] == ["mlp#3", "mlp#4", "mlp#5"]
    assert found.ops[1].operands == (FUNC.params[1],)


def test_several_results_are_replaced_together() -> None:
    func = dsc.parse("func @f(%x: f32[4]) {\n  %v: f32[2], %i: i64[2] = topk(%x, k=2)  @ f#1 F\n  return %i, %v\n}").main

    def other(op: Op, b: Builder) -> tuple[Value, ...]:
        made = b.emit(TopK(b.emit(Neg(op.operands[0])).result, k=2))
        return b.emit(Neg(made.results[0])).result, made.results[1]

    assert text(rebuild(func, other)) == (
        "  %neg: f32[4] = neg(%x)  @ f#1.1 F\n"
        "  %topk_0: f32[2], %i: i64[2] = topk(%neg, k=2)  @ f#1.2 F\n"
        "  %v: f32[2] = neg(%topk_0)  @ f#1 F\n"
    )


def test_ops_without_ids_stay_without() -> None:
    func = dsc.parse("func @f(%x: f32[4]) {\n  %y: f32[4] = silu(%x)\n  return %y\n}").main
    assert [op.id for op in rebuild(func, split).ops] == ["", ""]


def test_a_replacement_of_another_type_is_refused() -> None:
    message = r"^silu mlp#3: %a is f32\[4, 4\], but its replacement is bf16\[4, 4\]$"
    with pytest.raises(dsc.DscError, match=message):
        rebuild(FUNC, lambda op, b: b.emit(Cast(op.x, DType.bf16)).results if isinstance(op, Silu) else None)


def test_results_and_updates_follow() -> None:
    def doubled(op: Op, b: Builder) -> tuple[Value, ...] | None:
        return b.emit(Add(op.x, op.x)).results if isinstance(op, Exp) else None

    found = rebuild(FUNC, doubled)
    assert found.updates == {1: 1}
    assert isinstance(found.results[1].owner, Add)


@given(programs())
def test_a_copy_of_every_op_is_the_same_program(program: tuple[Module, object]) -> None:
    module, _ = program

    def copied(op: Op, b: Builder) -> tuple[Value, ...]:
        return b.emit(op.copy(id="")).results

    again = verify(module.map(lambda func: rebuild(func, copied)))
    assert again == module
    assert str(again) == str(module)
    assert not any(isinstance(op, Call | Unpack) and op in module.main.ops for op in again.main.ops)

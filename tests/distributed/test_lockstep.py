"""All ranks in one process: who waits for whom, what is said of those who never meet, and derivatives across ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

import dsc
from dsc import DscError, backends
from dsc.distributed import local
from dsc.distributed.world import Exchange, Gather, Index, Program, Receive, Send, Start, Wait, alone
from dsc.ir.mesh import Mesh, mesh_of, parse_mesh
from dsc.ir.verify import verify

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def gather(axis: str, size: int, x: np.ndarray = X, op: str = "", site: str = "") -> Program[np.ndarray]:
    found = yield Gather(axis, size, x, op=op, site=site)
    return np.concatenate(found)


def message(mesh: Mesh, program: Callable[[int], Program[object]]) -> str:
    with pytest.raises(DscError) as error:
        local.run(mesh, program)
    return str(error.value)


def test_ranks_that_meet_elsewhere_are_listed() -> None:
    mesh = parse_mesh("dp=2,tp=2")
    found = message(mesh, lambda rank: gather("dp" if rank == 3 else "tp", 2, op="all_gather", site=f"@main main#{rank // 3}"))
    assert found == (
        "2 of 4 ranks wait for ever:\n"
        "  ranks 0, 1  finished\n"
        "  rank 2      all_gather at @main main#0, for rank 3\n"
        "  rank 3      all_gather at @main main#1, for rank 1"
    )


def test_a_rank_that_has_finished_is_waited_for() -> None:
    def program(rank: int) -> Program[int]:
        if rank != 5:
            yield Gather("world", 6, X)
        return rank

    assert message(parse_mesh("dp=6"), program) == (
        "5 of 6 ranks wait for ever:\n  ranks 0 to 4  gather along world, for rank 5\n  rank 5        finished"
    )


def test_two_who_send_to_each_other_wait_for_ever() -> None:
    def program(rank: int) -> Program[None]:
        yield Send("pp", 2, (X,), 1 - rank)
        yield Receive("pp", 2, (X,), 1 - rank)

    found = message(parse_mesh("pp=2"), program)
    assert found.split("\n")[1:] == ["  rank 0  send along pp to 1, for rank 1", "  rank 1  send along pp to 0, for rank 0"]


def test_different_ops_along_one_axis() -> None:
    found = message(parse_mesh("tp=2"), lambda rank: gather("tp", 2, op="all_gather(f32[2])" if rank else "all_reduce(f32[2])"))
    assert found == "ranks meet along tp with different ops:\n  rank 0  all_reduce(f32[2])\n  rank 1  all_gather(f32[2])"


@pytest.mark.parametrize("other", [X[:1], X.astype(np.int32)])
def test_different_shapes_and_dtypes(other: np.ndarray) -> None:
    found = message(parse_mesh("tp=2"), lambda rank: gather("tp", 2, other if rank else X))
    assert found == (
        "ranks gather arrays of different types along tp, gather along tp:\n"
        f"  rank 0  float32[2, 3]\n  rank 1  {other.dtype}[{len(other)}, 3]"
    )


def test_rows_that_are_not_expected() -> None:
    def program(rank: int) -> Program[None]:
        yield Exchange("ep", 2, ((X[:1],), (X[:2],)), (((1, 3),), ((1, 3),)))

    assert message(parse_mesh("dp=2,ep=2"), program) == "rank 0 sends [2, 3], but rank 1 expects [1, 3]: exchange along ep"


def test_what_is_sent_has_to_be_what_is_received() -> None:
    def program(rank: int) -> Program[None]:
        yield Receive("pp", 2, (X[:1],), 0) if rank else Send("pp", 2, (X,), 1)

    assert message(parse_mesh("pp=2"), program) == "rank 0 sends float32[2, 3], but rank 1 expects float32[1, 3]: send along pp to 1"


def test_a_size_that_is_not_the_meshs() -> None:
    found = message(parse_mesh("tp=2"), lambda rank: gather("tp", 4))
    assert found == "rank 0: gather along tp: the mesh pp=1,dp=1,ep=1,tp=2 has 2 ranks along tp"


def test_an_error_names_its_rank_and_ends_the_others() -> None:
    ended = []

    def program(rank: int) -> Program[None]:
        try:
            if rank == 2:
                raise DscError("no room for 7 rows")
            yield Gather("world", 3, X)
        finally:
            ended.append(rank)

    assert message(parse_mesh("dp=3"), program) == "rank 2: no room for 7 rows"
    assert sorted(ended) == [0, 1, 2]


def test_a_rank_knows_its_place() -> None:
    def program(rank: int) -> Program[tuple[int, int]]:
        return (yield Index("pp", 2)), (yield Index("tp", 3))

    assert local.run(parse_mesh("pp=2,tp=3"), program) == [(p, t) for p in range(2) for t in range(3)]


def test_one_rank_alone() -> None:
    np.testing.assert_array_equal(alone(gather("tp", 1)), X)
    with pytest.raises(DscError) as error:
        alone(gather("tp", 4, op="all_gather(f32[2])", site="@main main#3"))
    hint = "run by 4 ranks together, and this is one: run it with --ranks local, or under torchrun"
    assert str(error.value) == f"all_gather(f32[2]) at @main main#3 is {hint}"


def test_what_is_started_waits_for_nobody_until_it_is_waited_for() -> None:
    """Answers come in the order in which the requests of an axis began, whenever they are waited for."""
    went_on = []

    def program(rank: int) -> Program[list[np.ndarray]]:
        first = yield Start(Gather("dp", 2, X + rank))
        second = yield Start(Gather("dp", 2, X - rank))
        went_on.append(rank)
        third = yield Gather("tp", 2, X * rank)
        return [np.stack(found) for found in ((yield Wait(second)), (yield Wait(first)), third)]

    mesh = parse_mesh("dp=2,tp=2")
    for rank, (second, first, third) in enumerate(local.run(mesh, program)):
        np.testing.assert_array_equal(first, [X + r for r in mesh.group("dp", rank)])
        np.testing.assert_array_equal(second, [X - r for r in mesh.group("dp", rank)])
        np.testing.assert_array_equal(third, [X * r for r in mesh.group("tp", rank)])
    assert went_on == [0, 1, 2, 3]  # each goes on when it has started both, before the others have


def test_sends_that_are_started_cross() -> None:
    def program(rank: int) -> Program[np.ndarray]:
        sent = yield Start(Send("pp", 2, (X + rank,), 1 - rank))
        (found,) = yield Receive("pp", 2, (X,), 1 - rank)
        assert (yield Wait(sent)) is None
        return found

    np.testing.assert_array_equal(local.run(parse_mesh("pp=2"), program), [X + 1, X])


def test_an_order_that_differs_is_told_when_ranks_meet() -> None:
    def swapped(rank: int) -> Program[None]:
        tickets = []
        for op in ("dispatch", "combine")[:: -1 if rank else 1]:
            tickets.append((yield Start(Gather("ep", 2, X, op=op))))
        for ticket in tickets:
            yield Wait(ticket)

    found = message(parse_mesh("dp=2,ep=2"), swapped)
    assert found == "ranks meet along ep with different ops:\n  rank 0  dispatch\n  rank 1  combine"


def test_a_start_that_nobody_answers_is_in_the_table() -> None:
    def program(rank: int) -> Program[None]:
        ticket = yield Start(Gather("tp", 2, X, op="all_gather", site="@main main#1"))
        if rank == 0:
            yield Wait((yield Start(Gather("tp", 2, X, op="all_gather", site="@main main#2"))))
        yield Wait(ticket)

    found = message(parse_mesh("tp=2"), program)
    assert found.split("\n")[1:] == ["  rank 0  all_gather at @main main#2, for rank 1", "  rank 1  finished"]


def test_nobody_sends_to_himself() -> None:
    def program(rank: int) -> Program[None]:
        yield Send("pp", 2, (X,), rank)

    assert message(parse_mesh("pp=2"), program) == "rank 0: send along pp to 0: a rank does not send to itself"


HEAD = """
module {{ stage=scheduled, mesh={{dp=3}} }}
func @main(%x: f32[6, 2]) {{"""
APART = """
  %t: async {type} = {call}, start=true)  @ moe#1.1 F
  %n: f32[6, 2] = neg(%x)  @ moe#2 F
  %y: {type} = done([%t])  @ moe#1 F
  return %y, %n
}}
"""
AT_ONCE = """
  %y: {type} = {call})  @ moe#1 F
  %n: f32[6, 2] = neg(%x)  @ moe#2 F
  return %y, %n
}}
"""


@pytest.mark.parametrize(
    ("type", "call"),
    [
        ("f32[18, 2]", 'all_gather(%x, axis="dp", size=3'),
        ("f32[2, 2]", 'reduce_scatter(%x, axis="dp", size=3'),
        ("f32[6, 2]", 'all_reduce(%x, axis="dp", size=3'),
        ("f32[6, 2]", 'all_to_all(%x, axis="dp", size=3'),
    ],
)
def test_a_collective_in_two_ops_gives_what_it_gives_in_one(type: str, call: str) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 6, 2)).astype(np.float32)

    def run(body: str) -> tuple[list[np.ndarray], list[str]]:
        module, seen = dsc.parse((HEAD + body).format(type=type, call=call)), list[str]()
        runner = backends.get("numpy")
        found = local.run(
            mesh_of(module), lambda rank: runner.program(module, None, (inputs[rank],), lambda site, *_: seen.append(site.op))
        )
        return [x for results in found for x in results], sorted(seen)

    (apart, seen), (at_once, expected) = run(APART), run(AT_ONCE)
    assert all(map(np.array_equal, apart, at_once))
    assert seen == expected == ["moe#1"] * 3 + ["moe#2"] * 3  # a start has nothing to show: its done has


@pytest.mark.parametrize("backend", ["numpy", "numpy-f64", "triton"])
def test_the_largest_of_zeros_is_zero(backend: str) -> None:
    """NumPy and torch give either of 0 and -0, as vector lanes have it: here -0 is the largest of -0 alone."""

    def no_weights(*_: object) -> np.ndarray:
        raise AssertionError

    negative = np.array([[bit >> rank & 1 for bit in range(12)] for rank in range(3)], bool).reshape(3, 6, 2)
    inputs = np.where(negative, np.float32(-0.0), np.float32(0.0))
    module, runner = (
        dsc.parse((HEAD + AT_ONCE).format(type="f32[6, 2]", call='all_reduce(%x, axis="dp", size=3, kind="max"')),
        backends.get(backend),
    )
    for y, _ in local.run(mesh_of(module), lambda rank: runner.program(module, no_weights, (inputs[rank],))):
        assert np.array_equal(np.signbit(y), negative.all(axis=0))


ROWS = """
module {{ stage=sharded, mesh={{dp=4, ep=4}} }}
func @main(%x: f32[rows<=9, 2], %n: i32[4], %m: i32[4]) {{
  %y: f32[got<={room}, 2] = all_to_all_rows([%x], %n, %m, axis="ep", size=4, rows={{name="got", bound={room}}})  @ moe#1 F
  return %y
}}
"""


def test_more_rows_than_there_is_room_for() -> None:
    counts = np.full((4, 4), 2, np.int32)
    inputs = (np.ones((8, 2), np.float32), counts[0], counts[1])
    module = dsc.parse(ROWS.format(room=7))
    found = message(mesh_of(module), lambda rank: backends.get("numpy").program(module, None, inputs))
    assert found == "rank 0: @main moe#1: all_to_all_rows: 8 rows arrive, but there is room for 7: got<=7"


def test_two_thousand_ranks_meet() -> None:
    found = local.run(parse_mesh("pp=16,dp=128,ep=64"), lambda rank: gather("ep", 64))
    assert len(found) == 2048


def law_breakers() -> dict[str, tuple[str, str]]:
    op = '%y: f32[{n}] = all_gather(%x, axis="{axis}", size=2)  @ a#1 F'
    text = f"module {{{{ stage={{stage}}{{mesh}} }}}}\nfunc @main(%x: f32[4]) {{{{\n  {op}\n  return %y\n}}}}"
    mesh = ", mesh={dp=4, ep=2}"
    return {
        "no mesh": (text.format(stage="sharded", mesh="", n=8, axis="dp"), "all_gather: the module has no mesh: it was not sharded"),
        "another size": (
            text.format(stage="lowered", mesh=mesh, n=8, axis="dp"),
            "all_gather: size is 2, but the mesh pp=1,dp=4,ep=2,tp=1 has 4 ranks along dp",
        ),
        "no axis": (text.format(stage="sharded", mesh=mesh, n=8, axis="cp"), "all_gather: mesh pp=1,dp=4,ep=2,tp=1 has no axis cp"),
        "before": (text.format(stage="traced", mesh="", n=8, axis="dp"), ""),
        "right": (text.format(stage="sharded", mesh=mesh, n=8, axis="ep"), ""),
    }


@pytest.mark.parametrize("case", law_breakers())
def test_the_law_of_sizes(case: str) -> None:
    text, expected = law_breakers()[case]
    if not expected:
        verify(dsc.parse(text))
        return
    with pytest.raises(DscError, match=expected.replace(",", r"\,").split("; it")[0]):
        verify(dsc.parse(text))


def test_simplify_and_recompute_leave_collectives_alone() -> None:
    text = """
    module { stage=sharded, mesh={dp=2, ep=2} }
    func @main(%x: f32[4]) {
      %a: f32[8] = call(@inner, [%x], weights="a")  @ main#1 F
      %b: f32[8] = call(@inner, [%x], weights="a")  @ main#2 F
      %c: f32[4] = call(@plain, [%x])  @ main#3 F
      return %a
    }
    func @inner(%x: f32[4]) {
      %y: f32[8] = all_gather(%x, axis="dp", size=2)  @ inner#1 F
      %z: f32[8] = all_gather(%x, axis="dp", size=2)  @ inner#2 F
      %n: f32[8] = neg(%y)  @ inner#3 F
      return %z
    }
    func @plain(%x: f32[4]) {
      %y: f32[4] = neg(%x)  @ plain#1 F
      return %y
    }
    """
    from dsc.passes.pairs import can_rerun

    after = dsc.apply(dsc.parse(text), "simplify")
    assert [op.id for op in after.main.ops] == ["main#1", "main#2"]
    assert [op.id for op in after["inner"].ops] == ["inner#1", "inner#2"]
    assert not any(map(can_rerun, after["inner"].ops))


TRANSPOSED = {
    "all_gather": ("f64[3, 2]", "f64[3, 8]", 'all_gather(%x, axis="ep", size=4, dim=1)'),
    "reduce_scatter": ("f64[3, 8]", "f64[3, 2]", 'reduce_scatter(%x, axis="ep", size=4, dim=1)'),
    "all_reduce": ("f64[3, 2]", "f64[3, 2]", 'all_reduce(%x, axis="ep", size=4)'),
    "all_reduce max": ("f64[3, 2]", "f64[3, 2]", 'all_reduce(%x, axis="ep", size=4, kind="max")'),
    "all_to_all": ("f64[8, 2]", "f64[8, 2]", 'all_to_all(%x, axis="ep", size=4)'),
    "all_to_all_rows": ("f64[10, 2]", "f64[10, 2]", 'all_to_all_rows([%x], %n, %m, axis="ep", size=4, rows=10)'),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_derivative_is_that_of_the_sum_over_ranks(case: str) -> None:
    """With f the sum, over the ranks, of <c, y> of each: the derivative of f by every rank's x, against central differences in float64."""
    given, result, call = TRANSPOSED[case]
    text = f"""
    func @main(%c: {result}, %n: i32[4], %m: i32[4]) {{
      %x: {given} = param("x")  @ main#1 F
      %y: {result} = {call}  @ main#2 F
      %z: {result} = mul(%y, %c)  @ main#3 F
      %loss: f64[] = sum(%z, axes=[0, 1])  @ main#4 F
      return %loss
    }}
    """
    mesh = parse_mesh("dp=4,ep=4")
    module = dsc.apply(dsc.parse(text), "autodiff")
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.array([[4, 0, 3, 3], [3, 4, 0, 3], [0, 3, 4, 3], [3, 3, 3, 1]], np.int32), axis=0)
    xs = rng.standard_normal((4, *module_shape(given)))
    cs = rng.standard_normal((4, *module_shape(result)))
    step = rng.standard_normal(xs.shape)

    def run(rank: int, at: np.ndarray) -> Program[tuple[object, ...]]:
        inputs = (cs[rank], counts[rank], counts[:, rank].copy())
        return backends.get("numpy").program(module, lambda *_: at[rank], inputs)

    def total(at: np.ndarray) -> float:
        return sum(float(loss) for loss, _ in local.run(mesh, partial(run, at=at)))

    gradients = np.stack([bundle[0] for _, bundle in local.run(mesh, partial(run, at=xs))])
    h = 1e-6
    difference = (total(xs + h * step) - total(xs - h * step)) / (2 * h)
    assert abs(float((gradients * step).sum()) - difference) < 1e-7 * max(1.0, abs(difference))


def module_shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text[text.index("[") + 1 : -1].split(","))

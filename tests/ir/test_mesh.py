"""The mesh: its views lie over the same ranks, and one that cannot be says what would fit."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsc import DscError
from dsc.ir.core import Module
from dsc.ir.mesh import Mesh, mesh_of, parse_mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    pp, dp, tp, node = (draw(st.sampled_from((1, 2, 3, 4, 8))) for _ in range(4))
    ep = draw(st.sampled_from([n for n in range(1, dp * tp + 1) if dp * tp % n == 0]))
    try:
        return Mesh(pp, dp, ep, tp, node)
    except DscError:
        assume(False)
        raise


@given(mesh=meshes())
def test_every_axis_parts_the_ranks_into_groups(mesh: Mesh) -> None:
    for axis in mesh.axes:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        for group in groups:
            assert len(group) == mesh.size(axis)
            for index, rank in enumerate(group):
                assert mesh.group(axis, rank) == group
                assert mesh.index(axis, rank) == index


@given(mesh=meshes())
def test_both_views_number_the_same_ranks(mesh: Mesh) -> None:
    for rank in range(mesh.world):
        at = {axis: mesh.index(axis, rank) for axis in mesh.axes}
        assert (at["pp"] * mesh.dp + at["dp"]) * mesh.tp + at["tp"] == rank
        assert (at["pp"] * mesh.edp + at["edp"]) * mesh.ep + at["ep"] == rank
        assert at["ep.node"] * mesh.size("ep.local") + at["ep.local"] == at["ep"]


@given(mesh=meshes())
def test_hops_cross_nodes_and_stay_in_them(mesh: Mesh) -> None:
    for rank in range(mesh.world):
        assert not any(mesh.crosses(rank, other) for other in mesh.group("ep.local", rank))
        assert all(mesh.crosses(rank, other) for other in mesh.group("ep.node", rank) if other != rank)
        by_two_hops = {b for a in mesh.group("ep.node", rank) for b in mesh.group("ep.local", a)}
        assert by_two_hops == set(mesh.group("ep", rank))


@given(mesh=meshes())
def test_a_mesh_survives_its_text_and_its_record(mesh: Mesh) -> None:
    assert parse_mesh(str(mesh)) == mesh
    assert parse_mesh(str(mesh), ranks=mesh.world) == mesh
    assert mesh_of(Module((), attributes={"mesh": mesh.record()})) == mesh


@pytest.mark.parametrize(
    ("text", "ranks", "dp"),
    [
        *(("", None, 1), ("ep=4", None, 4), ("ep=4,tp=2", None, 2), ("ep=2,tp=8", None, 1)),
        *(("pp=2,ep=4", 16, 8), ("tp=2", 6, 3), ("pp=16,ep=64", 2048, 128)),
    ],
)
def test_an_omitted_dp_is_filled(text: str, ranks: int | None, dp: int) -> None:
    assert parse_mesh(text, ranks).dp == dp


WRONG = {
    ("qq=2", None): "mesh 'qq=2': unknown 'qq', expected pp, dp, ep, tp, node",
    ("dp=2,dp=2", None): "mesh 'dp=2,dp=2': dp stands twice",
    ("dp=0", None): "mesh 'dp=0': dp=0, expected a whole number, 1 or more",
    ("ep=3,dp=4", None): "mesh pp=1,dp=4,ep=3,tp=1: ep=3 does not divide dp x tp = 4 x 1 = 4; ep = 1, 2, 4 or dp=3 would fit",
    ("pp=2,tp=2", 6): "mesh 'pp=2,tp=2': 6 ranks are not a multiple of pp x tp = 2 x 2; 4 or 8 ranks would fit",
    ("dp=2,ep=2", 8): "mesh pp=1,dp=2,ep=2,tp=1 is pp x dp x tp = 1 x 2 x 1 = 2 ranks, found 8; dp=8 would fit",
    ("dp=2,tp=2", 7): "mesh pp=1,dp=2,ep=1,tp=2 is pp x dp x tp = 1 x 2 x 2 = 4 ranks, found 7",
    ("dp=12,ep=6", None): (
        "mesh pp=1,dp=12,ep=6,tp=1: groups of ep=6 do not fit nodes of 8 ranks; 1, 2, 4, 8 or a multiple of 8 would"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), WRONG.items(), ids=str)
def test_a_mesh_that_cannot_be_says_what_would_fit(given: tuple[str, int | None], expected: str) -> None:
    with pytest.raises(DscError) as error:
        parse_mesh(*given)
    assert str(error.value) == expected


def test_an_axis_that_is_not_there() -> None:
    with pytest.raises(
        DscError, match=r"mesh pp=1,dp=1,ep=1,tp=1 has no axis cp; it has pp, dp, tp, stage, edp, ep, ep\.node, ep\.local, world"
    ):
        Mesh().size("cp")

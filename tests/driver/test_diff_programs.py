"""`dsc diff`: what is the same, what differs first, whose experts changed, and that seeded faults are found where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc import backends
from dsc.backends import Site
from dsc.driver.align import align
from dsc.driver.diff import Report
from dsc.ir.core import Module, Op
from dsc.ir.ops.elementwise import SwiGLU
from dsc.ir.ops.moe import Route
from dsc.ir.ops.norm import RmsNorm, Rope
from dsc.passes.rewrite import rebuild


@pytest.mark.parametrize("mode", ["forward", "train", "decode"])
def test_a_program_is_the_same_as_itself(command: Any, tiny: Path, tiny_modes: dict[str, Path], mode: str) -> None:
    path = {"forward": tiny, **tiny_modes}[mode]
    done = command("diff", path, path)
    assert done.code == 0
    report = command("diff", path, "--json").json
    ran = sum(1 for entry in executed(dsc.load(path).module))
    assert report["same"] is True
    assert len(report["ops"]) == ran
    assert all(op["equal"] and op["accumulated"]["relative_l2"] == 0 for op in report["ops"])
    assert (report["first"], report["worst"], report["only_in_a"], report["only_in_b"]) == (None, None, [], [])
    assert f"same (equal bits): {ran} ops compared, {ran} with equal bits" in done.out


def executed(module: Module) -> list[str]:
    """The sites of a run, in order."""
    found: list[str] = []
    dsc.run(module, observe=lambda site, *rest: found.append(str(site)))
    return found


def test_every_execution_has_a_site_of_its_own(tiny_modes: dict[str, Path]) -> None:
    """In training the embedding and the head run twice with the same weights."""
    sites = executed(dsc.load(tiny_modes["train"]).module)
    assert len(sites) == len(set(sites))
    assert "@head_fwd (lm_head) head#2" in sites
    assert "@head_fwd (lm_head, run 2) head#2" in sites
    assert str(Site("shift", "", "shift#1", 2)) == "@shift (run 2) shift#1"


def test_bf16_and_float32(command: Any, tiny: Path, tiny_float32: Path) -> None:
    """The errors are those of BF16: 2^-9 relative at a rounding, growing through the layers, far from wrong."""
    assert command("diff", tiny, tiny_float32).code == 1
    report = dsc.diff(dsc.load(tiny), dsc.load(tiny_float32))
    by_site = {op.site: op for op in report.ops}
    embedding = by_site["@embedding (model.embed_tokens) embedding#1"]
    assert report.first == embedding.site
    assert embedding.type == "f32[320, 144]"
    # of a number in [1, 2) BF16 keeps 2^-7, so the error is uniform in 2^-8 either way: 2^-8 / sqrt(3) of 1, half of that of 2
    assert 2**-9 < embedding.accumulated.relative_l2 * 3**0.5 < 2**-8
    assert all(op.accumulated.sqnr_db > 40 for op in report.ops if ".layers.0" in op.site)
    (logits,) = report.outputs_forced or report.outputs
    assert 2**-9 < logits.accumulated.relative_l2 < 2**-9 * 16
    gate = by_site["@decoder_layer_1 (model.layers.1) mlp.gate#6"]
    assert gate.op == "route"
    assert len(report.routing) == 2
    assert all(op.local.relative_l2 < 2**-8 for op in report.ops if op.local and op.op != "route")
    assert not report.only_in_b
    assert {site.split()[-1] for site in report.only_in_a} == {"mlp.gate#1", "mlp.gate#3"}, "the casts that only BF16 needs"
    wide = report.outputs[0].accumulated.relative_l2 * 1.01
    assert dsc.diff(dsc.load(tiny), dsc.load(tiny_float32), tolerance=max(1.0, wide)).same


def test_ids_that_count_other_ops_are_matched_by_kind(tiny: Path, tiny_float32: Path) -> None:
    a, b = dsc.load(tiny).module, dsc.load(tiny_float32).module
    for first, second in ((a, b), (b, a)):
        ids = align(first, second)
        for (func, id_b), id_a in ids.items():
            op_a, op_b = (next(op for op in m[func].ops if op.id == id) for m, id in ((first, id_a), (second, id_b)))
            assert op_a.name == op_b.name
            assert [getattr(r.type, "shape", None) for r in op_a.results] == [getattr(r.type, "shape", None) for r in op_b.results]
        assert len({(func, id_a) for (func, _), id_a in ids.items()}) == len(ids), "an op is matched twice"
    pairs = {id_b: id_a for (func, id_b), id_a in align(a, b).items() if func == "decoder_layer_1" and id_b.startswith("mlp.gate#")}
    assert pairs == {"mlp.gate#1": "mlp.gate#2", "mlp.gate#2": "mlp.gate#4", "mlp.gate#3": "mlp.gate#5", "mlp.gate#4": "mlp.gate#6"}


def test_ids_decide_where_a_pass_has_kept_them(tiny: Path) -> None:
    module = dsc.load(tiny).module
    quantised = dsc.apply(module, "quantize-fp8")
    ids = align(module, quantised)
    kept = {(func.name, op.id) for func in module.funcs for op in func.ops}
    assert {(func, id_b) for (func, id_b), id_a in ids.items() if id_a == id_b} == kept
    assert len(ids) == len(kept)


def change(module: Module, func: str, kind: type[Op], fault: Callable[[Any], Op], nth: int = 0) -> tuple[Module, str]:
    """The module with a fault in the nth op of a kind in one function, and that op's id."""
    target = [op for op in module[func].ops if isinstance(op, kind)][nth]

    def rule(op: Op, b: Any) -> Any:
        return b.emit(fault(op)).results if op.id == target.id else None

    return module.replace(funcs=tuple(rebuild(f, rule) if f.name == func else f for f in module.funcs)), target.id


FAULTS: dict[str, tuple[type[Op], Callable[[Any], Op], int]] = {
    "eps": (RmsNorm, lambda op: op.copy(eps=1e-2), 2),
    "operands swapped": (SwiGLU, lambda op: op.copy(gate=op.up, up=op.gate), 1),
    "rotation": (Rope, lambda op: op.copy(interleaved=not op.interleaved), 1),
    "no bias in the choice of experts": (Route, lambda op: op.copy(bias=None), 0),
    "gate not scaled": (Route, lambda op: op.copy(scale=1.0), 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_op_that_differs_is_the_faulty_one(tiny: Path, name: str) -> None:
    module = dsc.load(tiny).module
    kind, fault, nth = FAULTS[name]
    faulty, id = change(module, "decoder_layer_1", kind, fault, nth)
    assert faulty != module
    report = dsc.diff(module, faulty)
    assert not report.same
    assert report.first == f"@decoder_layer_1 (model.layers.1) {id}"
    assert report.worst is not None
    assert report.worst.endswith(f" {id}"), "handed the right operands, only the faulty op differs"
    locally_wrong = {op.site for op in report.ops if op.local and op.local.relative_l2 > 0}
    assert locally_wrong == {f"@decoder_layer_1 (model.layers.{i}) {id}" for i in (1, 2)}


def test_a_fault_in_a_weight_is_found_there(tiny: Path) -> None:
    """Another weight at one place: the first difference is the weight itself."""
    module = dsc.load(tiny).module
    faulty, id = change(module, "head", type(module["head"].ops[0]), lambda op: op.copy(path="bias"), 0)
    assert dsc.diff(module, faulty).first == f"@head (lm_head) {id}"


def test_tokens_that_changed_experts_are_counted_and_kept_apart(tiny: Path) -> None:
    """Forced: the first three tokens are sent elsewhere at the first gate, and nothing else is done to them."""
    module = dsc.load(tiny).module
    report = dsc.diff(module, change(module, "decoder_layer_1", Route, lambda op: op.copy(bias=None))[0])
    runs = [routes(module), routes(change(module, "decoder_layer_1", Route, lambda op: op.copy(bias=None))[0])]
    counts = [int((np.sort(a, -1) != np.sort(b, -1)).any(-1).sum()) for a, b in zip(*runs, strict=True)]
    assert [(gate.tokens, gate.changed) for gate in report.routing] == [(16, n) for n in counts]
    assert counts[0] > 0


def routes(module: Module) -> list[np.ndarray]:
    """The experts that each gate chose."""
    found: list[np.ndarray] = []

    def note(site: Any, op: Op, operands: Any, results: Any) -> None:
        if isinstance(op, Route):
            found.append(results[0])

    dsc.run(module, observe=note)
    return found


class Moving:
    """The interpreter, but the gate of the first MoE layer sends token 5 to other experts."""

    def run(self, module: Module, weights: Any, inputs: Any, observe: Any = None) -> Any:
        def observer(site: Site, op: Op, operands: Any, results: Any) -> Any:
            if isinstance(op, Route) and site.weights == "model.layers.1":
                ids = results[0].copy()
                ids[5] = (ids[5] + 1) % 16
                results = (ids, results[1])
            changed = observe(site, op, operands, results) if observe else None
            return results if changed is None else changed

        return backends.get("numpy").run(module, weights, inputs, observer)

    def evaluate(self, op: Op, operands: Any) -> Any:
        return backends.get("numpy").evaluate(op, operands)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that moves one token."""
    monkeypatch.setitem(backends.LOADERS, "moving", Moving)
    backends.get.cache_clear()


@pytest.mark.usefixtures("moving")
def test_rows_of_experts_are_matched_by_token(tiny: Path) -> None:
    """A token that moves shifts the rows behind it; those of the other tokens still compare equal in that layer."""
    report = dsc.diff(dsc.load(tiny), backends=("numpy", "moving"))
    by_site = {op.site: op for op in report.ops}
    assert report.routing[0].changed == 1
    for site in executed(dsc.load(tiny).module):
        if site.startswith("@decoder_layer_1 (model.layers.1) mlp.experts#"):
            matched = by_site[site]
            if matched.op in ("grouped_matmul", "swiglu"):
                # not 0: a product of other groups is summed in other blocks, and a rounding to BF16 may flip
                assert matched.accumulated.relative_l2 < 2**-9, "rows of tokens that did not move are the same"
    combined = by_site["@decoder_layer_1 (model.layers.1) mlp.experts#9"]
    assert combined.op == "combine"
    assert combined.accumulated.relative_l2 > 0.05
    assert combined.same_experts is not None
    assert combined.same_experts.relative_l2 < 2**-9
    assert report.outputs_forced[0].accumulated.relative_l2 == 0, "routed as the first, the moving backend is the first"
    assert not report.same


def test_two_backends(command: Any, tiny: Path, tiny_modes: dict[str, Path], tiny_float32: Path) -> None:
    """Float32 sums against float64 ones: each op within its bound, so exit code 0, though few bits are equal."""
    for path in (tiny, tiny_float32, *tiny_modes.values()):
        done = command("diff", path, "--backends", "numpy,numpy-f64", "--json")
        assert done.code == 0, path
        ratios = [op["bound_ratio"] for op in done.json["ops"] if op["bound_ratio"] is not None]
        assert 0 < max(ratios) <= 1
        assert not all(op["equal"] for op in done.json["ops"])


class Sloppy:
    """The interpreter, but its sums of the norm lack their last part."""

    def run(self, module: Module, weights: Any, inputs: Any, observe: Any = None) -> Any:
        def observer(site: Site, op: Op, operands: Any, results: Any) -> Any:
            if isinstance(op, RmsNorm) and site.weights == "model.layers.2":
                results = (np.nextafter(results[0].astype(np.float32) * 1.02, 9).astype(results[0].dtype),)
            changed = observe(site, op, operands, results) if observe else None
            return results if changed is None else changed

        return backends.get("numpy").run(module, weights, inputs, observer)

    def evaluate(self, op: Op, operands: Any) -> Any:
        return backends.get("numpy").evaluate(op, operands)


def test_a_backend_beyond_its_bound_is_named(command: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.LOADERS, "sloppy", Sloppy)
    backends.get.cache_clear()
    done = command("diff", tiny, "--backends", "numpy,sloppy", "--json")
    assert done.code == 1
    report = done.json
    assert report["first"] == "@decoder_layer_1 (model.layers.2) input_layernorm#2"
    beyond = {
        op["site"] for op in report["ops"] if op["bound_ratio"] is not None and float(op["bound_ratio"]) > 1
    }  # "inf" where none is permitted
    norms = ("input_layernorm#2", "post_attention_layernorm#2", "self_attn.q_a_layernorm#2", "self_attn.kv_a_layernorm#2")
    assert beyond == {f"@decoder_layer_1 (model.layers.2) {norm}" for norm in norms}
    text = command("diff", tiny, "--backends", "numpy,sloppy")
    assert text.code == 1
    assert "first: @decoder_layer_1 (model.layers.2) input_layernorm#2\n" in text.out


def test_tolerance(tiny: Path) -> None:
    module = dsc.load(tiny).module
    faulty, _ = change(module, "final_norm", RmsNorm, lambda op: op.copy(eps=1e-3))
    error = max(op.accumulated.relative_l2 for op in dsc.diff(module, faulty).ops)
    assert 0 < error < 0.01
    assert not dsc.diff(module, faulty, tolerance=error * 0.99).same
    assert dsc.diff(module, faulty, tolerance=error * 1.01).same


def test_programs_with_nothing_in_common_are_not_the_same() -> None:
    one = dsc.parse("func @main(%x: f32[2]) {\n  %y: f32[2] = neg(%x)  @ a#1 F\n  return %y\n}\n")
    other = dsc.parse("func @other(%x: f32[2]) {\n  %y: f32[2] = neg(%x)  @ b#1 F\n  return %y\n}\n")
    report = dsc.diff(one, other)
    assert not report.same
    assert (len(report.only_in_a), len(report.only_in_b)) == (1, 1)
    more = dsc.parse("func @main(%x: f32[2]) {\n  %y: f32[2] = neg(%x)  @ a#1 F\n  return %y, %x\n}\n")
    assert not dsc.diff(one, more).same


def test_the_report_as_an_object_and_as_json(command: Any, tiny: Path, tiny_float32: Path) -> None:
    report = dsc.diff(dsc.load(tiny), dsc.load(tiny_float32))
    assert isinstance(report, Report)
    shown = command("diff", tiny, tiny_float32, "--json").json
    assert shown == report.to_dict()
    assert set(shown) >= {"a", "b", "same", "criterion", "first", "worst", "ops", "only_in_a", "only_in_b", "routing", "outputs"}
    measures = {"relative_l2", "max_error", "sqnr_db", "cosine", "calc_diff"}
    assert all(set(op["accumulated"]) == measures for op in shown["ops"])
    assert (shown["a"], shown["b"]) == (f"{tiny} (numpy)", f"{tiny_float32} (numpy)")


def test_inputs_and_weights_reach_both_sides(tiny: Path, tiny_float32: Path) -> None:
    tokens = np.arange(16).reshape(1, 16)
    seen: list[np.ndarray] = []
    original = backends.get("numpy")

    class Watching:
        def run(self, module: Module, weights: Any, inputs: Any, observe: Any = None) -> Any:
            seen.append(inputs[0])
            return original.run(module, weights, inputs, observe)

        evaluate = original.evaluate

    backends.LOADERS["watching"] = Watching
    try:
        dsc.diff(dsc.load(tiny), dsc.load(tiny_float32), inputs=(tokens,), backends=("watching",), weights="random:9")
    finally:
        del backends.LOADERS["watching"]
        backends.get.cache_clear()
    assert len(seen) >= 2
    assert all(np.array_equal(x, tokens) for x in seen)


def test_a_call_that_only_one_has(tiny: Path) -> None:
    """A layer less: what is left is compared, what is missing is listed, and the results differ."""
    module = dsc.load(tiny).module
    lines = [line for line in str(module).splitlines() if not line.startswith("  %layers_2: ")]
    report = dsc.diff(module, dsc.parse("\n".join(lines).replace("%layers_2", "%layers_1")))
    assert not report.same
    assert {site.split()[1] for site in report.only_in_a} == {"(model.layers.2)"}
    assert report.only_in_b == ()
    assert report.first == "@final_norm (model.norm) final_norm#2"


def test_programs_of_many_ranks_are_compared_by_their_results(command: Any, refused: Any, tmp_path: Path) -> None:
    """The same model whole, on the ranks of a mesh, as a pipeline of two micro-batches, and on ranks with a fault in its gates."""
    sizes = {"whole": {"batch": 2}, "one": {}, "ranks": {"mesh": "dp=2,ep=2"}, "stages": {"mesh": "pp=2", "microbatches": 2}}
    sizes["fault"] = sizes["ranks"] | {"overrides": ("routed_scaling_factor=2.0",)}
    whole, one, ranks, stages, fault = (dsc.compile("deepseek-v3-tiny", out=tmp_path / n, seq=4, **o).path for n, o in sizes.items())
    for other in (ranks, stages):
        done = command("diff", whole, other, "--tolerance", 2**-8)
        assert done.code == 0
        assert done.out.splitlines()[1] == f"b: {other} (2 ranks, numpy)"
        assert "same (relative L2 <= 0.00390625): 1 result compared, " in done.out
    done = command("diff", ranks, fault, "--tolerance", 2**-8)
    assert done.code == 1
    assert done.out.splitlines()[3] == "first: logits"
    assert "\nlogits  result  bf16[2, 4, 320] " in done.out
    assert refused("diff", one, stages) == [
        f"{one} takes (tokens: i64[1, 4]), but {stages} takes (tokens: i64[2, 4]): "
        f"expected the same inputs, as with {one} compiled with --batch 2"
    ]
    assert refused("diff", ranks, "--backends", "numpy,numpy-f64") == [
        f"{ranks} runs on 2 ranks, whose ops are not compared: expected one backend"
    ]

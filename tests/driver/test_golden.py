"""`dsc golden`: the tensors read back with NumPy alone, mean what golden.json says, and catch a device that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.driver import golden
from dsc.ir.core import OPS
from dsc.testing.samples import SAMPLES, samples

ALONE = """
import json, sys
for name in ("dsc", "ml_dtypes", "torch", "safetensors"):
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
import numpy as np

def e4m3(codes):
    c = codes.astype(int)
    exponent, mantissa = c >> 3 & 15, c & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(c & 127 == 127, np.nan, np.where(c >> 7 == 1, -value, value))

def bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)

folder = Path(sys.argv[1])
index = json.loads((folder / "golden.json").read_text())
products = casts = 0
for case in index["cases"]:
    arrays = np.load(folder / case["file"])
    names = [o["name"] for o in case["operands"]]
    by_name = {o["name"]: (o["dtype"], arrays[o["array"]]) for o in case["operands"]}
    if case["op"] == "matmul" and by_name["a"][0] == "bf16":
        a, b = (bf16(by_name[n][1]).astype(np.float64) for n in "ab")
        exact = a @ (b.swapaxes(-1, -2) if case["attributes"]["transpose_b"] == "true" else b)
        result = case["results"][0]
        y = arrays[result["array"]]
        y = bf16(y) if result["dtype"] == "bf16" else y
        # the reference itself lies within one rounding of the exact product and the error of a float32 sum
        unit = 2.0**-8 if result["dtype"] == "bf16" else 2.0**-24
        assert (np.abs(y - exact) <= unit * np.abs(exact) + a.shape[-1] * 2.0**-24 * (np.abs(a) @ np.abs(b.swapaxes(-1, -2)
                if case["attributes"]["transpose_b"] == "true" else b))).all()
        assert arrays[result["bound"]].shape == y.shape and (arrays[result["bound"]] >= 0).all()
        products += 1
    if case["op"] == "cast" and case["attributes"]["dtype"] == "f8e4m3" and by_name["x"][0] == "f32":
        x, found = by_name["x"][1].astype(np.float64), arrays["result.0"]
        grid = e4m3(np.arange(256))
        finite = np.isfinite(grid)
        away = np.abs(np.clip(x, -448, 448)[..., None] - grid[finite]).min(-1)
        good = np.abs(np.clip(x, -448, 448) - e4m3(found)) == away
        assert (good | np.isnan(x) & np.isnan(e4m3(found))).all(), x[~good]
        assert not arrays[case["results"][0]["bound"]].any()
        casts += 1
print(products, casts)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden tensors of a few ops, not to be written to."""
    made = tmp_path_factory.mktemp("golden")
    for op in ("matmul", "cast", "dispatch", "route", "scaled_matmul"):
        golden.write(made / op, op)
    return made


def results_of(source: Path, target: Path) -> Path:
    """What a perfect device would give: the results alone."""
    target.mkdir()
    index = json.loads((source / "golden.json").read_text())
    for case in index["cases"]:
        with np.load(source / case["file"]) as arrays:
            np.savez(target / case["file"], allow_pickle=False, **{r["array"]: arrays[r["array"]] for r in case["results"]})
    return target


@pytest.mark.slow
def test_every_op_is_written_and_is_its_own_answer(command: Any, tmp_path: Path) -> None:
    done = command("golden", "-o", tmp_path / "all", "--json").json
    assert done["cases"].keys() == OPS.keys()
    assert sum(done["cases"].values()) == len(SAMPLES)
    index = json.loads((tmp_path / "all" / "golden.json").read_text())
    assert {case["file"] for case in index["cases"]} | {"golden.json"} == {f.name for f in (tmp_path / "all").iterdir()}
    for case in index["cases"]:
        dsc.parse(case["ir"])
    assert command("golden", "--check", tmp_path / "all", tmp_path / "all").code == 0


@pytest.mark.parametrize(("op", "expected"), [("matmul", (3, 0)), ("cast", (0, 3))])
def test_numpy_alone_reads_them(folder: Path, op: str, expected: tuple[int, int]) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder / op)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tuple(map(int, done.stdout.split())) == expected, "as many cases as there are samples of the kind"


def test_what_golden_json_says_is_in_the_files(folder: Path) -> None:
    index = json.loads((folder / "dispatch" / "golden.json").read_text())
    assert len(index["cases"]) == len(samples(OPS["dispatch"]))
    for case in index["cases"]:
        assert case["form"].startswith("dispatch(")
        assert case["formula"].startswith("Tokens to expert rows")
        assert case["attributes"].keys() == {a.name for a in OPS["dispatch"].arguments} - {"xs", "ids"}
        with np.load(folder / "dispatch" / case["file"]) as arrays:
            for entry in (*case["operands"], *case["results"]):
                array = arrays[entry["array"]]
                assert list(array.shape) == entry["shape"]
                assert array.dtype.name == index["storage"][entry["dtype"]]["npz"]
            names = {e["array"] for e in (*case["operands"], *case["results"])} | {r["bound"] for r in case["results"]}
            assert set(arrays.files) == names
    assert [o["name"] for o in index["cases"][3]["operands"]] == ["xs[0]", "xs[1]", "ids"]
    assert index["cases"][0]["results"][-1]["array"] == "result.2.0", "the handle, a bundle of one"


def test_the_folder_may_be_moved_and_is_the_same_each_time(folder: Path, command: Any, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "g"
    shutil.copytree(folder / "matmul", moved)
    results = results_of(folder / "matmul", tmp_path / "results")
    assert command("golden", "--check", moved, results).code == 0
    again, other = tmp_path / "again", tmp_path / "other"
    golden.write(again, "matmul")
    assert all(bool((again / f.name).read_bytes() == f.read_bytes()) for f in (folder / "matmul").iterdir())
    golden.write(other, "matmul", seed=1)
    assert bool((other / "matmul-0.npz").read_bytes() != (again / "matmul-0.npz").read_bytes())
    golden.write(other, "matmul", draws=2)
    assert bool((other / "matmul-0.npz").read_bytes() == (again / "matmul-0.npz").read_bytes())
    assert len(json.loads((other / "golden.json").read_text())["cases"]) == 2 * len(samples(OPS["matmul"]))


@pytest.mark.parametrize("op", ["matmul", "scaled_matmul", "cast"])
def test_safetensors_hold_the_same(folder: Path, command: Any, tmp_path: Path, op: str) -> None:
    """Read by the library itself; a team may answer in either kind of file."""
    from safetensors.torch import load_file

    made = golden.write(tmp_path / "st", op, format="safetensors").folder
    index = json.loads((made / "golden.json").read_text())
    for case in index["cases"]:
        tensors = load_file(made / case["file"])
        with np.load((folder / op / case["file"]).with_suffix(".npz")) as arrays:
            for name, tensor in tensors.items():
                import torch

                flat = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
                assert flat.tobytes().hex() == np.ascontiguousarray(arrays[name]).tobytes().hex()
    assert command("golden", "--check", made, results_of(folder / op, tmp_path / "npz")).code == 0


def changed(folder: Path, file: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    with np.load(folder / file) as arrays:
        given = {name: arrays[name].copy() for name in arrays.files}
    change(given)
    np.savez(folder / file, allow_pickle=False, **given)


@pytest.mark.parametrize(
    ("op", "file", "change", "reason"),
    [
        ("matmul", "matmul-0.npz", lambda r: r["result.0"].__setitem__((1, 2, 3, 4), 9.0), r"result.0[1, 2, 3, 4]: found 9.0, expected "),
        ("cast", "cast-4.npz", lambda r: r["result.0"].__setitem__((0, 0, 1), r["result.0"][0, 0, 1] ^ 1), "permitted difference 0"),
        ("matmul", "matmul-0.npz", lambda r: r.update({"result.0": r["result.0"][:1]}), "has shape [1, 3, 5, 7], expected [2, 3, 5, 7]"),
        ("matmul", "matmul-0.npz", lambda r: r.update({"result.0": r["result.0"].astype(int)}), "is int64, expected float32"),
        ("cast", "cast-4.npz", lambda r: r.update({"result.0": r["result.0"].view(np.int8)}), "is int8, expected uint8 (bits), float32"),
        ("matmul", "matmul-0.npz", lambda r: r.update({"result.0": r["result.0"] * np.nan}), "found nan"),
        ("dispatch", "dispatch-0.npz", lambda r: r["result.1"].__setitem__(2, 99), "result.1[2]: found 99, expected "),
    ],
)  # fmt: skip
def test_a_wrong_result_is_named(
    folder: Path, command: Any, tmp_path: Path, op: str, file: str, change: Callable[[Any], object], reason: str
) -> None:
    results = results_of(folder / op, tmp_path / "results")
    changed(results, file, change)
    done = command("golden", "--check", folder / op, results)
    assert done.code == 1
    assert f"\n{file}: {op}(" in done.out
    assert reason in done.out
    assert done.out.endswith("cases: 1 not the same\n")
    found = command("golden", "--check", folder / op, results, "--json").json
    assert [c["status"] for c in found["cases"] if c["file"] == file] == ["different"]
    assert not found["same"]


def test_numbers_in_place_of_bits_and_differences_within_the_bound(folder: Path, command: Any, tmp_path: Path) -> None:
    results = results_of(folder / "matmul", tmp_path / "results")
    with np.load(folder / "matmul" / "matmul-1.npz") as arrays:  # bf16: its bits, and the next number where the bound has room
        wide = (arrays["result.0"].astype(np.uint32) << 16).view(np.float32)
        limit = arrays["bound.0"]
        wide = np.where(limit > 0, wide + limit, wide).astype(np.float64)
    assert (limit > 0).any(), "somewhere a rounding boundary is near"
    changed(results, "matmul-1.npz", lambda r: r.update({"result.0": wide}))
    assert command("golden", "--check", folder / "matmul", results).code == 0
    changed(results, "matmul-1.npz", lambda r: r.update({"result.0": wide + 1e-3}))
    assert command("golden", "--check", folder / "matmul", results).code == 1


def test_what_is_missing_is_not_the_same(folder: Path, command: Any, tmp_path: Path) -> None:
    results = results_of(folder / "route", tmp_path / "results")
    changed(results, "route-0.npz", lambda r: r.pop("result.1"))
    (results / "route-1.npz").unlink()
    done = command("golden", "--check", folder / "route", results)
    assert done.code == 1
    assert "missing: no array result.1" in done.out
    assert "missing: no such file" in done.out


def test_bad_input_is_one_line(folder: Path, refused: Any, tmp_path: Path) -> None:
    assert refused("golden", "matmull") == ["unknown op matmull; did you mean matmul, scaled_matmul, mul?"]
    assert refused("golden", "matmul", "-o", tmp_path / "g", "--samples", 0) == ["--samples is 0, expected 1 or more"]
    assert refused("golden", "matmul", "-o", tmp_path / "g", "--format", "h5") == ["unknown format 'h5'; expected one of npz, safetensors"]
    assert refused("golden", "matmul", "--check", folder, tmp_path)[0].startswith("--check reads a folder")
    assert refused("golden", "--check", tmp_path, tmp_path)[0].endswith("found a folder without golden.json")
    assert refused("golden", "--check", folder / "matmul", tmp_path / "none")[0].endswith("expected a folder of results, found nothing")
    (tmp_path / "mine").write_text("text")
    assert "exists and is no folder of golden tensors" in refused("golden", "matmul", "-o", tmp_path / "mine")[0]
    assert (tmp_path / "mine").read_text() == "text"
    results = results_of(folder / "matmul", tmp_path / "results")
    (results / "matmul-0.npz").write_bytes(b"PK not a zip")
    assert "matmul-0.npz: not an .npz file that NumPy reads" in refused("golden", "--check", folder / "matmul", results)[0]
    broken = tmp_path / "broken"
    shutil.copytree(folder / "matmul", broken)
    (broken / "matmul-1.npz").write_bytes(b"other")
    assert "is not what golden.json says" in refused("golden", "--check", broken, results_of(folder / "matmul", tmp_path / "r2"))[0]
    (broken / "golden.json").write_text("{")
    assert "not an index of golden tensors" in refused("golden", "--check", broken, results)[0]
    (broken / "golden.json").write_text('{"schema": 9}')
    assert "schema 9, but this dsc reads 1" in refused("golden", "--check", broken, results)[0]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    def interrupt(step: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        golden.write(tmp_path / "g", "matmul", on_step=interrupt)
    assert list(tmp_path.iterdir()) == []

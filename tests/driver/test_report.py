"""report.html: what the page holds, that it is one file which loads nothing, and what `dsc report` refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsc
from dsc.driver.report import numerics, page, programs, trace, tree
from dsc.driver.report.html import VOID, data, el
from dsc.driver.run import run
from dsc.ir.walk import flops
from dsc.schedule.timeline import COLOURS

Refused = Callable[..., list[str]]


class Page(HTMLParser):
    """The elements of a page, and the text of scripts by id; what is not closed in order is a fault."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, text: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.data[attributes.get("id") or "script"] = text
        elif tag != "style":
            self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised program in training on a mesh."""
    out = tmp_path_factory.mktemp("report") / "fp8"
    mesh = "dp=2,ep=2"
    return dsc.compile("deepseek-v3-tiny", out=out, seq=16, mode="train", recipe="deepseek-v3", mesh=mesh, command=("dsc", "<&>")).path


@pytest.fixture(scope="module")
def compared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Two artifacts, and what dsc diff says of them."""
    other = dsc.compile("deepseek-v3-tiny", out=tmp_path_factory.mktemp("report") / "b", seq=16, recipe="deepseek-v3").path
    return tiny, other, dsc.diff(dsc.load(tiny), dsc.load(other)).to_dict()


def test_compile_writes_what_report_writes_again(command: Any, tiny: Path, fp8: Path, tmp_path: Path) -> None:
    for artifact in (tiny, fp8):
        done = command("report", artifact, "-o", tmp_path / "again.html", "--json")
        again = (tmp_path / "again.html").read_bytes()
        assert done.json == {"report": str(tmp_path / "again.html"), "bytes": len(again), "numerics": False}
        assert again == (artifact / "report.html").read_bytes()


def test_the_page_says_what_the_artifact_says(command: Any, fp8: Path) -> None:
    found = Page((fp8 / "report.html").read_text())
    manifest = json.loads((fp8 / "manifest.json").read_text())
    inspected = command("inspect", fp8, "--comm", "--quantization", "--json").json
    sections = [attributes["id"] for tag, attributes in found.elements if tag == "section"]
    assert sections == ["warnings", "made", "model", "programs", "quantization", "memory", "communication", "files"]
    for words in (
        "dsc '<&>'",
        *(f"{name} {version}" for name, version in manifest["versions"].items()),
        f"{inspected['quantization']['quantised']} of {len(inspected['quantization']['products'])} matrix products are quantised",
        *(row["reason"] for row in inspected["quantization"]["products"]),
        f"in {len(inspected['comm']['collectives'])} collectives",
        "Bytes and FLOPs are those of one rank of the mesh pp=1,dp=2,ep=2,tp=1.",
    ):
        assert words in found.text, words


def test_every_file_is_listed_with_its_hash(fp8: Path) -> None:
    text = Page((fp8 / "report.html").read_text()).text
    listed = {path for path in fp8.rglob("*") if path.is_file() and path.name != "report.html"}
    assert {"manifest.json", "memory.json", "00-traced.dsc"} <= {path.name for path in listed}
    for file in listed:
        line = f"{file.relative_to(fp8).as_posix()}{file.stat().st_size:,}{hashlib.sha256(file.read_bytes()).hexdigest()}"
        assert line in text, file


def test_the_page_loads_nothing_and_runs_only_its_own_script(fp8: Path) -> None:
    text = (fp8 / "report.html").read_text()
    found = Page(text)
    policy = next(a["content"] for tag, a in found.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(found.data["script"].encode()).digest()).decode()
    assert policy is not None
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in policy
    addresses = [a[key] for _, a in found.elements for key in ("src", "href") if a.get(key)]
    assert [address for address in addresses if not str(address).startswith("#")] == []
    assert re.findall(r"\b(?:https?|ftp):|//cdn|@import|url\(", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert not {name for _, a in found.elements for name in a if name.startswith("on")}


def test_programs_are_packed_without_loss(fp8: Path) -> None:
    packed = json.loads(Page((fp8 / "report.html").read_text()).data["programs-data"])
    artifact = dsc.load(fp8)
    for i, record in enumerate(artifact.manifest.passes):
        assert (programs.unpack(packed, i) == artifact.text_of(record)) is True, record.name
        assert packed["steps"][i]["file"] == record.file
    assert len(packed["lines"]) == len(set(packed["lines"]))


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=12), min_size=1, max_size=5), st.integers(0, 80))
def test_packing(texts: list[list[str]], budget: int) -> None:
    whole = ["".join(f"{line}\n" for line in lines) for lines in texts]
    packed = programs.pack(whole, budget, len(whole) - 1)
    assert sum(len(line) + 3 for line in packed["lines"]) <= budget
    for i, text in enumerate(whole):
        if packed["texts"][i] is not None:
            assert programs.unpack(packed, i) == text
    if budget >= 4 * 6:
        assert None not in packed["texts"]


def test_a_program_without_room_is_named(fp8: Path) -> None:
    shown = str(programs.programs(dsc.load(fp8), budget=100_000))
    packed = json.loads(Page(shown).data["programs-data"])
    missing = [step["file"] for step, text in zip(packed["steps"], packed["texts"], strict=True) if text is None]
    assert 0 < len(missing) < len(packed["steps"])
    assert f"Not in this page, for its size: {', '.join(missing)}." in Page(shown).text


@given(st.text(), st.text())
def test_text_is_never_markup(text: str, other: str) -> None:
    text, other = (t.replace("\0", "").replace("\r", "") for t in (text, other))
    found = Page(el("p", text, title=other))
    assert [tag for tag, _ in found.elements] == ["p"]
    assert "".join(found.words) == text
    assert found.elements[0][1]["title"] == other
    assert json.loads(Page(data("x", [text + "</script><!--<script>"])).data["x"]) == [text + "</script><!--<script>"]


def test_the_tree_adds_up(tiny: Path, fp8: Path, tiny_modes: dict[str, Path]) -> None:
    for path in (tiny, fp8, *tiny_modes.values()):
        module = dsc.load(path).module
        root = tree.tree(module)
        assert root.held == sum(count.total for count in dsc.ir.walk.parameters(module).values())
        assert root.bytes == sum(tensor.bytes for tensor in dsc.ir.walk.weights(module).values())
        assert sum(root.own_flops) == flops(module)


def test_layers_that_are_alike_are_one_entry(tiny: Path) -> None:
    root = tree.tree(dsc.load(tiny).module)
    text = Page(tree.render(dsc.load(tiny).module)).text
    assert "1 – 2 (2 alike)" in text  # layer 0 is dense
    experts = root.at("model.layers.1.mlp.experts.gate_proj")
    assert f"gate_proj {experts.kind}" in text
    assert experts.active * 16 == experts.parameters * 4


class TestNumerics:
    """What `dsc diff --json` says, on the page of either side."""

    def test_it_is_shown(self, command: Any, compared: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
        first, second, found = compared
        (tmp_path / "diff.json").write_text(json.dumps(found))
        for artifact in (first, second):
            assert command("report", artifact, "--numerics", tmp_path / "diff.json", "-o", tmp_path / "page.html").code == 0
            text = Page((tmp_path / "page.html").read_text()).text
            worst = next(op for op in found["ops"] if op["site"] == found["worst"])
            assert f"{worst['local']['relative_l2']:.2e}" in text
            moved = max(gate["changed"] for gate in found["routing"])
            assert f"{moved} tokens chose other experts" in text
            unequal = [op for op in found["ops"] if not op["equal"]]
            assert f"{len(unequal)} ops that differ." in text
            assert [op["site"] for op in unequal if op["site"] not in text] == []

    def test_diff_runs_it(self, command: Any, compared: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
        first, second, found = compared
        assert command("report", first, "--diff", second, "-o", tmp_path / "page.html").code == 0
        expected = page(dsc.load(first), found)
        assert ((tmp_path / "page.html").read_text() == expected) is True

    def test_infinities_and_nan(self, compared: tuple[Path, Path, dict[str, Any]]) -> None:
        found = json.loads(json.dumps(compared[2]))
        nothing = {"relative_l2": "nan", "max_error": "inf", "sqnr_db": "-inf", "cosine": "nan", "calc_diff": "nan"}
        for op in found["ops"][::2]:
            op |= {"equal": False, "accumulated": nothing, "local": nothing, "bound_ratio": "nan"}
        text = Page(page(dsc.load(compared[0]), found)).text
        assert "beyond the bound of rounding" in text

    def test_sites_are_those_that_the_reference_visits(self, tiny: Path, tiny_modes: dict[str, Path]) -> None:
        for path in (tiny, *tiny_modes.values()):
            module = dsc.load(path).module
            seen: list[str] = []

            def observe(site: Any, *rest: Any, seen: list[str] = seen) -> None:
                seen.append(str(site))

            run(dsc.load(path), observe=observe)
            assert Counter(numerics.sites(module)) == Counter(seen)

    def test_of_another_program(self, refused: Refused, compared: tuple[Path, Path, dict[str, Any]], fp8: Path, tmp_path: Path) -> None:
        (tmp_path / "diff.json").write_text(json.dumps(compared[2]))
        before = (fp8 / "report.html").read_bytes()
        (line,) = refused("report", fp8, "--numerics", tmp_path / "diff.json")
        assert re.match(
            rf"{tmp_path}/diff.json: compares .* with .*, and neither is this program: of \d+ ops \d+ are not in it, e.g. @", line
        )
        assert (fp8 / "report.html").read_bytes() == before


def test_bad_input(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "mlir"
    other.mkdir()
    (other / "manifest.json").write_text('{"tool": "another"}')
    text, lacking, broken = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "artifact"
    text.write_text("no json")
    lacking.write_text('{"a": 1, "ops": []}')
    shutil.copytree(tiny, broken)
    (broken / "plan" / "memory.json").write_text("{")
    page = tmp_path / "page.html"
    for arguments, expected in (
        ([other], "mlir/manifest.json: not a manifest of dsc"),
        ([tmp_path / "nowhere"], "expected an artifact made by dsc compile, found no such folder"),
        ([tiny, "--numerics", text], "a.json:1:1: not JSON"),
        ([tiny, "--numerics", lacking], "b.json: expected what dsc diff --json prints; it lacks b, same"),
        ([tiny, "--numerics", tmp_path / "none.json"], "none.json: cannot be read: No such file or directory"),
        ([tiny, "--numerics", text, "--diff", tiny], "give one of the two"),
        ([tiny, "--diff", other], "mlir/manifest.json: not a manifest of dsc"),
        ([tiny, "--timeline", tmp_path / "none.json", "-o", page], "none.json: no such file"),
        ([tiny, "--timeline", lacking, "-o", page], "b.json: expected a Chrome trace"),
        ([tiny, "-o", tmp_path / "page.png"], "page.png: expected a name that ends in .html"),
        ([tiny, "-o", tmp_path / "no" / "page.html"], "there is no folder"),
        ([broken, "-o", page], "memory.json:1:2: not JSON"),
    ):
        (line,) = refused("report", *arguments)
        assert expected in line
        assert not page.exists()


class TestTrace:
    """plan/timeline.json."""

    EVENTS = (
        {"ph": "M", "name": "process_name", "pid": 3, "tid": 0, "args": {"name": "rank 3"}},
        {"ph": "X", "name": "F", "cat": "F", "pid": 3, "tid": 0, "ts": 20, "dur": 5},
        {"ph": "X", "name": "W", "pid": 3, "tid": 0, "ts": 10.5, "dur": 2},
        {"ph": "C", "name": "held", "pid": 3, "ts": 0, "args": {"chunks": 1}},
    )

    def write(self, folder: Path, value: Any) -> Path:
        file = folder / trace.FILE
        file.parent.mkdir(exist_ok=True)
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        return file

    def test_spans(self, tmp_path: Path) -> None:
        expected = {
            "rows": [{"group": "rank 3", "name": "thread 0", "spans": [0, 2, 0, 0, 9.5, 5, 1, 1]}],
            "names": ["W", "F"],
            "kinds": ["span", "F"],
            "hues": [5, 0],
            "end": 14.5,
            "left_out": 0,
        }
        for value in (list(self.EVENTS), {"traceEvents": list(self.EVENTS)}):
            assert trace.read(self.write(tmp_path, value)) == expected

    def test_the_longest_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trace, "MOST", 1)
        found = trace.read(self.write(tmp_path, list(self.EVENTS)))
        assert (found["names"], found["left_out"]) == (["F"], 1)
        assert "The 1 shortest spans are left out here." in Page(str(trace.timeline(tmp_path))).text

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("{", "not JSON"),
            ("{}", "expected a Chrome trace"),
            ([1], "event 0 is no event"),
            ([{"ph": "X", "ts": 0, "dur": -1}], "event 0: ts and dur are [0, -1]"),
            ([{"ph": "M"}], "no events of phase X"),
        ],
    )
    def test_what_is_no_trace(self, tmp_path: Path, value: Any, expected: str) -> None:
        with pytest.raises(dsc.DscError, match=re.escape(expected)):
            trace.read(self.write(tmp_path, value))

    def test_colours_are_those_of_schedules(self) -> None:
        style = files("dsc.driver.report").joinpath("report.css").read_text()
        for hue, colour in enumerate(COLOURS.values()):
            assert f".hue-{hue} {{ fill: {colour};" in style

    def test_one_from_elsewhere(self, command: Any, tiny: Path, tmp_path: Path) -> None:
        file, out = self.write(tmp_path, list(self.EVENTS)), tmp_path / "page.html"
        assert command("report", tiny, "--timeline", file, "-o", out).code == 0
        found = Page(out.read_text())
        assert json.loads(found.data["timeline-data"]) == trace.read(file)
        assert f"2 spans in 1 rows, from {file} " in found.text

    def test_no_trace_no_section(self, tmp_path: Path) -> None:
        assert trace.timeline(tmp_path) is None


def test_kernels(command: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    facts = {"ops": ["matmul"], "num_warps": 8, "registers": 255, "shared": 49152, "spill_bytes": 0, "matrix": {"HGMMA": 4}}
    for target, name, spilled in (("sm_90", "good", 0), ("sm_90", "bad", 512), ("gfx942", "other", 0)):
        folder = out / "kernels" / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(facts | {"spill_bytes": spilled}))
        (folder / f"{name}.triton.json").write_text("{}")
    assert command("report", out).code == 0
    text = Page((out / "report.html").read_text()).text
    assert "1 kernel for sm_90 spills registers, most of all bad with 512 B" in text
    assert "goodmatmul825549.15 kB0 B4 HGMMA" in text
    assert "badmatmul825549.15 kB512 B4 HGMMA" in text


@pytest.mark.parametrize(
    ("needed", "kind", "words"),
    [
        (1_000_000, None, ""),
        (100 * 10**9, "note", r"it needs 100.00 GB at once, .* H200.* have as much, .*H100.* not"),
        (10**12, "warning", "no GPU that dsc knows has as much"),
    ],
)
def test_memory_beyond_that_of_gpus_is_a_warning(tiny: Path, tmp_path: Path, needed: int, kind: str | None, words: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    memory = json.loads((out / "plan" / "memory.json").read_text())
    (out / "plan" / "memory.json").write_text(json.dumps(memory | {"total_bytes": needed}))
    found = Page(page(dsc.load(out)))
    flags = [a["class"] for tag, a in found.elements if tag == "b" and "flag" in (a.get("class") or "")]
    assert flags == ([f"flag {kind}"] if kind else [])
    assert re.search(words, found.text)

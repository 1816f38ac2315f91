"""`dsc run --routing-stats` and `dsc place`: what is counted, what is shown, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsc
from dsc.ir.ops.moe import Route


@pytest.fixture
def stats(command: Callable[..., Any], tiny: Path, tmp_path: Path) -> Path:
    """The histogram of one run of the tiny model."""
    file = tmp_path / "routing.json"
    assert command("run", tiny, "--routing-stats", file).code == 0
    return file


def layers(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["layers"]
    return found


def test_runs_add_up_to_what_the_gates_chose(command: Callable[..., Any], tiny: Path, stats: Path) -> None:
    chosen: dict[str, list[int]] = {}

    def see(site: Any, op: Any, operands: Any, results: Any) -> None:
        if isinstance(op, Route):
            chosen[site.weights] = np.bincount(results[0].ravel(), minlength=16).tolist()

    dsc.run(dsc.load(tiny), observe=see)
    once = layers(stats)
    assert {name: layer["counts"] for name, layer in once.items()} == chosen
    assert list(chosen) == ["model.layers.1", "model.layers.2"]
    assert once["model.layers.1"] | {"counts": 0} == {
        "top_k": 4,
        "groups": 4,
        "top_groups": 2,
        "expert_bytes": 3 * 56 * 144 * 2,
        "counts": 0,
    }
    command("run", tiny, "--routing-stats", stats)
    assert {name: layer["counts"] for name, layer in layers(stats).items()} == {k: [2 * n for n in v] for k, v in chosen.items()}


def test_a_training_step_counts_each_token_once(command: Callable[..., Any], tiny_modes: dict[str, Path], tmp_path: Path) -> None:
    """Its balance loss routes as well, and sends nothing."""
    file = tmp_path / "routing.json"
    command("run", tiny_modes["train"], "--routing-stats", file)
    found = layers(file)
    assert {name: sum(layer["counts"]) for name, layer in found.items()} == {f"model.layers.{i}": 16 * 4 for i in (1, 2, 3)}
    assert {layer["top_groups"] for layer in found.values()} == {2}


def test_place_compares_the_policies_and_writes_one(command: Callable[..., Any], stats: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement.json"
    arguments = ("place", stats, "--gpus", 4, "--replicas", 20, "--nodes", 2)
    ended = command(*arguments, "-o", out)
    assert ended.out.splitlines()[0] == "2 layers of 16 experts, 16 tokens; 20 replicas on 4 GPUs in 2 nodes"
    assert "balanced *" in ended.out
    found = command(*arguments, "--previous", out, "--json").json
    assert set(found["policies"]) == {"balanced", "eplb-hierarchical", "eplb-global"}
    own = found["policies"]["balanced"]
    assert own["moved"] == own["moved_bytes"] == own["duplicates"] == 0
    assert own["balancedness"] <= found["bound"]
    other = found["policies"]["eplb-global"]
    assert other["moved_bytes"] == other["moved"] * 3 * 56 * 144 * 2 > 0
    assert {name: layer["slots"] for name, layer in found["layers"].items()} == json.loads(out.read_text())["layers"]


WANTED = "expected a routing histogram as dsc run --routing-stats routing.json writes it"
LAYER = '{"format": "dsc-routing-stats", "layers": {"a": {"top_k": 2, "groups": 2, "top_groups": 2, "expert_bytes": 0, "counts": [1, 0]}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f": {WANTED}, found no JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", f": {WANTED}, found other JSON"),
        ('{"layers": {}}', f": {WANTED}, found other JSON"),
        ('{"format": "dsc-placement"}', f": {WANTED}, found one of format dsc-placement"),
        ('{"format": "dsc-routing-stats", "layers": {}, "version": 2}', ": version is 2, expected 1"),
        ('{"format": "dsc-routing-stats", "layers": [], "x": 1}', ": layers is a list, expected an object; x is not supported"),
        ('{"format": "dsc-routing-stats", "layers": {}}', "the routing histogram has no layers"),
        (LAYER.replace("1", "-1"), ": layers.a.counts.0 is -1, expected 0 or more"),
        (LAYER.replace("1", '"some"'), ': layers.a.counts.0 is "some", expected a whole number'),
        (LAYER, ": layers.a: 1 choices of 2 experts: expected a multiple of top_k and of groups"),
        (LAYER.replace("1, ", ""), ": layers.a: 0 choices of 1 experts: expected a multiple of top_k and of groups"),
    ],
)
def test_a_file_that_is_no_histogram(refused: Callable[..., list[str]], tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "routing.json"
    file.write_text(text)
    (line,) = refused("place", file, "--gpus", 4, "--replicas", 20)
    assert line.removeprefix(str(file)) == message


def test_the_shared_expert_is_placed_and_compiled(command: Callable[..., Any], stats: Path, tmp_path: Path, refused: Any) -> None:
    """It is the last one, which all tokens go to: none has more slots."""
    out = tmp_path / "placement.json"
    arguments = ("place", stats, "--gpus", 4, "--replicas", 24, "--nodes", 2, "--shared-expert", "routed", "-o", out)
    ended = command(*arguments)
    assert ended.out.splitlines()[0] == "2 layers of 16 experts and the shared one, 16 tokens; 24 replicas on 4 GPUs in 2 nodes"
    assert "hierarchical" not in ended.out
    placed = json.loads(out.read_text())
    assert placed["experts"] == 17
    for name, slots in placed["layers"].items():
        assert slots.count(16) == max(map(slots.count, range(17))) > 1, name
    asked = ("compile", "deepseek-v3-tiny", "-o", tmp_path / "out", "--seq", 16, "--mesh", "dp=4,ep=4", "--placement", out)
    assert refused(*asked) == [
        f"place-experts: {out} places 17 experts, the program has 16: place the shared expert as compile takes it, apart or routed"
    ]
    assert command(*asked, "--shared-expert", "routed").code == 0


def test_what_cannot_be_placed_or_counted(refused: Callable[..., list[str]], stats: Path, tmp_path: Path, tiny: Path, scale: Path) -> None:
    place = ("place", stats, "--gpus", 4)
    assert refused(*place, "--replicas", 21) == ["21 replicas do not make equal shares for 4 GPUs: 20 or 24 would"]
    assert refused(*place, "--replicas", 12) == ["12 replicas cannot hold 16 experts: 16 or more would"]
    assert refused(*place, "--replicas", 20, "--nodes", 3) == ["4 GPUs do not make equal shares for 3 nodes: 1, 2, 4 would"]
    assert refused("place", stats, "--gpus", 0, "--replicas", 20) == ["0 GPUs: expected 1 or more"]
    assert refused(*place, "--replicas", 20, "--nodes", -1) == ["-1 nodes: expected 1 or more"]
    assert refused(*place, "--replicas", 20, "--policy", "eplb-hierarchical", "--shared-expert", "routed") == [
        "eplb-hierarchical places groups of experts, and the shared one is in none"
    ]
    assert refused(*place, "--replicas", 20, "--previous", stats) == [f"{stats}: expected a placement as dsc place -o writes it"]
    assert refused(*place, "--replicas", 20, "-o", tmp_path) == [f"{tmp_path} is a folder, expected a file to write"]
    assert refused("place", tmp_path / "no.json", "--gpus", 4, "--replicas", 20) == [f"{tmp_path / 'no.json'}: No such file or directory"]
    dsc.compile(str(scale), out=tmp_path / "scale")
    (line,) = refused("run", tmp_path / "scale", "--routing-stats", tmp_path / "other.json")
    assert line.startswith("--routing-stats counts where gates send tokens, but no route op leads to a dispatch")
    changed = json.loads(stats.read_text())
    changed["layers"]["model.layers.2"]["top_groups"] = 3
    stats.write_text(json.dumps(changed))
    assert refused(*place, "--replicas", 20)[0].startswith("model.layers.2 routes by {'top_k': 4, 'groups': 4, 'top_groups': 3")
    assert refused("run", tiny, "--routing-stats", stats)[0].startswith(
        "model.layers.2 routes by {'top_k': 4, 'groups': 4, 'top_groups': 2"
    )

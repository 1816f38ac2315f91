"""The backend of examples/torch_backend, found by its entry point, passes the conformance suite."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc import backends
from dsc.testing import conformance
from dsc.testing.samples import SAMPLES

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_backend"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example as pip would have installed it in place: its folder on the path, with the metadata that its pyproject.toml declares."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in project["entry-points"].items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    sys.path[:0] = [str(site), str(EXAMPLE)]
    yield
    sys.path.remove(str(site))
    sys.path.remove(str(EXAMPLE))
    backends.get.cache_clear()


class TestTorchEager(conformance.Conformance):
    backend = "torch-eager"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["forward-fp8", "decode", "train-fp8"])
    def test_model(self, runner: backends.Runner, tally: conformance.Tally, name: str) -> None:
        super().test_model(runner, tally, name)


def test_it_declines_what_torch_does_not_say_and_nothing_else() -> None:
    runner = backends.get("torch-eager")
    declined = {s.name: reason for s in SAMPLES if (reason := backends.declines(runner, s.op()))}
    assert len(declined) == 2
    assert all(name.split("(")[0] in ("scaled_matmul", "grouped_scaled_matmul_wgrad") for name in declined)
    assert all("tensor cores" in reason for reason in declined.values())


def test_its_own_test_file_runs_the_suite() -> None:
    source = (EXAMPLE / "test_torch_eager.py").read_text()
    scope: dict[str, type[conformance.Conformance]] = {}
    exec(source, scope)
    assert issubclass(scope["TestTorchEager"], conformance.Conformance)
    assert scope["TestTorchEager"].backend == "torch-eager"
    assert len([line for line in source.splitlines() if line and not line.startswith('"""')]) == 3

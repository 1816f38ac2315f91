"""Calibrating: what is written is read back, a machine with known coefficients is found again, and the command measures this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc.driver.benches import CpuBench, GpuBench, least_seconds
from dsc.driver.calibrate import Sizes, measured
from dsc.driver.cli import cli
from dsc.driver.devices_command import calibrate, devices
from dsc.driver.link_times import fitted_leg
from dsc.hardware.cluster import cluster, clusters
from dsc.hardware.description import described
from dsc.hardware.kernels import Compute
from dsc.ir.core import Op
from dsc.ir.types import DType

assert cli.commands["calibrate"] is calibrate


@pytest.mark.parametrize("name", clusters())
def test_a_described_cluster_is_read_back(name: str, tmp_path: Path) -> None:
    known = cluster(name)
    file = tmp_path / "again.toml"
    file.write_text(described(known))
    again = cluster(str(file))
    assert (again.name, again.about, again.node, again.features) == (known.name, known.about, known.node, known.features)
    assert again.device.accumulations == known.device.accumulations
    assert again.device.units == known.device.units
    for (key, a), (other, b) in zip(known.figures(), again.figures(), strict=True):
        assert (key, a.unit, a.provenance, a.source) == (other, b.unit, b.provenance, b.source)
        assert (b.low, b.mid, b.high) == pytest.approx((a.low, a.mid, a.high), rel=1e-5), key


class Known:
    """A machine that takes as long as the cost model says with these coefficients."""

    name, how, base, units, memory = "known", "by definition", "cpu", 4, 1e10
    dtypes = (DType.f32, DType.bf16)
    sizes = Sizes(
        ((512, 512, 512), (1024, 1024, 1024), (64, 2048, 2048), (2048, 4096, 512), (128, 8192, 8192)), 1 << 28, (512, 4), (1024, 4096)
    )

    def __init__(self, figures: dict[str, float]) -> None:
        from dataclasses import replace

        base = cluster("cpu").with_figures(figures)
        self.compute = Compute(replace(base.device, units=self.units))
        self.bandwidth, self.launch = figures["device.peak.bandwidth"], figures["device.kernels.launch"]

    def ready(self, op: Op) -> Callable[[], float]:
        from dsc.ir.ops.linalg import Matmul

        return lambda: self.compute.cost(op).seconds + (0 if isinstance(op, Matmul) else self.launch)

    def copy(self, bytes: int) -> Callable[[], float]:
        return lambda: 2 * bytes / self.bandwidth

    def seconds(self, run: Callable[[], float], least: float) -> float:
        return run()


def test_a_machine_with_known_coefficients_is_found_again() -> None:
    figures = {
        "device.peak.bandwidth": 2e10,
        "device.peak.f32": 4e11,
        "device.peak.bf16": 2e11,
        "device.kernels.matrix": 0.8,
        "device.kernels.ramp": 3e-6,
        "device.kernels.memory": 0.6,
        "device.kernels.attention": 0.3,
        "device.kernels.attention_backward": 0.2,
        "device.kernels.rows": 0.5,
        "device.kernels.launch": 5e-6,
    }
    found = measured(Known(figures), "known", 0.0, lambda step: {}, lambda step: None)
    assert max(abs(p.predicted / p.seconds - 1) for p in found.products) < 0.02
    made = {key: figure.mid for key, figure in found.cluster.figures()}
    for key in ("device.peak.bandwidth", "device.kernels.launch"):
        assert made[key] == pytest.approx(figures[key], rel=0.02), key
    assert made["device.kernels.matrix"] * made["device.peak.f32"] == pytest.approx(0.8 * 4e11, rel=0.05)
    assert made["device.kernels.rows"] == pytest.approx(0.5, rel=0.02)
    for key in ("attention", "attention_backward"):
        share = f"device.kernels.{key}"
        assert made[share] * made["device.peak.f32"] == pytest.approx(figures[share] * figures["device.peak.f32"], rel=0.05)
    assert {figure.provenance for key, figure in found.figures.items()} == {"measured"}
    assert found.cluster.figure("device.peak.f8").provenance == "assumed"


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(st.floats(1e-7, 1e-3), st.floats(1e8, 1e12), st.integers(1, 8))
def test_a_link_is_found_from_its_times(latency: float, bandwidth: float, steps: int) -> None:
    times = [(bytes, steps * latency + bytes / bandwidth) for bytes in (1e3, 1e5, 1e7, 1e9)]
    leg = fitted_leg(times, steps)
    assert leg.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert leg.latency == pytest.approx(latency, rel=1e-2, abs=1e-12)


@pytest.mark.slow
def test_torchs_kernels_can_be_timed_without_a_gpu() -> None:
    """The way of a GPU, on tensors of the CPU and at tiny sizes."""
    pytest.importorskip("torch")
    bench = GpuBench(quick=True, device="cpu")
    bench.sizes = Sizes(((8, 16, 32),), 1 << 10, (16, 2), (4, 32))
    found = measured(bench, "torch", 0.0, lambda step: {}, lambda step: None)
    assert all(figure.mid > 0 for figure in found.figures.values())
    assert found.cluster.figure("device.peak.f8").source == cluster("h100").figure("device.peak.f8").source


def test_a_run_is_timed_by_its_least() -> None:
    ticks = iter([0, 5, 5, 7, 7, 10, inf])
    assert least_seconds(lambda: None, 0.0, lambda: next(ticks)) == 2


@pytest.mark.slow
def test_the_command_measures_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("dsc.driver.benches.has_gpu", lambda: False)
    monkeypatch.setattr(CpuBench, "seconds", lambda self, run, least: least_seconds(run, 0.0, self.clock))
    file = tmp_path / "mine.toml"
    answer = CliRunner().invoke(calibrate, ["--quick", "-o", str(file), "--name", "mine", "--json"], catch_exceptions=False)
    record: dict[str, Any] = json.loads(answer.stdout)
    made = cluster(str(file))
    assert made.name == record["name"] == "mine"
    assert made.device.peak.f32.provenance == "measured"
    assert record["measured"] in made.device.peak.f32.source
    assert "numpy" in made.device.peak.f32.source
    assert record["figures"]["device.peak.f32"]["value"] == pytest.approx(made.device.peak.f32.mid, rel=1e-5)
    shown = CliRunner().invoke(devices, [str(file)], catch_exceptions=False)
    assert "measured" in shown.stdout


def test_devices_are_listed_with_sources_and_tables() -> None:
    listed = json.loads(CliRunner().invoke(devices, ["--json"], catch_exceptions=False).stdout)
    assert {"h100", "h800", "h800-all", "h200", "b200", "mi300x", "gb200-nvl72", "cpu"} <= {one["name"] for one in listed}
    shown = CliRunner().invoke(devices, ["H800"], catch_exceptions=False).stdout
    for figure in dict(cluster("h800").figures()).values():
        assert figure.source in shown
    tables = json.loads(CliRunner().invoke(devices, ["--tables", "--json"], catch_exceptions=False).stdout)
    assert sum(len(one["rows"]) for one in tables["tables"]) > 100

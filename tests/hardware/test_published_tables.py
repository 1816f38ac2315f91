"""Published tables against the cost model: the fit gives the shipped coefficients, and each table is met within its stated error."""

from __future__ import annotations

import pytest

from dsc.hardware.cluster import cluster
from dsc.hardware.fit import fitted
from dsc.hardware.links import tpot_bound
from dsc.hardware.tables import entries, table

H800 = cluster("h800")
ENTRIES = tuple(entries(H800))

STATED = {
    "DeepGEMM": (0.051, 0.135),
    "DeepGEMM, later": (0.085, 0.32),
    "profile: products": (0.112, 0.355),
    "profile: wgrad": (0.039, 0.114),
    "profile: attention": (0.001, 0.001),
    "FlashMLA": (0.044, 0.068),
    "profile: RMSNorm": (0.001, 0.001),
    "profile: FP8 casts": (0.136, 0.136),
    "DeepEP": (0.032, 0.069),
    "DeepEP, low latency": (0.034, 0.116),
    "profile: exchanges": (0.106, 0.195),
}
"""Mean and largest error of a row, as docs/hardware.md states them."""


def test_the_fit_gives_the_shipped_coefficients() -> None:
    """To the four digits that the files bear, begun from figures that are not the result."""
    away = {"device.kernels.matrix": 0.6, "device.kernels.feed": 150e9, "device.kernels.ramp": 1e-6, "device.kernels.memory": 0.9}
    start = H800.with_figures(away | {"comm.slowdown": 1.2, "device.kernels.rows": 0.8, "comm.notify": 1e-5, "intra.efficiency": 1.0})
    for key, value in fitted(start).items():
        assert value == pytest.approx(H800.figure(key).mid, rel=2e-3), key


@pytest.mark.parametrize("name", STATED)
def test_a_table_is_met_within_its_stated_error(name: str) -> None:
    errors = [abs(entry.error) for entry in ENTRIES if entry.table == name]
    mean, largest = STATED[name]
    assert sum(errors) / len(errors) <= mean
    assert max(errors) <= largest


def test_every_table_has_a_stated_error() -> None:
    assert {entry.table for entry in ENTRIES} == set(STATED)


@pytest.mark.parametrize("rows", ["rows", "first"])
def test_deepeps_rates_are_bytes_of_the_selections_by_time(rows: str) -> None:
    """Each published GB/s follows from the published time within the 1 GB/s to which it is rounded, so the bytes are understood."""
    found = table("exchange.low-latency")
    for row in (dict(zip(found["columns"], row, strict=True)) for row in found[rows]):
        for kind in ("dispatch", "combine"):
            rate = found["selections"] * found[f"{kind}_bytes"] / (row[kind] * 1e-6) / 1e9
            assert rate == pytest.approx(row[f"{kind}_rate"], abs=1), (row, kind)


def test_published_tables_say_the_same_rate_and_bandwidth() -> None:
    """DeepGEMM's GB/s are (m k + n k + 2 m n) by time: 1688 GB/s at 206 TFLOP/s, 2668 at 336, 697 at 1025."""
    for (m, n, k, rate), bandwidth in (((64, 2112, 7168, 206), 1688), ((64, 7168, 16384, 336), 2668), ((4096, 7168, 2048, 1025), 697)):
        assert next(row for row in table("products.deepgemm")["rows"] if row[1:4] == [m, n, k])[5] == rate
        took = 2 * m * n * k / (rate * 1e12)
        assert (m * k + n * k + 2 * m * n) / took / 1e9 == pytest.approx(bandwidth, rel=0.5 / rate + 1e-3)


def test_the_bound_of_tpot_is_iscas() -> None:
    """14.76 ms at 50 GB/s and 0.82 ms at 900 GB/s: 61 layers of 2 x 3 B x 32 x 9 x 7000 / bandwidth."""
    shape = {"tokens": 32, "copies": 9, "hidden": 7000, "layers": 61}
    assert tpot_bound(H800, ranks=320, **shape) * 1e3 == pytest.approx(61 * 2 * 3 * 32 * 9 * 7000 / 50e9 * 1e3)
    assert round(tpot_bound(H800, ranks=320, **shape) * 1e3, 2) == 14.76
    rack = cluster("gb200-nvl72").with_figures({"intra.bandwidth": 900e9})
    assert round(tpot_bound(rack, ranks=72, **shape) * 1e3, 2) == 0.82
    assert round(1 / tpot_bound(H800, ranks=320, **shape), 2) == 67.76

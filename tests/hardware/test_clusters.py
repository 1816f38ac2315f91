"""Clusters and devices as data: what is shipped can be read, overlays change what they say, and a mistake is one line with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc import DscError
from dsc.hardware.cluster import CLUSTERS, cluster, clusters
from dsc.hardware.device import device, devices

H800 = (CLUSTERS / "h800.toml").read_text()


@pytest.mark.parametrize("name", clusters())
def test_every_figure_of_a_shipped_cluster_says_where_it_is_from(name: str) -> None:
    found = dict(cluster(name).figures())
    assert len(found) > 20
    for key, figure in found.items():
        assert figure.low <= figure.mid <= figure.high, key
        assert figure.provenance in ("measured", "published", "assumed"), key
        assert figure.source.strip(), key


def test_names_are_found_in_any_case_and_a_wrong_one_names_its_neighbours() -> None:
    assert cluster("GB200 NVL72").node == 72
    assert cluster("H800").name == "H800"
    assert device("RTX 4090").name == "RTX 4090"
    with pytest.raises(DscError, match=r"unknown cluster h8000; .* one of: h800, .*h800-all.* \(dsc devices lists all\)$"):
        cluster("h8000")
    assert {"h100", "h800", "h200", "b200", "mi300x", "gb200", "cpu"} <= set(devices())


def test_an_overlay_changes_what_it_says_and_signs_it() -> None:
    plain, unified = cluster("h800"), cluster("h800-unified")
    assert unified.inter.bandwidth.mid == plain.intra.bandwidth.mid > plain.inter.bandwidth.mid
    assert unified.inter.bandwidth.provenance == "assumed"
    assert unified.inter.efficiency == plain.inter.efficiency
    assert unified.price == plain.price
    assert unified.device is plain.device


def test_a_user_adds_a_cluster_by_its_differences(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'name = "mine"\nbase = "h100"\nnode = 4\n[inter]\nbandwidth = "25 GB/s"\nprovenance = "measured"\nsource = "perftest, May"\n'
        '[device]\nname = "H100 PCIe"\n[device.peak]\nbandwidth = "2 TB/s"\nprovenance = "published"\nsource = "datasheet"\n'
    )
    found = cluster(str(mine))
    assert (found.node, found.inter.bandwidth.mid, found.inter.bandwidth.provenance) == (4, 25e9, "measured")
    assert found.device.name == "H100 PCIe"
    assert found.device.peak.bandwidth.mid == 2e12
    assert found.device.peak.bf16 == device("h100").peak.bf16
    over = tmp_path / "over.toml"
    over.write_text('base = "mine.toml"\nnode = 2\n')
    assert (cluster(str(over)).node, cluster(str(over)).inter.bandwidth.mid) == (2, 25e9)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('mid = "160 GB/s"', 'mid = "160 GB"', r"intra\.bandwidth: expected a number of B/s such as .*, found '160 GB'"),
        ('mid = "160 GB/s"', "mid = 160", r"intra\.bandwidth: expected a number of B/s such as .*, found 160"),
        ('mid = "160 GB/s"', 'mid = "160 Gb/s"', r"intra\.bandwidth: expected a number of B/s .*, found '160 Gb/s'"),
        ('low = "150 GB/s"', 'low = "170 GB/s"', r"intra\.bandwidth: expected low <= mid <= high"),
        ('provenance = "published"', 'provenance = "heard"', r"provenance is 'heard', expected one of measured, published, assumed"),
        ('provenance = "published"\nsource = "DeepSeek-V3 report, table 1"', "", r"price\.hour: provenance is None, expected one of"),
        ('source = "DeepSeek-V3 report, table 1"', 'source = ""', r'price\.hour: expected source = "\.\.\.", found \'\''),
        ("node = 8", "node = 0", r"node: expected how many GPUs a scale-up domain has, 1 or more, found 0"),
        ("[price]", "[prices]", r"unknown key prices; expected base or some of"),
        ("hour =", "day =", r"price: unknown key day; expected hour, provenance, source"),
        ('device = "h800"', 'device = "h8"', r"unknown device in .*h8; expected a \.toml file or one of: "),
        ('name = "H800"', 'name = "H800', r"not TOML"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in H800
    file = tmp_path / "faulty.toml"
    file.write_text(H800.replace(old, new))
    with pytest.raises(DscError, match=message) as caught:
        cluster(str(file))
    assert "faulty.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_that_leads_back_to_itself_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "b.toml"')
    (tmp_path / "b.toml").write_text('base = "a.toml"')
    with pytest.raises(DscError, match="base leads back to itself"):
        cluster(str(tmp_path / "a.toml"))

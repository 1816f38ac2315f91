"""The bound of decoding, as published."""

import pytest

from dsc.schedule.formulas import tpot_bound


@pytest.mark.parametrize(("bandwidth", "milliseconds"), [(50e9, 14.76), (900e9, 0.82)])
def test_tpot_of_the_paper(bandwidth: float, milliseconds: float) -> None:
    """Insights into DeepSeek-V3, section 2.3.2: 32 tokens, 9 experts, 7000 channels, 61 layers, on InfiniBand and on GB200 NVL72."""
    assert round(1e3 * tpot_bound(32, 9, 7000, 61, bandwidth), 2) == milliseconds

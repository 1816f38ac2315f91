"""What every test shares.

`pytest --bless` rewrites the expectations of golden tests from what the code does now. Read the difference before you commit it.
"""

from __future__ import annotations

import hypothesis
import pytest

# An example that is slow on a busy machine is no failure: nothing here tests by the clock.
hypothesis.settings.register_profile("dsc", deadline=None)
hypothesis.settings.load_profile("dsc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the expectations of golden tests")


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> bool:
    """Whether a golden test should rewrite its expectation instead of comparing with it."""
    return bool(request.config.getoption("--bless"))

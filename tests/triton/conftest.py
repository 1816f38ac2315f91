"""Without Triton, or where another package has imported it as a compiler, these tests say so instead of failing."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("triton") is None:
        for item in items:
            if "tests/triton" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="triton is not installed"))

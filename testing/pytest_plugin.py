"""A pytest plugin of one hook, for a repository whose root folder is itself a package (as dsc's is).

Left alone, pytest takes such a root for a package named after its folder and tries to import it under that name, which fails
where the name is no Python identifier (`deepseek-compiler`) and imports everything a second time where it is. Enabled by
`addopts = "-p dsc.testing.pytest_plugin"`, next to `--import-mode=importlib`.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the root as a plain folder. None for every other folder: pytest decides."""
    if path == parent.config.rootpath:
        return pytest.Dir.from_parent(parent, path=path)
    return None

"""Files of generated source: in `dsc/generated` beside the cache of compiled kernels, each named by its content.

They are imported from there: by this process, by those that compile, by a debugger. `dsc compile --target` copies a file with all that it
calls to `kernels/<target>/<name>.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ...ir.errors import DscError


def folder() -> Path:
    """Where generated source lies: `dsc/generated` under XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc" / "generated"


GENERATED = "dsc_generated."
"""What the names of generated modules begin with; the file's follows."""


@cache
def load(name: str, text: str) -> Any:
    """The kernel `name` of a module whose text is `text`, written to a file of that content and imported from there."""
    stem = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    file = folder() / f"{stem}.py"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, prefix=".draft-", delete=False) as draft:
                draft.write(text)
            os.replace(draft.name, file)  # complete or absent, whoever else writes it
        except OSError as error:
            raise DscError(f"{file.parent}: generated kernels are written there: {error.strerror}; set XDG_CACHE_HOME") from None
    return getattr(import_file(stem), name)


def import_file(stem: str) -> Any:
    """The generated module in the file `stem`.py."""
    name = GENERATED + stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder() / f"{stem}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]

"""One kernel per file, named after its op. Importing this package registers them all."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..registry import KERNELS

__all__ = ["KERNELS"]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

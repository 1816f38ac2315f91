"""dsc: a compiler for DeepSeek-V3-style mixture-of-experts models.

The functions here are what the `dsc` command does, for use from Python. They load what they need when they are called,
so that `import dsc` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .ir.errors import DscError

if TYPE_CHECKING:
    from . import testing
    from .driver.artifact import Artifact, load
    from .driver.compile import compile
    from .driver.diff import Report, diff
    from .driver.run import run
    from .driver.train import train
    from .ir.parser import parse
    from .models.trace import trace
    from .passes.manager import apply

_PLACES = {
    "Artifact": ".driver.artifact",
    "Report": ".driver.diff",
    "apply": ".passes.manager",
    "compile": ".driver.compile",
    "diff": ".driver.diff",
    "load": ".driver.artifact",
    "parse": ".ir.parser",
    "run": ".driver.run",
    "trace": ".models.trace",
    "train": ".driver.train",
}

__all__ = ["Artifact", "DscError", "Report", "apply", "compile", "diff", "load", "parse", "run", "testing", "trace", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name == "testing":
        return import_module(".testing", __name__)
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

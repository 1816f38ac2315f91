"""What users put into their own test suites: `assert_backends_agree`, samples of every op, derived bounds, random programs.

`programs` needs hypothesis, so it is a module of its own: `from dsc.testing.programs import programs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agree import Agreement, assert_backends_agree
    from .bounds import bound
    from .sampling import Sample, WrongCall

__all__ = ["Agreement", "Sample", "WrongCall", "assert_backends_agree", "bound"]

_HOMES = {"Agreement": "agree", "assert_backends_agree": "agree", "bound": "bounds", "Sample": "sampling", "WrongCall": "sampling"}


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is: pytest imports this package for its plugin alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

"""The one exception that reaches users: `DscError`, whose text is the line that the command prints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


class DscError(Exception):
    """Something the user can mend. The message is what was found, what was expected, and where.

    The `dsc` command prints the message and exits with status 2; in Python it is an ordinary exception. Where several
    things are wrong at once the message has one line for each.
    """


def require(condition: bool, message: str) -> None:
    """Raise `DscError(message)` unless `condition` holds. Not an assert: it guards input, so it must never be switched off."""
    if not condition:
        raise DscError(message)


def faults(errors: Sequence[Mapping[str, Any]]) -> str:
    """In one line what pydantic's `errors()` say of a record: each field, what stands there, and what was expected."""
    return "; ".join([*map(_fault, errors[:4]), *([f"and {len(errors) - 4} more"] if len(errors) > 4 else [])])


_WORDS = (
    (r"^Input should be (a valid |an instance of )?", "expected "),
    (r"dictionary.*|instance of .*", "an object"),
    (r"expected tuple|expected list", "expected a list"),
    (r"^(Tuple|List) should have (.*) after validation.*", r"expected \2"),
    (r"greater than or equal to (\S+)", r"\1 or more"),
    (r"greater than (\S+)", r"more than \1"),
    (r"expected integer.*", "expected a whole number"),
    (r"expected number.*", "expected a number"),
    (r"expected string.*", "expected text"),
    (r"expected boolean.*", "expected true or false"),
)
"""Pydantic's words and ours, who speak of JSON."""


def _fault(error: Mapping[str, Any]) -> str:
    field, found, message = ".".join(map(str, error["loc"])), error["input"], error["msg"]
    match error["type"]:
        case "missing":
            return f"{field} is missing"
        case "extra_forbidden":
            return f"{field} is not supported"
        case "value_error":
            return f"{field}: {error['ctx']['error']}".removeprefix(": ")
    for theirs, ours in _WORDS:
        message = re.sub(theirs, ours, message)
    shown = "an object" if isinstance(found, dict) else "a list" if isinstance(found, list) else json.dumps(found, default=str)
    return f"{field} is {shown}, {message}" if field else f"{message}, found {shown}"

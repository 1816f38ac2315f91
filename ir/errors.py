"""The one exception that reaches users: `DscError`, whose text is the line that the command prints."""

from __future__ import annotations


class DscError(Exception):
    """Something the user can mend. The message is what was found, what was expected, and where.

    The `dsc` command prints the message and exits with status 2; in Python it is an ordinary exception. Where several
    things are wrong at once the message has one line for each.
    """


def require(condition: bool, message: str) -> None:
    """Raise `DscError(message)` unless `condition` holds. Not an assert: it guards input, so it must never be switched off."""
    if not condition:
        raise DscError(message)

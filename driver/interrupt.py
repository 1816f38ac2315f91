"""Ctrl-C and SIGTERM, obeyed even where their exception is lost.

Python drops an exception that a signal handler raises while a callback of the garbage collector or of an import runs, and the program goes
on. So a signal is remembered as well: what is about to be kept, and every step of long work, asks `check`.
"""

from __future__ import annotations

import signal


class Terminated(KeyboardInterrupt):
    """The process was asked to end. It is met as Ctrl-C is: what was begun is cleared away."""


_asked: list[type[KeyboardInterrupt]] = []


def _handle(number: int, frame: object) -> None:
    _asked.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
    raise _asked[0]


def obey() -> None:
    """Take over SIGTERM, and SIGINT unless whoever started this process has it ignored."""
    signal.signal(signal.SIGTERM, _handle)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)


def check() -> None:
    """Raise what a signal asked for, if one did."""
    if _asked:
        raise _asked[0]

"""The `dsc` command with a rank that does not live to the end, for test_torch_world.py: `failing_rank.py kill|hang|raise RANK run OUT ...`.

It happens in the middle of the program, where the rank computes an `exp`; with `RANK@OP:COUNT` where it computes an OP after COUNT others.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from dsc.__main__ import main
from dsc.backends.numpy_ref.run import REFERENCES  # once all are there
from dsc.ir.core import OPS
from dsc.ir.errors import DscError
from dsc.ir.ops.elementwise import Exp


def failing(how: str) -> Any:
    def exp(*_: Any) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        raise DscError("no room for 7 rows")

    return exp


def after(count: int, cls: type, then: Any) -> Any:
    """The reference of an op that does as ever, `count` times."""
    real, left = REFERENCES[cls], iter(range(count))
    return lambda *given: then() if next(left, None) is None else real(*given)


how, at, *arguments = sys.argv[1:]
rank, _, place = at.partition("@")
name, _, count = place.partition(":")
if os.environ["RANK"] == rank:
    cls = OPS[name] if name else Exp
    REFERENCES[cls] = after(int(count or 0), cls, failing(how))
sys.argv[1:] = arguments
main()

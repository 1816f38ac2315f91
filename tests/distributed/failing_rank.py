"""The `dsc` command with a rank that does not live to the end, for test_torch_world.py: `failing_rank.py kill|hang|raise RANK run OUT ...`.

It happens in the middle of the program, where the rank computes an `exp`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from dsc.__main__ import main
from dsc.backends.numpy_ref.run import REFERENCES  # once all are there
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


how, rank, *arguments = sys.argv[1:]
if os.environ["RANK"] == rank:
    REFERENCES[Exp] = failing(how)
sys.argv[1:] = arguments
main()

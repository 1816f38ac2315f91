"""A process that has torch loaded and forks on demand: a fork can be killed like any process, and costs none of the seconds of a start.

A request is a line of JSON on standard input, its answer one on standard output; `Forks` in conftest.py asks. `compile` has what
`train_program.programs` takes: forks that train just that find it compiled.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

import matplotlib.pyplot  # noqa: F401 - what is loaded here is loaded in every fork

import dsc.distributed.torch_world
import dsc.driver.train
import dsc.models.trace
from dsc.__main__ import main
from dsc.driver import train_program

COMPILED: dict[str, train_program.Programs] = {}


def programs(source: Any, **options: Any) -> train_program.Programs:
    """The same as it is elsewhere, and kept."""
    key = json.dumps({"source": str(source)} | {k: v for k, v in options.items() if v is not None}, sort_keys=True)
    if key not in COMPILED:
        COMPILED[key] = train_program.programs(source, **options)
    return COMPILED[key]


def become(script: str, arguments: list[str], environment: dict[str, str], files: list[str]) -> None:
    """Run a script, or the dsc command, as a process that was started with these arguments, environment and standard streams."""
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = streams = [os.fdopen(number, "w" if number else "r") for number in range(3)]
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
    sys.argv = [script, *arguments]
    if script == "dsc":
        main()
    else:
        runpy.run_path(script, run_name="__main__")


def serve() -> None:
    """Answer requests until there are no more; forks return from here as well."""
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None = None
        match request.pop("do"):
            case "compile":
                programs(**request)
            case "start":
                if (answer := os.fork()) == 0:
                    return become(**request)
            case "poll":
                pid = request["pid"]
                if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[pid] = os.waitstatus_to_exitcode(found[1])
                answer = ended.get(pid)
        print(json.dumps(answer), flush=True)


dsc.driver.train.programs = programs
if __name__ == "__main__":
    serve()

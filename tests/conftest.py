"""What every test shares.

`pytest --bless` rewrites the expectations of golden tests from what the code does now. Read the difference before you commit it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# An example that is slow on a busy machine is no failure: nothing here tests by the clock.
hypothesis.settings.register_profile("dsc", deadline=None)
hypothesis.settings.load_profile("dsc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the expectations of golden tests")


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> bool:
    """Whether a golden test should rewrite its expectation instead of comparing with it."""
    return bool(request.config.getoption("--bless"))


@dataclass(frozen=True)
class Fork:
    """One process that `Forks` has started."""

    of: Forks
    pid: int

    def poll(self) -> int | None:
        """The exit code, once it has ended; that of a signal is negative."""
        code: int | None = self.of.ask("poll", pid=self.pid)
        return code

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code, when it has ended. One that takes longer is killed."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                pytest.fail(f"a process runs after {seconds:.0f} s")
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


class Forks:
    """Processes with torch loaded, and with what they train compiled: see forks.py."""

    def __init__(self) -> None:
        pipe, alone = subprocess.PIPE, {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | alone)

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to one request."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, script: str, *arguments: str, environment: Mapping[str, str] | None = None, files: Sequence[str | Path] = ()) -> Fork:
        """A process that runs a script, or "dsc"; `files` are its first standard streams."""
        given = os.environ | {"OMP_NUM_THREADS": "1", **(environment or {})}
        streams = [*map(str, files), *["/dev/null"] * (2 - len(files))]
        return Fork(self, self.ask("start", script=script, arguments=arguments, environment=given, files=streams))

    def ranks(self, count: int, script: str, *arguments: str, files: Sequence[Sequence[str | Path]] | None = None) -> list[Fork]:
        """A process for each rank, as torchrun starts them; `files` are each one's."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            team = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        own = [team | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(script, *arguments, environment=own[r], files=files[r] if files else ()) for r in range(count)]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """One process that forks for all tests."""
    made = Forks()
    yield made
    assert made.process.stdin
    assert made.process.stdout
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait(30)

"""Shell completion: the script for a shell, and what completes the values of options and arguments.

Values are found by the name that an option or argument has in every command, so a new command that takes `--recipe` completes recipes.
Everything here has to answer in the time of a key press: names are those of files and tables, and nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from .cli import COMPLETE

ROOT = Path(__file__).resolve().parent.parent


def script(shell: str) -> str:
    """What the shell is to source. Only the command's name goes into it, so it stays valid when dsc is upgraded."""
    found = get_completion_class(shell)
    assert found is not None
    return found.source_template % {"complete_func": "_dsc_completion", "complete_var": COMPLETE, "prog_name": "dsc"}


def _stems(folder: str, pattern: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / folder).glob(pattern))


models = partial(_stems, "models/configs", "*.json")
recipes = partial(_stems, "passes/recipes", "*.toml")
devices = partial(_stems, "hardware/devices", "*.toml")
clusters = partial(_stems, "hardware/clusters", "*.toml")


def passes() -> list[str]:
    from ..passes.manager import PASSES

    return sorted(PASSES)


def ops() -> list[str]:
    from ..ir import ops as _ops  # noqa: F401 - fills the table
    from ..ir.core import OPS

    return sorted(OPS)


def backends() -> list[str]:
    from ..backends import names

    return list(names())


def schedules() -> list[str]:
    from ..schedule.generate import NAMES as generated

    return [*generated, "auto"]


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "--backend": backends,
    "--backends": backends,
    "--recipe": recipes,
    "--passes": passes,
    "--device": devices,
    "--cluster": clusters,
    "--mode": lambda: ("forward", "train", "prefill", "decode"),
    "--to": lambda: ("bf16", "fp8"),
    "--profile": lambda: ("standard", "ort", "compact"),
    "source": models,
    "devices name": lambda: [*clusters(), *devices()],
    "passes name": passes,
    "ops name": ops,
    "golden op": ops,
    "--schedule": schedules,
    "schedule name": schedules,
}
"""What completes an option, or an argument by its name, alone or behind its command's."""

LISTS = {"--backends", "--passes"}
"""Options of several values with commas between: the last one is completed."""


def complete(values: Callable[[], Iterable[str]], listed: bool, files: bool, ctx: Any, incomplete: str) -> list[CompletionItem]:
    """The values that begin with what was typed; a file's name where `files` and none does."""
    before, comma, last = incomplete.rpartition(",") if listed else ("", "", incomplete)
    found = [CompletionItem(f"{before}{comma}{value}") for value in values() if value.startswith(last)]
    return found or ([CompletionItem(incomplete, type="file")] if files else [])


def attach(group: click.Group) -> None:
    """Give the options and arguments of every command of `group` their values."""
    for name, command in group.commands.items():
        for param in command.params:
            keys = [*param.opts] if isinstance(param, click.Option) else [f"{name} {param.name}", str(param.name)]
            known = next((key for key in keys if key in NAMES), None)
            if known is not None:
                files = known in ("source", "--recipe", "--device", "--cluster")
                param.shell_complete = partial(complete, NAMES[known], known in LISTS, files)  # type: ignore[method-assign]


def answer(group: click.Group, instruction: str) -> int:
    """Do what the shell's script asks for: print what completes the line that it has in its environment."""
    attach(group)
    return shell_complete(group, {}, "dsc", COMPLETE, instruction)

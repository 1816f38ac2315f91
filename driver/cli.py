"""The `dsc` command: its errors, its exit codes, and how options are shared. The commands are in *commands.py.

Exit codes: 0 done (for diff: the same), 1 different (diff only), 2 an error; as a shell has them for signals, 130 interrupted, 141
nobody reads on, 143 terminated.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import click

from ..ir.errors import DscError
from .interrupt import Terminated


class Group(click.Group):
    """Commands in the order in which they are met, each error as one line on standard error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dsc", prog_name="dsc")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """A compiler for DeepSeek-V3-style mixture-of-experts models.

    \b
    dsc compile deepseek-v3 -o out     the 671B model as IR, in seconds, without a GPU
    dsc inspect out --params           what it is made of
    dsc compile deepseek-v3-tiny -o tiny && dsc run tiny

    Exit codes: 0 done (diff: the same), 1 different (diff only), 2 an error, 130 interrupted.
    """


COMPLETE = "_DSC_COMPLETE"
"""The environment variable by which a shell asks what completes a command line (complete.py)."""

RESUMED: dict[str, str] = {}
"""What to do after an interrupt, by the name of a command that keeps what is done; others leave nothing behind."""


def resumed(text: str) -> Callable[[click.Command], click.Command]:
    """Say of the command below what goes on with it once it was interrupted."""

    def attach(command: click.Command) -> click.Command:
        RESUMED[str(command.name)] = text
        return command

    return attach


PATH = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
weights_option = click.option("--weights", metavar="DIR|random:SEED", help="Checkpoint folder, or random weights keyed by name.")
inputs_option = click.option("--inputs", metavar="FILE.npz", help="An array for each input, by name. Default: seeded ones.")


def pipeline_options(command: Callable[..., int]) -> Callable[..., int]:
    """What ranks along pp follow."""
    for option in (
        click.option("--chunks", type=int, help="Stages of a rank, for interleaved, zb1p and forward. Default: 1, of interleaved 2."),
        click.option("--microbatches", type=int, help="Micro-batches of a step of the pipeline. Default: two for each stage."),
        click.option(
            "--schedule",
            metavar="NAME|auto|FILE.csv",
            help="With pp in the mesh: the pipeline's schedule (see dsc schedule). Default: 1f1b, in inference forward.",
        ),
    ):
        command = option(command)
    return command


def recompute_option(default: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Whether backward runs again what the report's does."""
    shown = f"In training: run again in backward what the DeepSeek-V3 report does, or nothing. Default: {default}."
    return click.option("--recompute", type=click.Choice(["deepseek", "none"]), default=default, help=shown)


budget_option = click.option(
    "--budget-gb",
    type=float,
    metavar="GB",
    help="In training: run again what lets residuals and workspace of a rank fit.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]  # it may stand before or after the command
    try:
        from . import (  # noqa: F401 - attach the commands to the group
            commands,
            devices_command,
            diff_command,
            doctor_command,
            export_command,
            golden_command,
            list_commands,
            place_command,
            plan_command,
            report_command,
            schedule_command,
            train_command,
            tune_command,
        )

        if COMPLETE in os.environ:
            from .complete import answer

            code = answer(cli, os.environ[COMPLETE])
        else:
            code = cli.main(given or ["--help"], prog_name="dsc", standalone_mode=False, obj=("dsc", *given))
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # the reader has gone, which click meets by exiting: say nothing more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except click.ClickException as error:
        usage = isinstance(error, click.UsageError)
        _fail(error.format_message(), debug, hint=shlex.join(["dsc", *_named(given)]) if usage else "")
    except (KeyboardInterrupt, click.Abort) as error:  # click makes the one the other, and ends the line that was begun
        print(f"dsc: interrupted; {RESUMED.get(''.join(_named(given)), 'nothing half-written was left behind')}", file=sys.stderr)
        sys.exit(143 if isinstance(error.__cause__ or error, Terminated) else 130)
    except DscError as error:
        _fail(str(error), debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", debug)
    except MemoryError as error:
        _fail(f"out of memory{f': {error}' if str(error) else ''}", debug)
    except Exception as error:
        first = str(error).partition("\n")[0]
        _fail(f"internal error: {type(error).__name__}: {first} (dsc --debug {shlex.join(given)} shows where)", debug)
    sys.exit(code if isinstance(code, int) else 0)


def _named(given: Sequence[str]) -> list[str]:
    """The command that was given, if any was."""
    return [a for a in given[:1] if a in cli.commands]


def _fail(message: str, debug: bool, hint: str = "") -> NoReturn:
    if debug:
        traceback.print_exc()
    if hint:
        message = f"{' '.join(message.split()).rstrip('.')} (see {hint} --help)"
    for line in message.splitlines():  # one for each thing that is wrong; what is indented belongs to the line before
        print(line if line.startswith(" ") else f"dsc: error: {line}", file=sys.stderr)
    sys.exit(2)

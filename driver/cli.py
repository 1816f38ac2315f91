"""The `dsc` command: its errors, its exit codes, and how options are shared. The commands themselves are in commands.py.

Exit codes: 0 done (for diff: the same), 1 different (diff only), 2 an error, 130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import click

from ..ir.errors import DscError


class Group(click.Group):
    """Commands in the order in which they are met, each error as one line on standard error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, no_args_is_help=True)
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


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
weights_option = click.option("--weights", metavar="DIR|random:SEED", help="Checkpoint folder, or random weights keyed by name.")
inputs_option = click.option("--inputs", metavar="FILE.npz", help="An array for each input, by name. Default: seeded ones.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    from . import commands  # noqa: F401 - attaches the commands to the group

    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]  # it may stand before or after the command
    try:
        code = cli.main(given, prog_name="dsc", standalone_mode=False, obj=("dsc", *given))
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else error)
        sys.exit(0)
    except click.ClickException as error:
        _fail(error.format_message(), debug, hint=error.ctx if isinstance(error, click.UsageError) else None)
    except (KeyboardInterrupt, click.Abort):
        print("\ndsc: interrupted; nothing half-written was left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: say nothing more
        sys.exit(0)
    except DscError as error:
        _fail(str(error), debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", debug)
    except MemoryError as error:
        _fail(f"out of memory{f': {error}' if str(error) else ''}", debug)
    except Exception as error:
        _fail(f"internal error: {type(error).__name__}: {error} (dsc --debug {shlex.join(given)} shows where)", debug)


def _fail(message: str, debug: bool, hint: click.Context | None = None) -> None:
    if debug:
        traceback.print_exc()
    if hint:
        message = f"{message.rstrip('.')} (see {hint.command_path} --help)"
    for line in message.splitlines():  # one for each thing that is wrong; what is indented belongs to the line before
        print(line if line.startswith(" ") else f"dsc: error: {line}", file=sys.stderr)
    sys.exit(2)

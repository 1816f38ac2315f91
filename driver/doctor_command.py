"""`dsc doctor` and `dsc completion`: the machine, and the shell."""

from __future__ import annotations

from dataclasses import asdict

import click

from .cli import cli, json_option
from .ui import emit_json, progress, styled


@cli.command()
@click.option("--compile", "compile_targets", is_flag=True, help="Also compile a kernel for each target, which takes some seconds once.")
@json_option
def doctor(compile_targets: bool, as_json: bool) -> int:
    """Say what this machine can do.

    Each line is ok, missing or broken, with what to do about it: Python and the libraries, GPUs, Triton and the targets it compiles
    for, ranks, optional parts, backends of other packages, caches. Exit code 2 where something is wrong that nothing works without.

    \b
    dsc doctor
    dsc doctor --compile --json
    """
    from .doctor import examine, healthy

    with progress("looking at") as step:
        found = examine(compile_targets, step)
    if as_json:
        emit_json({"healthy": healthy(found), "findings": [asdict(f) for f in found]})
        return 0 if healthy(found) else 2
    widths = [max(len(f.area) for f in found), max(len(f.name) for f in found)]
    area = ""
    for f in found:
        shown = "" if f.area == area else f.area
        area = f.area
        status = styled(f"{f.status:<7}", {"ok": "green", "missing": "yellow", "broken": "red"}[f.status])
        print(f"{shown:<{widths[0]}}  {f.name:<{widths[1]}}  {status}  {f.detail}{f' -> {f.hint}' if f.hint else ''}")
    if not healthy(found):
        print("\nsomething is wrong that nothing works without; the lines above say what to do")
    return 0 if healthy(found) else 2


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print a script that completes commands and names.

    \b
    dsc completion bash >> ~/.bashrc
    dsc completion zsh >> ~/.zshrc
    dsc completion fish > ~/.config/fish/completions/dsc.fish
    """
    from .complete import script

    print(script(shell), end="")
    return 0

"""Renew what the documents quote: every block of README.md and docs/*.md that opens with ```console is run and its output put in its place.

    python docs/refresh.py            rewrite the documents, or those that are named
    python docs/refresh.py --check    say which outputs differ, times aside, and exit with 1 if any does

A line `$ command` is run by sh in a scratch folder that all documents share, with `dsc` on the PATH; what it prints on either stream
follows it. `...` alone on a line stands for lines left out on purpose, and stays.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIME = re.compile(r" *\b\d+\.\d+ m?s\b")


def documents() -> list[Path]:
    """The documents in the order in which a reader meets them."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(command: str, folder: Path) -> str:
    """What the command prints on a terminal of 140 columns."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "140", "NO_COLOR": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def renewed(block: str, folder: Path) -> str:
    """The block with the output of each of its commands."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    lines = []
    for command, old in zip(parts[1::2], parts[2::2], strict=True):
        output = run(command, folder)
        lines.append(f"$ {command}\n{shortened(output, old)}{old[len(old.rstrip()) + 1 :]}")
    return "".join(lines)


def shortened(output: str, old: str) -> str:
    """`output` without the lines that the old text left out: it keeps as many before and behind its `...` as there were."""
    before, dots, behind = old.rstrip("\n").partition("\n...\n")
    if not dots:
        return output.rstrip("\n") + "\n" if output.strip() else ""
    lines = output.rstrip("\n").split("\n")
    head, tail = before.count("\n") + 1, behind.count("\n") + 1
    return "\n".join([*lines[:head], "...", *lines[-tail:]]) + "\n"


def main() -> int:
    """Renew or check, and say what was done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="say which outputs differ, and rewrite nothing")
    parser.add_argument("document", nargs="*", type=Path, help="of README.md and docs/*.md (default: all)")
    given = parser.parse_args()
    check, stale = given.check, []
    with tempfile.TemporaryDirectory() as scratch:
        for document in [path.resolve() for path in given.document] or documents():
            old = document.read_text(encoding="utf-8")
            new = BLOCK.sub(lambda match: f"```console\n{renewed(match[1], Path(scratch))}```", old)
            if TIME.sub("", new) != TIME.sub("", old):
                stale.append(document.relative_to(ROOT).as_posix())
            if not check and new != old:
                document.write_text(new, encoding="utf-8")
    print(f"{'differ' if check else 'renewed'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

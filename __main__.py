"""`python -m dsc`: the `dsc` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the arguments say."""
    try:
        from .driver.cli import main as cli
        from .driver.interrupt import obey
    except KeyboardInterrupt:
        sys.exit(130)
    obey()
    cli()


if __name__ == "__main__":
    main()

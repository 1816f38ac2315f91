"""`python -m dsc`: the `dsc` command."""

from __future__ import annotations

import sys
from signal import SIGTERM, signal


def main() -> None:
    """Run the command that the arguments say."""
    try:
        from .driver.cli import main as cli
        from .driver.cli import terminated
    except KeyboardInterrupt:
        sys.exit(130)
    signal(SIGTERM, terminated)
    cli()


if __name__ == "__main__":
    main()

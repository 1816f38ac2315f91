"""`python -m dsc`: the `dsc` command."""

from __future__ import annotations


def main() -> None:
    """Run the command that the arguments say."""
    from .driver.cli import main as cli

    cli()


if __name__ == "__main__":
    main()

"""The `herd` command, also `python -m herd`. The rest is imported inside, so that Ctrl-C at start-up is one line."""

import sys


def main() -> None:
    """Run the command with the arguments of this process, and exit with its code."""
    try:
        from herd.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""The command line: `python -m nf4lab quantize IN OUT`, `… inspect FILE`, `… compare FILE`."""

import argparse
import sys

from nf4lab import __version__
from nf4lab.commands import compare, inspect, quantize

COMMANDS = (quantize, inspect, compare)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name. Returns the exit status: 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m nf4lab", description="4-bit formats on the command line.")
    parser.add_argument("--version", action="version", version=f"nf4lab {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(subparsers)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"nf4lab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

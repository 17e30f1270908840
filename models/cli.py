"""The `vmonarch` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import vmonarch_jax as vm


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; `run` of what it parses does the work."""
    from . import commands

    parser = argparse.ArgumentParser(prog="vmonarch", description=vm.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in commands.COMMANDS:
        add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status.

    0 is success, 2 a mistake that the message on standard error names, 130 an interruption that
    the same command goes on from.
    """
    try:
        # here and not above: a bare installation must get a sentence and no traceback
        from . import cli_options
        from .loop import Interrupted

        parser = make_parser()
    except ModuleNotFoundError as error:
        print(
            f"vmonarch: error: {error}; the command needs pip install 'vmonarch-jax[video]'",
            file=sys.stderr,
        )
        return 2
    args = parser.parse_args(argv)
    try:
        with cli_options.implementation_of(args):
            args.run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"vmonarch {args.command}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"\n{stop}; the same command goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command `lightning-influence`, which inspects captured fits and scores on disk; one file per subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from lightning_influence.cli import report, show, top, verify
from lightning_influence.types import MissingEvidence

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, ModuleType] = {"show": show, "top": top, "report": report, "verify": verify}
"""Each has `arguments(parser)` and `run(options) -> exit code`; its docstring is its help text."""

_EXIT_CODES = "exit codes: 0 success; 1 something is damaged, missing or refused; 2 wrong arguments"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command-line arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the pipe, as `head` does; Python's own flush at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MissingEvidence, ValueError, OSError, ImportError) as error:
        print(f"lightning-influence {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-influence",
        description="Inspect the captured fits and scores that `Influence` wrote to disk.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").strip()
        one = commands.add_parser(name, help=text.splitlines()[0], description=text, epilog=_EXIT_CODES)
        command.arguments(one)
        one.set_defaults(run=command.run)
    return parser

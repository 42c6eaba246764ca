"""The command `lightning-influence`, which inspects captured fits and scores on disk; one file per subcommand."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import lightning_influence

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "show": "Print what a folder of captured fits, a run or a file of scores holds.",
    "top": "Print the strongest proponents and opponents of a query, or the highest self-influence.",
    "report": "Write one HTML page to review suspicious training examples and explanations.",
    "verify": "Check whether the files of a run are complete, and list what can be computed from them.",
}
"""What each does. Its file, with `arguments(parser)` and `run(options) -> exit code`, is imported when it is called."""

_EXIT_CODES = "exit codes: 0 success; 1 something is damaged, missing or refused; 2 wrong arguments"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command-line arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser(arguments).parse_args(arguments)
    try:
        with contextlib.redirect_stdout(import_module(".text", __name__).Printable(sys.stdout)):
            code = int(options.run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the pipe, as `head` does; Python's own flush at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (lightning_influence.MissingEvidence, ValueError, OSError, ImportError) as error:
        text = import_module(".text", __name__).printable(str(error))
        print(f"lightning-influence {options.command}: {text}", file=sys.stderr)
        return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-influence",
        description="Inspect the captured fits and scores that `Influence` wrote to disk.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text, epilog=_EXIT_CODES)
        if name in arguments:
            command = import_module(f".{name}", __name__)
            command.arguments(one)
            one.set_defaults(run=command.run)
    return parser

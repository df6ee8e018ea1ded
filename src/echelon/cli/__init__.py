"""The command line: one module a verb, imported only when it is asked for."""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from echelon import __version__
from echelon.cli.arguments import OneLineParser
from echelon.errors import UserError
from echelon.registry import suggest

VERBS = {
    "methods": "list the methods, or show one method's card",
    "compare": "run a bake-off and write its report",
    "generate": "continue a prompt with any decoder",
    "train": "train a language model by any method, or a ranker, on your corpus",
    "adapt": "train an adapter, any low-rank one, on a model",
    "compress": "make a model smaller",
    "edit": "take texts out of a language model",
    "index": "make documents searchable, add to them, take away from them",
    "search": "find documents in an index",
    "rerank": "order what was found anew, by any method and model",
    "evaluate": "measure runs against judgements, or run a benchmark",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 2 after a bad argument or file, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # a full disk or a closed pipe is met here, not when Python ends
        return status
    except KeyboardInterrupt:
        if debug:
            raise
        print("echelon: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"echelon: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, OSError):
            _forget_stdout()
        return 2


def _forget_stdout() -> None:
    """What could not be written must not be tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    width = max(map(len, VERBS))
    parser = OneLineParser(
        prog="echelon",
        description="Low-rank and ranking methods for language models, compared on your model under one budget.",
        epilog="verbs:\n" + "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
        + "\n\n`echelon VERB --help` says more; --debug shows a traceback in place of one line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"echelon {__version__}")
    parser.add_argument("verb", metavar="VERB", nargs="?", help=argparse.SUPPRESS)
    head, rest = arguments[:1], arguments[1:]
    try:
        verb = parser.parse_args(head).verb
    except SystemExit as leaving:  # --help and --version
        return int(leaving.code or 0)
    if verb is None:
        parser.print_help()
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}; verbs are {', '.join(VERBS)}")
    try:
        return importlib.import_module(f"echelon.cli.{verb}").run(rest)
    except SystemExit as leaving:  # --help, or argparse's own complaint
        return int(leaving.code or 0)

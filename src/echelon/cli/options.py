"""From dataclasses to command-line options: a knob is written once, in its method."""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from echelon import registry
from echelon.cli.arguments import OneLineParser
from echelon.cli.help import help_text
from echelon.cli.progress import quiet_libraries
from echelon.errors import UserError


def parse(
    verb: str, description: str, options: type, kind: str | Sequence[str], arguments: Sequence[str], positional: tuple[str, str] | None = None,
    default_method: str | None = None,
) -> tuple[Any, Any, list[str]]:
    """Parse ``--method X --method.knob v`` and a verb's own options.

    Args:
        verb: its name, for the usage line.
        description: one sentence for ``--help``.
        options: dataclass of the verb's own options.
        kind: registry kind that ``--method`` picks from, or several that share no name; empty for a verb without methods.
        arguments: what stands after the verb.
        positional: name and help of the positional words, if the verb takes any.
        default_method: the method when ``--method`` is not given.

    Returns:
        The filled ``options``, the method built from its knobs (None when the method is neither given nor defaulted), and the
        positional words.

    Raises:
        UserError: on an unknown option or method, with the nearest legal one.
        ValueError: from a method whose knob is out of range.
    """
    kinds = [kind] if isinstance(kind, str) and kind else list(kind)
    first = OneLineParser(add_help=False, allow_abbrev=False)
    if kind:
        first.add_argument("--method", default=default_method)
    chosen, rest = first.parse_known_args(list(arguments))
    picked = getattr(chosen, "method", None)
    card = registry.card(picked, kind_of(picked, kinds)) if picked else None
    if {"-h", "--help"} & set(rest[: rest.index("--")] if "--" in rest else rest):
        names = [known.name for each in kinds for known in registry.cards(each)]
        print(help_text(verb, description, options, names, default_method, card, positional), end="")
        sys.exit(0)
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"echelon {verb}", exit_on_error=False, parser_mode="yaml")
    if kind:
        parser.add_argument("--method")
    if positional:
        parser.add_argument(positional[0], nargs="*", default=[])
    parser.add_class_arguments(options, as_group=False)
    if card is not None:
        cls = registry.get(card.name, card.kind)
        quiet_libraries()
        parser.add_class_arguments(cls, "method_knobs", fail_untyped=False)
        rest = ["--method_knobs" + word[len("--method") :] if word.startswith("--method.") else word for word in rest]
    rest = _spelled_out(rest, parser)
    _refuse_unknown(rest, parser, picked)
    with _quiet_errors():
        filled = parser.instantiate_classes(parser.parse_args(rest))
    own = options(**{name: filled[name] for name in [field.name for field in dataclasses.fields(options)]})
    return own, filled.get("method_knobs"), list(filled[positional[0]]) if positional else []


def kind_of(name: str, kinds: Sequence[str]) -> str:
    """The one of these kinds that a method is of.

    Raises:
        UserError: if none of them has it; the nearest name is suggested.
    """
    pool = {card.name: each for each in kinds for card in registry.cards(each)}
    if name not in pool:
        told = f"unknown {' or '.join([', '.join(kinds[:-1]), kinds[-1]][len(kinds) < 2 :])} {name!r}{registry.suggest(name, pool)}"
        raise UserError(f"{told}; see `echelon methods{' --kind ' + kinds[0] if len(kinds) == 1 else ''}`")
    return pool[name]


def _spelled_out(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """``--dry-run`` becomes ``--dry_run=true``: hyphens in names, and switches without a value."""
    made: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return made + words[place:]
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            word = "--" + name[2:].replace("-", "_") + equals + value
            action = parser._option_string_actions.get(word)
            following = words[place + 1].lower() if place + 1 < len(words) else ""
            if action is not None and getattr(action, "_typehint", None) is bool and following not in ("true", "false"):
                word += "=true"
        made.append(word)
    return made


def _refuse_unknown(words: list[str], parser: argparse.ArgumentParser, method: str | None) -> None:
    legal = [option.replace("--method_knobs.", "--method.") for option in parser._option_string_actions]
    for word in words:
        name = word.split("=")[0].replace("--method_knobs.", "--method.")
        if name == "--":
            return
        if name.startswith("--") and name not in legal:
            of = f" of {method}" if name.startswith("--method.") and method else ""
            raise UserError(f"unknown option {name!r}{of}{registry.suggest(name, legal)}")


@contextlib.contextmanager
def _quiet_errors() -> Iterator[None]:
    """jsonargparse prints usage before it raises; the one line that main() prints is enough."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except argparse.ArgumentError as error:
        raise UserError(_plain(str(error.message))) from error


def _plain(message: str) -> str:
    """jsonargparse's complaint about a value, as one sentence."""
    key, value = re.search(r'[Kk]ey "([\w.]+)"', message), re.search(r"(?:Given|Got) value: (.*)", message)
    expected = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\]|(tuple with \d+ elements))", message)
    wanted = [name for names in expected for name in names if name not in ("", "NoneType")]
    if key and value and wanted:
        return f"--{key[1].replace('method_knobs.', 'method.')} is {value[1]!r}; it must be {' or '.join(wanted)}"
    return message.replace("method_knobs.", "method.")

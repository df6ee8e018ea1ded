"""What ``--help`` of a verb prints, from the options' dataclass and the method's card: nothing is imported for it."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from echelon.registry import Card, attribute_docs


def help_text(
    verb: str, description: str, options: type, methods: Sequence[str], default_method: str | None, picked: Card | None, positional: tuple[str, str] | None
) -> str:
    """Usage and one entry for every option, with its type, its sentence and its default.

    Args:
        verb: its name.
        description: one sentence.
        options: dataclass of the verb's own options.
        methods: names that ``--method`` takes; none for a verb without methods.
        default_method: the one that is taken without ``--method``.
        picked: card of the method whose knobs are shown.
        positional: name and help of the positional words, if there are any.
    """
    parser = argparse.ArgumentParser(prog=f"echelon {verb}", description=description)
    if positional:
        parser.add_argument(positional[0], nargs="*", help=_escaped(positional[1]))
    if methods:
        told = f"one of: {', '.join(methods)} (default: {default_method}); add it before --help to see its knobs"
        parser.add_argument("--method", metavar="NAME", help=_escaped(told))
    docs: dict[str, str] = {}
    for base in reversed(options.__mro__):
        docs |= attribute_docs("\n".join(line.removeprefix("    ") for line in (base.__doc__ or "").splitlines()))
    for field in dataclasses.fields(options):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        _add(parser, f"--{field.name}", kind, docs.get(field.name, ""), repr(field.default))
    if picked is not None:
        knobs = parser.add_argument_group(f"knobs of {picked.name}", _escaped(picked.summary))
        for knob in picked.knobs:
            _add(knobs, f"--method.{knob.name}", knob.type, knob.help, knob.default)
    return parser.format_help()


def _add(place: Any, name: str, kind: str, told: str, default: str | None) -> None:
    end = "" if default is None else f" (default: {default.strip(chr(39))})"
    if kind == "bool" and default == "False":
        place.add_argument(name, action="store_true", help=_escaped(told + end))
    else:
        place.add_argument(name, metavar=_value(kind), help=_escaped(told + end))


def _value(kind: str) -> str:
    """A type as it is written in code, as people write it."""
    choices = re.fullmatch(r"Literal\[(.*)\]", kind)
    if choices:
        return "{" + choices[1].replace("'", "").replace('"', "").replace(", ", ",") + "}"
    return kind.upper() if kind.isidentifier() else kind


def _escaped(text: str) -> str:
    return text.replace("%", "%%")

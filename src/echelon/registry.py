"""What a method says about itself.

A method declares itself once, beside its own code::

    @method(kind="decoder", title="...", arxiv="2205.09726", year=2022, summary="...")
    @dataclass(frozen=True)
    class RankGen(Decoder): ...

The arguments are literals, so the cards are read from the source with :mod:`ast`: listing all methods imports neither torch nor
the methods. Only :func:`get` imports, and only the one module that it needs.
"""

import ast
import difflib
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.errors import UserError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Knob:
    """One field of a method's dataclass: its name, type and default as written, and the sentence its docstring gives it."""

    name: str
    type: str
    default: str | None
    help: str


@dataclass(frozen=True)
class Card:
    """A method's own account of itself.

    Attributes:
        name: what users type.
        kind: what sort of method it is (decoder, scorer, benchmark, ...).
        title: title of its paper.
        year: year of the paper's first version.
        summary: one line on what it does.
        arxiv: arXiv id, empty when there is none.
        needs: what it needs beyond a model, in words.
        published: figures as its paper reports them, in words.
        module: dotted module that holds it.
        attribute: name of the class there.
        doc: the class's docstring.
        knobs: its dataclass fields, inherited ones first.
    """

    name: str
    kind: str
    title: str
    year: int
    summary: str
    arxiv: str = ""
    needs: str = ""
    published: str = ""
    module: str = ""
    attribute: str = ""
    doc: str = ""
    knobs: tuple[Knob, ...] = ()


def method(
    *, kind: str, title: str, year: int, summary: str, arxiv: str = "", name: str = "", needs: str = "", published: str = ""
) -> Callable[[type], type]:
    """Declare the class below as a method. All arguments must be literals; ``name`` defaults to the class name in snake_case."""

    def declare(cls: type) -> type:
        cls.method_name = name or snake_case(cls.__name__)  # type: ignore[attr-defined]
        return cls

    return declare


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def cards(kind: str | None = None) -> list[Card]:
    """All cards, or those of one kind, sorted by kind and name.

    Raises:
        UserError: if no method is of this kind.
    """
    if kind is None:
        return list(_all_cards())
    kinds = sorted({card.kind for card in _all_cards()})
    if kind not in kinds:
        raise UserError(f"unknown kind {kind!r}{suggest(kind, kinds)}; kinds are {', '.join(kinds)}")
    return [card for card in _all_cards() if card.kind == kind]


def named(name: str) -> list[Card]:
    """All cards of this name: one method may be a scorer, a decoder and a trainer.

    Raises:
        UserError: if there is none; the nearest name is suggested.
    """
    found = [card for card in cards() if card.name == name]
    if not found:
        raise UserError(f"unknown method {name!r}{suggest(name, {card.name for card in cards()})}; see `echelon methods`")
    return found


def card(name: str, kind: str) -> Card:
    """The card of one method; names are unique within a kind.

    Raises:
        UserError: if there is no such method; the nearest name is suggested.
    """
    pool = {card.name: card for card in cards(kind)}
    if name not in pool:
        raise UserError(f"unknown {kind} {name!r}{suggest(name, pool)}; see `echelon methods --kind {kind}`")
    return pool[name]


def get(name: str, kind: str) -> Any:
    """Import and return the class of one method."""
    found = card(name, kind)
    return getattr(importlib.import_module(found.module), found.attribute)


def build(name: str, kind: str, knobs: dict[str, Any]) -> Any:
    """An instance of a method with these knobs.

    Raises:
        UserError: if the method or a knob is unknown (the nearest name is suggested).
        ValueError: if a knob is out of range, from the method itself.
    """
    legal = [knob.name for knob in card(name, kind).knobs]
    for knob in knobs:
        if knob not in legal:
            raise UserError(f"unknown knob {knob!r} of {name}{suggest(knob, legal)}; its knobs are {', '.join(legal) or 'none'}")
    return get(name, kind)(**knobs)


def suggest(word: str, legal: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no legal word is near."""
    near = difflib.get_close_matches(word, list(legal), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


@functools.cache
def _all_cards() -> tuple[Card, ...]:
    found: list[Card] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "@method(" in source and path.name != "registry.py":
            module = ".".join(("echelon", *path.relative_to(PACKAGE).with_suffix("").parts))
            found += _read(ast.parse(source), module)
    names = [(c.kind, c.name) for c in found]
    if len(set(names)) < len(names):
        raise RuntimeError(f"two methods of one kind share a name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    return tuple(sorted(found, key=lambda c: (c.kind, c.name)))


def _read(tree: ast.Module, module: str) -> Iterator[Card]:
    for node in _classes(tree).values():
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "method":
                said = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in mark.keywords}
                said.setdefault("name", snake_case(node.name))
                yield Card(**said, module=module, attribute=node.name, doc=ast.get_docstring(node) or "", knobs=tuple(_knobs(node, tree).values()))


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def _module(name: str) -> ast.Module:
    return ast.parse(PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8"))


def _knobs(node: ast.ClassDef, tree: ast.Module) -> dict[str, Knob]:
    """Fields of a class, after those of its bases; a field that is declared again keeps its place, and its sentence unless it gets a new one."""
    found: dict[str, Knob] = {}
    imported = {name.name: line.module for line in tree.body if isinstance(line, ast.ImportFrom) for name in line.names}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in (own := _classes(tree)):
            found |= _knobs(own[base.id], tree)
        elif isinstance(base, ast.Name) and (imported.get(base.id) or "").startswith("echelon."):
            there = _module(imported[base.id])  # type: ignore[arg-type]
            found |= _knobs(_classes(there)[base.id], there)
    told = attribute_docs(ast.get_docstring(node) or "")
    is_dataclass = any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)  # what other bases annotate are no fields
    for line in node.body if is_dataclass else ():
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            name = line.target.id
            before = found[name].help if name in found else ""
            found[name] = Knob(name, ast.unparse(line.annotation), ast.unparse(line.value) if line.value else None, told.get(name, before))
            if "ClassVar" in found[name].type:  # a base's knob that is fixed here, or no knob at all
                del found[name]
    return found


def attribute_docs(doc: str) -> dict[str, str]:
    """The ``Attributes:`` section of a Google-style docstring, as name -> sentence."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if not section:
        return {}
    entries = re.split(r"\n(?=    \w+:)", "\n" + section.group(1).rstrip())
    pairs = (re.match(r"\s*(\w+):\s*(.*)", entry, re.DOTALL) for entry in entries)
    return {m.group(1): " ".join(m.group(2).split()) for m in pairs if m}

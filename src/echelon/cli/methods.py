"""``echelon methods``: the registry, as a table or as cards."""

import dataclasses
import json
from collections.abc import Sequence

from echelon.cli.arguments import OneLineParser
from echelon.errors import UserError
from echelon.registry import Card, cards, named


def run(arguments: Sequence[str]) -> int:
    parser = OneLineParser(prog="echelon methods", description="List the methods, or show one method's card.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this method's paper, knobs and figures")
    parser.add_argument("--kind", help="only methods of this kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    found = named(args.name) if args.name else cards(args.kind)
    if args.name and args.kind:
        found = [card for card in found if card in cards(args.kind)]
        if not found:
            raise UserError(f"{args.name} is no {args.kind}; it is a {', a '.join(card.kind for card in named(args.name))}")
    if args.json:
        print(json.dumps([dataclasses.asdict(card) for card in found], indent=2))
    elif args.name:
        print("\n\n".join(as_text(card) for card in found))
    else:
        widths = [max(len(getattr(card, column)) for card in found) for column in ("name", "kind")]
        for card in found:
            print(f"{card.name:{widths[0]}}  {card.kind:{widths[1]}}  {card.year}  {card.summary}")
    return 0


def as_text(card: Card) -> str:
    """One card for people."""
    lines = [f"{card.name} ({card.kind})", f"  {card.summary}", f"  {card.title}, {card.year}" + (f", arXiv {card.arxiv}" if card.arxiv else "")]
    lines += [f"  needs: {card.needs}"] if card.needs else []
    lines += [f"  published: {card.published}"] if card.published else []
    lines += [f"  from {card.module} import {card.attribute}"]
    if card.knobs:
        width = max(len(knob.name) for knob in card.knobs)
        lines += ["  knobs:"] + [f"    {k.name:{width}}  {k.type} = {k.default}  {k.help}" for k in card.knobs]
    return "\n".join(lines)

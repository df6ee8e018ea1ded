"""From what a model wrote to a permutation: always one, and how it was read.

Where models answer with a ranking, parsers usually take any number in the text for an identifier, or refuse all of an answer with one slip in
it. Here the forms in which models answer are tried one after the other, prose is left alone, and what had to be mended is counted.
"""

import json
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from echelon.errors import UserError
from echelon.llm.base import Identifiers

Status = Literal["complete", "partial", "repaired", "unparseable"]

_NOUNS = r"(?i:passages?|documents?|docs?|texts?|items?|candidates?|sources?|paragraphs?|option|no\.?|number|id)"
_KIN = {"[": "［【〔〖「『〈《⟦❲⟨", "]": "］】〕〗」』〉》⟧❳⟩", "(": "（⦅", ")": "）⦆", ">": "＞›»≻→⇒⟶➜➔", ",": "，、；،", ":": "：", "#": "＃"}
_TO_ASCII = str.maketrans({char: plain for plain, chars in _KIN.items() for char in chars})
_IDS = {"number": r"\d+", "letter": r"(?<![^\W_])[A-Z](?![^\W_]|')"}


@dataclass(frozen=True)
class Parsed:
    """A ranking that was read from a text.

    Attributes:
        order: places (from 0) of all that was to be ranked, the best first; what the text does not name follows in the order of the input.
        status: ``complete`` if every identifier was named once and nothing else was; ``repaired`` if identifiers were named again, or such as
            do not exist, and were left out; ``partial`` if some were not named; ``unparseable`` if none was, and the order is the input's.
        repeated: identifiers named again.
        missing: identifiers not named.
        out_of_range: identifiers named that do not exist.
    """

    order: tuple[int, ...]
    status: Status
    repeated: int = 0
    missing: int = 0
    out_of_range: int = 0


def parse_permutation(text: str, n: int, identifiers: Identifiers = "number") -> Parsed:
    """The ranking of ``n`` passages that a text holds.

    The first of these forms that names all passages counts, or else the first that names any: JSON (the whole text, a code fence, or an object
    in the text); identifiers in square brackets, in the order of their first mention, up to a blank line behind which prose follows; identifiers
    with ``>`` between them; lines that hold nothing but identifiers; and "Passage 3". What stands before ``</think>`` is not looked at, and a
    thought that does not end holds no answer.

    Args:
        text: what the model wrote.
        n: how many passages it was shown.
        identifiers: whether they were numbered from 1 or lettered from A.

    Raises:
        UserError: if there are fewer than no passages, or more than letters.
    """
    _check(n, identifiers)
    read = _mentions(text, identifiers, n)
    order: list[int] = []
    repeated = out_of_range = 0
    seen: set[int] = set()
    for place in read:
        if not 0 <= place < n:
            out_of_range += 1
        elif place in seen:
            repeated += 1
        else:
            seen.add(place)
            order.append(place)
    missing = n - len(order)
    if not order and n:
        return Parsed(tuple(range(n)), "unparseable", repeated, missing, out_of_range)
    status: Status = "partial" if missing else "repaired" if repeated or out_of_range else "complete"
    return Parsed((*order, *(place for place in range(n) if place not in seen)), status, repeated, missing, out_of_range)


def identifier(place: int, identifiers: Identifiers = "number") -> str:
    """What a passage is called: 1, 2, 3 ... or A, B, C ..."""
    return string.ascii_uppercase[place] if identifiers == "letter" else str(place + 1)


def ranking_text(order: Sequence[int], identifiers: Identifiers = "number") -> str:
    """A ranking as models are asked to write it, ``[2] > [1]``; ``order`` holds places from 0."""
    return " > ".join(f"[{identifier(place, identifiers)}]" for place in order)


def without_thought(text: str) -> str | None:
    """What follows the last thought of a reasoning model; None if a thought was begun and not ended."""
    lowered = text.lower()
    end = lowered.rfind("</think>")
    begun = lowered.rfind("<think>")
    if begun > end:
        return None
    return text[end + len("</think>") :] if end >= 0 else text


def plain_characters(text: str) -> str:
    """Digits of any script as ASCII, numbers in circles and the like as ``[3]``, and brackets, arrows and commas as their ASCII kin."""
    made = []
    for char in text.replace("\r\n", "\n").translate(_TO_ASCII):
        if char.isascii():
            made.append(char)
        elif unicodedata.category(char) == "Nd":
            made.append(str(unicodedata.decimal(char)))
        elif unicodedata.category(char) == "No" and (value := unicodedata.numeric(char, 0.5)).is_integer():
            part_of_number = unicodedata.decomposition(char).startswith(("<super>", "<sub>"))
            made.append(str(int(value)) if part_of_number else f"[{int(value)}]")
        elif "Ａ" <= char <= "Ｚ":
            made.append(chr(ord(char) - ord("Ａ") + ord("A")))
        else:
            made.append(char)
    return "".join(made)


def _check(n: int, identifiers: str) -> None:
    if n < 0:
        raise UserError(f"n is {n!r}; it must be at least 0")
    if identifiers not in _IDS:
        raise UserError(f"identifiers is {identifiers!r}; it must be number or letter")
    if identifiers == "letter" and n > 26:
        raise UserError(f"{n} passages cannot be lettered; letters are for 26 at most, take numbers")


def _mentions(text: str, identifiers: str, n: int) -> list[int]:
    """Places named by the first form that names all, or else any; those that do not exist are -1."""
    answer = without_thought(text)
    if answer is None:
        return []
    answer = plain_characters(answer)
    token = _IDS[identifiers]
    best: list[int] = []
    for names in (_json(answer, identifiers), _bracketed(answer, token), _chained(answer, token), _listed(answer, token), _labelled(answer, token)):
        found = [_place(name, n) for name in names]
        if len(set(found) - {-1}) == n > 0:
            return found
        if not best or (max(best) < 0 <= max(found, default=-1)):
            best = found
    return best


def _place(name: str, n: int) -> int:
    """Of an identifier; -1 if there is no such one. (Text can hold numbers of any length: they are not made into integers.)"""
    if name.isdigit():
        name = name.lstrip("0")
        return int(name) - 1 if 0 < len(name) < 10 and int(name) <= n else -1
    place = string.ascii_uppercase.find(name)
    return place if 0 <= place < n else -1


def _json(text: str, identifiers: str) -> list[str]:
    """Of the first list of identifiers in JSON: the whole text, a code fence, or an object somewhere in the text."""
    places = [text, *re.findall(r"```\w*\s(.*?)```", text, re.DOTALL), *re.findall(r"\{[^{}]*\}", text)]
    for place in places:
        try:
            value = json.loads(place)
        except (ValueError, RecursionError):
            continue
        for values in _lists(value):
            names = [_json_name(item, identifiers) for item in values]
            if names and all(name is not None for name in names):
                return [name for name in names if name is not None]
    return []


def _lists(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list):
        yield value
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, list))


def _json_name(item: Any, identifiers: str) -> str | None:
    if isinstance(item, dict):  # {"id": 3, ...}
        item = next((item[key] for key in ("id", "identifier", "passage", "document") if key in item), None)
    if identifiers == "number" and not isinstance(item, bool):
        if isinstance(item, int):
            return str(item) if 0 <= item < 10**9 else "0"
        if isinstance(item, float) and item.is_integer():
            return str(int(item)) if 0 <= item < 10**9 else "0"
    if isinstance(item, str):
        whole = re.fullmatch(rf"\s*(?:{_NOUNS}\s*)?[\[(#]?\s*({_IDS[identifiers]})\s*[\])]?\s*", item)
        return whole[1] if whole else None
    return None


def _bracketed(text: str, token: str) -> list[str]:
    """Identifiers in square brackets, one or several in each, of the first ranking in the text."""
    one_id = rf'["#]?{token}"?'
    inside = rf"\[\s*(?:{_NOUNS}\s*)?{one_id}(?:(?:\s*[,>]\s*|\s+){one_id})*\s*\]"
    chain, one = re.compile(rf"{inside}(?:\s*>\s*{inside})+"), re.compile(inside)
    ranking: list[str] = []
    paragraphs = re.split(r"\n[^\S\n]*\n", text)
    # A ranking in the asked form is preferred to a mention in the prose before it.
    begin = next((k for k, paragraph in enumerate(paragraphs) if chain.search(paragraph)), None)
    if begin is None:
        begin = next((k for k, paragraph in enumerate(paragraphs) if one.search(paragraph)), len(paragraphs))
    for paragraph in paragraphs[begin:]:
        if ranking and not re.match(rf"[\s>*\-•]*(?:\d+\s*[.):]\s*)?{inside}", paragraph) and re.search(r"[^\W\d_]", paragraph):
            break
        ranking += one.findall(paragraph)
    names = [name for piece in ranking for name in re.findall(token, piece)]
    longest = max(chain.findall("\n\n".join(paragraphs[begin:])), key=len, default="")
    in_chain = re.findall(token, longest)
    return in_chain if set(in_chain) >= set(names) else names


def _chained(text: str, token: str) -> list[str]:
    """The longest run of bare identifiers with ``>`` between them."""
    runs = [re.findall(token, run) for run in re.findall(rf"(?<![\w.]){token}(?:\s*\))?(?:\s*>\s*(?:\(\s*)?{token}(?:\s*\))?)+", text)]
    return max(runs, key=len, default=[])


def _listed(text: str, token: str) -> list[str]:
    """Identifiers on lines that hold nothing else, but for bullets, an enumeration or a label before a colon; the longest block of such lines."""
    blocks: list[list[str]] = [[]]
    enumerated = re.compile(rf"\s*\d+\s*[.):]\s+\(?#?({token})\)?[.,;]?\s*")
    bare = re.compile(rf"(?:[^\n:]*:)?[\s\-*•(#]*{token}(?:[\s,;()#&=|/\-]+(?:and\s+)?{token})*[\s).,;]*")
    for line in text.split("\n"):
        match = enumerated.fullmatch(line)
        if match:
            blocks[-1].append(match[1])
        elif bare.fullmatch(line):
            blocks[-1] += re.findall(token, line.rpartition(":")[2])
        elif line.strip():
            blocks.append([])
    return max(blocks, key=len)


def _labelled(text: str, token: str) -> list[str]:
    """``Passage 3``, ``document #3``: in the order of first mention. What numbers a label (``1. Passage 3``) is none."""
    gap = r"[^\S\n]*"
    named: list[str] = re.findall(rf"(?<!\w){_NOUNS}{gap}(?:[:#]{gap})?[\[(]?({token})(?!\w|{gap}[.):]{gap}{_NOUNS})", text)
    return list(dict.fromkeys(named))

"""Conditions on what documents are besides their text, in one form for all stores.

A filter is a part of SQL: ``year >= 1990 and lang in ('en', 'fr') and draft = false``. A condition on a field that a document does not have, or has with a
value of another type, is false, ``!=`` too.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from echelon.errors import UserError

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in"]
Scalar = str | float | bool

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*') | (?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w.])
    | (?P<sign>!=|<>|<=|>=|=|<|>|\(|\)|,) | (?P<word>[^\W\d]\w*))""",
    re.VERBOSE,
)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_HELP = "a filter is like: year >= 1990 and lang in ('en', 'fr'); texts stand in single quotes"


@dataclass(frozen=True)
class Condition:
    """One comparison.

    Attributes:
        field: name of an entry of ``meta``.
        operator: the comparison; texts compare by code point, true and false only by ``=``, ``!=`` and ``in``.
        values: what it is compared with; several only for ``in``.
    """

    field: str
    operator: Operator
    values: tuple[Scalar, ...]

    def __post_init__(self) -> None:
        """Raises: UserError: if the field is no plain name, the operator is unknown, or does not fit the values."""
        if not re.fullmatch(r"[^\W\d]\w*", self.field):
            raise UserError(f"the field {self.field!r} cannot be filtered by; names have letters, digits and _")
        if self.operator not in get_args(Operator) or not self.values or (self.operator != "in" and len(self.values) > 1):
            raise UserError(f"the condition {self.field} {self.operator} {list(self.values)!r} cannot be read; {_HELP}")
        if self.operator in ("<", "<=", ">", ">=") and isinstance(self.values[0], bool):
            raise UserError(f"{self.field} {self.operator} {str(self.values[0]).lower()}: true and false have no order")

    def matches(self, meta: Mapping[str, Any]) -> bool:
        mine: Any = meta.get(self.field)
        alike: list[Any] = [value for value in self.values if _kind(value) is _kind(mine)]
        return mine in alike if self.operator == "in" else bool(alike) and _ORDER[self.operator](mine, alike[0])


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, told: str) -> Self:
        """Read a filter.

        Raises:
            UserError: if it is none.
        """
        words, place = [], 0
        while told[place:].strip():
            found = _TOKEN.match(told, place)
            if not found:
                raise UserError(f"the filter {told!r} cannot be read at {told[place:].strip()[:20]!r}; {_HELP}")
            words.append((str(found.lastgroup), found[found.lastgroup or 0]))
            place = found.end()
        conditions: list[Condition] = []
        while words:
            if conditions and (words.pop(0)[1].lower() != "and" or not words):
                raise UserError(f"the filter {told!r} cannot be read; conditions are joined by 'and'; {_HELP}")
            conditions.append(_condition(words, told))
        if not conditions:
            raise UserError(f"the filter is empty; {_HELP}")
        return cls(tuple(conditions))

    def matches(self, meta: Mapping[str, Any]) -> bool:
        return all(condition.matches(meta) for condition in self.conditions)


def _condition(words: list[tuple[str, str]], told: str) -> Condition:
    """Take one condition off the front."""
    taken = [words.pop(0) for _ in range(min(2, len(words)))]
    if [kind for kind, _ in taken] not in (["word", "sign"], ["word", "word"]) or not words:
        raise UserError(f"the filter {told!r} cannot be read; {_HELP}")
    field, sign = taken[0][1], taken[1][1].lower().replace("<>", "!=")
    if sign != "in":
        return Condition(field, sign, (_value(words.pop(0), told),))  # type: ignore[arg-type]
    values = []
    if words.pop(0)[1] != "(":
        raise UserError(f"the filter {told!r} cannot be read; behind 'in' stand values in parentheses; {_HELP}")
    while True:
        if len(words) < 2 or words[1][1] not in (",", ")"):
            raise UserError(f"the filter {told!r} cannot be read; behind 'in' stand values in parentheses; {_HELP}")
        values.append(_value(words.pop(0), told))
        if words.pop(0)[1] == ")":
            return Condition(field, "in", tuple(values))


def _value(word: tuple[str, str], told: str) -> Scalar:
    kind, text = word
    if kind == "text":
        return text[1:-1].replace("''", "'")
    if kind == "number":
        return as_number(float(text)) if re.search(r"[.eE]", text) else int(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise UserError(f"the filter {told!r} cannot be read: {text!r} is no value; {_HELP}")


def as_number(value: Any) -> Any:
    """A whole number as int, as stores keep it; all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kind(value: Any) -> type | None:
    return bool if isinstance(value, bool) else float if isinstance(value, int | float) else str if isinstance(value, str) else None


def filterable(meta: Mapping[str, Any]) -> dict[str, Scalar]:
    """The entries that can be filtered by: texts, finite numbers, true and false."""
    kept = {name: value for name, value in meta.items() if _kind(value) is not None and not (_kind(value) is float and not abs(value) < 1e300)}
    return {name: as_number(value) for name, value in kept.items()}


def as_sql(filter: Filter, column: str) -> str:
    """The filter over a JSON column of LanceDB.

    ``json_get_*`` fails on a value that cannot be cast, so types are told apart by the JSON text first.
    """
    return " AND ".join(f"({_sql(condition, column)})" for condition in filter.conditions)


def _sql(condition: Condition, column: str) -> str:
    raw = f"json_extract({column}, '$.{condition.field}')"
    made = []
    for value in condition.values:
        sign = "=" if condition.operator == "in" else condition.operator
        if isinstance(value, bool):
            made.append(f"({raw} IN ('true', 'false') AND {raw} {sign} '{json.dumps(value)}')")
        elif isinstance(value, str):
            quoted = value.replace("'", "''")
            made.append(f"({raw} LIKE '\"%' AND json_get_string({column}, '{condition.field}') {sign} '{quoted}')")
        else:
            made.append(f"try_cast({raw} AS double) {sign} {float(value)!r}")
    return " OR ".join(made)

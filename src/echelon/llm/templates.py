"""Prompts as data: one YAML file for each, with named slots, read and checked once.

What is put into a slot is never read again, so braces and percent signs in a passage stay what they are. Queries and passages are cut to
numbers of tokens before they are put in; a finished prompt is never cut, or the question at its end would go.
"""

import functools
import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from echelon.data.documents import Doc
from echelon.data.files import read_text
from echelon.errors import UserError
from echelon.llm.base import Engine, Identifiers, Permutation, Prompt, Role
from echelon.llm.citations import parse_citations
from echelon.llm.permutation import Status, identifier, parse_permutation, ranking_text, without_thought
from echelon.llm.sanitizing import SANITIZERS, spell_apart
from echelon.registry import suggest

BUILT_IN = Path(__file__).parent / "templates"
TemplateKind = Literal["point", "pair", "set", "list", "cite"]
_CHARACTERS = 256
"""Characters of a field for each token that it may have, at most: of a book that is to be cut to 300 tokens, the rest is not looked at."""
_SLOT = re.compile(r"\{([a-z_]+)\}")
_SLOTS: dict[str, set[str]] = {
    "point": {"query", "passage"}, "pair": {"query", "passage_a", "passage_b"}, "set": {"query", "count", "passages", "example"},
    "list": {"query", "count", "passages", "example"}, "cite": {"query", "count", "passages", "example", "nothing"},
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn of a template; with ``each="passage"`` it stands once for each passage, next to its neighbours of the same sort."""

    role: Role
    text: str
    each: Literal["", "passage"] = ""


@dataclass(frozen=True)
class Rendered(Prompt):
    """A prompt made from a template, and what had to be cut.

    Attributes:
        query: the query as it stands in it.
        cut: passages that were longer than what they may have.
        shrunk_to: tokens that each passage was left with because the context does not hold more; None if it does.
    """

    query: str = ""
    cut: int = 0
    shrunk_to: int | None = None


@dataclass(frozen=True)
class Template:
    """A prompt with slots, and how its answer is read.

    Attributes:
        name: what it is called.
        kind: what is asked: of one passage (`point`), of two (`pair`), for the best of some (`set`), for an order (`list`), or for an
            answer that cites its passages (`cite`).
        messages: its turns.
        document: how a passage stands among others, with `{id}` and `{passage}`.
        separator: what stands between passages.
        identifiers: whether passages are numbered or lettered.
        answer_prefix: what the model's turn begins with.
        answers: what is scored behind it; one with `{id}` stands for one of each passage, `{query}` for the query.
        label: how a written answer names a passage.
        pattern: finds the answer in what was written, with one group; the text is lower-cased first.
        nothing: what the model writes if the passages do not hold the answer.
        max_tokens: tokens of a `query` and of a `passage` at most.
        sanitize: what is done to both, in this order (see :mod:`echelon.llm.sanitizing`).
        note: where it comes from; no part of its hash.

    Raises:
        UserError: if the parts do not fit each other.
    """

    name: str
    kind: TemplateKind
    messages: tuple[Message, ...]
    document: str = "[{id}] {passage}"
    separator: str = "\n"
    identifiers: Identifiers = "number"
    answer_prefix: str = ""
    answers: tuple[str, ...] = ()
    label: str = ""
    pattern: str = ""
    nothing: str = ""
    max_tokens: Mapping[str, int] = field(default_factory=dict, hash=False)
    sanitize: tuple[str, ...] = ("unicode", "control")
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def hash(self) -> str:
        """Names all that a prompt and the reading of its answer depend on."""
        told = {key: value for key, value in asdict(self).items() if key not in ("name", "note")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def render(
        self, engine: Engine, query: str, docs: Sequence[Doc | str], *, max_query_tokens: int | None = None, max_passage_tokens: int | None = None,
        max_new_tokens: int = 0,
    ) -> Rendered:  # fmt: skip
        """The prompt for a query and its passages.

        Args:
            engine: whose tokens count and whose marks are spelled apart.
            query: its text.
            docs: the passages in the order in which they are shown.
            max_query_tokens: in place of the template's own.
            max_passage_tokens: in place of the template's own.
            max_new_tokens: room to leave in the context. If all does not fit into it, every passage is cut to the same number of tokens.

        Raises:
            UserError: if the number of passages is not the kind's, or the context does not even hold the prompt without them.
        """
        self._check_count(len(docs))
        most, limit = max_query_tokens or self.max_tokens.get("query"), max_passage_tokens or self.max_tokens.get("passage")
        query = _truncated(engine, self._sanitized(engine, query, most), most)
        whole = [self._sanitized(engine, doc.content if isinstance(doc, Doc) else doc, limit) for doc in docs]
        passages = [_truncated(engine, text, limit) for text in whole]
        cut = sum(a != b for a, b in zip(passages, whole, strict=True))
        made = self._filled(query, passages)
        context = engine.context_length
        if context is None or (over := engine.prompt_tokens(made) + max_new_tokens - context) <= 0:
            return Rendered(made.messages, made.answer_prefix, query, cut)
        lengths = [engine.count_tokens(text) for text in passages]
        shrunk = max(lengths, default=0)
        while over > 0:
            longest = sum(length >= shrunk for length in lengths)
            shrunk -= max(1, over // max(1, longest))
            if shrunk <= 0:
                bare = engine.prompt_tokens(self._filled(query, [""] * len(docs)))
                raise UserError(
                    f"template {self.name!r} takes {bare} tokens without its {len(docs)} passages, and {max_new_tokens} are for the answer; "
                    f"the context of {engine.identity} holds {context}: rank fewer passages at a time or take shorter queries"
                )
            made = self._filled(query, [engine.truncate(text, shrunk) for text in passages])
            over = engine.prompt_tokens(made) + max_new_tokens - context
        return Rendered(made.messages, made.answer_prefix, query, max(cut, sum(length > shrunk for length in lengths)), shrunk)

    def choices(self, n: int, query: str = "") -> list[str]:
        """What is scored behind the prompt: a text for each of ``n`` passages, or one for each answer; ``query`` is that of the rendered prompt."""
        values = {"query": query}
        if any("{id}" in answer for answer in self.answers):
            return [_insert(self.answers[0], {**values, "id": identifier(place, self.identifiers)}) for place in range(n)]
        return [_insert(answer, values) for answer in self.answers]

    def constraint(self, n: int) -> Permutation:
        """That an answer is an order of all ``n`` passages, for engines that can be held to it."""
        return Permutation(n, self.identifiers)

    def parse(self, text: str, n: int) -> tuple[tuple[int, ...], Status]:
        """What a written answer says: places from 0.

        Returns:
            Of all passages for ``list``, of the cited ones for ``cite``, of both for ``pair``; of the best one for ``set``, of the chosen answer
            for ``point``; nothing where the text does not say. And how it was read.
        """
        if self.kind == "list":
            parsed = parse_permutation(text, n, self.identifiers)
            return parsed.order, parsed.status
        if self.kind == "cite":
            parsed = parse_citations(text, n, self.nothing)
            return parsed.order, parsed.status
        found, status = self._by_pattern(text, n) if self.pattern else self._by_choice(text, n)
        if found is None:
            return (), "unparseable"
        return ((found, 1 - found) if self.kind == "pair" else (found,)), status

    def _by_pattern(self, text: str, n: int) -> tuple[int | None, Status]:
        """The pattern's first match, in lower case, must be one of the shown labels to the letter."""
        for given in (text, self.answer_prefix + text):
            match = re.search(self.pattern, given.lower(), re.DOTALL)
            if match:
                labels = [_insert(self.label, {"id": identifier(place, self.identifiers)}).lower() for place in range(n)]
                said = match[1].strip()
                return (labels.index(said), "complete") if said in labels else (None, "unparseable")
        return None, "unparseable"

    def _by_choice(self, text: str, n: int) -> tuple[int | None, Status]:
        """The choice that the text begins with; else the only one that it names."""
        said = (without_thought(text) or "").strip().strip("\"'*`“”.").strip()
        ends = [answer.strip() for answer in self.choices(n)]
        wholes = [(self.answer_prefix + answer).strip() for answer in self.choices(n)]
        for names, behind in ((wholes, r"(?!\w)"), (ends, r"\s*(?:$|[^\w\s])")):  # "A good passage" does not name passage A
            begun = [place for place, name in enumerate(names) if re.match(_loosely(name) + behind, said)]
            if len(begun) == 1:
                return begun[0], "complete"
        for names in (wholes, ends):
            named = [place for place, name in enumerate(names) if re.search(rf"(?<!\w){_loosely(name)}(?!\w)", said)]
            if len(named) == 1:
                return named[0], "repaired"
        return None, "unparseable"

    def _sanitized(self, engine: Engine, text: str, max_tokens: int | None) -> str:
        return _sanitized(text if max_tokens is None else text[: _CHARACTERS * max_tokens], self.sanitize, tuple(engine.special_tokens))

    def _filled(self, query: str, passages: Sequence[str]) -> Prompt:
        values = {"query": query, "count": str(len(passages)), "nothing": self.nothing}
        shown = [{"id": identifier(place, self.identifiers), "passage": text} for place, text in enumerate(passages)]
        if self.kind == "list":
            values["example"] = ranking_text((1, 0) if len(passages) > 1 else (0,), self.identifiers)
        elif self.kind in ("set", "cite"):
            values["example"] = _insert(self.label, shown[min(len(shown), 2) - 1]).strip()
        if self.kind == "point":
            values["passage"] = passages[0]
        elif self.kind == "pair":
            values |= {"passage_a": passages[0], "passage_b": passages[1]}
        else:
            values["passages"] = self.separator.join(_insert(self.document, one) for one in shown)
        messages: list[tuple[Role, str]] = []
        place = 0
        while place < len(self.messages):
            end = place
            while end < len(self.messages) and self.messages[end].each:
                end += 1
            for one in shown if end > place else [{}]:
                messages += [(turn.role, _insert(turn.text, {**values, **one})) for turn in self.messages[place : max(end, place + 1)]]
            place = max(end, place + 1)
        return Prompt(tuple(messages), self.answer_prefix)

    def _check_count(self, n: int) -> None:
        wanted = {"point": 1, "pair": 2}.get(self.kind)
        if n != wanted if wanted else n < 1:
            raise UserError(f"template {self.name!r} was given {n} passages; it takes {wanted or 'at least 1'}")
        if self.identifiers == "letter" and wanted is None and n > len(string.ascii_uppercase):
            raise UserError(f"template {self.name!r} was given {n} passages; it letters them, which goes up to 26")


def template_names() -> list[str]:
    """The templates that ship with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_template(source: str | Path | Template) -> Template:
    """A template by its name, from a YAML file, or as it is.

    Raises:
        UserError: if there is none, or it is wrong anywhere: the key, its value and what is allowed are named.
    """
    if isinstance(source, Template):
        return source
    names = template_names()
    path = BUILT_IN / f"{source}.yaml" if str(source) in names else Path(source)
    if str(source) not in names and not path.is_file():
        raise UserError(f"no template {str(source)!r}{suggest(str(source), names)}; give a YAML file, or one of {', '.join(names)}")
    try:
        told = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"template {path} is not YAML" + (f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark else "")) from error
    if not isinstance(told, dict):
        raise UserError(f"template {path} is a {type(told).__name__}; a template is a mapping with at least kind and messages")
    return _made(told, path)


def _made(told: dict[str, Any], path: Path) -> Template:
    texts = {"kind", "document", "separator", "identifiers", "answer_prefix", "label", "pattern", "nothing", "note"}
    lists = {"messages", "answers", "sanitize"}
    for key, value in told.items():
        if key not in texts | lists | {"max_tokens"}:
            raise UserError(f"template {path} has the unknown key {key!r}{suggest(str(key), texts | lists | {'max_tokens'})}")
        wanted = str if key in texts else list if key in lists else dict
        if not isinstance(value, wanted):
            raise UserError(f"{key} of template {path} is {value!r}; it must be a {wanted.__name__}")
    for key in ("kind", "messages"):
        if key not in told:
            raise UserError(f"template {path} lacks {key}")
    for turn in told["messages"]:
        if not isinstance(turn, dict) or not {"role", "text"} <= set(turn) <= {"role", "text", "each"} or not all(isinstance(v, str) for v in turn.values()):
            raise UserError(f"template {path} has the message {turn!r}; a message has the texts role, text and perhaps each")
    parts: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    return Template(**{**parts, "name": path.stem, "messages": tuple(Message(**turn) for turn in told["messages"])})


def _check(template: Template) -> None:
    def refuse(what: str) -> None:
        raise UserError(f"template {template.name!r}: {what}")

    def one_of(what: str, value: str, legal: Sequence[str]) -> None:
        if value not in legal:
            refuse(f"{what} is {value!r}{suggest(value, legal)}; it must be {', '.join(legal)}")

    one_of("kind", template.kind, get_args(TemplateKind))
    one_of("identifiers", template.identifiers, get_args(Identifiers))
    for name in template.sanitize:
        one_of("sanitize", name, list(SANITIZERS))
    for name, limit in template.max_tokens.items():
        one_of("max_tokens", name, ("query", "passage"))
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            refuse(f"max_tokens of {name} is {limit!r}; it must be an integer of at least 1")
    several = template.kind in ("set", "list", "cite")
    legal = _SLOTS[template.kind]
    used: set[str] = set()
    for message in template.messages:
        one_of("role", message.role, get_args(Role))
        one_of("each", message.each, ("", "passage"))
        used |= _slots(template.name, message.text, legal | {"id", "passage"} if message.each and several else legal)
    used |= {"passages"} & legal if "passage" in used and several else set()
    for answer in template.answers:
        used |= _slots(template.name, answer, {"query"} | ({"id"} if template.kind == "set" else set())) & {"query"}
    if not template.messages or template.messages[-1].role == "assistant":
        refuse("it must end with a message that is not the assistant's")
    for slot in sorted(legal - {"count", "example", "nothing"} - used):
        refuse(f"it lacks the slot {{{slot}}}, which a template of kind {template.kind} must have")
    if several and not {"id", "passage"} <= _slots(template.name, template.document, {"id", "passage"}):
        refuse("document must have the slots {id} and {passage}")
    if template.pattern:
        try:
            groups = re.compile(template.pattern).groups
        except re.error as error:
            raise UserError(f"template {template.name!r}: pattern {template.pattern!r} is not a regular expression: {error}") from error
        if groups != 1:
            refuse(f"pattern {template.pattern!r} has {groups} groups; it must have one")
    _check_answers(template, refuse)


def _check_answers(template: Template, refuse: Any) -> None:
    answers = template.answers
    if len(set(answers)) < len(answers) or not all(answers):
        refuse(f"answers are {list(answers)!r}; they must differ and not be empty")
    if template.kind == "pair" and len(answers) != 2:
        refuse(f"it has {len(answers)} answers; a pair has two")
    if template.kind == "point" and not answers:
        refuse("it has no answers; a point has at least one, of which the first counts for the passage")
    if template.kind == "set" and not template.pattern and not (len(answers) == 1 and "{id}" in answers[0]):
        refuse("a set needs one answer with {id}, or a pattern")
    if template.kind in ("set", "cite") and "{id}" not in template.label:
        refuse("it needs a label with {id}")


def _slots(name: str, text: str, legal: set[str]) -> set[str]:
    used = set(_SLOT.findall(text))
    for slot in sorted(used - legal):
        raise UserError(f"template {name!r} has the unknown slot {{{slot}}}{suggest(slot, legal)}; here these are known: {', '.join(sorted(legal))}")
    return used


def _insert(text: str, values: Mapping[str, str]) -> str:
    """Slots filled; what is put in is not read again."""
    return _SLOT.sub(lambda match: values[match[1]], text)


@functools.lru_cache(maxsize=4096)  # a passage stands in many prompts
def _sanitized(text: str, names: tuple[str, ...], marks: tuple[str, ...]) -> str:
    for name in names:
        text = spell_apart(text, marks) if name == "control" else SANITIZERS[name](text)
    return text


def _truncated(engine: Engine, text: str, max_tokens: int | None) -> str:
    return text if max_tokens is None else engine.truncate(text, max_tokens)


def _loosely(name: str) -> str:
    """A choice of several letters in any case; single letters as they are, or the article would be taken for passage A."""
    return re.escape(name) if len(name) == 1 else rf"(?i:{re.escape(name)})"

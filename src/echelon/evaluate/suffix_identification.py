"""Suffix identification: can a scorer tell what really followed a prefix?

Source: "RankGen: Improving Text Generation with Large Ranking Models", arXiv 2205.09726, section 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echelon.data.rankgen_pairs import read_documents, whole_sentences
from echelon.data.text import split_sentences
from echelon.errors import UserError
from echelon.models import LoadedModel, load
from echelon.registry import method
from echelon.score import ScoreItem, Scorer, checked_scores


@dataclass(frozen=True)
class Question:
    """A prefix, what followed it, as long pieces of the same document that did not, and what a model wrote (empty without one)."""

    doc_id: str
    prefix: str
    gold: str
    inbook: tuple[str, ...]
    generated: str = ""


@method(
    kind="benchmark", title="RankGen: Improving Text Generation with Large Ranking Models", arxiv="2205.09726", year=2022,
    summary="Tell a prefix's true continuation from others of its document and from a model's.",
    published="2-way, PG19 / Wikipedia: RankGen XL 99.1 / 92.3 %, GPT-3 78.2 / 67.7 %, unigram overlap 79.4 / 69.1 %, people 94.5 / 91.0 %",
)  # fmt: skip
@dataclass(frozen=True)
class SuffixIdentification:
    """Two-way and many-way accuracy of scorers on continuations of ``suffix_words`` words.

    Attributes:
        questions: how many, spread evenly over the documents.
        prefix_words: whole sentences up to this many words before the place.
        suffix_words: words of every continuation, cut in mid-sentence, so that length and ending tell nothing.
        negatives: other places of the same document that each continuation is held against.
        generator: language model whose continuations are told apart too; empty for none.
        top_p: its nucleus.
        seed: of places and samples.
    """

    questions: int = 1000
    prefix_words: int = 256
    suffix_words: int = 40
    negatives: int = 10
    generator: str = "embedded"
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name in ("questions", "prefix_words", "suffix_words", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")

    def evaluate(
        self, data: str | Path, scorers: Mapping[str, Scorer], on_progress: Callable[[str], None] | None = None
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Accuracies of each scorer, with 95 % bootstrap intervals over questions.

        Args:
            data: documents (see :func:`echelon.data.rankgen_pairs.read_documents`), which nobody was trained on.
            scorers: by name.
            on_progress: told what is being done.

        Returns:
            For each scorer: ``inbook`` (share of pairs with gold above a negative; a tie counts half), ``inbook_all`` (gold above
            all of them) and ``generated`` (gold above the model's text), each with ``value``, ``low``, ``high`` and ``n``.
        """
        tell = on_progress or (lambda _: None)
        tell("choosing places" + (" and writing continuations" if self.generator else ""))
        asked = self.ask(data)
        made = {}
        for name, scorer in scorers.items():
            tell(f"scoring with {name}")
            made[name] = self._measure(asked, scorer)
        return made

    def ask(self, data: str | Path) -> list[Question]:
        """The questions: places at even distances through all documents.

        Raises:
            UserError: if the documents are too short for the negatives.
        """
        documents = {
            name: [" ".join(sentence.split()) for sentence in split_sentences(text)] for name, text in read_documents(data).items()
        }
        lengths = {name: [len(sentence.split()) for sentence in sentences] for name, sentences in documents.items()}
        total = max(1, sum(map(sum, lengths.values())))
        asked: list[Question] = []
        generator = np.random.default_rng(self.seed)
        for name, sentences in documents.items():
            words = [word for sentence in sentences for word in sentence.split()]
            starts = np.concatenate([[0], np.cumsum(lengths[name])]).astype(int)
            # A place needs one sentence before it and a whole continuation after it; so does a negative, less the sentence.
            fit = np.flatnonzero(starts[:-1] + self.suffix_words <= len(words))
            share = max(1, round(self.questions * len(words) / total))
            for place in np.unique(np.linspace(1, len(fit) - 1, share).astype(int)) if len(fit) > 1 else ():
                first, _ = whole_sentences(lengths[name], place, self.prefix_words, backward=True)
                away = (starts[fit] + self.suffix_words <= starts[first]) | (starts[fit] >= starts[place] + self.suffix_words)
                if away.sum() < self.negatives:
                    continue
                others = generator.choice(fit[away], self.negatives, replace=False)
                cut = [" ".join(words[starts[at] : starts[at] + self.suffix_words]) for at in (place, *others)]
                asked.append(Question(name, " ".join(sentences[first:place]), cut[0], tuple(cut[1:])))
        if not asked:
            raise UserError(f"{data}: the documents are too short for prefixes with {self.negatives} other places of {self.suffix_words} words")
        return self._with_generated(asked) if self.generator else asked

    def _with_generated(self, asked: Sequence[Question]) -> list[Question]:
        from echelon.generate import Nucleus

        loaded: LoadedModel = load(self.generator)
        made = []
        for start in range(0, len(asked), 128):
            here = asked[start : start + 128]
            prompts = [loaded.tokenizer(question.prefix).input_ids[-256:] for question in here]
            texts = Nucleus(top_p=self.top_p).generate(loaded, prompts, max_new_tokens=2 * self.suffix_words, seed=self.seed + start).texts
            for question, text in zip(here, texts, strict=True):
                cut = " ".join(text.split()[: self.suffix_words])
                made.append(Question(question.doc_id, question.prefix, question.gold, question.inbook, cut))
        return made

    def _measure(self, asked: Sequence[Question], scorer: Scorer) -> dict[str, dict[str, float]]:
        items = [
            ScoreItem(question.prefix, text, finished=not scorer.partial)
            for question in asked
            for text in (question.gold, *question.inbook, *([question.generated] if self.generator else []))
        ]
        scores = np.concatenate([checked_scores(scorer, items[i : i + 2048], allow_invalid=True).numpy() for i in range(0, len(items), 2048)])
        scores = scores.reshape(len(asked), -1)
        gold, inbook = scores[:, :1], scores[:, 1 : 1 + self.negatives]
        made = {"inbook": above(gold, inbook).mean(1), "inbook_all": (gold > inbook).all(1).astype(float)}
        if self.generator:
            made["generated"] = above(gold, scores[:, 1 + self.negatives :])[:, 0]
        return {name: with_interval(values, self.seed) for name, values in made.items()}


def above(gold: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where gold is higher, 0 where it is lower, a half for a tie: guessing gets a half."""
    return (gold > others) + 0.5 * (gold == others)


def with_interval(values: np.ndarray, seed: int, draws: int = 10_000) -> dict[str, float]:
    """Mean and its 95 % bootstrap interval."""
    generator = np.random.default_rng(seed)
    means = np.concatenate([values[generator.integers(0, len(values), (500, len(values)))].mean(1) for _ in range(draws // 500)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def baselines(model: Any = "embedded", rankgen: Any = "embedded", encoder: Any = "embedded") -> dict[str, Scorer]:
    """RankGen and what it must beat: word overlap, an untrained encoder, and a language model's likelihood."""
    from echelon.score import Cosine, LogLikelihood, RankGenScorer, UnigramOverlap

    loaded = load(model) if isinstance(model, str) else model
    return {
        "rankgen": RankGenScorer(rankgen), "unigram_overlap": UnigramOverlap(), "cosine (untrained encoder)": Cosine(encoder),
        "likelihood, mean": LogLikelihood(loaded), "likelihood, sum": LogLikelihood(loaded, "sum"), "likelihood, PMI": LogLikelihood(loaded, "pmi"),
    }  # fmt: skip

"""Many ways of continuing the same prefixes, measured by many metrics at once."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from echelon.evaluate import text as of
from echelon.evaluate.features import encoder_name, featurize
from echelon.evaluate.likelihood import Model, coherence, greedy_ratio, mean_log_likelihood, model_name
from echelon.evaluate.mauve import mauve_score
from echelon.models import load_encoder
from echelon.registry import suggest

PerText = Float[np.ndarray, " texts"]


@dataclass(frozen=True)
class Measured:
    """One metric of one set of texts.

    Attributes:
        value: the figure to report.
        unit: what it is counted in.
        higher_is_better: which way is good.
        per_text: one figure per text, for paired tests; None where the metric only exists for the whole set.
        note: what the figure depends on, in words.
    """

    value: float
    unit: str
    higher_is_better: bool
    per_text: PerText | None
    note: str


@dataclass(frozen=True)
class Texts:
    """What the metrics of one set of continuations share."""

    prefixes: list[str]
    references: list[str]
    texts: list[str]
    model: Model | None
    encoder: Any
    reference_embeddings: Callable[[], Float[np.ndarray, "texts width"]]
    seed: int

    @cached_property
    def behind_prefixes(self) -> tuple[list[str], list[str]]:
        """Human and generated continuations, each with its prefix before it."""
        both = [[_join(a, b) for a, b in zip(self.prefixes, side, strict=True)] for side in (self.references, self.texts)]
        return both[0], both[1]

    @property
    def reader(self) -> Model:
        assert self.model is not None
        return self.model


Result = tuple[float, PerText | None, str]


class Metric(NamedTuple):
    """How one metric is measured, and what it needs: ``references``, ``model`` or neither."""

    unit: str
    higher_is_better: bool
    needs: str
    measure: Callable[[Texts], Result]


def _mean_of(score: Callable[[Texts], Sequence[float] | PerText], note: str) -> Callable[[Texts], Result]:
    def measure(job: Texts) -> Result:
        per_text = np.asarray(score(job), dtype=np.float64)
        return float(np.nanmean(per_text)) if np.isfinite(per_text).any() else float("nan"), per_text, note

    return measure


def _by_model(score: Callable[..., PerText], note: str) -> Callable[[Texts], Result]:
    def measure(job: Texts) -> Result:
        return _mean_of(lambda job: score(job.reader, job.texts, job.prefixes), f"{note}, under {model_name(job.reader[0])}")(job)

    return measure


def _similarity(job: Texts) -> Result:
    ours, theirs = _embed(job.encoder, job.texts), job.reference_embeddings()
    per_text = (ours * theirs).sum(1)
    return float(per_text.mean()), per_text, f"cosine of continuation and human reference, by {encoder_name(job.encoder)}"


def _mauve(job: Texts) -> Result:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        human, ours = job.behind_prefixes
        theirs, name = _human_features(job.encoder, tuple(human))
        found = mauve_score(theirs, featurize(ours, job.encoder)[0], name=name)
    few = "; few texts, so noisy and biased" if any("MAUVE" in str(warning.message) for warning in caught) else ""
    return found.value, None, (
        f"featurizer {found.featurizer}, prefix + continuation, {found.p_count} texts, {found.clusters} clusters, "
        f"mean over {len(found.values)} k-means seeds (sd {found.spread:.4f}){few}"
    )  # fmt: skip


def _diversity(job: Texts) -> Result:
    per_text = np.array([of.diversity(text) if text.strip() else 0.0 for text in job.texts])
    pooled = of.diversity(job.texts) if any(text.strip() for text in job.texts) else 0.0
    return pooled, per_text, "n = 2, 3, 4, words; counts pooled over texts, which a mean over texts does not equal"


def _distinct_2(job: Texts) -> Result:
    per_text = np.array([of.distinct_n(text, 2) for text in job.texts])
    return of.distinct_n(job.texts, 2), per_text, "words, over all texts together; per text it is each text's own"


def _self_bleu(job: Texts) -> Result:
    note = "BLEU-4, method-1 smoothing, words; all other texts are references"
    return _mean_of(lambda job: of.self_bleu(job.texts, 4, limit=None), note)(job)


def _overlap(job: Texts) -> list[float]:
    return [of.overlap_f1(text, reference) for text, reference in zip(job.texts, job.references, strict=True)]


def _repetition(job: Texts) -> list[float]:
    return [of.rep_w(text, prefix, w=20) for text, prefix in zip(job.texts, job.prefixes, strict=True)]


def _mattr(job: Texts) -> list[float]:
    return [of.mattr(text) for text in job.texts]


def _prompt_overlap(job: Texts) -> list[float]:
    return [of.unigram_overlap(text, prefix) if text.strip() else 0.0 for text, prefix in zip(job.texts, job.prefixes, strict=True)]


_METRICS = {
    "similarity": Metric("cosine", True, "references", _similarity),
    "overlap": Metric("share", True, "references", _mean_of(_overlap, "F1 of content words with the human reference")),
    "prompt_overlap": Metric("share", True, "", _mean_of(_prompt_overlap, "precision of content words against the prefix")),
    "mauve": Metric("score", True, "references", _mauve),
    "diversity": Metric("share", True, "", _diversity),
    "repetition": Metric("share", False, "", _mean_of(_repetition, "words that are also among the 20 before them (rep-w)")),
    "likelihood": Metric("nats/token", True, "model", _by_model(mean_log_likelihood, "mean log p per token given the prefix")),
    "coherence": Metric("nats/token", True, "model", _by_model(coherence, "mean log p per token given bos + prefix")),
    "greedy_ratio": Metric("share", False, "model", _by_model(greedy_ratio, "tokens that were the first choice")),
    "self_bleu": Metric("share", False, "", _self_bleu),
    "distinct_2": Metric("share", True, "", _distinct_2),
    "mattr": Metric("share", True, "", _mean_of(_mattr, "types per word, windows of 100 words")),
    "length": Metric("words", True, "", _mean_of(lambda job: [len(text.split()) for text in job.texts], "words per text")),
}  # fmt: skip
METRICS = tuple(_METRICS)


def evaluate_generation(
    prefixes: Sequence[str], references: Sequence[str] | None, outputs: Mapping[str, Sequence[str]],
    metrics: Sequence[str] = ("similarity", "overlap", "diversity", "repetition"), model: Model | None = None, encoder: Any = None,
    seed: int = 0,
) -> dict[str, dict[str, Measured]]:  # fmt: skip
    """Measure continuations by several methods of the same prefixes.

    An empty continuation is legal: it gets 0 where overlap, similarity or variety is measured, and counts as the end-of-text
    token where a model reads it. The notes say how many there are.

    Args:
        prefixes: what was continued.
        references: how people continued it; may be None where no metric needs it.
        outputs: for each method, one continuation per prefix.
        metrics: names from `METRICS`.
        model: reads the texts, for likelihood, coherence and greedy_ratio.
        encoder: a SentenceTransformer for similarity and mauve; by default the one that ships.
        seed: seed of what is random; no metric here draws at random but mauve, whose seeds are part of its definition.

    Returns:
        For each method and metric the figure, with one per text where there is one.

    Raises:
        ValueError: for an unknown metric, numbers of texts that differ, a missing model or references, or too few texts for mauve
            or self_bleu.
    """
    for metric in metrics:
        if metric not in _METRICS:
            raise ValueError(f"unknown metric {metric!r}{suggest(metric, METRICS)}; metrics are {', '.join(METRICS)}")
        need = _METRICS[metric].needs
        if (need == "model" and model is None) or (need == "references" and references is None):
            raise ValueError(f"metric {metric!r} needs {need}, which is None")
    if not prefixes:
        raise ValueError("prefixes is empty; there must be at least one")
    for name, texts in {**outputs, **({} if references is None else {"references": references})}.items():
        if isinstance(texts, str) or len(texts) != len(prefixes):
            raise ValueError(f"{name!r} has {len(texts)} texts for {len(prefixes)} prefixes; there must be one each")
    if encoder is None and {"similarity", "mauve"} & set(metrics):
        encoder = _default_encoder()
    human = list(references or ())
    embeddings = functools.partial(_human_embeddings, encoder, tuple(human))
    measured: dict[str, dict[str, Measured]] = {}
    for name, texts in outputs.items():
        job = Texts(list(prefixes), human, list(texts), model, encoder, embeddings, seed)
        empty = sum(not text.strip() for text in texts)
        tail = f"; {empty} of {len(texts)} texts are empty" if empty else ""
        measured[name] = {}
        for metric in metrics:
            value, per_text, note = _METRICS[metric].measure(job)
            measured[name][metric] = Measured(value, _METRICS[metric].unit, _METRICS[metric].higher_is_better, per_text, note + tail)
    return measured


@functools.cache
def _default_encoder() -> Any:
    return load_encoder("embedded")


@functools.lru_cache(maxsize=1)  # a comparison asks again for every method
def _human_embeddings(encoder: Any, texts: tuple[str, ...]) -> Float[np.ndarray, "texts width"]:
    return _embed(encoder, list(texts))


@functools.lru_cache(maxsize=1)
def _human_features(encoder: Any, texts: tuple[str, ...]) -> tuple[Float[np.ndarray, "texts width"], str]:
    return featurize(texts, encoder)


def _embed(encoder: Any, texts: list[str]) -> Float[np.ndarray, "texts width"]:
    """Embeddings of length 1; of length 0 for empty texts."""
    made = np.asarray(encoder.encode(texts, convert_to_numpy=True, show_progress_bar=False), dtype=np.float64)
    made[[not text.strip() for text in texts]] = 0
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)


def _join(prefix: str, text: str) -> str:
    return prefix + text if not prefix or not text or prefix[-1].isspace() or text[0].isspace() else f"{prefix} {text}"

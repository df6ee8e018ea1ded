"""How much a model suffers from fewer bits: the study of ZeroQuant-V2, from weights and activations rounded to nearest to the class of each setting.

Source: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation", arXiv 2303.08302.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.compress.budget import size
from echelon.compress.lorc import LoRC
from echelon.compress.rtn import RTN
from echelon.models import LoadedModel

MILD, STRONG = 0.1, 0.5  # increases of the average perplexity up to which a setting is of class 1 and 2


@dataclass(frozen=True)
class Sensitivity:
    """One setting and what it does to the model.

    Attributes:
        w_bits: bits of weights; 16 as they are.
        a_bits: bits of activations; 16 as they are.
        group_size: neighbours in a row that share a step; -1 the row.
        lorc_rank: rank of the compensation; 0 for none.
        perplexities: by the name of each text.
        perplexity: their mean (of the perplexities, not of the losses).
        increase: of that over the model as it is.
        sensitivity_class: 1 if the increase is at most 0.1, 2 if at most 0.5, else 3; 0 for the model as it is.
        bytes: that model and compensation take when stored.
    """

    w_bits: int
    a_bits: int
    group_size: int
    lorc_rank: int
    perplexities: dict[str, float]
    perplexity: float
    increase: float
    sensitivity_class: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def study(
    model: LoadedModel | PreTrainedModel, evaluate: Mapping[str, Callable[[PreTrainedModel], float]], *, base: RTN | None = None,
    w_bits: Iterable[int] = (4, 8, 16), a_bits: Iterable[int] = (8, 16), group_size: Iterable[int] = (-1, 128), lorc_rank: Iterable[int] = (0, 8),
    lorc_bits: int = 8, data: Any = None, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[Sensitivity]:  # fmt: skip
    """Every combination of bits, granularity and compensation on a copy of the model; the model as it is comes first.

    Combinations that would be the same are tried once: without rounded weights there are neither groups nor anything to compensate.

    Args:
        model: left as it is.
        evaluate: for the name of each text, what gives a model's perplexity on it. The paper takes WikiText-2, PTB and C4 in windows of 2048 tokens that
            do not overlap; figures from other files or windows are comparable among themselves only.
        base: all other knobs, such as asymmetric weights or GPTQ.
        w_bits: bits of weights.
        a_bits: bits of activations.
        group_size: -1 for one step a row (the paper's coarse setting), or the size of groups (its fine one).
        lorc_rank: ranks of the compensation, 0 for none.
        lorc_bits: bits of its factors.
        data: calibration data, if ``base`` needs it.
        tokenizer: for texts.
        seed: of the choice of rows.
        on_progress: called with ``{"step", "done", "of"}`` after each setting.

    Raises:
        ValueError: if there is nothing to evaluate on, or a knob is out of range.
    """
    if not evaluate:
        raise ValueError("evaluate is empty; give at least one text to measure perplexity on")
    if isinstance(model, LoadedModel):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    base = base or RTN(pad_groups=True)
    settings = _settings(w_bits, a_bits, group_size, lorc_rank)
    rows = [_row((16, 16, -1, 0), _measured(model, evaluate), None, size(model).bytes)]
    for done, (setting, ranks) in enumerate(settings.items(), 1):
        w, a, group = setting
        compressed = copy.deepcopy(model)
        replace(base, w_bits=w, a_bits=a, group_size=group).compress(compressed, data, tokenizer, seed=seed)
        stored = size(compressed).bytes
        for rank in ranks:
            if not rank:
                rows.append(_row((*setting, 0), _measured(compressed, evaluate), rows[0], stored))
                continue
            repaired = LoRC(lorc_rank=rank, lorc_bits=lorc_bits).compensate(model, compressed)
            measured = _measured(repaired.model.get_base_model(), evaluate)  # type: ignore[arg-type]
            rows.append(_row((*setting, rank), measured, rows[0], stored + repaired.report.packed_bytes))
            repaired.model.unload()  # type: ignore[operator]
        if on_progress is not None:
            on_progress({"step": f"W{w}A{a}", "done": done, "of": len(settings)})
    return rows


def table(rows: Iterable[Sensitivity]) -> str:
    """The study as a Markdown table."""
    rows = list(rows)
    names = list(rows[0].perplexities)
    head = ["setting", "group", "LoRC rank", *names, "mean", "increase", "class", "bytes"]
    lines = [" | ".join(head), " | ".join(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for row in rows:
        measured = [f"{row.perplexities[name]:.2f}" for name in names]
        group = "-" if row.w_bits == 16 else "row" if row.group_size < 0 else str(row.group_size)
        cells = [f"W{row.w_bits}A{row.a_bits}", group, str(row.lorc_rank), *measured, f"{row.perplexity:.2f}", f"{row.increase:+.2f}"]
        lines.append(" | ".join([*cells, f"Class-{row.sensitivity_class}" if row.sensitivity_class else "-", f"{row.bytes:,}"]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def sensitivity_class(increase: float) -> int:
    """The paper's class of an increase of the average perplexity; NaN is 3."""
    return 1 if increase <= MILD else 2 if increase <= STRONG else 3


def _settings(
    w_bits: Iterable[int], a_bits: Iterable[int], group_size: Iterable[int], lorc_rank: Iterable[int]
) -> dict[tuple[int, int, int], list[int]]:  # fmt: skip
    groups, ranks = list(dict.fromkeys(group_size)), sorted(set(lorc_rank))
    made = {}
    for w in dict.fromkeys(w_bits):
        for a in dict.fromkeys(a_bits):
            if w == 16 and a < 16:
                made[w, a, -1] = [0]
            elif w < 16:
                made |= {(w, a, group): ranks for group in groups}
    return made


def _measured(model: PreTrainedModel, evaluate: Mapping[str, Callable[[PreTrainedModel], float]]) -> dict[str, float]:
    return {name: float(perplexity(model)) for name, perplexity in evaluate.items()}


def _row(setting: tuple[int, int, int, int], measured: dict[str, float], whole: Sensitivity | None, stored: int) -> Sensitivity:
    mean = sum(measured.values()) / len(measured)
    increase = 0.0 if whole is None else mean - whole.perplexity
    return Sensitivity(*setting, measured, mean, increase, 0 if whole is None else sensitivity_class(increase), stored)

"""Bits of weights and activations, with and without low-rank compensation: the study of ZeroQuant-V2 on one's own model and text.

Every entry is round-to-nearest (or another solver of ``rtn``) at its own bits, ``lorc_rank`` above 0 puts LoRC on top; ``dense`` is the model as it is.
Quality is the loss on held-out documents, paired by document; the class of the paper (1: perplexity up by at most 0.1, 2: by at most 0.5, 3: more) stands
beside it.

Source: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation", arXiv 2303.08302, with one text in
place of the average over three.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.compare.documents import PASSAGES, documents, losses
from echelon.compare.task import Outcome, Quality, check_keys
from echelon.compare.tasks.compress import DENSE, speed
from echelon.compress import LoRC, size
from echelon.compress.sensitivity import sensitivity_class
from echelon.errors import UserError
from echelon.models import LoadedModel, load
from echelon.registry import build

DATA: dict[str, Any] = {"calibration": "passages", "test": "passages"}
COMPENSATION = ("lorc_rank", "lorc_bits")


@dataclass
class Context:
    """Work shared by all runs."""

    model: str
    calibration: list[str]
    test: list[str]
    perplexity: float


class Task:
    """Quantised models.

    Recipe keys: ``data.calibration`` (what static ranges and GPTQ see) and ``data.test`` are ``passages`` (the two halves of the prose that ships) or files of
    texts. An entry is ``dense``, or ``rtn`` with its knobs and, for LoRC on top, ``lorc_rank`` and ``lorc_bits``. There is no budget: bytes are the cost.
    """

    kind = ""  # dense is no compressor; `check` builds the others
    unit = "document"
    cost_axis = "bytes"
    primary = "loss"
    reference = DENSE
    columns = ("bytes", "sensitivity_class", "perplexity")

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA}, recipe)
        if recipe.budget:
            raise UserError(f"budget is {recipe.budget!r}; this comparison has none: bits are the methods' knobs, and bytes are reported")
        for metric in recipe.metrics:
            if metric != "loss":
                raise UserError(f"unknown metric {metric!r}; the metric is loss")
        for entry in recipe.methods:
            if entry.name not in (DENSE, "rtn"):
                raise UserError(f"unknown method {entry.name!r}; it must be {DENSE}, or rtn with its knobs and lorc_rank")
            _parts(entry)
        for key in DATA:
            if recipe.data.get(key, "passages") != "passages" and not Path(recipe.data[key]).exists():
                raise UserError(f"data.{key}: no file {recipe.data[key]}; give a .txt, a .jsonl with a 'text' in each line, a folder of these, or passages")

    def sources(self, recipe: Any) -> list[Path]:
        told = {**DATA, **recipe.data}
        return sorted(PASSAGES.glob("*.jsonl")) + [Path(told[key]) for key in DATA if told[key] != "passages"]

    def describe(self, context: Context) -> str:
        return f"{load(context.model).model.num_parameters() / 1e6:.1f} M parameters, {len(context.test)} held-out documents"

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        """The command line that quantises so; compensation is a second one."""
        if method == DENSE:
            return []
        told = [word for name, value in knobs.items() if name not in COMPENSATION for word in (f"--method.{name}", str(value))]
        return ["compress", "--model", recipe["model"], "--method", method, *told, "--out", "FOLDER"]

    def prepare(self, recipe: Any) -> Context:
        told = {**DATA, **recipe.data}
        test = documents(told["test"], "test")
        return Context(recipe.model, documents(told["calibration"], "calibration"), test, math.exp(losses(load(recipe.model), test)[1]))

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        loaded, stored = self._made(context, entry, seed)
        per_document, loss = losses(loaded, context.test)
        perplexity = math.exp(min(loss, 700))
        cost = {"bytes": float(stored), "perplexity": perplexity, **speed(loaded)}
        if entry.name != DENSE:
            cost["sensitivity_class"] = float(sensitivity_class(perplexity - context.perplexity))
        note = f"held-out loss, documents weighted by their tokens; perplexity {perplexity:.3f}, {perplexity - context.perplexity:+.3f} over the model as it is"
        return Outcome({"loss": Quality(loss, "nats/token", False, per_document, note)}, cost, {})

    def _made(self, context: Context, entry: Any, seed: int) -> tuple[LoadedModel, float]:
        """The model at these bits, and the bytes that it and its compensation take."""
        loaded = load(context.model)
        if entry.name == DENSE:
            return loaded, size(loaded.model).bytes
        compressor, compensator = _parts(entry)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # layers left as they are stand in the report
            compressor.compress(loaded, context.calibration if compressor.needs_data else None, seed=seed)
        stored = float(size(loaded.model).bytes)
        if compensator is None:
            return loaded, stored
        repaired = compensator.compensate(load(context.model).model, loaded.model)
        return LoadedModel(repaired.model, loaded.tokenizer), stored + repaired.report.packed_bytes

    def timing(self, context: Context, entry: Any) -> float:
        return speed(self._made(context, entry, 0)[0])["seconds_per_1k_tokens"]


def _parts(entry: Any) -> tuple[Any, LoRC | None]:
    """The compressor, and LoRC if its rank is above 0.

    Raises:
        ValueError: if a knob is unknown or out of range.
    """
    if entry.name == DENSE:
        return None, None
    compensation = {name: value for name, value in entry.knobs.items() if name in COMPENSATION}
    compressor = build(entry.name, "compressor", {name: value for name, value in entry.knobs.items() if name not in COMPENSATION})
    return compressor, LoRC(**compensation) if compensation.get("lorc_rank") else None

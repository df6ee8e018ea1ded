"""Compressors, compared at equal numbers of parameters.

The knob that sets a method's size is solved so that the whole model has each of the budget's shares of its parameters, to within half a
percent; the papers' "ratios" are never compared. ``dense`` is the model as it is. Quality is the loss on held-out documents, paired by
document, after compression and, where the budget has ``recover_steps``, after as many steps of the same fine-tuning.
"""

import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from echelon.compare.documents import PASSAGES, losses
from echelon.compare.task import Outcome, Quality, check_keys
from echelon.compress import Compressed, recover
from echelon.data.files import read_texts
from echelon.data.passages import passages
from echelon.errors import UserError
from echelon.models import LoadedModel, load
from echelon.registry import build, suggest

DENSE = "dense"
BUDGET = {"parameters": [0.9, 0.8, 0.7, 0.6], "recover_steps": 0, "recover_lr": 5e-4}
DATA = {"calibration": "passages", "test": "passages", "documents": 0}


@dataclass
class Context:
    """Work shared by all runs; ``kept`` holds each method's smallest model, to be timed again."""

    model: str
    calibration: list[str]
    documents: list[str]
    shares: list[float]
    recover_steps: int
    recover_lr: float
    kept: dict[str, LoadedModel] = field(default_factory=dict)


class Task:
    """Compressors on one model.

    Recipe keys: ``data.calibration`` and ``data.test`` are ``passages`` (the two halves of the prose that ships) or JSON-lines files with a
    ``text`` in each line; ``data.documents`` takes that many of the test documents, 0 all. ``budget.parameters`` is a share of the model's
    parameters or a list of shares, ``budget.recover_steps`` and ``budget.recover_lr`` the fine-tuning behind every compression.
    """

    kind = ""  # dense is no compressor; `check` builds the others
    unit = "document"
    cost_axis = "seconds_per_1k_tokens"
    primary = ""
    reference = DENSE

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA, "budget": BUDGET}, recipe)
        for share in shares(recipe):
            if not isinstance(share, float) or not 0 < share < 1:
                raise UserError(f"budget.parameters holds {share!r}; it must be shares of the model's parameters, in (0, 1)")
        if not isinstance(recipe.budget.get("recover_steps", 0), int) or recipe.budget.get("recover_steps", 0) < 0:
            raise UserError(f"budget.recover_steps is {recipe.budget['recover_steps']!r}; it must be a whole number of at least 0")
        legal = names(shares(recipe))
        for metric in recipe.metrics:
            if metric not in legal:
                raise UserError(f"unknown metric {metric!r}{suggest(metric, legal)}; with these budgets metrics are {', '.join(legal)}")
        for entry in recipe.methods:
            if entry.name != DENSE:
                build(entry.name, "compressor", entry.knobs)
        for key in ("calibration", "test"):
            if key in recipe.data and recipe.data[key] != "passages" and not Path(recipe.data[key]).is_file():
                raise UserError(f"data.{key}: no file {recipe.data[key]}; give a JSON-lines file with a 'text' in each line, or passages")

    def sources(self, recipe: Any) -> list[Path]:
        told = {**DATA, **recipe.data}
        named = [Path(str(told[key])) for key in ("calibration", "test") if told[key] != "passages"]
        return sorted(PASSAGES.glob("*.jsonl")) + named

    def describe(self, context: Context) -> str:
        model = load(context.model).model
        return f"{model.num_parameters() / 1e6:.1f} M parameters, {len(context.documents)} held-out documents"

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        """The command line that compresses by this method, to the smallest of the shares."""
        if method == DENSE:
            return []
        told = [word for name, value in knobs.items() for word in (f"--method.{name}", str(value))]
        share = min(recipe["budget"].get("parameters", BUDGET["parameters"]))
        return ["compress", "--model", recipe["model"], "--method", method, *told, "--parameters", str(share), "--data", "FILE", "--out", "FOLDER"]

    def prepare(self, recipe: Any) -> Context:
        told, budget = {**DATA, **recipe.data}, {**BUDGET, **recipe.budget}
        calibration, documents = (
            [passage.text for passage in passages(half)] if told[key] == "passages" else read_texts(told[key])  # type: ignore[arg-type]
            for key, half in (("calibration", "calibration"), ("test", "test"))
        )
        if set(calibration) & set(documents):
            raise UserError("data.calibration and data.test share documents; what is tested must not have been seen")
        if told["documents"]:
            documents = documents[: told["documents"]]
        return Context(recipe.model, calibration, documents, shares(recipe), budget["recover_steps"], budget["recover_lr"])

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        quality: dict[str, Quality] = {}
        cost: dict[str, float] = {}
        curve: list[list[float]] = []
        used = 0.0
        dense = load(context.model)
        whole = dense.model.num_parameters()
        loaded = dense
        for share in context.shares:
            percent = round(100 * share)
            if entry.name != DENSE:
                loaded = load(context.model)
                try:
                    made = self._compress(context, entry, loaded, share, seed)
                except ValueError as error:  # a size that this method cannot give: the other sizes still count
                    cost[f"cannot_reach_{percent}"] = 1.0
                    last = error
                    continue
                cost["seconds_to_compress"] = max(cost.get("seconds_to_compress", 0.0), made.report.seconds)
                used = loaded.model.num_parameters() / whole
            if quality and entry.name == DENSE:
                quality |= {f"loss_{percent}": quality[f"loss_{round(100 * context.shares[0])}"]}
            else:
                quality |= self._measure(loaded, context.documents, percent)
            curve.append([share, quality[f"loss_{percent}"].value])
        if not quality:
            raise last
        context.kept[entry.label] = loaded
        cost |= speed(loaded) | {"bytes_on_disk": stored_bytes(loaded.model)}
        budget = {"unit": "of the parameters at least", "allowed": min(context.shares), "used": used or 1.0}
        return Outcome(quality, cost, budget, curves={"loss against share of the parameters": curve})

    def _compress(self, context: Context, entry: Any, loaded: LoadedModel, share: float, seed: int) -> Compressed:
        compressor = build(entry.name, "compressor", entry.knobs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # layers left dense stand in the report
            made = compressor.compress(loaded, context.calibration if compressor.needs_data else None, seed=seed, parameters=share)
        if context.recover_steps:
            recover(
                loaded.model, context.calibration, loaded.tokenizer, steps=context.recover_steps, learning_rate=context.recover_lr, seed=seed,
                batch_size=8, seqlen=256,
            )  # fmt: skip
        return made

    def _measure(self, loaded: LoadedModel, documents: list[str], percent: int) -> dict[str, Quality]:
        per_document, loss = losses(loaded, documents)
        note = f"held-out loss at {percent} % of the parameters, documents weighted by their tokens; perplexity {np.exp(loss):.2f} for this run"
        return {f"loss_{percent}": Quality(loss, "nats/token", False, per_document, note)}

    def timing(self, context: Context, entry: Any) -> float:
        """Seconds for a thousand tokens read at once, by the smallest model."""
        if entry.label not in context.kept:
            loaded = load(context.model)
            if entry.name != DENSE:
                self._compress(context, entry, loaded, context.shares[-1], 0)
            context.kept[entry.label] = loaded
        return speed(context.kept[entry.label])["seconds_per_1k_tokens"]


def shares(recipe: Any) -> list[float]:
    """The sizes that are compared, largest first."""
    told = recipe.budget.get("parameters", BUDGET["parameters"])
    found = told if isinstance(told, list) else [told]
    return sorted(found, reverse=True) if all(isinstance(share, float) for share in found) else found


def names(sizes: list[float]) -> list[str]:
    return [f"loss_{round(100 * share)}" for share in sizes]


@torch.inference_mode()
def speed(loaded: LoadedModel, rounds: int = 5) -> dict[str, float]:
    """Median seconds for a thousand tokens read in eight rows, and for one token written behind one row of these."""
    model: Any = loaded.model
    length = min(128, (getattr(model.config, "max_position_embeddings", None) or 256) // 2)
    ids = torch.randint(0, model.config.vocab_size, (8, length), generator=torch.Generator().manual_seed(0))
    read, written = [], []
    for number in range(rounds + 1):
        started = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        middle = time.perf_counter()
        model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        if number:  # the first round warms up
            read.append((middle - started) * 1000 / ids.numel())
            written.append((time.perf_counter() - middle) / 16)
    return {"seconds_per_1k_tokens": statistics.median(read), "decode_seconds_per_token": statistics.median(written)}


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of the saved weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))

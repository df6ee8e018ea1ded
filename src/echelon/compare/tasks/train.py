"""Optimizers and parameterisations, compared at equal training tokens: a language model from random weights, the same batches in the same order for all.

Full-rank AdamW is a method like the others, and is clipped and tuned like the others (arXiv 2505.22922: without that, it loses to methods that are). Quality is
the loss on held-out documents, paired by document and weighted by tokens; what papers report for C4 stands beside it as published.
"""

import dataclasses
import json
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from echelon.compare.documents import PASSAGES, documents, losses
from echelon.compare.task import Outcome, Quality, check_keys
from echelon.compare.tuning import Sweeps, evenly, is_whole, published, tries, tuned, tuning_notes
from echelon.errors import UserError
from echelon.models import LoadedModel, load
from echelon.registry import build, card, cards, suggest
from echelon.train.language import fit
from echelon.train.memory import Memory, formula
from echelon.train.training import Training

KINDS = ("optimizer", "layer")
SMALL = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
DATA: dict[str, Any] = {"train": "passages", "tune": None, "test": "passages", "documents": 0, "model": SMALL}
BUDGET: dict[str, Any] = {
    "tokens": 1_000_000, "tune_tokens": None, "batch_size": 16, "seqlen": 128, "warmup": 0.1, "max_grad_norm": 1.0, "bf16": False, "optimizer_state": None,
}  # fmt: skip
CHARACTERS = 8  # a token at most: text beyond that many times the tokens is not needed
POINTS = 200  # of a learning curve


@dataclass
class Context:
    """Work shared by all runs."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train: list[str]
    tune: list[str]
    test: list[str]
    tokens: int
    tune_tokens: int
    state_share: float | None
    sweeps: Sweeps
    training: Mapping[str, Any] = field(default_factory=dict)

    def fresh(self, seed: int) -> PreTrainedModel:
        """The model with new random weights, the same ones for all methods of a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(self.config).float()


@dataclass(frozen=True)
class Trained:
    """A model after training, what the trainer told, and the loss of every step."""

    loaded: LoadedModel
    told: dict[str, Any]
    losses: list[float]


class Task:
    """Ways of training one model.

    Recipe keys: ``model`` gives the tokenizer; ``data.model`` is the settings of a Llama's config (those not given are of one with five million parameters), or
    ``same`` for the shape of ``model``. ``data.train`` and ``data.test`` are ``passages`` (the two halves of the prose that ships) or files (.txt, .jsonl) and
    folders of them, ``data.tune`` what learning rates are chosen on (a tenth of ``data.train`` where any method has a sweep); documents of more than 300
    words are cut. ``data.documents`` takes that many of the test documents, spread evenly, 0 all. ``budget.tokens`` is what every run trains on, in steps of
    ``batch_size`` rows of ``seqlen`` tokens, ``budget.tune_tokens`` what each try of a sweep gets: as much by default, and then the best try is a run.
    ``budget.optimizer_state`` is a share of AdamW's state in float32: with it, each method gets the largest ``rank`` or ``r`` whose state is not above it.
    """

    kind = ""  # there are two; `check` builds the methods
    unit = "document"
    cost_axis = "training_bytes"
    primary = "loss"
    reference = ""
    sweeps = True
    folder = Path()
    columns = ("training_bytes", "formula_bytes", "optimizer_state_bytes", "stalled_seconds", "tuning_seconds")

    def check(self, recipe: Any) -> None:
        check_keys({"data": DATA, "budget": BUDGET}, recipe)
        for metric in recipe.metrics:
            if metric != "loss":
                raise UserError(f"unknown metric {metric!r}; the metric is loss")
        data, budget = {**DATA, **recipe.data}, resolved(recipe)
        if not is_whole(data["documents"], 0):
            raise UserError(f"data.documents is {data['documents']!r}; it must be a whole number of at least 0")
        for name in ("batch_size", "seqlen"):
            if not is_whole(budget[name], 1):
                raise UserError(f"budget.{name} is {budget[name]!r}; it must be a whole number of at least 1")
        share = budget["optimizer_state"]
        if share is not None and not (isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1):
            raise UserError(f"budget.optimizer_state is {share!r}; it must be a share of AdamW's state, in (0, 1]")
        least = budget["batch_size"] * budget["seqlen"]
        for name in ("tokens", "tune_tokens"):
            if not is_whole(budget[name], least):
                raise UserError(f"budget.{name} is {budget[name]!r}; it must be a whole number of at least {least}, the tokens of one step")
        try:
            Training(steps=1, **{name: budget[name] for name in ("batch_size", "seqlen", "warmup", "max_grad_norm", "bf16")})
        except (ValueError, TypeError) as error:
            raise UserError(f"budget: {error}") from error
        for key in ("train", "tune", "test"):
            if data[key] not in ("passages", None) and not Path(str(data[key])).exists():
                raise UserError(f"data.{key}: no file {data[key]}; give a .txt, a .jsonl with a 'text' in each line, a folder of these, or passages")
        if data["model"] != "same":
            _check_config(data["model"], budget["seqlen"])
        for entry in recipe.methods:
            for knobs in tries(entry):
                built(entry.name, knobs)

    def sources(self, recipe: Any) -> list[Path]:
        told = {**DATA, **recipe.data}
        named = [Path(str(told[key])) for key in ("train", "tune", "test") if told[key] not in ("passages", None)]
        return sorted(PASSAGES.glob("*.jsonl")) + named

    def describe(self, context: Context) -> str:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(context.config)
        return (
            f"{context.config.model_type} with {shape.num_parameters() / 1e6:.1f} M parameters from random weights, {context.tokens:,} training tokens, "
            f"{len(context.test)} held-out documents"
        )

    def command(self, recipe: dict[str, Any], method: str, knobs: dict[str, Any]) -> list[str]:
        """The command line that trains by this method, from random weights in the shape of the recipe's model."""
        told = [word for name, value in knobs.items() for word in (f"--method.{name}", value if isinstance(value, str) else json.dumps(value))]
        steps = {**BUDGET, **recipe["budget"]}
        size = ["--batch_size", str(steps["batch_size"]), "--seqlen", str(steps["seqlen"])]
        count = str(steps["tokens"] // (steps["batch_size"] * steps["seqlen"]))
        return ["train", "--model", recipe["model"], "--scratch", "--method", method, *told, "--steps", count, *size, "--data", "FILE", "--out", "FOLDER"]

    def prepare(self, recipe: Any) -> Context:
        data, budget = {**DATA, **recipe.data}, resolved(recipe)
        loaded = load(recipe.model)
        train, test = (documents(data[key], half) for key, half in (("train", "calibration"), ("test", "test")))
        tune = documents(data["tune"], "calibration") if data["tune"] is not None else []
        if not tune and any(entry.sweep for entry in recipe.methods):
            tune = train[::10]
            train = [text for text in train if text not in set(tune)]
            if not train:
                raise UserError("data.train holds one document of at most 300 words; a sweep needs a second one to choose on (or data.tune)")
        for name, texts in (("data.train", train), ("data.tune", tune)):
            if set(texts) & set(test):
                raise UserError(f"{name} and data.test share documents; what is tested must not have been seen")
        if set(train) & set(tune):
            raise UserError("data.train and data.tune share documents; what knobs are chosen on must not have been trained on")
        config = loaded.model.config if data["model"] == "same" else llama(data["model"], loaded.tokenizer)
        training = {name: budget[name] for name in ("batch_size", "seqlen", "warmup", "max_grad_norm", "bf16")}
        if data["documents"]:
            test = evenly(test, data["documents"])
        wanted = CHARACTERS * budget["tokens"] * len(train) // sum(map(len, train)) + 1
        sizes = budget["tokens"], budget["tune_tokens"], budget["optimizer_state"], Sweeps(self.folder, recipe)
        return Context(config, loaded.tokenizer, evenly(train, wanted), evenly(tune, 40), test, *sizes, training)

    def run(self, context: Context, entry: Any, seed: int) -> Outcome:
        size: dict[str, int] = {}
        told: list[str] = []
        if context.state_share is not None:
            size, used = sized(context, entry)
            told = [f"optimizer state {100 * used:.1f} % of AdamW's, {100 * context.state_share:g} % allowed" + "".join(f"; {k} {v}" for k, v in size.items())]
        entry = dataclasses.replace(entry, knobs=entry.knobs | size)
        knobs, tuning = tuned(entry, lambda knobs: measured(context, entry.name, knobs, context.tune_tokens, 0), tokens=context.tune_tokens)
        trained = measured(context, entry.name, knobs, context.tokens, seed)
        told_of, loss = trained["told"], trained["test"]
        memory, counted = told_of["memory"], told_of["memory"]["formula"]
        parts = {f"{part}_bytes": float(memory[part]) for part in ("weights", "gradients", "optimizer_state")}
        cost = {
            "seconds_per_step": told_of["median_step_seconds"], "worst_step_seconds": told_of["worst_step_seconds"],
            "stalled_seconds": told_of["stalled_seconds"], **parts, "training_bytes": sum(parts.values()),
        }  # fmt: skip
        if counted:  # the optimizer is one whose state has a formula
            cost |= {"formula_bytes": Memory(**counted).bytes(4)["total"], "published_convention_bytes": Memory(**counted).published}
        if tuning:
            cost |= {"tuning_seconds": tuning["cost"]["seconds"], "tuning_tokens": tuning["cost"]["tokens"]}
        note = f"held-out loss, documents weighted by their tokens; perplexity {math.exp(min(loss, 700)):.2f} for this run"
        step = context.training["batch_size"] * context.training["seqlen"]
        return Outcome(
            {"loss": Quality(loss, "nats/token", False, np.array(trained["per_document"]), note)},
            cost,
            {"unit": "training tokens", "allowed": context.tokens, "used": told_of["tokens"], "order": told_of["order"]},
            curves={"training loss against tokens": curve(trained["losses"], step)},
            tuning=tuning,
            notes=told + notes(entry.name, tuning),
        )  # fmt: skip

    def timing(self, context: Context, entry: Any) -> float:
        """Median seconds of a step over five of them; the sweep does not change it."""
        method = built(entry.name, {"seed": 0} | tries(entry)[0])
        step = context.training["batch_size"] * context.training["seqlen"]
        return train(context, method, 5 * step, 0).told["median_step_seconds"]


def measured(context: Context, name: str, knobs: dict[str, Any], tokens: int, seed: int) -> dict[str, Any]:
    """What training by these knobs comes to. Where a sweep trains as long as a run, the run of the first seed is the sweep's.

    Returns:
        What the trainer ``told``, the ``losses`` of its steps, for the first seed the ``loss`` on the tuning documents, and after the whole budget that on the
        ``test`` documents, also ``per_document``.
    """

    def make() -> dict[str, Any]:
        trained = train(context, built(name, {"seed": seed} | knobs), tokens, seed)
        made: dict[str, Any] = {"told": trained.told, "losses": trained.losses}
        if seed == 0 and context.tune:
            made["loss"] = losses(trained.loaded, context.tune)[1]
        if tokens == context.tokens:
            per_document, made["test"] = losses(trained.loaded, context.test)
            made["per_document"] = per_document.tolist()
        return made

    return context.sweeps.kept([name, knobs, tokens, seed], make)


def resolved(recipe: Any) -> dict[str, Any]:
    """The budget with its defaults."""
    told = {**BUDGET, **recipe.budget}
    return told if told["tune_tokens"] is not None else {**told, "tune_tokens": told["tokens"]}


def built(name: str, knobs: Mapping[str, Any]) -> Any:
    """An optimizer or a parameterisation, whichever has this name.

    Raises:
        UserError: if neither has, or a knob is unknown.
        ValueError: if a knob is out of range.
    """
    return build(name, kind_of(name), dict(knobs))


def kind_of(name: str) -> str:
    known = {one.name: kind for kind in KINDS for one in cards(kind)}
    if name not in known:
        raise UserError(f"unknown optimizer or layer {name!r}{suggest(name, known)}; they are {', '.join(sorted(known))}")
    return known[name]


def sized(context: Context, entry: Any) -> tuple[dict[str, int], float]:
    """The knob that gives a method the largest state within the budget, and the share of AdamW's state that this is. No knob where it has none for that.

    Raises:
        UserError: if its state is above the budget at any rank.
    """
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(context.config)
    known = {knob.name for knob in card(entry.name, kind_of(entry.name)).knobs}
    knob = next((name for name in ("rank", "r") if name in known), None)

    def share(rank: int) -> float:
        """Of the bytes; moments in fewer bits count as that."""
        method = built(entry.name, {**tries(entry)[0], **({knob: rank} if knob else {})})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ranks above the smaller side of a matrix
            return formula(shape, method).state * getattr(method, "state_bits", 32) / 32 / (2 * shape.num_parameters())

    least, most = 1, max(shape.config.hidden_size, 1) if knob else 1
    if share(least) > context.state_share:  # type: ignore[operator]
        raise UserError(f"{entry.label} takes {100 * share(least):.1f} % of AdamW's state at the least; budget.optimizer_state allows {context.state_share}")
    while least < most:
        middle = (least + most + 1) // 2
        try:
            fits = share(middle) <= context.state_share  # type: ignore[operator]
        except ValueError:  # no layer takes so high a rank
            fits = False
        least, most = (middle, most) if fits else (least, middle - 1)
    return ({knob: least} if knob else {}), share(least)


def notes(name: str, tuning: Mapping[str, Any]) -> list[str]:
    """How the knobs were chosen, and what the method's paper reports."""
    return tuning_notes(tuning, "tuning documents") + published(card(name, kind_of(name)))


def train(context: Context, method: Any, tokens: int, seed: int) -> Trained:
    """Train a fresh model on so many tokens.

    Raises:
        ValueError: from the method or the trainer, or if the loss is not finite.
    """
    size = context.training["batch_size"] * context.training["seqlen"]
    training = Training(steps=tokens // size, save_every=0, seed=seed, **context.training)
    model = context.fresh(seed)
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        told = fit(model, context.tokenizer, context.train, Path(folder) / "model", method, training, on_step=lambda event: seen.append(event["loss"]))
    return Trained(LoadedModel(model.eval(), context.tokenizer), told, seen)


def curve(values: Sequence[float], step: int) -> list[list[float]]:
    """Means of a loss over at most 200 stretches of equal length, against the tokens seen at their ends."""
    width = max(1, math.ceil(len(values) / POINTS))
    stretches = [values[start : start + width] for start in range(0, len(values), width)]
    return [[float(min(len(values), (place + 1) * width) * step), sum(part) / len(part)] for place, part in enumerate(stretches)]


def llama(told: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A Llama's config for a tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer), **special, **told})


def _check_config(told: Any, seqlen: int) -> None:
    if not isinstance(told, Mapping):
        raise UserError(f"data.model is {told!r}; it must be settings of a Llama's config, or the word same")
    legal = list(LlamaConfig().to_dict())
    for key in told:
        if key not in legal:
            raise UserError(f"unknown key {key!r} under data.model{suggest(str(key), legal)}; keys are those of LlamaConfig")
    try:
        with torch.device("meta"):
            config = LlamaConfig(**{**SMALL, **told})
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises what it likes for sizes that do not fit together
        raise UserError(f"data.model is {dict(told)}; no Llama can be made of it: {' '.join(str(error).split())}") from error
    if config.max_position_embeddings < seqlen:
        raise UserError(f"budget.seqlen is {seqlen}; the model has max_position_embeddings {config.max_position_embeddings}, so it must be at most that")

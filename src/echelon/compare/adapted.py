"""Adapters by name, of a size that is asked for, trained on batches that are the same for all."""

import hashlib
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from echelon.adapt import DeltaConfig
from echelon.adapt.callbacks import tuners
from echelon.compare.downstream import Downstream
from echelon.errors import UserError
from echelon.linalg.checks import number, whole
from echelon.models import LoadedModel
from echelon.models.randomness import own_randomness
from echelon.registry import build, cards, suggest
from echelon.train.memory import on_meta

KINDS = ("adapter", "baseline")
ADALORA = "adalora"  # PEFT cannot resume it, so it is no registered baseline
SIZES = {"nola": "num_basis", "increlora": "target_r", ADALORA: "target_r"}  # the knob that sets the size, where it is not r
_MOST = 2**16
_NEAR = 2  # settings on both sides of the one that bisection finds which are counted too: sizes need not rise evenly
_POOL = 50  # batches whose rows are put in order of length, so that few pads are computed
HEAD = "modules_to_save"


@dataclass(frozen=True)
class AdaLora:
    """PEFT's AdaLoRA (arXiv 2303.10512) with its schedule in shares of the training.

    Attributes:
        target_r: average rank at the end.
        init_r: rank at first; half as much again by default.
        lora_alpha: numerator of the scale, over the rank.
        lora_dropout: share of the inputs that are zero while training.
        orth_reg_weight: of the penalty on factors that are not orthogonal.
        warmup: share of the steps before ranks fall.
        final: share of the steps behind that.
    """

    target_r: int = 8
    init_r: int | None = None
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    orth_reg_weight: float = 0.5
    warmup: float = 0.125
    final: float = 0.5

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        whole("target_r", self.target_r, 1)
        if self.init_r is not None:
            whole("init_r", self.init_r, self.target_r)
        number("warmup", self.warmup, 0, 1)
        number("final", self.final, 0, 1 - self.warmup, open_high=True)

    def config(self, steps: int, targets: Any) -> AdaLoraConfig:
        """PEFT's config for a training of so many steps."""
        first = math.ceil(1.5 * self.target_r) if self.init_r is None else self.init_r
        return AdaLoraConfig(
            target_r=self.target_r, init_r=first, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,  # type: ignore[arg-type]
            orth_reg_weight=self.orth_reg_weight, total_step=steps, tinit=int(self.warmup * steps), tfinal=min(int(self.final * steps), steps - 1),
            deltaT=max(1, steps // 100), target_modules=targets,
        )  # fmt: skip


def kind_of(name: str) -> str:
    """Raises: UserError: if there is no such adapter."""
    known = {one.name: kind for kind in KINDS for one in cards(kind)} | {ADALORA: ""}
    if name not in known:
        raise UserError(f"unknown adapter {name!r}{suggest(name, known)}; they are {', '.join(sorted(known))}")
    return known[name]


def config_of(name: str, knobs: Mapping[str, Any], targets: Any, *, steps: int = 1000, task_type: str | None = None, seed: int = 0) -> PeftConfig:
    """PEFT's config of an adapter.

    Raises:
        UserError: if the adapter or a knob is unknown.
        ValueError: if a knob is out of range.
    """
    kind = kind_of(name)
    if kind == "adapter":
        return build(name, kind, {"seed": seed, **knobs, "target_modules": targets, "task_type": task_type})
    if kind == "":
        legal = list(AdaLora.__dataclass_fields__)
        for knob in knobs:
            if knob not in legal:
                raise UserError(f"unknown knob {knob!r} of {name}{suggest(knob, legal)}; its knobs are {', '.join(legal)}")
        made: Any = AdaLora(**knobs).config(steps, targets)
    else:
        drawn = {"projection_prng_key": seed} if name == "vera" else {}
        made = build(name, kind, {**drawn, **knobs, "target_modules": targets}).config()
    made.task_type = task_type
    return made


def trained_parameters(model: nn.Module, name: str, knobs: Mapping[str, Any], targets: Any, task_type: str | None = None) -> int:
    """How many numbers of an adapter are in use at the end of training, those of a new head not counted; only shapes are looked at.

    What grows or shrinks counts as it ends: AdaLoRA and IncreLoRA by ``target_r``, whatever they reserve.

    Raises:
        ValueError: if no adapter of this size can be made.
    """
    ends = {ADALORA: {"init_r": knobs.get("target_r")}, "increlora": {"r": knobs.get("target_r"), "max_r": None}}.get(name, {})
    config: Any = config_of(name, {**knobs, **ends}, targets, task_type=task_type)
    if isinstance(config, DeltaConfig):
        config.init_weights = False
    elif hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False
    with warnings.catch_warnings(), own_randomness(0):
        warnings.simplefilter("ignore")
        made = get_peft_model(on_meta(model), config)  # type: ignore[arg-type]
    return sum(p.numel() for key, p in made.named_parameters() if p.requires_grad and HEAD not in key)


def sized(
    model: nn.Module, name: str, knobs: Mapping[str, Any], targets: Any, wanted: int, most: int, task_type: str | None = None
) -> tuple[dict[str, int], int]:  # fmt: skip
    """The setting of the knob for size that comes nearest to so many trained parameters, and how many these are.

    Args:
        model: what is adapted.
        name: of the adapter.
        knobs: its others.
        targets: layers that are adapted.
        wanted: trained parameters.
        most: largest rank that is tried.
        task_type: as PEFT names it; a classifier's head is left alone then.

    Raises:
        UserError: if no size works.
    """
    limit = _MOST if name == "nola" else most
    counted: dict[int, float] = {}

    def count(value: int) -> float:
        if value not in counted:
            try:
                counted[value] = trained_parameters(model, name, {**knobs, **size_knobs(name, value, knobs)}, targets, task_type)
            except ValueError:
                counted[value] = math.nan  # too large for some layer
        return counted[value]

    low, high = 1, limit
    while high > 1 and math.isnan(count(high)):
        high //= 2
    rises = count(high) >= count(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (count(middle) < wanted) == rises else (low, middle)
    for value in range(max(1, low - _NEAR), min(limit, high + _NEAR) + 1):
        count(value)
    possible = {value: int(found) for value, found in counted.items() if not math.isnan(found)}
    if not possible:
        raise UserError(f"{name} can be put on none of these layers, whatever its size")
    best = min(possible, key=lambda value: (abs(possible[value] - wanted), value))
    return size_knobs(name, best, knobs), possible[best]


def size_knobs(name: str, value: int, knobs: Mapping[str, Any]) -> dict[str, int]:
    """What sets an adapter's size, at a value; IncreLoRA's layers may reach twice their average where the knobs do not say otherwise."""
    room = {"r": 2 * value} if name == "increlora" and not {"r", "max_r"} & set(knobs) else {}
    return {SIZES.get(name, "r"): value, **room}


class Batches:
    """The rows of a training as every method of a seed reads them: in a new order each time round, those of similar length together.

    Args:
        rows: with ``input_ids``.
        size: rows a batch.
        steps: batches.
        seed: of the order.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], size: int, steps: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        places: list[Int[Tensor, " size"]] = []
        while len(places) < steps:
            for pool in torch.randperm(len(rows), generator=generator).split(_POOL * size):
                batches = torch.tensor(sorted(pool.tolist(), key=lambda place: len(rows[place]["input_ids"]))).split(size)
                places += [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
        self.rows, self.places = rows, places[:steps]

    def __iter__(self) -> Any:
        return ([self.rows[place] for place in places.tolist()] for places in self.places)

    def digest(self) -> str:
        """SHA-256 of the token ids in the order they are read."""
        return hashlib.sha256(repr([row["input_ids"] for batch in self for row in batch]).encode()).hexdigest()


@dataclass(frozen=True)
class Adapted:
    """A model with its trained adapter, and what its training took.

    Attributes:
        tuned: what ``get_peft_model`` made.
        loaded: the same for those who want a plain model: the base with the adapter in it.
        losses: of every step.
        seconds: of every step.
    """

    tuned: PeftModel
    loaded: LoadedModel
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def adapted(
    task: Downstream, batches: Batches, config: PeftConfig, *, lr: float, head_lr: float = 1e-3, warmup: float = 0.1, max_grad_norm: float = 1.0, seed: int = 0
) -> Adapted:  # fmt: skip
    """Train an adapter: AdamW without decay, a rate that rises linearly, reaches its top at the end of the warm-up, and falls linearly towards zero.

    Args:
        task: gives the model and its batches.
        batches: one for each step.
        config: of the adapter.
        lr: of the adapter.
        head_lr: of a new head.
        warmup: share of the steps in which the rates rise.
        max_grad_norm: to which gradients are clipped together.
        seed: of first values and dropout.

    Raises:
        UserError: if the loss is not finite.
    """
    loaded, steps = task.fresh(seed), len(batches.places)
    rises = max(1, round(warmup * steps))
    with own_randomness(seed):
        if isinstance(config, DeltaConfig):
            config.start_from(loaded.model, (task.collate(rows) for rows in batches), lr / rises)
        tuned: Any = get_peft_model(loaded.model, config)
        parts = {head: [p for name, p in tuned.named_parameters() if p.requires_grad and (HEAD in name) == head] for head in (False, True)}
        groups: list[dict[str, Any]] = [{"params": parts[head], "lr": rate} for head, rate in ((False, lr), (True, head_lr)) if parts[head]]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / rises, (steps - step) / max(1, steps - rises + 1)))
        made = Adapted(tuned, LoadedModel(tuned.get_base_model(), loaded.tokenizer))
        hooks = list(tuners(tuned))
        for tuner in hooks:
            tuner.total_steps, tuner.warmup_steps = steps, rises
            tuner.begin_training(optimizer)
        tuned.train()
        for step, rows in enumerate(batches):
            started = time.perf_counter()
            for tuner in hooks:
                tuner.begin_step(step)
            loss = tuned(**{name: value.to(loaded.model.device) for name, value in task.collate(rows).items()}).loss
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step + 1}; lower the learning rate, {lr:g}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], max_grad_norm)
            for tuner in hooks:
                tuner.before_update(step, optimizer)
            optimizer.step()
            if isinstance(config, AdaLoraConfig):
                tuned.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            schedule.step()
            for tuner in hooks:
                tuner.end_step(step + 1)
            made.losses.append(loss.item())
            made.seconds.append(time.perf_counter() - started)
        for tuner in hooks:
            tuner.end_training()
    tuned.eval()
    return made


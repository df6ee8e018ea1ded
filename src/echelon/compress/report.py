"""What a compression did and cost."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from echelon.calibrate.walker import on_device
from echelon.compress.budget import Size, size
from echelon.models.modules import is_linear


@dataclass
class Report:
    """Before and after. Tied tensors count once; ``None`` stands for what was not measured.

    Attributes:
        method: its name.
        parameters_before: parameters of the whole model.
        parameters_after: the same, compressed.
        parameters_before_without_embeddings: without the embedding tables and a head tied to them.
        parameters_after_without_embeddings: the same, compressed.
        bytes_before: bytes that the tensors take when stored.
        bytes_after: the same, compressed.
        macs_before: multiply-accumulates of the linear layers for one token.
        macs_after: the same, compressed.
        milliseconds_before: median time of one forward over the first calibration batch.
        milliseconds_after: the same, compressed.
        perplexity_before: on the evaluation text, if any was given.
        perplexity_after: the same, compressed.
        metrics_before: other measures by name, such as a click model's ``auc`` and ``logloss``.
        metrics_after: the same, compressed.
        modules: for each replaced module what is known of it, such as ``rank``, ``lost`` (squared error in the norm that the method
            minimises), ``tail_energy`` (its share of the whole) and ``rel_err`` (the root of that).
        skipped: ``{"name", "reason"}`` of modules that were targets and stayed as they were.
        tokens: calibration tokens, without pads.
        source: where these came from.
        seconds: how long the compression took.
        details: figures of the method's own.
    """

    method: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    parameters_before_without_embeddings: int = 0
    parameters_after_without_embeddings: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    metrics_before: dict[str, float] = field(default_factory=dict)
    metrics_after: dict[str, float] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0
    source: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def measure(self, model: PreTrainedModel, when: str, batch: Mapping[str, Tensor] | None, found: float | Mapping[str, float] | None) -> None:
        """Fill in one side, ``before`` or ``after``; ``found`` is the perplexity, or other metrics by name."""
        counted: Size = size(model)
        metrics = dict(found) if isinstance(found, Mapping) else {}
        made: dict[str, Any] = {
            "parameters": counted.parameters, "bytes": counted.bytes, "macs": macs(model), "metrics": metrics,
            "perplexity": None if isinstance(found, Mapping) else found,
            "milliseconds": None if batch is None else milliseconds(model, dict(batch)),
        }  # fmt: skip
        for name, value in made.items():
            setattr(self, f"{name}_{when}", value)
        tables = {id(p): p.numel() for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
        setattr(self, f"parameters_{when}_without_embeddings", counted.parameters - sum(tables.values()))

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append({"name": name, "reason": reason})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.parameters_before:,} -> {self.parameters_after:,} parameters ({self.parameters_after / max(self.parameters_before, 1):.1%})"]
        parts.append(f"{self.bytes_before:,} -> {self.bytes_after:,} bytes")
        if self.perplexity_before is not None and self.perplexity_after is not None:
            parts.append(f"perplexity {self.perplexity_before:.3f} -> {self.perplexity_after:.3f}")
        parts += [f"{name} {value:.4f} -> {self.metrics_after[name]:.4f}" for name, value in self.metrics_before.items() if name in self.metrics_after]
        parts.append(f"{len(self.modules)} modules replaced, {len(self.skipped)} left")
        return ", ".join(parts) + f", {self.seconds:.1f} s"


def macs(model: nn.Module) -> int:
    """Multiply-accumulates for one token: one for each number of each matrix that multiplies it (a module may say otherwise by ``macs``)."""
    total, inner = 0, set()
    for module in model.modules():
        if id(module) in inner:
            continue
        own = getattr(module, "macs", None)
        if isinstance(own, int):
            total += own
            inner |= {id(child) for child in module.modules()}
        elif is_linear(module):
            total += module.weight.numel()  # type: ignore[union-attr, operator]
    return total


@torch.no_grad()
def milliseconds(model: PreTrainedModel, batch: dict[str, Tensor], repeats: int = 3) -> float:
    """Median time of a forward, after one to warm up."""
    training = model.training
    model.eval()
    batch = on_device(batch, model.device)
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model.base_model(**batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    model.train(training)
    return sorted(taken[1:])[repeats // 2]

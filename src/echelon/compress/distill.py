"""A small model learns what each block of a large one gives: feature distillation, for any model with a chain of blocks.

Source: the losses of "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700; they fit every compressed model whose
blocks are as wide as the original's.
Differs from it: pads do not count, and on text the error of a block is divided by the variance of the teacher's features there, since hidden states of
language models differ by orders of magnitude between blocks. The plain loop is for one device; :mod:`echelon.compress.distill_trainer` has the rest.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.calibrate.walker import on_device
from echelon.compress.recovery import recover
from echelon.models.targets import blocks

Penalty = Callable[[], Tensor | None]
Features = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Distillation:
    """What is compared.

    Attributes:
        feature_weight: weight of the mean squared error between outputs of blocks, at least 0.
        logit_weight: weight of that between logits, at least 0.
        feature_layers: indices of the blocks to compare, or names of other modules; all blocks if None.
        normalize: divide the error of each block by the variance of the teacher's features; None does it where the model reads text.
    """

    feature_weight: float = 1.0
    logit_weight: float = 0.0
    feature_layers: list[int | str] | None = None
    normalize: bool | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name in ("feature_weight", "logit_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0")
        if self.feature_layers is not None and not self.feature_layers:
            raise ValueError("feature_layers is []; it must name at least one block (feature_weight=0 compares none)")


class FeatureDistiller:
    """Loss = task + feature_weight * mean over blocks of MSE(student, teacher) + logit_weight * MSE(logits) + penalties.

    The student runs first. The teacher then runs without gradients, and each of its features is compared and forgotten as it appears, so none are kept.
    Errors are taken in float32. An ``attention_mask`` of the shape of the tokens leaves out pads.

    Args:
        student: the model to train.
        teacher: frozen here and set to evaluation; in any dtype, on any device.
        settings: what is compared.
        penalties: further terms, each a weight and a function that gives its value, or None where it is left out this time.

    Raises:
        ValueError: if ``feature_layers`` names what is not there, or the model has no chain of blocks.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, settings: Distillation | None = None,
        penalties: Mapping[str, tuple[float, Penalty]] | None = None,
    ):  # fmt: skip
        self.student, self.settings, self.penalties = student, settings or Distillation(), dict(penalties or {})
        self.teacher = teacher.requires_grad_(False).eval()
        self.names = feature_modules(student, self.settings.feature_layers) if self.settings.feature_weight else []
        for name in self.names:
            if name not in dict(teacher.named_modules(remove_duplicate=False)):
                raise ValueError(f"the teacher has no module {name}; feature distillation needs a student with the teacher's blocks")

    @contextlib.contextmanager
    def watching(self) -> Iterator[Features]:
        """Collects the features of one forward of the student inside the ``with``; a recomputation in the backward, outside it, leaves no trace."""
        features: Features = {name: [] for name in self.names}
        with _hooks({self.student.get_submodule(name): features[name].append for name in self.names}):
            yield features

    def terms(self, features: Features, inputs: Mapping[str, Any], logits: Tensor | None) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of every term beside the task's own loss.

        Args:
            features: of the student, from :meth:`watching`.
            inputs: what the student was given; labels are ignored.
            logits: of the student; needed with ``logit_weight``.

        Raises:
            ValueError: if student and teacher do not give features of the same shape.
        """
        made = {}
        if self.names or self.settings.logit_weight:
            shown = {name: value for name, value in inputs.items() if "label" not in name}
            errors: list[Tensor] = []

            def compare(name: str) -> Callable[[Tensor], None]:
                own = iter(features[name])
                return lambda theirs: errors.append(self._error(name, next(own, None), theirs, shown))

            runs = self.teacher if self.settings.logit_weight else self.teacher.base_model
            extra = {"use_cache": False} if hasattr(self.teacher.config, "use_cache") else {}
            with torch.no_grad(), _hooks({self.teacher.get_submodule(name): compare(name) for name in self.names}, grad=True):
                outputs = runs(**on_device(shown, self.teacher.device), **extra)
            if self.names:
                made["features"] = (self.settings.feature_weight, torch.stack(errors).mean())
            if self.settings.logit_weight:
                if logits is None:
                    raise ValueError("logit_weight needs a student that returns logits")
                made["logits"] = (self.settings.logit_weight, mean_squared_error(logits, outputs.logits, shown.get("attention_mask")))
        for name, (weight, penalty) in self.penalties.items():
            if weight and (value := penalty()) is not None:
                made[name] = (weight, value)
        return made

    def loss(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The whole loss of the student on a batch, and its terms before weighting; the task's is there where the model gives one (``labels``)."""
        with self.watching() as features:
            outputs = self.student(**inputs)
        terms = self.terms(features, inputs, getattr(outputs, "logits", None))
        if getattr(outputs, "loss", None) is not None:
            terms = {"task": (1.0, outputs.loss)} | terms
        if not terms:
            raise ValueError("there is nothing to learn from: the batch has no labels, and all other terms have weight 0")
        return torch.stack([weight * value.float() for weight, value in terms.values()]).sum(), {name: float(v.detach()) for name, (_, v) in terms.items()}

    def fit(
        self, data: Any, tokenizer: PreTrainedTokenizerBase | None = None, *, steps: int, learning_rate: float = 1e-4, weight_decay: float = 0.02,
        warmup: int | None = None, batch_size: int = 8, seqlen: int = 2048, seed: int = 0, on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train the student by :func:`echelon.compress.recover`, which tells what the arguments are; see :func:`labelled` for the task.

        Returns:
            What ``recover`` does, and ``terms``, those of the last batch before weighting.
        """
        terms: dict[str, float] = {}

        def loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
            whole, found = self.loss(labelled(model, batch))
            terms.update(found)
            return whole

        told = recover(
            self.student, data, tokenizer, steps=steps, learning_rate=learning_rate, seed=seed, loss=loss, batch_size=batch_size, seqlen=seqlen,
            warmup=warmup, weight_decay=weight_decay, on_progress=on_progress,
        )  # fmt: skip
        return told | {"terms": terms}

    def _error(self, name: str, own: Tensor | None, theirs: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if own is None or own.shape != theirs.shape:
            shape = None if own is None else tuple(own.shape)
            raise ValueError(f"{name} gives {shape} in the student and {tuple(theirs.shape)} in the teacher; feature distillation needs equal shapes")
        normalize = "input_ids" in inputs if self.settings.normalize is None else self.settings.normalize
        return mean_squared_error(own, theirs, inputs.get("attention_mask"), normalize)


def feature_modules(model: PreTrainedModel, layers: Sequence[int | str] | None = None) -> list[str]:
    """Names of the modules whose outputs are compared: the blocks, those of them at some indices, or others by name.

    Raises:
        ValueError: if one is not there, or the model has no chain of blocks.
    """
    chain = [name for name, _ in blocks(model)]
    if not chain and (layers is None or any(isinstance(layer, int) for layer in layers)):
        raise ValueError(f"{type(model).__name__} is no single chain of blocks; name the modules to compare in feature_layers")
    known, made = dict(model.named_modules(remove_duplicate=False)), []
    for layer in range(len(chain)) if layers is None else layers:
        if isinstance(layer, int) and not -len(chain) <= layer < len(chain):
            raise ValueError(f"feature_layers holds {layer}; the model has {len(chain)} blocks")
        made.append(chain[layer] if isinstance(layer, int) else layer)
        if made[-1] not in known:
            raise ValueError(f"feature_layers holds {layer!r}; the model has no such module")
    return made


def mean_squared_error(
    own: Float[Tensor, "*batch width"], theirs: Float[Tensor, "*batch width"], mask: Tensor | None = None, normalize: bool = False
) -> Float[Tensor, ""]:
    """Mean over all elements that are not pads, in float32; with ``normalize`` divided by the variance of ``theirs`` over the same elements."""
    theirs = theirs.detach().to(own.device, torch.promote_types(theirs.dtype, torch.float32))
    errors, width = (own.to(theirs.dtype) - theirs).square(), own.shape[-1]
    fits = mask is not None and mask.shape == own.shape[:-1]
    weights = mask.to(own.device, theirs.dtype) if fits and mask is not None else theirs.new_ones(own.shape[:-1])
    count = width * weights.sum().clamp_min(1)
    error = (errors.sum(-1) * weights).sum() / count
    if not normalize:
        return error
    center = (theirs.sum(-1) * weights).sum() / count
    variance = ((theirs - center).square().sum(-1) * weights).sum() / count
    return error / variance.clamp_min(1e-12)


def labelled(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with ``labels``: those that it has, or, for a causal language model, its own tokens without the pads; other models go without."""
    made = dict(batch)
    if "labels" not in made and "input_ids" in made and model.can_generate() and not model.config.is_encoder_decoder:
        mask = made.get("attention_mask")
        made["labels"] = made["input_ids"] if mask is None else made["input_ids"].masked_fill(mask == 0, -100)
    return made


@contextlib.contextmanager
def _hooks(takers: Mapping[nn.Module, Callable[[Tensor], None]], grad: bool = False) -> Iterator[None]:
    def hook(take: Callable[[Tensor], None]) -> Callable[..., None]:
        def taken(module: nn.Module, args: Any, output: Any) -> None:
            with torch.set_grad_enabled(grad or torch.is_grad_enabled()):
                take(output[0] if isinstance(output, tuple) else output)

        return taken

    handles = [module.register_forward_hook(hook(take)) for module, take in takers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

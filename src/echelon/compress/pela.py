"""PELA: truncate every linear layer, then train the whole again so that its blocks give what they gave before.

Source: "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700 (vision and vision-language models).
Differs from it: language models are our extension, the paper has no numbers for them; only layers inside the blocks are taken unless ``target_modules``
says more; the teacher's features are normalised on text; the student runs once a step.
The published penalty bounds the largest absolute entry of the deviation (the code, where the paper writes an infinity norm). Its gradient touches one
entry of a layer's product a step, so it hardly acts; ``perturb_norm="fro"`` acts on all of them. It is two-sided: nearer than ``perturb_eps`` is
penalised too, unless ``hinge``.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from echelon import linalg
from echelon.calibrate import Moments
from echelon.compress.base import Job
from echelon.compress.distill import Distillation, FeatureDistiller
from echelon.compress.linear import Layer, LowRankCompressor
from echelon.linalg.checks import number, one_of
from echelon.linalg.lowrank import Factors
from echelon.models.modules import LowRankLinear, Spec, dense_weight, factored, is_linear
from echelon.models.targets import Targets
from echelon.registry import method

NORMS = ("max_abs", "max_row_sum", "fro")


@method(
    kind="compressor", name="pela", title="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arxiv="2310.10700", year=2023,
    summary="Truncated SVD, then training on features of the original model.", needs="training text with steps; without, it is a plain SVD",
    published="1/3 to 2/3 of the parameters of DeiT-B, DeiT-III-L, Swin-B and ALBEF removed for about 0.6 points on average (abstract)",
)  # fmt: skip
@dataclass(frozen=True)
class PELA(LowRankCompressor):
    """Factor ``W (out, in)`` as ``U sqrt(S) (out, r)`` and ``sqrt(S) V^T (r, in)`` with r = floor(m p / (c (m + p))), then train all parameters.

    The loss is that of the task, plus ``feature_weight`` times the mean squared error of the blocks' outputs against the original model, plus
    ``perturb_weight`` times the mean over layers of ``(||up down - W|| - perturb_eps)^2``. With `steps` this happens here, on the data given, with a
    copy of the model as the teacher. For longer runs compress with ``steps=0`` and give :meth:`distiller` to
    :class:`echelon.compress.DistillationTrainer`. Without any training, ratios of 2 and more are poor. A causal language model learns to predict its
    text; other models need batches with ``labels``, or learn from the features alone. Train in float32.

    Attributes:
        compress_ratio: each factored layer keeps at most 1/c of its parameters, above 1.
        exclude_modules: layers whose name has a match of one of these regular expressions (a plain word: contains it) stay as they are.
        min_out_features: layers with fewer outputs stay as they are.
        target_modules: layers to take: `all-linear` inside the blocks, `attention`, `mlp`, a regular expression, or a list of name ends.
        feature_weight: weight of the features' mean squared error, at least 0; 0.1 suits losses of several tasks.
        feature_layers: indices of the blocks whose outputs are compared, or names of other modules; all blocks if None.
        logit_weight: weight of the mean squared error of logits, at least 0.
        normalize: divide each block's error by the variance of the teacher's features; None does it on text.
        perturb_weight: weight of the penalty on the deviation of the factors' product from the original weight, at least 0.
        perturb_eps: the deviation that is allowed, at least 0.
        perturb_norm: `max_abs`, the largest absolute entry; `max_row_sum`, the largest sum of absolute entries of a row; or `fro`.
        hinge: let deviations below `perturb_eps` be free.
        perturb_every: compute the penalty once in so many steps.
        steps: updates of the training; 0 leaves the truncated model.
        batch_size: rows of each.
        learning_rate: of AdamW, at most; it falls along a cosine to a tenth.
        weight_decay: of AdamW, on matrices.
        warmup_steps: steps in which the rate rises from 0; a twentieth of them if None.
        nsamples: rows of training text.
        seqlen: tokens a row.
        strict: raise where a layer would be left dense because its rank would be 0.
    """

    budget_knob: ClassVar[str] = "compress_ratio"
    budget_range: ClassVar[tuple[float, float]] = (1.0001, 16.0)

    compress_ratio: float = 2.0
    exclude_modules: list[str] | tuple[str, ...] = ("lm_head", "embed", "classifier")
    min_out_features: int = 10
    target_modules: Targets = None
    feature_weight: float = 1.0
    feature_layers: list[int | str] | None = None
    logit_weight: float = 0.0
    normalize: bool | None = None
    perturb_weight: float = 1.0
    perturb_eps: float = 1e-3
    perturb_norm: Literal["max_abs", "max_row_sum", "fro"] = "max_abs"
    hinge: bool = False
    perturb_every: int = 1
    steps: int = 0
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.02
    warmup_steps: int | None = None
    nsamples: int = 128
    seqlen: int = 2048
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 1 < self.compress_ratio < float("inf"):
            raise ValueError(f"compress_ratio is {self.compress_ratio!r}; it must be above 1")
        for pattern in self.exclude_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"exclude_modules holds {pattern!r}, which is no regular expression ({error})") from None
        for name, least in (("min_out_features", 0), ("steps", 0), ("batch_size", 1), ("perturb_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least {least}")
        for name in ("perturb_weight", "perturb_eps", "weight_decay"):
            number(name, getattr(self, name), 0, float("inf"), open_high=True)
        number("learning_rate", self.learning_rate, 0, float("inf"), open_low=True, open_high=True)
        one_of("perturb_norm", self.perturb_norm, NORMS)
        self._distillation()

    @property
    def needs_data(self) -> bool:
        return self.steps > 0

    def prepare(self, job: Job) -> dict[str, Layer]:
        layers = super().prepare(job)
        for name in list(layers):
            excluding = next((pattern for pattern in self.exclude_modules if re.search(pattern, name)), None)
            if excluding is not None:
                job.report.skip(name, f"its name has {excluding!r}, which exclude_modules names")
            elif layers[name].shape[0] < self.min_out_features:
                job.report.skip(name, f"it has {layers[name].shape[0]} outputs, fewer than min_out_features={self.min_out_features}")
            else:
                continue
            del layers[name]
        if not layers:
            raise ValueError("exclude_modules and min_out_features leave no layer to factor")
        return layers

    def plan(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        return linalg.allocate("params", None, {name: layer.shape for name, layer in layers.items()}, float(self.compress_ratio))

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        ranks = self.plan(state)
        for name, layer in state.items():
            if name not in ranks:
                rows, columns = layer.shape
                job.refuse(name, f"its rank would be 0 ({rows} x {columns} at compress_ratio={self.compress_ratio:.4g})")
        if state and not ranks:
            raise ValueError(f"compress_ratio is {self.compress_ratio:.4g}; the rank of every layer would be 0")
        return super().specs(job, {name: layer for name, layer in state.items() if name in ranks})

    def factor(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None, rank: int
    ) -> Factors:
        """Best factors of this rank, each with columns of norm sqrt(sigma)."""
        return linalg.svd(weight, rank, balance="sqrt", dtype=torch.float64)

    def apply(self, job: Job, state: dict[str, Layer], specs: Mapping[str, Spec]) -> None:
        teacher = copy.deepcopy(job.model) if self.steps else None
        super().apply(job, state, specs)
        if teacher is not None and job.calibration is not None:
            self.distiller(job.model, teacher).fit(
                job.calibration.batches, steps=self.steps, learning_rate=self.learning_rate, weight_decay=self.weight_decay,
                warmup=self.warmup_steps, batch_size=self.batch_size, seed=job.seed,
                on_progress=lambda entry: job.progress("training", entry["done"], entry["of"]),
            )  # fmt: skip

    def distiller(self, student: PreTrainedModel, teacher: PreTrainedModel) -> FeatureDistiller:
        """The losses of this method for a compressed model and the original one."""
        penalties = {}
        if self.perturb_weight:
            penalty = WeightPerturbation(student, teacher, self.perturb_eps, self.perturb_norm, self.hinge, self.perturb_every)
            penalties["perturbation"] = (self.perturb_weight, penalty)
        return FeatureDistiller(student, teacher, self._distillation(), penalties)

    def _distillation(self) -> Distillation:
        return Distillation(self.feature_weight, self.logit_weight, self.feature_layers, self.normalize)


class WeightPerturbation:
    """How far factors have come from the weights they stand for: the mean over layers of ``(||up down - W|| - eps)^2``.

    For the two maxima only the entry or the row that attains it enters the graph, which gives the same gradient without a backward through the product.

    Args:
        student: with factored layers.
        teacher: with the dense layers of the same names.
        eps: the deviation that is allowed.
        norm: ``max_abs``, ``max_row_sum`` or ``fro``.
        hinge: let smaller deviations be free.
        every: give the value once in so many calls, and None at the others.

    Raises:
        ValueError: if the student has no factored layer that is dense in the teacher.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, eps: float = 1e-3, norm: str = "max_abs", hinge: bool = False, every: int = 1):
        self.eps, self.norm, self.hinge, self.every, self.calls = eps, one_of("norm", norm, NORMS), hinge, every, 0
        dense = {name: module for name, module in teacher.named_modules() if is_linear(module)}
        self.pairs = [(module, dense[name]) for name, module in factored(student) if name in dense]
        if not self.pairs:
            raise ValueError("the student has no factored layer that is dense in the teacher; there is no perturbation of weights to bound")

    def __call__(self) -> Float[Tensor, ""] | None:
        self.calls += 1
        if (self.calls - 1) % self.every:
            return None
        excess = torch.stack([self.deviation(student, dense_weight(teacher).detach()) for student, teacher in self.pairs]) - self.eps
        return (excess.clamp_min(0) if self.hinge else excess).square().mean()

    def deviation(self, layer: LowRankLinear, weight: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
        """The norm of ``up down - W`` of one layer, in float32 or wider."""
        wide = torch.promote_types(layer.up.weight.dtype, torch.float32)
        up, down = layer.up.weight.to(wide), layer.down.weight.to(wide)
        weight = weight.to(up)
        if self.norm == "fro":
            return torch.linalg.vector_norm(up @ down - weight)
        with torch.no_grad():
            gap = (up @ down - weight).abs()
            row, column = divmod(int(gap.argmax()), gap.shape[1]) if self.norm == "max_abs" else (int(gap.sum(1).argmax()), slice(None))  # type: ignore[assignment]
        return (up[row] @ down[:, column] - weight[row, column]).abs().sum()

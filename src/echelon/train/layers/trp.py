"""TRP: train a dense network while its weights are snapped to low rank again and again; factoring it at the end then costs next to nothing.

Source: "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 2004.14566.
Differs from its code: periods count optimizer steps over the whole training; linear layers take part, a fused query-key-value matrix as one, and so do
convolutions of width 1; any stride, kernel, padding and bias; a failed SVD is told. The energy kept in training and the period in the paper's text could not be
confirmed; `energy` is that of the code.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.linalg.checks import number, one_of, whole
from echelon.models.factored_conv import SCHEMES, FactoredConv, conv_spec, is_convolution, kernel, matrices, parameters_at
from echelon.models.modules import Spec, build, dense_weight, put
from echelon.models.reload import attach
from echelon.models.targets import blocks, linear_targets, matches
from echelon.registry import method
from echelon.train.layers.base import LayerMethod, agree, rewrite, stored

RULES = ("value_threshold", "energy", "fraction")
Parts = tuple[Float[Tensor, "*batch rows n"], Float[Tensor, "*batch n"], Float[Tensor, "*batch n columns"]]

# The nuclear norm's direction of each weight, from the truncation until the update of the same step.
_directions: Any = WeakTensorKeyDictionary()


@method(
    kind="layer", name="trp", title="Trained Rank Pruning for Efficient Deep Neural Networks", arxiv="2004.14566", year=2020,
    summary="Train dense weights that are snapped to low rank every few steps, and factor them at the end.",
    published="CIFAR-10, ResNet-20: 90.50 at 0.10M parameters (nc), 90.62 at 0.08M (vh), 91.74 dense at 0.27M",
)  # fmt: skip
@dataclass(frozen=True)
class TRP(LayerMethod):
    """Every ``period`` optimizer steps, before the forward pass, replace a weight by its nearest one of the rank that keeps ``energy``.

    A sub-gradient pushes its nuclear norm down in the same steps. No layer is swapped before :meth:`finish`: what is trained, saved and loaded is the
    ordinary model, and the optimizer's state stays as it is. Between truncations the rank may grow again. Leave batch norm in training mode; its statistics
    drift with the weights.

    Attributes:
        target_modules: layers to take: `all` for linear layers and convolutions, `all-linear` for the linear ones inside the blocks, `attention`, `mlp`, a
            regular expression, or a list of names or their ends; embeddings and language-modelling heads never are.
        scheme: how a convolution is read as a matrix: `nc` channels, `vh` space, `nd` one matrix for each output channel. Linear layers are matrices already.
        energy: share of the squared singular values that a truncation keeps, in (0, 1). Every truncation takes from what the last one left: with small learning
            rates, which refill little, ranks fall on and on unless this is near 1 or `period` long.
        period: optimizer steps between truncations; 0 for none, which leaves the nuclear norm alone at work.
        nuclear_weight: factor of the nuclear norm's sub-gradient; 0 for none.
        nuclear_every: optimizer steps between its uses; by default those of the truncations, or every step where there are none.
        nuclear_decoupled: take it off the weights behind the optimizer, times the learning rate, in place of adding it to the gradients; by default with all
            optimizers but SGD, since Adam would scale it away.
        start_step: optimizer steps of ordinary training before either begins.
        skip: layers of `target_modules` to leave out: a regular expression or a list of names or their ends; by default, of `all` and `linear`, the first two
            convolutions and a last linear layer outside the blocks, the classifier.
        final_rule: what the last ranks go by: `value_threshold`, singular values below it are dropped; `energy`, the share of squares to keep; `fraction`, of
            the full rank. By default `value_threshold`, and `energy` under `nd`.
        final_threshold: its number; by default 0.05, 0.85 or 0.5.
        min_gain: a layer is factored only where its weight has more than this many times the parameters of the factors.
    """

    target_modules: str | list[str] = "all"
    scheme: Literal["nc", "vh", "nd"] = "nc"
    energy: float = 0.9
    period: int = 20
    nuclear_weight: float = 3e-4
    nuclear_every: int | None = None
    nuclear_decoupled: bool | None = None
    start_step: int = 0
    skip: str | list[str] | None = None
    final_rule: Literal["value_threshold", "energy", "fraction"] | None = None
    final_threshold: float | None = None
    min_gain: float = 1.0

    convolutions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scheme", self.scheme, SCHEMES)
        number("energy", self.energy, 0, 1, open_low=True, open_high=True)
        whole("period", self.period, 0)
        number("nuclear_weight", self.nuclear_weight, 0, float("inf"), open_high=True)
        if self.nuclear_every is not None:
            whole("nuclear_every", self.nuclear_every, 1)
        whole("start_step", self.start_step, 0)
        check_rule(*self.final)
        number("min_gain", self.min_gain, 0, float("inf"), open_high=True)

    @property
    def final(self) -> tuple[str, float]:
        """The rule of the last ranks, and its number."""
        rule = self.final_rule or ("energy" if self.scheme == "nd" else "value_threshold")
        default = {"value_threshold": 0.05, "energy": 0.85}.get(rule, 0.5)
        return rule, default if self.final_threshold is None else self.final_threshold

    def targets(self, model: nn.Module) -> list[str]:
        names = super().targets(model)
        if self.skip is None:
            left = _first_and_last(model, names) if self.target_modules in ("all", "linear") else []
        else:
            patterns = [self.skip] if isinstance(self.skip, str) else self.skip
            left = [name for name in names if any(matches(name, pattern, isinstance(self.skip, str)) for pattern in patterns)]
        names = [name for name in names if name not in left]
        if not names:
            raise ValueError(f"target_modules is {self.target_modules!r} and skip is {self.skip!r}; no layer is left: all of these are skipped: {left}")
        return names

    def spec(self, name: str, module: Any) -> Spec:
        rule, threshold = self.final
        spec = factored_spec(name, module, self.scheme)
        values = torch.linalg.svdvals(matrices(module.weight.detach().double(), spec.get("scheme", "nc")))
        return spec | {"rank": int(ranks_by(rule, values, threshold).max())}

    def fill(self, new: Any, old: Any, generator: torch.Generator) -> None:
        fill(new, parts(old.weight.double(), getattr(new, "scheme", "nc")), old.bias)

    def convert(self, model: nn.Module) -> list[str]:
        """Names of the layers that will be truncated; nothing is swapped before :meth:`finish`.

        Raises:
            ValueError: if there is none, or one cannot be factored.
        """
        names = self.targets(model)
        for name in names:
            factored_spec(name, model.get_submodule(name), self.scheme)
        return names

    def begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        truncating = bool(self.period) and self._due(step, self.period)
        pushing = self.nuclear_weight > 0 and self._due(step, self.nuclear_every or self.period or 1)
        if truncating or pushing:
            for name in self.targets(model):
                weight: Any = model.get_submodule(name).weight
                if weight.requires_grad:
                    self._truncate(name, weight, self._scheme(weight), optimizer, truncating, pushing)

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Add the nuclear norm's sub-gradient to the gradients, where it is not decoupled."""
        decoupled = self.nuclear_decoupled
        if decoupled is None:
            decoupled = not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
        if not decoupled:
            for weight, left, right in self._pending(model):
                if weight.grad is not None:
                    weight.grad.add_(kernel(left @ right, self._scheme(weight), weight.shape), alpha=self.nuclear_weight)

    def end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take the nuclear norm's sub-gradient off the weights, where it is decoupled."""
        pending = self._pending(model)
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]} if pending else {}
        for weight, left, right in pending:
            value, direction = stored(optimizer, weight), kernel(left @ right, self._scheme(weight), weight.shape)
            rewrite(optimizer, weight, value - rates.get(id(weight), 0.0) * self.nuclear_weight * direction.to(value.dtype))

    def finish(self, model: nn.Module) -> None:
        """Factor what became low in rank, see :func:`decompose`; the other layers stay dense."""
        rule, threshold = self.final
        decompose(model, rule, threshold, scheme=self.scheme, min_gain=self.min_gain, names=self.targets(model), knobs=dataclasses.asdict(self))

    @torch.no_grad()
    def ranks(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """For each target, the rank that keeps ``energy`` now, and the full one; under ``nd`` the largest over the filters."""
        found = {}
        for name in self.targets(model):
            weight: Any = model.get_submodule(name).weight
            values = torch.linalg.svdvals(matrices(weight.double(), self._scheme(weight)))
            found[name] = int(ranks_by("energy", values, self.energy).max()), values.shape[-1]
        return found

    def _due(self, step: int, every: int) -> bool:
        return step >= self.start_step and (step - self.start_step) % every == 0

    def _scheme(self, weight: Tensor) -> str:
        return self.scheme if weight.ndim > 2 else "nc"

    @torch.no_grad()
    def _truncate(self, name: str, weight: nn.Parameter, scheme: str, optimizer: torch.optim.Optimizer, truncating: bool, pushing: bool) -> None:
        value = stored(optimizer, weight)
        try:
            left, values, right = parts(value, scheme)
        except torch.linalg.LinAlgError as error:
            warnings.warn(f"no SVD of {name}, which stays as it is in this step: {error}", stacklevel=2)
            return
        kept = torch.arange(values.shape[-1], device=values.device) < ranks_by("energy", values, self.energy)[..., None]
        if truncating:
            low = (left * (values * kept)[..., None, :]) @ right
            rewrite(optimizer, weight, kernel(low, scheme, value.shape).to(value.dtype))
        if pushing:
            most = int(kept.sum(-1).max())
            present = (kept & (values > 0)).to(left.dtype)  # a weight of zero has no direction
            _directions[weight] = ((left * present[..., None, :])[..., :most].to(weight.dtype), right[..., :most, :].to(weight.dtype))

    @torch.no_grad()
    def _pending(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """The directions that have not been used, which are forgotten with that."""
        return [(weight, *_directions.pop(weight)) for weight in model.parameters() if weight in _directions]


@torch.no_grad()
def decompose(
    model: nn.Module, rule: str = "value_threshold", threshold: float = 0.05, *, scheme: str = "nc", min_gain: float = 1.0,
    names: Iterable[str] | None = None, knobs: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Factor linear layers and convolutions in place, each at the rank that a rule finds in its spectrum; at least 1.

    Args:
        model: any model; a ``PreTrainedModel`` keeps note, so that it saves and loads like any other after ``import echelon``.
        rule: ``value_threshold``, singular values below ``threshold`` are dropped; ``energy``, the share of squares to keep; ``fraction``, of the full rank.
        threshold: its number.
        scheme: ``nc``, ``vh`` or ``nd``, for convolutions.
        min_gain: layers stay dense unless their weight has more than this many times the parameters of the factors.
        names: the layers; by default all but embeddings and a language-modelling head.
        knobs: to note in the model's config.

    Returns:
        For each layer its ``rank``, ``full_rank``, kept ``energy``, ``parameters`` of the factors and those ``before``, and whether it was ``factored``.

    Raises:
        ValueError: if an argument is out of range, or a layer cannot be factored; the model is unchanged then.
    """
    check_rule(rule, threshold)
    names = linear_targets(model, "all", True)[0] if names is None else list(names)
    specs = {name: factored_spec(name, model.get_submodule(name), scheme) for name in names}
    for name in names:
        if not bool(torch.isfinite(model.get_parameter(f"{name}.weight")).all()):
            raise ValueError(f"the weight of {name} holds NaN or infinity; nothing was changed")
    report: dict[str, dict[str, Any]] = {}
    made: dict[str, Spec] = {}
    for name, spec in specs.items():
        old: Any = model.get_submodule(name)
        found = parts(old.weight.double(), spec.get("scheme", "nc"))
        rank, squares = int(ranks_by(rule, found[1], threshold).max()), found[1].square()
        share = float(squares[..., :rank].sum() / squares.sum()) if squares.any() else 1.0
        before, after = old.weight.numel(), parameters_at(old.weight.shape, spec.get("scheme", "nc"), rank)
        factored = before > min_gain * after
        report[name] = {"rank": rank, "full_rank": squares.shape[-1], "energy": share, "parameters": after, "before": before, "factored": factored}
        if factored:
            made[name] = spec | {"rank": rank}
            new = build(made[name], old)
            fill(new, found, old.bias)
            put(model, name, new)
    if made and isinstance(model, PreTrainedModel):
        attach(model, made, {"method": "trp", **(knobs or {"final_rule": rule, "final_threshold": threshold, "scheme": scheme, "min_gain": min_gain})})
    return report


def factored_spec(name: str, module: Any, scheme: str) -> Spec:
    """What a layer becomes, at rank 1.

    Raises:
        ValueError: if it is a convolution with groups, or of other than two dimensions under a scheme for these.
    """
    if is_convolution(module):
        return conv_spec(name, module, scheme, 1)
    rows, columns = dense_weight(module).shape
    made: Spec = {"kind": "lowrank", "in": columns, "out": rows, "rank": 1, "bias": module.bias is not None}
    return made | ({"transposed": True} if isinstance(module, Conv1D) else {})


def fill(new: Any, found: Parts, bias: Tensor | None) -> None:
    """Give a factored layer the leading singular triplets of the stored weight that it replaces, the scale shared as its scheme has it."""
    left, values, right = found
    left, values, right = left[..., : new.rank], values[..., : new.rank], right[..., : new.rank, :]
    if isinstance(new, FactoredConv):
        new.fill(left, values, right, bias)
    else:
        up, down = (right.T, left.T) if new.transposed else (left, right)
        new.fill(up * values.sqrt(), values.sqrt()[:, None] * down, bias)


def parts(weight: Float[Tensor, "..."], scheme: str) -> Parts:
    """Economy SVD of a weight's matrices, in float32 at least; all processes get that of the first."""
    found = torch.linalg.svd(matrices(weight, scheme).to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    agree(*found)
    return found


def ranks_by(rule: str, values: Float[Tensor, "*batch n"], threshold: float) -> Int[Tensor, "*batch"]:
    """The rank of each spectrum, from 1 to n: see :func:`decompose`. Values are descending."""
    if rule == "energy":
        kept = values.double().square().cumsum(-1)
        found = (kept < threshold * kept[..., -1:] * (1 - 1e-12)).sum(-1) + 1
    elif rule == "value_threshold":
        found = (values >= threshold).sum(-1)
    else:
        found = torch.full(values.shape[:-1], int(threshold * values.shape[-1] + 1e-9), device=values.device)
    return found.clamp(1, values.shape[-1])


def check_rule(rule: str, threshold: float) -> None:
    """Raises: ValueError: if a rule of the last ranks or its number is out of range."""
    one_of("final_rule", rule, RULES)
    number("final_threshold", threshold, 0, float("inf") if rule == "value_threshold" else 1, open_low=rule != "value_threshold")


def _first_and_last(model: nn.Module, names: list[str]) -> list[str]:
    """The first two convolutions, and the last linear layer where it stands outside the blocks."""
    convolutions = [name for name in names if is_convolution(model.get_submodule(name))]
    last = [name for name in names if not is_convolution(model.get_submodule(name))][-1:]
    return convolutions[:2] + [name for name in last if not any(name.startswith(block + ".") for block, _ in blocks(model))]

"""GradNormLoRP: weight-normalised low-rank adapters whose factors are trained with projected gradients.

Source: "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", arXiv 2412.19616. ``mode="adapter"`` is the paper's method: DoRA, with
GaLore on its factors. The authors' code holds another one, an optimizer that weight-normalises dense matrices: ``mode="reparam_optim"`` is that idea with
magnitudes that persist and the true gradient of the direction, ``mode="reference"`` their ``LowRankWeightNormAdamW`` as it runs, which derives each magnitude
from the direction again at every step. Differs from the paper: one side of a factor's gradient is projected unless ``proj_type="full"``, as the code
does; the rank of that projection is a knob of its own. Differs from the code: a row of zeros stays zero, and a gradient that is NaN is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.linalg.checks import number, one_of, whole
from echelon.models.targets import linear_targets
from echelon.registry import method
from echelon.train.optimizers.base import Group, ProjectedMethod, decay, target_groups
from echelon.train.optimizers.dora import SMALLEST_NORM, mend
from echelon.train.optimizers.moments import State, adam_direction, step_size

MODES = ("adapter", "reparam_optim", "reference")


@method(
    kind="optimizer", name="gradnormlorp", title="Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", arxiv="2412.19616", year=2024,
    summary="DoRA adapters whose factors are trained with projected gradients; or weight-normalised dense matrices.",
    needs="a DoRA adapter, which its adapt() adds (mode adapter)",
    published="GLUE, RoBERTa-base, r=8: average 80.65, LoRA 79.23 (their own setting, with WNLI)",
)  # fmt: skip
@dataclass(frozen=True)
class GradNormLoRP(ProjectedMethod):
    """Train magnitude and direction of every row apart, and keep Adam's moments of the direction for a projection of its gradient.

        method = GradNormLoRP(r=8)
        model = method.adapt(model)
        optimizer = method.optimizer(model)

    The adapter is PEFT's DoRA: it is saved, loaded, merged and unmerged by PEFT. Its factors are projected, magnitudes, biases and heads take plain AdamW,
    magnitudes without decay. The two other modes need no adapter; they keep each matrix a second time, as its direction, and write the matrix at every step,
    so that nothing else may change it meanwhile. There, ``reparam_optim`` follows ``torch.optim.AdamW``'s rule (``eps`` beside the corrected root, decay first)
    and leaves what is no target to AdamW; ``reference`` normalises vectors and embeddings too.

    Attributes:
        mode: `adapter`, or without one `reparam_optim` or `reference`.
        r: rank of the adapter.
        lora_alpha: the adapter is scaled by this over `r`.
        lora_dropout: share of the adapter's inputs that are zero while training.
        target_modules: layers that get an adapter: `all-linear` (those inside the blocks), `attention`, `mlp`, a regular expression, or a list of names or
            their ends.
        bias: biases that train beside the adapter: `none`, `all`, or those of adapted layers (`lora_only`).
        proj_rank: directions kept of the gradient of an adapter's factor, at most `r`; half of `r` by default. With `r` nothing is saved.
        detach_norm: take the norm of the rows for a constant in backward, which saves memory; without it the gradient is exact.
        rank: directions kept of a matrix's gradient in the modes without adapter; none for no projection.
        scale: factor of the update of what is projected; the authors use 0.25 to pre-train, 4 on GLUE.
    """

    lr: float = 0.01
    eps: float = 1e-6
    update_proj_gap: int = 250
    mode: Literal["adapter", "reparam_optim", "reference"] = "adapter"
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.1
    target_modules: str | list[str] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    proj_rank: int | None = None
    detach_norm: bool = True
    rank: int | None = 128  # type: ignore[assignment]
    scale: float = 0.25

    def __post_init__(self) -> None:
        if self.rank is None:
            replace(self, rank=1)  # checks all other knobs
            return
        super().__post_init__()
        one_of("mode", self.mode, MODES)
        whole("r", self.r, 1)
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; it must be above 0")
        number("lora_dropout", self.lora_dropout, 0, 1, open_high=True)
        one_of("bias", self.bias, ("none", "all", "lora_only"))
        if self.proj_rank is not None:
            whole("proj_rank", self.proj_rank, 1, self.r)
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}; it must be above 0")

    def adapt(self, model: nn.Module) -> PeftModel:
        """Put DoRA adapters on the target layers, in place; the PEFT model around it. It computes what the model did.

        A PEFT model with a DoRA adapter, loaded to be trained on, keeps its values.

        Raises:
            ValueError: if the mode has no adapter, there is no target, or the PEFT model has no DoRA adapter on a linear layer.
        """
        if self.mode != "adapter":
            raise ValueError(f"mode is {self.mode!r}; only 'adapter' has an adapter, the others train the model as it is")
        fresh = not isinstance(model, PeftModel)
        if fresh:
            names, skipped = linear_targets(model, self.target_modules)
            if not names:
                raise ValueError(f"target_modules is {self.target_modules!r}; none of these layers can be adapted: {skipped or 'there are none'}")
            config = LoraConfig(
                r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, target_modules=names, bias=self.bias, use_dora=True,  # type: ignore[arg-type]
                fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
            )  # fmt: skip
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                model = get_peft_model(model, config)  # type: ignore[arg-type, assignment]
        if not mend(model, self.detach_norm, fresh):
            raise ValueError("the PEFT model has no DoRA adapter on a linear layer; give one with use_dora=True, or the model without adapter")
        return model  # type: ignore[return-value]

    def prepare(self, model: Any) -> Any:
        return self.adapt(model) if self.mode == "adapter" else model

    def groups(self, model: nn.Module) -> list[Group]:
        """The factors of the adapter, which get a ``rank``; its magnitudes, without decay; all others. Without adapter: target matrices, and all others.

        Raises:
            ValueError: if there is no target, in mode ``adapter`` no DoRA adapter, or in mode ``reference`` a parameter of more than two dimensions.
        """
        if self.mode == "adapter":
            if not any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
                raise ValueError("the model has no DoRA adapter to train; call adapt(model) first, or set mode to 'reparam_optim', which needs none")
            targets, *others = target_groups(model, self.optim_target_modules, self.proj_rank or max(1, self.r // 2))
            named = others[0]["params"] if others else []
            magnitudes = [pair for pair in named if "lora_magnitude_vector" in pair[0]]
            rest = [pair for pair in named if "lora_magnitude_vector" not in pair[0]]
            made = [targets, {"params": magnitudes, "weight_decay": 0.0}, {"params": rest}]
            return [group for group in made if group["params"]]
        made = target_groups(model, self.optim_target_modules, self.rank or 1)
        made[0]["rank"] = self.rank
        for name, p in model.named_parameters():
            if self.mode == "reference" and p.requires_grad and p.ndim > 2:
                raise ValueError(f"{name} has shape {tuple(p.shape)}; mode 'reference' is for vectors and matrices only")
        return made

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        if self.mode == "adapter" or (self.mode == "reparam_optim" and len(shape) != 2):
            return super().state_numbers(shape, rank)
        rows = shape[0] if len(shape) == 2 else 1
        return super().state_numbers(shape, rank) + math.prod(shape) + 3 * rows

    def update(self, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> None:
        if knobs["mode"] != "adapter":
            self._normalised(weight, gradient, state, knobs, knobs["rank"] is not None)
            return
        weight.add_(self._answer(gradient, state, knobs, True), alpha=-step_size(state, knobs))
        decay(weight, knobs)

    def update_plain(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        if knobs["mode"] == "reference":
            self._normalised(weight, gradient, state, knobs, False)
        else:
            super().update_plain(weight, gradient, state, knobs)

    def _answer(self, gradient: Tensor, state: State, knobs: Mapping[str, Any], projected: bool) -> Tensor:
        """Adam's direction, through the projection or not."""
        torch_rule = knobs["mode"] == "reparam_optim"
        if not projected:
            return adam_direction(gradient, state, knobs, corrected_eps=torch_rule)
        projector = self.refresh(gradient, state, knobs)
        return projector.up(adam_direction(projector.down(gradient, state), state, knobs, corrected_eps=torch_rule), state).mul_(knobs["scale"])

    def _normalised(self, weight: Tensor, gradient: Tensor, state: State, knobs: Mapping[str, Any], projected: bool) -> None:
        """One step on ``g`` and ``v`` of ``W = g v / |v|``, with a norm for each row, or one for a vector."""
        ours = knobs["mode"] == "reparam_optim"
        rows, slope = (t if t.ndim == 2 else t.reshape(1, -1) for t in (weight, gradient))
        direction = state.setdefault("direction", rows.clone())
        length = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        magnitude = state.setdefault("magnitude", length.clone()) if ours else state.setdefault("magnitude", length).copy_(length)
        length = _divisor(length)
        unit = direction / length
        along = (slope * unit).sum(1, keepdim=True)
        across = magnitude / length * (slope - unit * along if ours else slope)
        prefix, size = "magnitude_", -step_size(state, knobs)
        moments = {"step": state["step"]} | {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        answers = self._answer(across, state, knobs, projected), self._answer(along, moments, knobs, False)
        state.update({prefix + key: value for key, value in moments.items() if key != "step"})
        for variable, answer in zip((direction, magnitude), answers, strict=True):
            if ours:
                decay(variable, knobs)
                variable.add_(answer, alpha=size)
            else:
                variable.add_(answer, alpha=size)
                decay(variable, knobs)
        length = _divisor(torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        weight.copy_((magnitude * (direction / length)).view_as(weight))


def _divisor(length: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    """Infinity where a row is zero or rounding noise: it has no direction, and stays zero."""
    return torch.where(length > SMALLEST_NORM, length, math.inf)

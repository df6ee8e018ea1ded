"""DCT-AdamW: Adam on the few cosine coefficients in which a gradient is largest, chosen anew at every step.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv 2505.17967. Differs from its code: both
transforms use the DCT-II basis (see :mod:`echelon.linalg.cosine`); every width has a basis of its own; moments are carried over by default; the quantiser
has all its 255 or 15 steps, and its row limits are in the dtype computed in; gradients are not overwritten.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.blockwise import dequantize_rows, quantize_rows
from echelon.linalg.checks import one_of, whole
from echelon.linalg.projection import side_of
from echelon.registry import method
from echelon.train.optimizers.base import decay
from echelon.train.optimizers.fixed_basis import FixedBasisMethod
from echelon.train.optimizers.moments import State, adam_direction, read, step_size, write


@method(
    kind="optimizer", name="dct_adamw", year=2025, arxiv="2505.17967",
    title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    summary="Adam on the largest cosine coefficients of each gradient: no SVD, indices in place of a basis, a new choice every step.",
)  # fmt: skip
@dataclass(frozen=True)
class DCTAdamW(FixedBasisMethod):
    """Decay; describe ``A = G + error`` by ``rank`` directions; keep what they miss as the next error; run AdamW on the coefficients; go back.

    When directions change, those that stay keep their moments and new ones start at zero. Late in training, when the bias correction has worn off, a new
    direction's first step is then ``(1 - beta1) / sqrt(1 - beta2)`` long (3.2 with the defaults), which ``new_square`` avoids. There is no scale as in GaLore.

    Attributes:
        update_proj_gap: steps between two choices of the directions (a choice falls on the first step and on its multiples).
        rotate_subspace: let moments follow their directions; needed where directions change at every step. Without it they keep their places.
        use_ef: error feedback: what projection left out of a gradient is added to the next one.
        q_ef: bits of the stored error, by rows: 8, 4, or 0 to store it as it is (in bfloat16 where `state_bits` is 16).
        new_square: second moment of a new direction: `zero`, or the `mean` over the directions before, per entry of the other side.
        max_shape: matrices with a side of this length or more get plain AdamW.
    """

    update_proj_gap: int = 1
    rotate_subspace: bool = True
    use_ef: bool = False
    q_ef: Literal[0, 4, 8] = 0
    new_square: Literal["zero", "mean"] = "zero"
    max_shape: int = 32000

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("update_proj_gap", self.update_proj_gap, 1)
        whole("max_shape", self.max_shape, 1)
        one_of("new_square", self.new_square, ("zero", "mean"))
        if not self.rotate_subspace and self.update_proj_gap == 1:
            raise ValueError(f"rotate_subspace is {self.rotate_subspace!r}; it must be true with update_proj_gap 1")
        if self.q_ef not in (0, 4, 8) or (self.q_ef and not self.use_ef):
            raise ValueError(f"q_ef is {self.q_ef!r}; it must be 0, or 4 or 8 with use_ef")

    def check_target(self, name: str, shape: tuple[int, ...], knobs: Mapping[str, Any]) -> None:
        if max(shape) < knobs["max_shape"]:
            super().check_target(name, shape, knobs)

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        """Of a target: two moments of its coefficients, its indices, and the error (quantised: at two bytes a number)."""
        if rank is None or max(shape) >= self.max_shape:
            return super().state_numbers(shape)
        size = shape[0] * shape[1]
        return 2 * max(shape) * rank + rank + (size * (self.q_ef or 16) // 16 if self.use_ef else 0)

    def update(self, weight: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> None:
        if max(weight.shape) >= knobs["max_shape"]:
            self.update_plain(weight, gradient, state, knobs)
            return
        decay(weight, knobs)
        if knobs["use_ef"]:
            gradient = gradient + self._error(gradient, state, knobs)
        count = int(state["step"])
        first = count == 1 or "blank" in state
        if first:  # a zero gradient (LoRA's A while B is zero) says nothing: the first other one chooses
            if gradient.any():
                state.pop("blank", None)
            else:
                state["blank"] = torch.ones((), dtype=torch.bool, device=gradient.device)
        due = first or count % knobs["update_proj_gap"] == 0
        low = self._choose_anew(gradient, state, knobs) if due else self.down(gradient, state["indices"], knobs)
        shape: tuple[int, int] = tuple(weight.shape)  # type: ignore[assignment]
        if knobs["use_ef"]:
            self._keep_error(gradient - self.up(low, state["indices"], shape, knobs), state, knobs)
        direction = adam_direction(low, state, knobs, corrected_eps=True)
        weight.add_(self.up(direction, state["indices"], shape, knobs), alpha=-step_size(state, knobs))

    def _choose_anew(self, gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> Tensor:
        """The gradient's coefficients of new directions; moments move to where their directions stand now.

        Both sets of directions come from one orthonormal basis, so that moving is a gather. A zero gradient changes no directions.
        """
        low, now = self.choose(gradient, state, knobs)
        before = state.get("indices")
        if before is None:
            state["indices"] = now
            return low
        now = state["indices"] = torch.where(low.any(), now, before)
        if knobs["rotate_subspace"]:
            dim = int(side_of(gradient.shape, "std") == "right")  # type: ignore[arg-type]
            place = torch.searchsorted(before, now).clamp_max(len(before) - 1)
            stays = (before[place] == now).unsqueeze(1 - dim)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                kept = read(state, name, low, signed)
                new = kept.mean(dim, keepdim=True) if not signed and knobs["new_square"] == "mean" else torch.zeros_like(kept[:1, :1])
                write(state, name, torch.where(stays, kept.index_select(dim, place), new), knobs["state_bits"], signed)
        return low

    def _error(self, like: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> Float[Tensor, "m n"]:
        if "error_step" in state:
            return dequantize_rows(state["error"], state["error_low"], state["error_step"], knobs["q_ef"], like.shape[1])
        return read(state, "error", like)

    def _keep_error(self, error: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> None:
        if knobs["q_ef"]:
            state["error"], state["error_low"], state["error_step"] = quantize_rows(error, knobs["q_ef"])
        else:
            write(state, "error", error, 16 if knobs["state_bits"] == 16 else 32)

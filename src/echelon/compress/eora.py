"""EoRA: of all low-rank paths beside a compressed layer, the one that gives back most of its outputs; and ACT-S, its diagonal forerunner.

Source: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", arXiv 2410.21271.
Differs from the published code: sequences count alike unless ``accumulate`` is ``decay`` (theirs forgets the first ones by the factor 1/e), pads are left out,
and eigenvalues of the second moment that are zero but for rounding are dropped instead of lifted. Factors of few bits have their values on that grid, but PEFT
stores them as floating-point numbers; the report gives both sizes.
The adapter stays beside the layer: a sum of both would be neither on a quantiser's grid nor in a pruning pattern.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from echelon import linalg
from echelon.calibrate import Moments
from echelon.compress.compensator import Compensator, uniform
from echelon.compress.linear import named_by
from echelon.compress.lorc import packed_bytes
from echelon.linalg.lowrank import Factors
from echelon.linalg.rounding import Grid, gptq
from echelon.models.targets import Targets
from echelon.registry import method


@method(
    kind="compensator", name="eora", title="EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    arxiv="2410.21271", year=2024, summary="Low-rank path that gives back most of each compressed layer's outputs, as a LoRA; training-free.",
    needs="the original model and calibration text, best of the task",
    published="LLaMA3-8B at 3 bits: +10.84 / +6.74 / +11.45 points on ARC-C / MathQA / GSM8K (abstract)",
)  # fmt: skip
@dataclass(frozen=True)
class EoRA(Compensator):
    """With H = Q Lambda Q^T the second moment of the inputs and E = W - Wc, truncate the SVD of E Q Lambda^(1/2) and project it back.

    What is left of the outputs' squared error is the sum of the dropped squared singular values; no other path of this rank leaves less.

    Attributes:
        r: the rank, at most the smaller side of every layer; or one for each of `mlp`, `attention` or ends of layer names.
        nsamples: rows of calibration text.
        seqlen: tokens a row.
        task_fraction: share of the rows that come from task text, where that is given.
        accumulate: `uniform` counts all rows alike; `decay` weighs later ones more, as the published code does.
        solver: `eigh` ignores directions that no input shows; `cholesky` needs every direction shown; `gram` takes no inverse and is the safest.
        rtol: eigenvalues up to this share of the largest count as zero, with `eigh`; by default inputs times 1.2e-7.
        sequential: take the inputs of each block behind the blocks already compensated, else from the original model.
        factor_bits: bits of the numbers in the factors: 16 (as they are), or 8, 4 or 3, rounded by GPTQ.
        target_modules: layers to take, as for compressors; by default those that compression changed.
        rank_allocation: `uniform`; or `energy`, the same number of parameters, given where they remove most error.
    """

    needs_data: ClassVar[bool] = True

    r: int | dict[str, int] = 128
    nsamples: int = 64
    seqlen: int = 2048
    task_fraction: float = 0.5
    accumulate: Literal["uniform", "decay"] = "uniform"
    solver: Literal["eigh", "cholesky", "gram"] = "eigh"
    rtol: float | None = None
    sequential: bool = True
    factor_bits: int = 16
    target_modules: Targets = None
    rank_allocation: Literal["uniform", "energy"] = "uniform"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        _check_common(self)
        for name, legal in {"accumulate": ("uniform", "decay"), "solver": ("eigh", "cholesky", "gram"), "rank_allocation": ("uniform", "energy")}.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol is {self.rtol!r}; it must be in [0, 1)")
        if self.factor_bits not in (16, 8, 4, 3):
            raise ValueError(f"factor_bits is {self.factor_bits!r}; it must be 16, 8, 4 or 3")

    @property
    def needs_spectra(self) -> bool:
        return self.rank_allocation == "energy"

    def ranks(self, shapes: Mapping[str, tuple[int, int]], spectra: Mapping[str, Float[Tensor, " k"]]) -> dict[str, int]:
        even = _ranks(self.r, shapes)
        if self.rank_allocation == "uniform":
            return even
        budget = sum(rank * sum(shapes[name]) for name, rank in even.items())
        taken = {name: shapes[name] for name in even}
        return linalg.allocate("budget", {name: spectra[name] for name in taken}, taken, budget, guard=False)

    def watch(self, rows: int) -> Callable[[int, Any], Any]:
        return Moments.of if self.accumulate == "uniform" else lambda size, device: DecayedMoment(size, device, rows)

    def norm(self, seen: Any) -> Float[Tensor, "in in"] | None:
        return seen.second_moment

    def factor(self, error: Float[Tensor, "out in"], seen: Any, rank: int) -> Factors:
        found = linalg.error_svd(error, seen.second_moment, rank, solver=self.solver, rtol=self.rtol, dtype=torch.float64)
        return linalg.balance(found) if self.solver == "gram" else found

    def quantized(self, factors: Factors, seen: Any) -> tuple[Factors, float]:
        if self.factor_bits == 16:
            return factors, 0.0
        grid, spread = Grid(self.factor_bits, symmetric=True), seen.second_moment
        down = gptq(factors.down, spread, grid, name="the factor A").dequantize()
        inner = down @ spread.to(down) @ down.T
        up = gptq(factors.up, (inner + inner.T) / 2, grid, name="the factor B").dequantize()
        return replace(factors, up=up, down=down), packed_bytes(factors, self.factor_bits)


@method(
    kind="compensator", name="act_s", title="EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    arxiv="2410.21271", year=2024, summary="Baseline of EoRA: the error's SVD with inputs weighted by their mean magnitude.",
    needs="the original model and calibration text",
)  # fmt: skip
@dataclass(frozen=True)
class ActS(Compensator):
    """Truncate the SVD of E diag(s), s the mean magnitude of each input, and take the scale back out.

    Attributes:
        r: the rank, at most the smaller side of every layer; or one for each of `mlp`, `attention` or ends of layer names.
        nsamples: rows of calibration text.
        seqlen: tokens a row.
        task_fraction: share of the rows that come from task text, where that is given.
        sequential: take the inputs of each block behind the blocks already compensated, else from the original model.
        target_modules: layers to take, as for compressors; by default those that compression changed.
    """

    needs_data: ClassVar[bool] = True

    r: int | dict[str, int] = 128
    nsamples: int = 64
    seqlen: int = 2048
    task_fraction: float = 0.5
    sequential: bool = True
    target_modules: Targets = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        _check_common(self)

    def ranks(self, shapes: Mapping[str, tuple[int, int]], spectra: Mapping[str, Float[Tensor, " k"]]) -> dict[str, int]:
        return _ranks(self.r, shapes)

    def watch(self, rows: int) -> Callable[[int, Any], Any]:
        return MeanMagnitude

    def norm(self, seen: Any) -> Float[Tensor, "in in"] | None:
        return seen.mean.square().diag()

    def factor(self, error: Float[Tensor, "out in"], seen: Any, rank: int) -> Factors:
        return linalg.weighted_svd(error, rank, right=seen.mean.square(), balance="sqrt", dtype=torch.float64)


class DecayedMoment:
    """Second moment in which row i of n counts (n / (n + 1))^(n - i): H <- H n / (n + 1) + X^T X / n for each row in its turn.

    Args:
        size: width of the inputs.
        device: where they are.
        rows: n, how many rows there will be.
    """

    def __init__(self, size: int, device: torch.device | str, rows: int):
        self.rows = rows
        self.second_moment = torch.zeros(size, size, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "rows tokens d"], mask: Bool[Tensor, "rows tokens"] | None = None) -> None:
        for place, row in enumerate(x.reshape(-1, *x.shape[-2:])):
            shown = (row if mask is None else row[mask.reshape(-1, x.shape[-2])[place]]).double()
            if not shown.isfinite().all():
                raise ValueError("activations hold NaN or infinity")
            self.second_moment = self.second_moment * (self.rows / (self.rows + 1)) + shown.T @ shown / self.rows


class MeanMagnitude:
    """Mean of ``|x|`` over all tokens."""

    def __init__(self, size: int, device: torch.device | str):
        self.n, self.sum = 0, torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, x: Float[Tensor, "*rows d"], mask: Bool[Tensor, "*rows"] | None = None) -> None:
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        if not rows.isfinite().all():
            raise ValueError("activations hold NaN or infinity")
        self.n, self.sum = self.n + len(rows), self.sum + rows.double().abs().sum(0)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        if not self.n:
            raise ValueError("there is no mean of no rows: every token was a pad")
        return self.sum / self.n


def _ranks(rank: int | dict[str, int], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    wanted = named_by(rank, shapes) if isinstance(rank, dict) else dict.fromkeys(shapes, rank)
    return {name: uniform(wanted[name], {name: shapes[name]}, "r")[name] for name in wanted}


def _check_common(knobs: EoRA | ActS) -> None:
    for value in knobs.r.values() if isinstance(knobs.r, dict) else [knobs.r]:
        if value < 1:
            raise ValueError(f"r is {value!r}; it must be at least 1")
    for name in ("nsamples", "seqlen"):
        if getattr(knobs, name) < 1:
            raise ValueError(f"{name} is {getattr(knobs, name)!r}; it must be at least 1")
    if not 0 <= knobs.task_fraction <= 1:
        raise ValueError(f"task_fraction is {knobs.task_fraction!r}; it must be in [0, 1]")

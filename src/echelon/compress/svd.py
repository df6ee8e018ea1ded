"""Truncated SVD of each linear layer, plain or weighted by the activations: the baseline that every other low-rank method has to beat.

Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936; with activations, "SVD-LLM: Truncation-aware
Singular Value Decomposition for Large Language Model Compression", arXiv 2403.07378.
Differs from SVD-LLM: the same factors are computed without a Cholesky factor or an inverse, so dead inputs do no harm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon import linalg
from echelon.calibrate import Moments
from echelon.compress.linear import Layer, LowRankCompressor
from echelon.linalg.lowrank import Factors
from echelon.models.targets import Targets
from echelon.registry import method


@method(
    kind="compressor", name="svd", title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    arxiv="2403.07378", year=2024, summary="Truncated SVD of each linear layer, plain or weighted by its activations.",
    needs="calibration text if whitened",
)  # fmt: skip
@dataclass(frozen=True)
class SVD(LowRankCompressor):
    """Replace ``W (out, in)`` by its best rank-r approximation, in the Frobenius norm or in that of its outputs on the calibration tokens.

    Attributes:
        ratio: share of the parameters of the targeted layers to keep, in (0, 1].
        rank: the same rank for every layer, in place of `ratio`.
        whiten: weigh errors by the second moment of the inputs (SVD-LLM) in place of all directions alike.
        allocation: `uniform` keeps the same share of every layer; `global` gives rank where it removes most error.
        balance: `sqrt` gives both factors the same scale, which training likes; `none` leaves all of it in the second.
        round_to: ranks are rounded down to a multiple of this.
        target_modules: layers to take: `all-linear` inside the blocks, `attention`, `mlp`, a regular expression, or a list of name ends.
        sequential: with `whiten`, take each block's statistics behind the blocks already compressed.
        nsamples: rows of calibration text.
        seqlen: tokens a row.
        strict: raise where a layer would be left dense because its rank saves nothing.
    """

    budget_knob: ClassVar[str] = "ratio"

    ratio: float = 0.8
    rank: int | None = None
    whiten: bool = False
    allocation: Literal["uniform", "global"] = "uniform"
    balance: Literal["none", "sqrt"] = "sqrt"
    round_to: int = 8
    target_modules: Targets = None
    sequential: bool = False
    nsamples: int = 128
    seqlen: int = 2048
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio!r}; it must be in (0, 1]")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; it must be at least 1")
        if self.allocation not in ("uniform", "global"):
            raise ValueError(f"allocation is {self.allocation!r}; it must be uniform or global")
        if self.balance not in ("none", "sqrt"):
            raise ValueError(f"balance is {self.balance!r}; it must be none or sqrt")
        if self.round_to < 1:
            raise ValueError(f"round_to is {self.round_to!r}; it must be at least 1")

    @property
    def uses_moments(self) -> bool:
        return self.whiten

    @property
    def uses_spectrum(self) -> bool:
        return self.allocation == "global" and self.rank is None

    def spectrum(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None) -> Float[Tensor, " k"]:
        return linalg.spectrum(weight, moments.second_moment if moments else None)

    def plan(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        shapes = {name: layer.shape for name, layer in layers.items()}
        if self.uses_spectrum:
            spectra = {name: layer.spectrum for name, layer in layers.items() if layer.spectrum is not None}
            return linalg.allocate("budget", spectra, shapes, float(self.ratio), round_to=self.round_to)
        if self.rank is not None:
            return linalg.allocate("fixed", None, shapes, self.rank, guard=False)
        # As many factors as fit into the share; a rank below one multiple stays as it is, and none is below 1.
        target = {name: max(1, math.floor(self.ratio * m * p / (m + p) + 1e-9)) for name, (m, p) in shapes.items()}
        return linalg.allocate("fixed", None, shapes, target, round_to=self.round_to, guard=False)

    def factor(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None, rank: int
    ) -> Factors:
        """Best factors of this rank: `rel_err` is relative to ``||W||``, or to the outputs where whitened."""
        if moments is None:
            return linalg.svd(weight, rank, balance=self.balance, dtype=torch.float64)
        return linalg.output_pca(weight, moments.second_moment, rank, centered=False, balance=self.balance, dtype=torch.float64)

"""LoRC: the largest singular directions of what compression took from each weight, put back beside it. No data needed.

Source: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation", arXiv 2303.08302; no code for LoRC was
published.
Differs from it: it works on any compression, not on quantisation alone. Rank 0, which would add nothing, is not allowed. Factors of 8 or 4 bits have their
values on that grid, but PEFT stores them as floating-point numbers; the report gives both sizes.
The error of a good uniform quantiser is nearly noise, of which few directions hold little: the report's ``captured`` tells what a rank is worth. With
``lorc_bits=16`` this is the plain SVD that methods with calibration have to beat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.compress.compensator import Compensator, uniform
from echelon.linalg.lowrank import Factors, svd
from echelon.linalg.rounding import Grid
from echelon.models.targets import Targets
from echelon.registry import method

_WIDE = 8192  # from here on a randomised SVD, with the many iterations that a flat spectrum takes


@method(
    kind="compensator", name="lorc", title="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
    arxiv="2303.08302", year=2023, summary="Truncated SVD of the weight error of any compressed model, as a LoRA; without data.",
    needs="the original model",
)  # fmt: skip
@dataclass(frozen=True)
class LoRC(Compensator):
    """With E = W - W^ = U S V^T, add B A for B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T.

    Attributes:
        lorc_rank: r, at most the smaller side of every layer.
        lorc_bits: bits of the numbers in A and B: 16 (as they are), 8 or 4, rounded row by row.
        target_modules: layers to take, as for compressors; by default those that compression changed.
    """

    lorc_rank: int = 8
    lorc_bits: int = 8
    target_modules: Targets = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if self.lorc_rank < 1:
            raise ValueError(f"lorc_rank is {self.lorc_rank!r}; it must be at least 1")
        if self.lorc_bits not in (16, 8, 4):
            raise ValueError(f"lorc_bits is {self.lorc_bits!r}; it must be 16, 8 or 4")

    def ranks(self, shapes: Mapping[str, tuple[int, int]], spectra: Mapping[str, Float[Tensor, " k"]]) -> dict[str, int]:
        return uniform(self.lorc_rank, shapes, "lorc_rank")

    def factor(self, error: Float[Tensor, "out in"], seen: Any, rank: int) -> Factors:
        wide = {"method": "randomized", "oversample": 32, "niter": 8} if min(error.shape) > _WIDE else {"method": "exact"}
        return svd(error, rank, balance="sqrt", dtype=torch.float64, **wide)  # type: ignore[arg-type]

    def quantized(self, factors: Factors, seen: Any) -> tuple[Factors, float]:
        if self.lorc_bits == 16:
            return factors, 0.0
        grid = Grid(self.lorc_bits, symmetric=True)
        up, down = grid.fit(factors.up), grid.fit(factors.down)
        return replace(factors, up=up.dequantize(), down=down.dequantize()), packed_bytes(factors, self.lorc_bits)


def packed_bytes(factors: Factors, bits: int) -> float:
    """Bytes of both factors in this many bits, with a 16-bit step for each row."""
    return (factors.up.numel() + factors.down.numel()) * bits / 8 + 2 * (len(factors.up) + len(factors.down))

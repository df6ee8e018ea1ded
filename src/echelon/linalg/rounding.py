"""Rounding a weight to a grid of few bits: each number by itself, or all of a row together so that the layer's output suffers least.

Sources: RTN and ZQ-Local, "ZeroQuant-V2", arXiv 2303.08302; GPTQ, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from echelon.linalg.checks import double, moment, number, whole
from echelon.linalg.quantize import Quantized, rtn

_COLUMNS = 128  # of GPTQ that are updated one by one before the rest of the matrix is


@dataclass(frozen=True)
class Grid:
    """How the levels of a matrix are laid, and in which floating-point format steps and minima are kept.

    Attributes:
        bits: of a code, 2..8.
        symmetric: about zero.
        group_size: neighbours in a row that share a step; -1 the row, 0 the matrix.
        zero_point: ``float`` or ``int``; see :func:`echelon.linalg.rtn`.
        convention: ``standard`` or ``deepspeed``.
        pad_groups: let the last group of a row be short.
        kept_in: float16 or float32. In float16 steps and minima are rounded first and the codes are fitted to what is kept.
    """

    bits: int
    symmetric: bool = False
    group_size: int = -1
    zero_point: str = "float"
    convention: str = "standard"
    pad_groups: bool = False
    kept_in: torch.dtype = torch.float32

    def fit(self, values: Float[Tensor, "out in"], name: str = "weight") -> Quantized:
        """Round each number to its nearest level.

        Raises:
            ValueError: as :func:`echelon.linalg.rtn`, and if a step or minimum does not survive in ``kept_in``.
        """
        found = rtn(
            values, self.bits, symmetric=self.symmetric, group_size=self.group_size, zero_point=self.zero_point, convention=self.convention,
            pad_groups=self.pad_groups, name=name,
        )  # fmt: skip
        if self.kept_in == torch.float32:
            return found
        kept = replace(found, scale=self._kept(found.scale, name, True), minimum=None if found.minimum is None else self._kept(found.minimum, name))
        return replace(kept, codes=self.codes(values, kept))

    def codes(self, values: Float[Tensor, "out in"], levels: Quantized) -> UInt8[Tensor, "out in"]:
        """The nearest code to each number on levels that are laid already."""
        scale, top = levels.widen(levels.scale, values.shape[-1]), 2**self.bits - 1
        if levels.minimum is not None:
            codes = ((values.double() - levels.widen(levels.minimum, values.shape[-1])) / scale).round()
        elif levels.zero is not None:
            codes = (values.double() / scale + levels.widen(levels.zero, values.shape[-1])).round()
        else:
            codes = (values.double() / scale).round() + 2 ** (self.bits - 1)
        lowest = 1 if self.symmetric and self.convention == "standard" else 0
        return codes.clamp(lowest, top).to(torch.uint8)

    def _kept(self, value: Tensor, name: str, positive: bool = False) -> Tensor:
        kept = value.to(self.kept_in).to(value.dtype)
        if not bool(kept.isfinite().all()) or (positive and not bool((kept > 0).all())):
            raise ValueError(f"{name} has steps in {float(value.min()):.3g}..{float(value.max()):.3g}, which {self.kept_in} cannot hold; use float32")
        return kept


def gptq(
    weight: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"], grid: Grid, *, damp: float = 0.01, name: str = "weight"
) -> Quantized:  # fmt: skip
    """Round column after column, and let the columns that are still free make up for each error.

    With H the second moment and U the upper Cholesky factor of (H + damp mean(diag H) I)^-1, column j is rounded and the columns behind it lose
    (w_j - q_j) U[j, j:] / U[j, j], which is the optimal response. Levels of a group are laid when its first column is reached, from the weights
    as they are then; those of whole rows or the whole matrix from the original ones.

    Args:
        weight: matrix to round.
        second_moment: H, of the layer's inputs; a sum or a mean.
        grid: where to round to.
        damp: share of the mean diagonal that is added to it, above 0.
        name: of the matrix, for error messages.

    Raises:
        ValueError: if shapes disagree, ``damp`` is out of range, or ``grid`` does not fit.
    """
    free = double(name, weight, 2).clone()
    number("damp", damp, 0, float("inf"), open_low=True, open_high=True)
    spread = moment("second_moment", second_moment, free.shape[1], free)
    width = free.shape[1]
    grid.fit(weight[:1], name)  # refuses groups that do not fit
    spread = spread + damp * spread.diagonal().mean() * torch.eye(width, dtype=spread.dtype, device=spread.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(spread))
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    size = grid.group_size if grid.group_size > 0 else _COLUMNS
    whole_levels = None if grid.group_size > 0 else grid.fit(weight, name)
    codes = torch.zeros_like(free, dtype=torch.uint8)
    parts = []
    for start in range(0, width, size):
        stop = min(start + size, width)
        block, errors = free[:, start:stop], torch.zeros_like(free[:, start:stop])
        levels = whole_levels if whole_levels is not None else replace(grid, group_size=-1).fit(block, name)
        parts.append(levels)
        for j in range(stop - start):
            column = block[:, j : j + 1]
            picked = grid.codes(column, levels)
            codes[:, start + j : start + j + 1] = picked
            rounded = replace(levels, codes=picked, group_size=min(levels.group_size, 0)).dequantize(torch.float64)
            row = upper[start + j, start + j : stop]
            errors[:, j : j + 1] = (column - rounded) / row[0]
            block[:, j:] -= errors[:, j : j + 1] * row
        free[:, stop:] -= errors @ upper[start:stop, stop:]
    if whole_levels is not None:
        return replace(whole_levels, codes=codes)

    def joined(field: str) -> Tensor | None:
        found = [getattr(part, field) for part in parts]
        return None if found[0] is None else torch.cat(found, -1)

    scale = joined("scale")
    assert scale is not None
    return Quantized(codes, scale, joined("minimum"), joined("zero"), grid.bits, grid.group_size, weight.dtype)


def learned_rounding(
    weight: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"], grid: Grid, *, steps: int = 100, name: str = "weight"
) -> Quantized:  # fmt: skip
    """Move the weight before it is rounded so that the layer's output error falls (ZQ-Local).

    The mean squared output error of rounded weights Q is trace((W - Q) H (W - Q)^T), so the second moment H stands for all calibration data.
    Its gradient passes the rounding straight through. Steps of gradient descent fall from 2 / (steps * largest eigenvalue of H) to zero: smaller
    ones than would be stable, so that few codes flip at a time. The best rounding on the way is returned, never a worse one than plain rounding.

    Args:
        weight: matrix to round.
        second_moment: H, of the layer's inputs; a sum or a mean.
        grid: where to round to.
        steps: of the descent, 0 for plain rounding.
        name: of the matrix, for error messages.

    Raises:
        ValueError: if shapes disagree, ``steps`` is negative, or ``grid`` does not fit.
    """
    target = double(name, weight, 2)
    whole("steps", steps, 0)
    spread = moment("second_moment", second_moment, target.shape[1], target)
    best, least, moving = grid.fit(weight, name), float("inf"), target.clone()
    for step in range(steps + 1):
        found = grid.fit(moving, name) if step else best
        error = found.dequantize(torch.float64) - target
        slope = error @ spread
        loss = float((slope * error).sum())
        if loss < least:
            best, least = found, loss
        if step == 0:
            rate = 2 / max(steps, 1) / float(torch.linalg.eigvalsh(spread)[-1])
        moving = moving - rate * (1 - step / (steps + 1)) * slope
    return replace(best, dtype=weight.dtype)

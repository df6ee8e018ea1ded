"""Principal components of an embedding table whose rows are used unequally often."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import double, sized, whole
from echelon.linalg.lowrank import eig_basis

_ROWS = 65536  # rows turned into float64 at once


@dataclass(frozen=True)
class TableSpread:
    """How the rows of a table lie when each counts as often as it is used.

    Attributes:
        mean: their weighted mean, or zero.
        axes: principal axes in columns, by decreasing variance.
        values: variances along them (second moments where not centred).
    """

    mean: Float[Tensor, " width"]
    axes: Float[Tensor, "width width"]
    values: Float[Tensor, " width"]

    def rank(self, energy: float) -> int:
        """The smallest rank that holds this share of the variance, in (0, 1]."""
        shares = self.values.clamp(min=0).cumsum(0) / self.values.clamp(min=0).sum()
        return min(int((shares < energy * (1 - 1e-12)).sum()) + 1, len(self.values))


def table_spread(table: Float[Tensor, "rows width"], counts: Tensor, centered: bool = True) -> TableSpread:
    """Weighted mean and axes of a table, in float64.

    Args:
        table: the embeddings.
        counts: how often each row is used, [rows]; not all zero.
        centered: about the mean; if not, about zero.

    Raises:
        ValueError: if shapes disagree, a count is negative, all are zero, or the table holds NaN.
    """
    weights = sized("counts", counts.double(), (len(table),), table)
    if float(weights.min()) < 0 or float(weights.sum()) == 0:
        raise ValueError("counts must be at least 0 and not all 0")
    shares = weights / weights.sum()
    mean = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    if centered:
        for rows, share in zip(table.split(_ROWS), shares.split(_ROWS), strict=True):
            mean += share @ double("table", rows, 2)
    spread = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=table.device)
    for rows, share in zip(table.split(_ROWS), shares.split(_ROWS), strict=True):
        part = double("table", rows, 2) - mean
        spread += part.T @ (share[:, None] * part)
    if not float(spread.abs().max()):  # all that is used is one point: any axes hold it
        return TableSpread(mean, torch.eye(len(mean), dtype=torch.float64, device=table.device), torch.zeros_like(mean))
    axes, values = eig_basis(spread)
    return TableSpread(mean, axes, values)


def table_codes(table: Float[Tensor, "rows width"], spread: TableSpread, rank: int) -> Float[Tensor, "rows rank"]:
    """Codes c = (E - mean) U, with ``c U^T + mean`` the affine rank-r reconstruction of least weighted squared error, in float64.

    The error is the sum of ``spread.values[rank:]``. Rows that are never used get a code too; how far off it is nothing bounds.

    Source: "Unified Low-rank Compression Framework for Click-through Rate Prediction", arXiv 2405.18146.

    Raises:
        ValueError: if the rank is not in 1..width.
    """
    whole("rank", rank, 1, table.shape[1])
    axes = spread.axes[:, :rank]
    return torch.cat([(rows.detach().double() - spread.mean) @ axes for rows in table.split(_ROWS)])

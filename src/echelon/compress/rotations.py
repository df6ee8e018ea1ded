"""Turning what linear layers read and write: orthogonal changes of basis, with or without leaving axes out.

A rotation is a matrix with orthonormal columns, applied on the right of row vectors; None stands for the identity.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.models.families import bias, matrix, put

Rotation = Float[Tensor, "width kept"] | None


def random_rotation(width: int, generator: torch.Generator) -> Float[Tensor, "width width"]:
    """An orthogonal matrix drawn uniformly (QR of a Gaussian one, signs fixed)."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def project(rows: Float[Tensor, "*rows width"], rotation: Rotation) -> Float[Tensor, "*rows kept"]:
    """Rows in the kept axes."""
    return rows if rotation is None else rows @ rotation.to(rows)


def back(rotation: Rotation) -> Float[Tensor, "kept width"] | None:
    """From the kept axes back to the original basis."""
    return None if rotation is None else rotation.T


def between(entering: Rotation, leaving: Rotation) -> Float[Tensor, "in out"] | None:
    """From one set of kept axes to another; None where they are the same."""
    if entering is leaving:
        return None
    if entering is None or leaving is None:
        return leaving if entering is None else entering.T
    return entering.T @ leaving


def read(readers: Sequence[nn.Module], rotation: Rotation) -> None:
    """Let linear layers read the kept axes."""
    for module in readers:
        put(module, project(matrix(module), rotation), bias(module))


def write(writer: nn.Module, rotation: Rotation) -> None:
    """Let a linear layer write the kept axes."""
    shift = bias(writer)
    put(writer, project(matrix(writer).T, rotation).T, None if shift is None else project(shift, rotation))

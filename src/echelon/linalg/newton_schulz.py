"""Orthogonalisation by products alone: all singular values are pushed towards 1.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), whose quintic is steep at zero and does not settle at 1: after five
steps, singular values above about 1% of the Frobenius norm are roughly between 0.7 and 1.2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrix: Float[Tensor, "m n"], steps: int = 5) -> Float[Tensor, "m n"]:
    """``U V^T`` of ``matrix = U S V^T``, roughly; zero for zero. Computed in bfloat16 (a float64 matrix: in float64), given back in the matrix's dtype.

    Args:
        matrix: finite.
        steps: of the iteration ``X <- a X + (b Y + c Y^2) X`` with ``Y = X X^T``.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix  # the Gram matrix is the smaller one
    x = wide / (torch.linalg.matrix_norm(wide) + 1e-7)
    x = x if matrix.dtype == torch.float64 else x.bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if tall else x).to(matrix.dtype)

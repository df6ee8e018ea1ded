"""A linear layer of the hyperboloid, a test bed for parameterisations of its inner matrix.

Source: "Fully Hyperbolic Neural Networks", arXiv 2105.14686 (HyboNet), as used in arXiv 2405.15481. No model of transformers has such layers.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon.models.modules import empty_linear


class LorentzLinear(nn.Module):
    """From points x of a hyperboloid to points ``(sqrt(|h|^2 - 1/K), h)`` of another one of the same curvature.

    ``h`` is ``inner(x)`` brought to the length ``exp(log_scale) sigmoid(gate(x))``. Layer methods find the matrix under the name ``inner``.

    Args:
        in_features: coordinates of the input, the one of time included.
        out_features: coordinates of the output, the one of time included.
        curvature: K, below 0.
        seed: of the first values, uniform within one over the root of the inputs.

    Raises:
        ValueError: if the curvature is not negative.
    """

    def __init__(self, in_features: int, out_features: int, curvature: float = -1.0, seed: int = 0):
        super().__init__()
        if not curvature < 0:
            raise ValueError(f"curvature is {curvature!r}; it must be below 0")
        self.curvature = curvature
        self.inner = empty_linear(in_features, out_features - 1, True)
        self.gate = empty_linear(in_features, 1, True)
        self.log_scale = nn.Parameter(torch.zeros(()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*self.inner.parameters(), *self.gate.parameters()):
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * in_features**-0.5)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        inner = self.inner(x)
        h = self.log_scale.exp() * self.gate(x).sigmoid() * nn.functional.normalize(inner, dim=-1)
        return torch.cat([(h.square().sum(-1, keepdim=True) - 1 / self.curvature).sqrt(), h], -1)

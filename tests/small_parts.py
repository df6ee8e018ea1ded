"""Seeded numbers and one linear layer: what several tests are made of."""

import torch
from torch import nn


def seeded(make, seed=0):
    """What a function makes when the global generator stands at a seed, which is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Toy(nn.Module):
    """One linear layer."""

    def __init__(self, rows, columns):
        super().__init__()
        self.layer = nn.Linear(columns, rows)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(noise(*p.shape, seed=0))

    def forward(self, x):
        return self.layer(x)

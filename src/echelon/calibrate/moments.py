"""First and second moments of activations, in float64, whatever the batches."""

import os
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save
from torch import Tensor

from echelon.data.files import write_whole

_ROWS = 8192  # rows turned into float64 at once


@dataclass
class Moments:
    """Count, mean and scatter of the rows seen so far.

    The scatter is taken about the mean and batches are joined by Chan, Golub and LeVeque's pairwise update, so neither a large mean nor
    the order of batches costs precision: the uncentred moment is the scatter plus a positive term, while the reverse would cancel.

    Attributes:
        n: rows.
        mean: their mean.
        scatter: sum over rows of ``(x - mean)(x - mean)^T``.
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def of(cls, size: int, device: torch.device | str = "cpu") -> "Moments":
        """Moments of no rows yet."""
        return cls(0, torch.zeros(size, dtype=torch.float64, device=device), torch.zeros(size, size, dtype=torch.float64, device=device))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*rows d"], mask: Bool[Tensor, "*rows"] | None = None) -> None:
        """Take in the rows of ``x`` where ``mask`` is true.

        Raises:
            ValueError: if one of them holds NaN or infinity.
        """
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).bool()]
        if not rows.isfinite().all():
            raise ValueError("activations hold NaN or infinity")
        for chunk in rows.split(_ROWS):
            part = chunk.double()
            if len(part):
                mean = part.mean(0)
                centred = part - mean if part is chunk else part.sub_(mean)  # wide layers: every copy counts
                self.scatter.addmm_(centred.T, centred)
                self._join(len(part), mean)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows."""
        joined = Moments(self.n, self.mean.clone(), self.scatter + other.scatter)
        if other.n:
            joined._join(other.n, other.mean)
        return joined

    def _join(self, n: int, mean: Tensor) -> None:
        """Take in the mean of rows whose scatter about it has been added."""
        total = self.n + n
        delta = mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def sum(self) -> Float[Tensor, " d"]:
        return self.n * self.mean

    @property
    def second(self) -> Float[Tensor, "d d"]:
        """Sum over rows of ``x x^T``."""
        return self.scatter + self.n * torch.outer(self.mean, self.mean)

    @property
    def second_moment(self) -> Float[Tensor, "d d"]:
        """Mean of ``x x^T``, about zero."""
        return self.second / self._some

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Mean of ``(x - mean)(x - mean)^T`` (divided by n, so that it is exact for the rows seen)."""
        return self.scatter / self._some

    @property
    def _some(self) -> int:
        if not self.n:
            raise ValueError("there are no moments of no rows: every token was a pad")
        return self.n

    def effective_rank(self, centered: bool = True) -> float:
        """``exp`` of the entropy of the normalised eigenvalues: between 1 and d."""
        values = torch.linalg.eigvalsh(self.covariance if centered else self.second_moment).clamp(min=0)
        shares = values / values.sum()
        return float(torch.special.entr(shares).sum().exp())

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"n": torch.tensor(self.n), "mean": self.mean.contiguous(), "scatter": self.scatter.contiguous()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Moments":
        return cls(int(tensors["n"]), tensors["mean"], tensors["scatter"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a safetensors file, whole or not at all."""
        write_whole(path, save(self.tensors()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Moments":
        return cls.from_tensors(load_file(path))



"""Random bases that are made from an integer seed when they are needed, and never stored.

A basis is ``count`` matrices of one shape with entries uniform in (-1, 1), divided by the root of ``count``. It is the same whatever the chunks, the device and
what else was drawn; the global random state is left alone. Used by adapters whose checkpoint is a seed and a few coefficients.

Source: "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556. Differs from its code, which reseeds the global generator and draws
on the device of the weights, so that other devices get other numbers.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import one_of, whole

_WRAPPERS = re.compile(r"^base_model\.model\.|(?<![^.])_fsdp_wrapped_module\.|(?<![^.])_orig_mod\.")
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


def seed_of(seed: int, *names: str | int) -> int:
    """A seed of 63 bits for one use: the same on every machine, and unrelated to that of any other names.

    Module names are freed of what PEFT, FSDP and torch.compile put in front of their parts, so that a wrapped model gets the seeds of the plain one.
    """
    words = [str(seed), *(_WRAPPERS.sub("", name) if isinstance(name, str) else str(name) for name in names)]
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8], "big") >> 1


def uniform(seed: int) -> float:
    """One number in [0, 1) that depends on a seed of 63 bits, as :func:`seed_of` gives them, alone."""
    return (seed >> 10) / 2**53


@dataclass(frozen=True)
class Basis:
    """``count`` random matrices of shape (rows, columns), made a chunk at a time.

    Attributes:
        seed: at least 0, below 2^63.
        count: how many.
        rows: of each.
        columns: of each.
        rng: ``torch_cpu`` draws float32 numbers from torch's generator for CPUs (mt19937) in C order, whatever the device; ``counter`` hashes the seed and the
            position of each entry in integers, on the device itself: quick on a GPU, and slower on a CPU.
        chunk: matrices that are in memory at once.
    """

    seed: int
    count: int
    rows: int
    columns: int
    rng: Literal["torch_cpu", "counter"] = "torch_cpu"
    chunk: int = 64

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is out of range."""
        whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("count", "rows", "columns", "chunk"):
            whole(name, getattr(self, name), 1)
        one_of("rng", self.rng, ("torch_cpu", "counter"))

    def chunks(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Float[Tensor, "some rows columns"]]]:
        """The matrices in order, with the places of each chunk among them."""
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.count, self.chunk):
            size = min(self.chunk, self.count - start)
            if self.rng == "torch_cpu":
                made = torch.empty(size, self.rows, self.columns).uniform_(-1, 1, generator=generator).to(device)
            else:
                made = self._hashed(start, size, device)
            yield slice(start, start + size), made.mul_(self.count**-0.5).to(dtype)

    def combine(self, coefficients: Float[Tensor, " count"]) -> Float[Tensor, "rows columns"]:
        """The sum of the matrices with these coefficients, in their dtype and on their device; differentiable, and nothing of the basis is kept for backward.

        Raises:
            ValueError: if there is not one coefficient for each matrix.
        """
        if tuple(coefficients.shape) != (self.count,):
            raise ValueError(f"coefficients have shape {tuple(coefficients.shape)}; the basis has {self.count} matrices")
        return _Combination.apply(coefficients, self)

    def project(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, " count"]:
        """Inner products (Frobenius) of a matrix with each of the basis: the gradient of the coefficients where it is the gradient of their combination."""
        found = matrix.new_empty(self.count)
        for places, part in self.chunks(matrix.device, matrix.dtype):
            found[places] = part.flatten(1) @ matrix.reshape(-1)
        return found

    def first(self) -> list[float]:
        """The first eight entries: what a checkpoint keeps to notice a generator that has changed."""
        return next(self.chunks())[1].reshape(-1)[:8].tolist()

    def _hashed(self, start: int, size: int, device: torch.device | str) -> Float[Tensor, "size rows columns"]:
        each = self.rows * self.columns
        place = torch.arange(start * each + 1, (start + size) * each + 1, device=device)
        mixed = place * _signed(_GOLDEN) + self.seed  # integers of torch wrap around, which is what splitmix64 wants
        mixed = (mixed ^ _shifted(mixed, 30)) * _signed(_FIRST)
        mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_SECOND)
        return ((_shifted(mixed ^ _shifted(mixed, 31), 40)).float() * 2.0**-23 - 1).view(size, self.rows, self.columns)


class _Combination(torch.autograd.Function):
    """The basis is made twice, once for the sum and once for its gradient."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, basis: Basis) -> Tensor:
        ctx.basis = basis
        total = coefficients.new_zeros(basis.rows * basis.columns)
        with torch.autocast(coefficients.device.type, enabled=False):  # which would round the sum, though not its gradient
            for places, part in basis.chunks(coefficients.device, coefficients.dtype):
                total += coefficients[places] @ part.flatten(1)
        return total.view(basis.rows, basis.columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.basis.project(gradients[0]), None


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills up with zeros; torch's fills up with the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)

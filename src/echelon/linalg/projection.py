"""Projecting a gradient onto a few directions, and back: the basis of GaLore and of what was built on it.

A projector keeps its basis as plain tensors in a dictionary that the caller owns, so that an optimizer's state stays one of tensors. The side that is
projected follows from the shape of the gradient alone and is never guessed from the projected one.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg import cosine
from echelon.linalg.checks import one_of, whole

Side = Literal["left", "right", "full"]
SIDES = ("std", "reverse_std", "left", "right", "full")
METHODS = ("exact", "randomized", "random", "dct")
OVERSAMPLE = 8


def side_of(shape: tuple[int, int], proj_type: str) -> Side:
    """Which side of an ``m x n`` gradient loses dimensions: ``std`` the shorter one (right on ties), ``reverse_std`` the other."""
    if proj_type in ("left", "right", "full"):
        return proj_type  # type: ignore[return-value]
    tall = shape[0] >= shape[1]
    return "right" if tall == (proj_type == "std") else "left"


@dataclass(frozen=True)
class Projector:
    """An orthonormal basis of ``rank`` directions of a gradient's rows or columns.

    Attributes:
        rank: directions kept; at most the smaller side.
        proj_type: side, see :func:`side_of`.
        method: ``exact`` SVD in float32, a ``randomized`` one (range finder with 8 extra directions, arXiv 0909.4061), ``random``
            orthonormal directions that do not look at the gradient, or ``dct``: those of the cosine basis in which the gradient is largest (arXiv 2505.17967).
        power_steps: of the randomized SVD; each sharpens the separation of the leading directions from the rest.
        deterministic: turn every direction so that its entry of largest magnitude is positive. Without it the sign is the SVD routine's.
    """

    rank: int
    proj_type: str = "std"
    method: str = "exact"
    deterministic: bool = False
    power_steps: int = 2

    def __post_init__(self) -> None:
        """Raises: ValueError: if a field is out of range."""
        whole("rank", self.rank, 1)
        whole("power_steps", self.power_steps, 0)
        one_of("proj_type", self.proj_type, SIDES)
        one_of("method", self.method, METHODS)

    def fit(self, gradient: Float[Tensor, "m n"], state: MutableMapping[str, Tensor], seed: int = 0) -> None:
        """Choose the basis anew, into ``state``: ``right`` (n, r), ``left`` (m, r), or both, in the gradient's dtype; of ``dct``, indices (r) in their place.

        An all-zero gradient says nothing: the basis stays, or becomes the first unit vectors where there is none.

        Args:
            gradient: finite.
            state: what it writes to.
            seed: of random directions.
        """
        side = side_of(gradient.shape, self.proj_type)  # type: ignore[arg-type]
        wanted = [name for name in ("left", "right") if side in (name, "full")]
        matrix = gradient.float() if gradient.dtype != torch.float64 else gradient
        if self.method == "dct":
            self._fit_cosine(matrix, wanted, state)
            return
        if not matrix.any():
            for name in wanted:
                size = gradient.shape[name == "right"]
                state.setdefault(name, torch.eye(size, min(self.rank, *gradient.shape), dtype=gradient.dtype, device=gradient.device))
            return
        found = self._bases(matrix, wanted, seed)
        for name, basis in found.items():
            if self.deterministic:
                top = basis.gather(0, basis.abs().argmax(0, keepdim=True))
                basis = basis * torch.where(top < 0, -1.0, 1.0).to(basis)
            state[name] = basis.to(gradient.dtype).contiguous()

    def _fit_cosine(self, matrix: Tensor, wanted: list[str], state: MutableMapping[str, Tensor]) -> None:
        nothing = not matrix.any()
        for name in wanted:
            size = matrix.shape[name == "right"]
            if not nothing or name not in state:
                state[name] = cosine.largest(cosine.coefficients(matrix, name), name, min(self.rank, *matrix.shape))
                state[f"{name}_size"] = torch.tensor(size)

    def _bases(self, matrix: Tensor, wanted: list[str], seed: int) -> dict[str, Tensor]:
        small = min(matrix.shape)
        rank = min(self.rank, small)
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw the same
        if self.method == "random":
            made = {}
            for name in wanted:
                size = matrix.shape[name == "right"]
                drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
                made[name] = torch.linalg.qr(drawn).Q.to(matrix)
            return made
        if self.method == "exact" or rank + OVERSAMPLE >= small:
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            found = {"left": left[:, :rank], "right": right[:rank].T}
        else:
            found = _range(matrix, rank, generator, wanted, self.power_steps)
        return {name: found[name] for name in wanted}

    def down(self, gradient: Float[Tensor, "m n"], state: MutableMapping[str, Tensor]) -> Tensor:
        """The projected gradient: ``G Q`` (m, r), ``P^T G`` (r, n), or ``P^T G Q`` (r, r)."""
        if "right" in state:
            gradient = gradient @ _directions(state, "right", gradient.dtype)
        return _directions(state, "left", gradient.dtype).T @ gradient if "left" in state else gradient

    def up(self, low: Tensor, state: MutableMapping[str, Tensor]) -> Float[Tensor, "m n"]:
        """Back to the gradient's shape."""
        if "left" in state:
            low = _directions(state, "left", low.dtype) @ low
        return low @ _directions(state, "right", low.dtype).T if "right" in state else low

    def add_up(self, weight: Float[Tensor, "m n"], low: Tensor, state: MutableMapping[str, Tensor], factor: float) -> None:
        """Add ``factor`` times :meth:`up` to a weight, in one product and without a copy of its size."""
        first: Tensor = low
        second: Tensor | None = None
        if "left" in state:
            first, second = _directions(state, "left", low.dtype), low
        if "right" in state:
            first, second = first if second is None else first @ second, _directions(state, "right", low.dtype).T
        assert second is not None
        weight.addmm_(first, second, alpha=factor)


def _directions(state: MutableMapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    kept = state[name]
    if kept.is_floating_point():
        return kept.to(dtype)
    return cosine.basis(int(state[f"{name}_size"]), dtype=dtype, device=kept.device)[:, kept]


def _range(matrix: Tensor, rank: int, generator: torch.Generator, wanted: list[str], power_steps: int) -> dict[str, Tensor]:
    """Leading singular vectors on the sides wanted, from the range of a few random combinations of the longer side's vectors."""
    tall = matrix.shape[0] >= matrix.shape[1]
    work = matrix if tall else matrix.T  # (long, short)
    start = torch.randn(work.shape[0], rank + OVERSAMPLE, generator=generator, dtype=torch.float32).to(matrix)
    rows = torch.linalg.qr(work.T @ start).Q  # (short, width)
    for _ in range(power_steps):
        rows = torch.linalg.qr(work.T @ (work @ rows)).Q
    # The spectrum within that range from the small Gram matrix; the long side is touched by one product only.
    image = work @ rows
    values, turn = torch.linalg.eigh((image.T @ image).double())
    turn = turn[:, values.argsort(descending=True)[:rank]].to(matrix)
    short_side, long_side = ("right", "left") if tall else ("left", "right")
    found = {short_side: rows @ turn}
    if long_side in wanted:
        long = torch.linalg.qr(image @ turn)
        found[long_side] = long.Q * torch.where(long.R.diagonal() < 0, -1.0, 1.0).to(matrix)
    return found


def projected_numbers(shape: tuple[int, int], rank: int, proj_type: str, method: str = "exact") -> tuple[int, tuple[int, int]]:
    """How many numbers the basis of an ``m x n`` gradient has (of ``dct``: indices), and the shape of the projected gradient."""
    (m, n), side = shape, side_of(shape, proj_type)
    rank = min(rank, m, n)
    rows, columns = (1, 1) if method == "dct" else shape
    return {"right": (columns * rank, (m, rank)), "left": (rows * rank, (rank, n)), "full": ((rows + columns) * rank, (rank, rank))}[side]

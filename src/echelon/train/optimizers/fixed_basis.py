"""What optimizers share that describe every gradient by directions of one fixed orthonormal basis, chosen anew from its coefficients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from echelon.linalg import cosine
from echelon.linalg.checks import one_of, whole
from echelon.linalg.projection import side_of
from echelon.train.optimizers.base import Group, OptimizerMethod, decay, processes, target_groups
from echelon.train.optimizers.moments import State, adam_step


@dataclass(frozen=True)
class FixedBasisMethod(OptimizerMethod):
    """Knobs of the basis and of the choice. The shorter side of a matrix is described (of a square one, its rows).

    Attributes:
        rank: directions kept of a matrix; at most its smaller side.
        proj: the basis: `dct` (cosines), `random_qr`, or `hadamard` (sides that are powers of two); matrices of one width share it. `dct3`, the transpose of
            `dct`, is what the authors' matrix product takes, for comparison with it.
        transform: how coefficients are found: `matmul`, `makhoul` (an FFT, `dct` only), or `auto`, the FFT from width 2048 on a GPU. Both give the same.
        ell_norm: norm by which directions are ranked, 1 or 2. With 2, what is left out is the least possible.
        optim_target_modules: which matrices are projected: `all-linear` (those inside the blocks), `attention`, `mlp`, a regular expression, or a list of
            names or their ends; embeddings, heads, norms and biases never are.
    """

    rank: int = 128
    proj: Literal["dct", "random_qr", "hadamard", "dct3"] = "dct"
    transform: Literal["auto", "matmul", "makhoul"] = "auto"
    ell_norm: Literal[1, 2] = 1
    optim_target_modules: str | list[str] = "all-linear"

    projects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rank", self.rank, 1)
        one_of("proj", self.proj, ("dct", "random_qr", "hadamard", "dct3"))
        one_of("transform", self.transform, cosine.TRANSFORMS)
        if self.transform == "makhoul" and self.proj != "dct":
            raise ValueError(f"transform is 'makhoul'; it must be 'auto' or 'matmul' with proj {self.proj!r}")
        if self.ell_norm not in (1, 2):
            raise ValueError(f"ell_norm is {self.ell_norm!r}; it must be 1 or 2")

    def groups(self, model: nn.Module) -> list[Group]:
        """Two groups: the target matrices, which get a ``rank``, and all other parameters that require gradients."""
        targets, *others = target_groups(model, self.optim_target_modules, rank=1)
        return [{**targets, "rank": self.rank}, *others]  # a rank that is too large is no warning here: see check_target

    def by_number(self, knobs: Mapping[str, Any]) -> bool:
        return "rank" not in knobs

    def check_target(self, name: str, shape: tuple[int, ...], knobs: Mapping[str, Any]) -> None:
        """Raises: ValueError: if the rank is above the smaller side, or the basis has no such width."""
        if knobs["rank"] > min(shape):
            raise ValueError(f"rank is {knobs['rank']}; it must be at most {min(shape)}, the smaller side of {name} {shape}")
        if knobs["proj"] == "hadamard" and not cosine.power_of_two(min(shape)):
            raise ValueError(f"proj is 'hadamard'; the smaller side of {name} {shape} must be a power of two")

    def choose(self, matrix: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> tuple[Tensor, Int[Tensor, " r"]]:
        """The coefficients, (m, r) or (r, n), of the directions in which a matrix is largest, and their indices, ascending.

        All processes get the indices of one of them: rounding on unlike devices may decide a near tie differently.
        """
        side = side_of(matrix.shape, "std")  # type: ignore[arg-type]
        found = cosine.coefficients(matrix, side, knobs["proj"], knobs["transform"], knobs["seed"])
        indices = cosine.largest(found, side, knobs["rank"], knobs["ell_norm"])
        if processes() > 1:
            dist.broadcast(indices, int(state["index"]) % processes())
        return cosine.keep(found, side, indices), indices

    def down(self, matrix: Float[Tensor, "m n"], indices: Int[Tensor, " r"], knobs: Mapping[str, Any]) -> Tensor:
        """The coefficients of directions chosen before."""
        return cosine.down(matrix, side_of(matrix.shape, "std"), indices, knobs["proj"], knobs["seed"])  # type: ignore[arg-type]

    def up(self, low: Tensor, indices: Int[Tensor, " r"], shape: tuple[int, int], knobs: Mapping[str, Any]) -> Float[Tensor, "m n"]:
        """Back from coefficients to the matrix's shape."""
        return cosine.up(low, side_of(shape, "std"), indices, min(shape), knobs["proj"], knobs["seed"])

    def update_plain(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        """AdamW as in torch: decay first, ``eps`` beside the corrected root."""
        decay(weight, knobs)
        adam_step(weight, gradient, state, knobs, corrected_eps=True)

"""Fixed orthonormal bases, first of all the cosine one: a gradient is described by the few of their directions in which it is largest.

Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv 2505.17967 (its first version is
titled "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models"). Differs from its code: the matrix product and the FFT give the same
numbers (there, one of them used the transposed basis), there is a basis for every width, and chosen directions are sorted.
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from echelon.linalg.checks import one_of, whole

BASES = ("dct", "dct3", "random_qr", "hadamard")
TRANSFORMS = ("auto", "matmul", "makhoul")
FFT_FROM = 2048  # width from which `auto` prefers the FFT on a GPU


@functools.lru_cache(maxsize=64)
def basis(size: int, kind: str = "dct", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Float[Tensor, "n n"]:
    """An orthonormal matrix whose columns are the directions; kept for every width, dtype and device, so do not change it in place.

    Args:
        size: width.
        kind: ``dct``: column k is ``sqrt(2/n) cos(pi k (2j+1) / (2n))`` (k = 0: times ``sqrt(1/2)``), so that ``x @ basis`` is the DCT-II of every row;
            ``dct3``: its transpose, which the authors' matrix product uses, for comparison only; ``random_qr``: uniformly random; ``hadamard``: Sylvester's,
            for powers of two.
        dtype: of the result; it is computed in float64.
        device: of the result.
        seed: of ``random_qr``.

    Raises:
        ValueError: if the kind is unknown, or ``hadamard`` is wanted of a width that is no power of two.
    """
    whole("size", size, 1)
    one_of("kind", kind, BASES)
    if kind == "random_qr":
        drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = torch.linalg.qr(drawn)
        made = found.Q * torch.where(found.R.diagonal() < 0, -1.0, 1.0)  # signs do not depend on the QR routine
    elif kind == "hadamard":
        if not power_of_two(size):
            raise ValueError(f"size is {size}; a hadamard basis needs a power of two")
        made = torch.ones(1, 1, dtype=torch.float64)
        while len(made) < size:
            made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), made)
        made = made / size**0.5
    else:
        frequency, place = torch.arange(size), torch.arange(size)
        turns = (frequency[None] * (2 * place[:, None] + 1)) % (4 * size)  # whole periods are taken off while the numbers are exact
        made = torch.cos(turns.double() * (torch.pi / (2 * size))) * (2 / size) ** 0.5
        made[:, 0] = size**-0.5
        made = made.T if kind == "dct3" else made
    return made.to(device=device, dtype=dtype).contiguous()


def power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def transform(
    rows: Float[Tensor, "m n"], kind: str = "dct", how: str = "auto", seed: int = 0
) -> Float[Tensor, "m n"]:  # fmt: skip
    """Every row's coefficients in a basis: ``rows @ basis``, in the dtype of the rows.

    Args:
        rows: what to describe.
        kind: of :func:`basis`.
        how: ``matmul``, ``makhoul`` (an FFT, for ``dct`` only), or ``auto``: the FFT from width 2048 on a GPU.
        seed: of a random basis.

    Raises:
        ValueError: if the FFT is wanted for another basis.
    """
    one_of("transform", how, TRANSFORMS)
    if how == "makhoul" and kind != "dct":
        raise ValueError(f"transform is 'makhoul'; it must be 'auto' or 'matmul' for the basis {kind!r}")
    size = rows.shape[-1]
    if how == "makhoul" or (how == "auto" and kind == "dct" and rows.is_cuda and size >= FFT_FROM):
        return _makhoul(rows)
    return rows @ basis(size, kind, rows.dtype, rows.device, seed)


def _makhoul(rows: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """DCT-II by one complex FFT of the same length: even places in order, then the odd ones backwards (Makhoul, IEEE TASSP 28(1), 1980)."""
    wide = rows if rows.dtype == torch.float64 else rows.float()  # there is no FFT in bfloat16
    found = torch.fft.fft(torch.cat([wide[..., ::2], wide[..., 1::2].flip(-1)], -1))
    real, imaginary = _twiddles(rows.shape[-1], wide.dtype, wide.device)
    return (found.real * real).addcmul_(found.imag, imaginary, value=-1).to(rows.dtype)


@functools.lru_cache(maxsize=64)
def _twiddles(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.arange(size, dtype=torch.float64) * (-torch.pi / (2 * size))
    factor = torch.full((size,), (2 / size) ** 0.5, dtype=torch.float64)
    factor[0] = size**-0.5
    return (factor * angle.cos()).to(device, dtype), (factor * angle.sin()).to(device, dtype)


def coefficients(matrix: Float[Tensor, "m n"], side: str, kind: str = "dct", how: str = "auto", seed: int = 0) -> Float[Tensor, "m n"]:
    """``matrix @ basis`` (side ``right``), or ``basis.T @ matrix`` (``left``)."""
    return transform(matrix, kind, how, seed) if side == "right" else transform(matrix.T, kind, how, seed).T


def largest(found: Float[Tensor, "m n"], side: str, rank: int, p: int = 1) -> Int[Tensor, " r"]:
    """Which columns (side ``right``) or rows (``left``) have the largest p-norm, ascending; of equal ones the first.

    With ``p = 2`` what is left out is at most ``1 - r/n`` of the squared norm, the least that any choice of ``r`` leaves out.

    Args:
        found: coefficients.
        side: what is chosen.
        rank: how many.
        p: 1 or 2.
    """
    if p not in (1, 2):
        raise ValueError(f"ell_norm is {p!r}; it must be 1 or 2")
    wide = found if found.dtype == torch.float64 else found.float()
    scores = torch.linalg.vector_norm(wide, p, dim=0 if side == "right" else 1)
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values


def keep(found: Float[Tensor, "m n"], side: str, indices: Int[Tensor, " r"]) -> Tensor:
    """The chosen columns (m, r) or rows (r, n)."""
    return found.index_select(1 if side == "right" else 0, indices)


def down(matrix: Float[Tensor, "m n"], side: str, indices: Int[Tensor, " r"], kind: str = "dct", seed: int = 0) -> Tensor:
    """Coefficients of the chosen directions only: (m, r), or (r, n)."""
    chosen = basis(matrix.shape[side == "right"], kind, matrix.dtype, matrix.device, seed)[:, indices]
    return matrix @ chosen if side == "right" else chosen.T @ matrix


def up(low: Tensor, side: str, indices: Int[Tensor, " r"], size: int, kind: str = "dct", seed: int = 0) -> Float[Tensor, "m n"]:
    """Back from coefficients of the chosen directions; ``size`` is the width of the basis."""
    chosen = basis(size, kind, low.dtype, low.device, seed)[:, indices]
    return low @ chosen.T if side == "right" else chosen @ low

"""One family of low-rank factorisations: W ~ up @ down, so that y = up(down(x)) + bias, with any bias on ``up``.

Without balancing, ``up`` carries no scale (its columns are orthonormal where the problem allows it) and ``down`` carries all of it.
Every function works in float64 and returns factors in ``dtype``, by default the dtype of the weight, on the weight's device.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import cast, descending_eigh, double, moment, number, one_of, sized, whole

BALANCES = ("none", "sqrt")
EXACT_LIMIT = 4096  # the smaller side up to which the SVD is exact by default


@dataclass(frozen=True)
class Factors:
    """Two factors of a weight [out, in].

    Attributes:
        up: left factor, [out, r].
        down: right factor, [r, in].
        bias_delta: what the layer's bias gains, [out], or None for nothing. A layer without bias gets one.
        report: ``tail``, the squared error in the norm that was minimised, and ``rel_err``, its root over the norm of the whole.
    """

    up: Float[Tensor, "out r"]
    down: Float[Tensor, "r in"]
    bias_delta: Float[Tensor, "out"] | None = None
    report: dict[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """The product in the dtype of the factors, multiplied in float64."""
        return (self.up.double() @ self.down.double()).to(self.up.dtype)


def balance(factors: Factors, mode: str = "sqrt") -> Factors:
    """Share the scale between the factors; the product stays.

    ``sqrt`` gives each component the same norm in both factors, which for an SVD is U sqrt(S), sqrt(S) V^T; components of norm zero stay.
    ``none`` changes nothing.

    Raises:
        ValueError: if the mode is unknown.
    """
    if one_of("balance", mode, BALANCES) == "none":
        return factors
    up, down = factors.up.double(), factors.down.double()
    left, right = up.norm(dim=0), down.norm(dim=1)
    scale = torch.where((left > 0) & (right > 0), (right / left.clamp_min(1e-300)).sqrt(), torch.ones_like(left))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return replace(factors, up=(up * scale).to(factors.up.dtype), down=(down / scale[:, None]).to(factors.down.dtype))


def svd(
    weight: Float[Tensor, "out in"], rank: int, *, method: str = "auto", oversample: int = 10, niter: int = 4, seed: int = 0,
    balance: str = "none", dtype: torch.dtype | None = None,
) -> Factors:  # fmt: skip
    """The best approximation of this rank in the Frobenius norm, exactly or by a seeded randomised range finder.

    Args:
        weight: matrix to factor.
        rank: rank of the result, 1..min(out, in).
        method: ``exact``, ``randomized`` (subspace iteration, Halko et al., arXiv 0909.4061), or ``auto``: exact up to a smaller side of 4096.
        oversample: extra random directions of the randomised method.
        niter: its power iterations.
        seed: of its random start, drawn on the CPU so that it is the same on all devices.
        balance: ``none`` (all scale in ``down``) or ``sqrt``.
        dtype: of the factors.

    Raises:
        ValueError: if the rank or another argument is out of range, or the weight is not finite.
    """
    matrix, rank = _weight_and_rank(weight, rank)
    one_of("method", method, ("auto", "exact", "randomized"))
    whole("oversample", oversample, 0)
    whole("niter", niter, 0)
    small = min(matrix.shape)
    if method == "exact" or (method == "auto" and small <= EXACT_LIMIT) or rank + oversample >= small:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        tail = float(values[rank:].square().sum())
    else:
        left, values, right = _randomized(matrix, rank + oversample, niter, seed)
        tail = max(0.0, float(matrix.square().sum() - values[:rank].square().sum()))
    down = values[:rank, None] * right[:rank]
    return _result(weight, left[:, :rank], down, None, tail, float(matrix.square().sum()), balance, dtype)


def output_pca(
    weight: Float[Tensor, "out in"], covariance: Float[Tensor, "in in"], rank: int, mean: Float[Tensor, "in"] | None = None,
    bias: Float[Tensor, "out"] | None = None, centered: bool = True, *, balance: str = "none", dtype: torch.dtype | None = None,
) -> Factors:  # fmt: skip
    """Keep the principal components of a layer's OUTPUT: the rank-r affine map nearest to y = W x + b in mean square.

    The output covariance is W Sigma W^T, so input statistics are enough. With V its leading eigenvectors, up = V, down = V^T W, and the bias
    gains (I - V V^T) W mean. The result equals the SVD whitened by the activations (centred or not, as the statistics are), without any
    inverse. ``tail`` is the sum of the dropped eigenvalues, which is the mean squared error on the calibration data. Where out > in the
    eigenproblem is solved on the input side.

    Source: "LoRD", arXiv 2309.14021; the same mathematics in arXiv 2405.18146.

    Args:
        weight: matrix to factor.
        covariance: of the inputs: about their mean when ``centered``, else their second moment E[x x^T].
        rank: rank of the result, 1..min(out, in).
        mean: of the inputs; None stands for zero. Not used unless ``centered``.
        bias: of the layer. It is only checked: the optimum keeps it whole, so it cancels from ``bias_delta``.
        centered: whether the covariance is about the mean; if not, the bias gains nothing.
        balance: ``none`` (up is orthonormal) or ``sqrt``.
        dtype: of the factors.

    Raises:
        ValueError: if shapes disagree, the rank is out of range, or the covariance is zero, not symmetric or not positive semi-definite.
    """
    matrix, rank = _weight_and_rank(weight, rank)
    spread = moment("covariance", covariance, matrix.shape[1], matrix)
    if bias is not None:
        sized("bias", bias, (matrix.shape[0],), matrix)
    basis, values = _output_basis(matrix, spread, rank)
    delta = None
    if centered and mean is not None:
        middle = matrix @ sized("mean", mean, (matrix.shape[1],), matrix)
        delta = middle - basis @ (basis.T @ middle)
    return _result(weight, basis, basis.T @ matrix, delta, float(values[rank:].sum()), float(values.sum()), balance, dtype)


def weighted_svd(
    weight: Float[Tensor, "out in"], rank: int, left: Tensor | None = None, right: Tensor | None = None, *, floor: float = 1e-8,
    balance: str = "none", dtype: torch.dtype | None = None,
) -> Factors:  # fmt: skip
    """The rank-r matrix that minimises trace(L E R E^T) of the error E = W - up down, that is ||L^(1/2) E R^(1/2)||_F^2.

    L and R are given as what errors are squared with: a vector for a diagonal (Fisher information of the rows for FWSVD, squared activation
    scales of the columns for ASVD), a symmetric positive semi-definite matrix (a second moment) otherwise, None for the identity. Roots are
    taken through eigenvalues, lifted to at least ``floor`` times the largest, so that the inverse exists.

    Args:
        weight: matrix to factor.
        rank: rank of the result, 1..min(out, in).
        left: L, [out] or [out, out].
        right: R, [in] or [in, in].
        floor: smallest eigenvalue of L and R relative to their largest, in (0, 1].
        balance: ``none`` or ``sqrt``.
        dtype: of the factors.

    Raises:
        ValueError: if shapes disagree, the rank is out of range, or a weight is zero, negative or not symmetric.
    """
    matrix, rank = _weight_and_rank(weight, rank)
    number("floor", floor, 0, 1, open_low=True)
    left_root, left_inverse = _root("left", left, matrix.shape[0], matrix, floor)
    right_root, right_inverse = _root("right", right, matrix.shape[1], matrix, floor)
    weighted = _times(right_root, _times(left_root, matrix).T).T
    basis, values, co_basis = torch.linalg.svd(weighted, full_matrices=False)
    up, down = _times(left_inverse, basis[:, :rank]), _times(right_inverse, (values[:rank, None] * co_basis[:rank]).T).T
    return _result(weight, up, down, None, float(values[rank:].square().sum()), float(values.square().sum()), balance, dtype)


def product_svd(
    up: Float[Tensor, "out inner"], down: Float[Tensor, "inner in"], rank: int, covariance: Float[Tensor, "in in"] | None = None, *,
    balance: str = "none", dtype: torch.dtype | None = None,
) -> Factors:  # fmt: skip
    """The rank-r pair nearest to the product ``up @ down`` in the norm ||. C^(1/2)||_F, without inverting C and without forming the product.

    For the value and output projections of one head pass W_o [D, h] and W_v [h, D]. For query heads that share a value head stack their
    output projections along the rows, and split the resulting ``up`` again: all heads are then fitted jointly. The new ``down`` is a
    combination of the rows of the old one.

    Source: "MoDeGPT", arXiv 2408.09632, type III. The paper divides by the singular values of C^(1/2) W_v^T; projecting on the leading
    output directions gives the same product without a division.

    Raises:
        ValueError: if shapes disagree, the rank is not in 1..min(out, inner), or the covariance is no second moment.
    """
    outer, rank = _weight_and_rank(up, rank, "up")
    inner = double("down", down, 2).to(outer.device)
    if inner.shape[0] != outer.shape[1]:
        raise ValueError(f"down has shape {tuple(inner.shape)}; its first side must be {outer.shape[1]}, the second side of up")
    middle = inner @ inner.T if covariance is None else inner @ moment("covariance", covariance, inner.shape[1], inner) @ inner.T
    basis, values = _output_basis(outer, (middle + middle.T) / 2, rank)
    return _result(up, basis, (basis.T @ outer) @ inner, None, float(values[rank:].sum()), float(values.sum()), balance, dtype)


def error_svd(
    error: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"], rank: int, *, solver: str = "eigh", rtol: float | None = None,
    split: str = "sqrt", dtype: torch.dtype | None = None,
) -> Factors:  # fmt: skip
    """The rank-r correction of a compression error E that leaves the least of trace((E - up down) H (E - up down)^T).

    With H = D D^T and E D = U S V^T: up = U_r sqrt(S_r), down = sqrt(S_r) V_r^T D^+. Solvers give the same product when H is positive
    definite. Otherwise ``eigh`` (a pseudo-inverse) is zero outside the observed inputs, while ``gram`` (no inverse at all) goes on projecting
    E there; the calibration error is the same. H may be a sum or a mean: scaling it leaves the product as it is.

    Source: "EoRA", arXiv 2410.21271.

    Args:
        error: original minus compressed weight.
        second_moment: H, of the layer's inputs.
        rank: rank of the result, 1..min(out, in).
        solver: ``eigh``, ``cholesky`` or ``gram``.
        rtol: eigenvalues of H up to this share of the largest count as zero (``eigh`` only); default in * eps of float32.
        split: ``sqrt`` as above, or ``none``: up = U_r. Use :func:`balance` on the result for equal norms.
        dtype: of the factors.

    Raises:
        ValueError: if shapes disagree, the rank is out of range, H is zero or no second moment, or not positive definite for ``cholesky``.
    """
    matrix, rank = _weight_and_rank(error, rank, "error")
    one_of("solver", solver, ("eigh", "cholesky", "gram"))
    one_of("split", split, BALANCES)
    spread = moment("second_moment", second_moment, matrix.shape[1], matrix)
    width = matrix.shape[1]
    rtol = width * torch.finfo(torch.float32).eps if rtol is None else number("rtol", rtol, 0, 1, open_high=True)
    if solver == "gram":
        basis, squares = _output_basis(matrix, spread, rank)
        values, down = squares.sqrt(), basis.T @ matrix
    elif solver == "cholesky":
        root, failed = torch.linalg.cholesky_ex(spread)
        if int(failed):
            raise ValueError("second_moment is not positive definite; solver must be eigh or gram for it, not 'cholesky'")
        basis, values, co_basis = torch.linalg.svd(matrix @ root, full_matrices=False)
        down = values[:rank, None] * torch.linalg.solve_triangular(root, co_basis[:rank], upper=False, left=False)
    else:
        lambdas, vectors = descending_eigh("second_moment", spread)
        seen = lambdas > rtol * lambdas[0]
        roots, vectors = lambdas[seen].sqrt(), vectors[:, seen]
        basis, values, co_basis = torch.linalg.svd(matrix @ (vectors * roots), full_matrices=False)
        down = values[:rank, None] * (co_basis[:rank] / roots) @ vectors.T
    total, tail = float(values.square().sum()), float(values[rank:].square().sum())
    up = _wider(basis[:, :rank], rank, 1)
    down = _wider(down, rank, 0)
    if split == "sqrt":
        # Components that the moment does not see have no scale to share.
        kept = _wider(values[:rank], rank, 0)
        scale = torch.where(kept > 1e-12 * values[0], kept, torch.ones_like(kept)).sqrt() if float(values[0]) > 0 else torch.ones_like(kept)
        up, down = up * scale, down / scale[:, None]
    return _result(error, up, down, None, tail, total, "none", dtype)


def eig_basis(covariance: Float[Tensor, "d d"], dtype: torch.dtype | None = torch.float64) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d"]]:
    """Principal axes in columns, and their eigenvalues, both by decreasing eigenvalue; each axis has its largest entry positive.

    Raises:
        ValueError: if the matrix is zero, not symmetric or not positive semi-definite.
    """
    values, vectors = descending_eigh("covariance", moment("covariance", covariance))
    dtype = covariance.dtype if dtype is None else dtype
    return vectors.to(covariance.device, dtype), values.to(covariance.device, dtype)


def spectrum(weight: Float[Tensor, "out in"], covariance: Float[Tensor, "in in"] | None = None) -> Float[Tensor, "n"]:
    """Singular values of W, or of W C^(1/2), in float64 and descending: what the rank rules work on. n = min(out, in).

    Raises:
        ValueError: if shapes disagree or the covariance is no second moment.
    """
    matrix = double("weight", weight, 2)
    if covariance is None:
        return torch.linalg.svdvals(matrix)
    return _output_basis(matrix, moment("covariance", covariance, matrix.shape[1], matrix), 0)[1].sqrt()


def _weight_and_rank(weight: Tensor, rank: int, name: str = "weight") -> tuple[Float[Tensor, "out in"], int]:
    matrix = double(name, weight, 2)
    return matrix, whole("rank", rank, 1, min(matrix.shape))


def _result(weight: Tensor, up: Tensor, down: Tensor, delta: Tensor | None, tail: float, total: float, mode: str, dtype: torch.dtype | None) -> Factors:
    report = {"tail": tail, "rel_err": math.sqrt(tail / total) if total > 0 else 0.0}
    made = balance(Factors(up, down, delta, report), mode)
    return Factors(cast(made.up, weight, dtype), cast(made.down, weight, dtype), None if delta is None else cast(delta, weight, dtype), report)


def _output_basis(
    matrix: Float[Tensor, "out in"], spread: Float[Tensor, "in in"], rank: int
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "n"]]:  # fmt: skip
    """Leading orthonormal eigenvectors of W C W^T and its min(out, in) largest eigenvalues."""
    rows, columns = matrix.shape
    if rows <= columns:
        gram = matrix @ spread @ matrix.T
        values, vectors = descending_eigh("covariance", (gram + gram.T) / 2)
        return vectors[:, :rank], values
    root, failed = torch.linalg.cholesky_ex(spread)  # many times faster than eigenvalues, but it wants them positive
    if failed:
        lambdas, axes = descending_eigh("covariance", spread)
        root = axes * lambdas.sqrt()
    half = matrix @ root  # half half^T = W C W^T
    values, vectors = descending_eigh("covariance", half.T @ half)
    # The columns of half V are orthogonal with norms sqrt(values). QR normalises them and stays orthonormal where a norm is zero.
    return torch.linalg.qr(half @ vectors[:, :rank])[0], values


def _randomized(matrix: Float[Tensor, "out in"], width: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(niter):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def _root(name: str, weight: Tensor | None, size: int, like: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Square root and its inverse: two vectors for a diagonal, two symmetric matrices otherwise."""
    if weight is None:
        return like.new_ones(size), like.new_ones(size)
    if weight.ndim == 1:
        values = sized(name, weight, (size,), like)
        if float(values.min()) < 0 or float(values.max()) == 0:
            raise ValueError(f"{name} lies in {float(values.min()):.3g}..{float(values.max()):.3g}; its values must be at least 0 and not all 0")
        roots = values.clamp_min(floor * float(values.max())).sqrt()
        return roots, 1 / roots
    values, vectors = descending_eigh(name, moment(name, weight, size, like))
    roots = values.clamp_min(floor * float(values[0])).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _times(root: Tensor, matrix: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _wider(value: Tensor, size: int, dim: int) -> Tensor:
    """Zeros behind, up to this size: ranks beyond what the moment can see."""
    missing = size - value.shape[dim]
    if missing <= 0:
        return value
    shape = list(value.shape)
    shape[dim] = missing
    return torch.cat([value, value.new_zeros(shape)], dim)

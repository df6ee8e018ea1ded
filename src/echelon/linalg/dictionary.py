"""Weights as combinations of atoms: sparse codes over small dense bases, and semi-non-negative factors."""

import math
from dataclasses import dataclass, field
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from echelon.linalg.checks import cast, double, number, one_of, whole
from echelon.linalg.lowrank import Factors

EXACT_LIMIT = 12  # atoms up to which all supports can be tried
JITTER = 1e-12  # on Gram matrices of unit atoms, so that equal atoms do no harm
DEPENDENT = 1e-7  # what is left of a unit atom that lies in the span of others


@dataclass(frozen=True)
class SparseCode:
    """A weight cut into blocks of columns, each a sparse combination of the atoms of its own basis: W_b ~ C_b D_b.

    Attributes:
        bases: atoms of each block in rows, [blocks, basis, block]; the last block is filled up with zeros where it is narrower.
        values: coefficients, [out, blocks, nnz].
        indices: the atom of each coefficient, distinct in a row: uint8 up to 256 atoms, int16 above. [out, blocks, nnz].
        in_features: columns of the weight.
        report: ``tail``, the squared error, and ``rel_err``, its root over the norm of the weight.
    """

    bases: Float[Tensor, "blocks basis block"]
    values: Float[Tensor, "out blocks nnz"]
    indices: Int[Tensor, "out blocks nnz"]
    in_features: int
    report: dict[str, float] = field(default_factory=dict)

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight that the code stands for, in the dtype of its values."""
        codes = self.values.new_zeros(*self.values.shape[:2], self.bases.shape[1], dtype=torch.float64)
        codes.scatter_(2, self.indices.long(), self.values.double())
        whole_rows = torch.einsum("obr,brc->obc", codes, self.bases.double()).flatten(1)
        return whole_rows[:, : self.in_features].to(self.values.dtype)


def sparse_code(
    weight: Float[Tensor, "out in"], basis: int, nnz: int, block: int = 64, *, iterations: int = 20, solver: str = "omp",
    start: SparseCode | None = None, hysteresis: float = 0.0, seed: int = 0, dtype: torch.dtype | None = None,
) -> SparseCode:  # fmt: skip
    """Factor blocks of columns into a dense basis and rows with exactly ``nnz`` coefficients, alternating codes and basis.

    Codes: orthogonal matching pursuit, a least-squares refit after each pick. Basis: least squares given the codes, atoms of unit norm, an
    atom that nobody uses replaced by the row that is fitted worst. A row keeps its old atoms where new ones would not be better, hence the
    error never rises. nnz = basis is a low-rank factorisation of each block, nnz = 1 vector quantisation with a scale.

    Source: "DSFormer", arXiv 2312.13211. No code was published: the schedule, the start (leading right singular vectors and random rows)
    and the replacement of atoms are ours.

    Args:
        weight: matrix to factor.
        basis: atoms of each block.
        nnz: coefficients of each row in each block, 1..basis.
        block: columns of a block, 1..in; the last may be narrower.
        iterations: updates of the basis, each followed by new codes.
        solver: ``omp``; ``topk``, the atoms with the largest coefficients in a dense fit; ``exact``, all supports, for at most 12 atoms.
        start: an earlier code with the same blocks and no more atoms and coefficients; its atoms and supports are where the search begins.
        hysteresis: share of a row's squared error that new atoms must save to replace the old ones, in [0, 1).
        seed: of the rows drawn for the start.
        dtype: of bases and values, by default that of the weight.

    Raises:
        ValueError: if an argument is out of range, or ``start`` does not fit.
    """
    matrix = double("weight", weight, 2)
    rows, columns = matrix.shape
    whole("block", block, 1, columns)
    whole("basis", basis, 1, 2**15)
    whole("nnz", nnz, 1, basis)
    whole("iterations", iterations, 0)
    number("hysteresis", hysteresis, 0, 1, open_high=True)
    if one_of("solver", solver, ("omp", "exact", "topk")) == "exact" and basis > EXACT_LIMIT:
        raise ValueError(f"basis is {basis}; it must be at most {EXACT_LIMIT} for the exact solver")
    blocks = math.ceil(columns / block)
    if start is not None:
        _check_start(start, (rows, columns), blocks, block, basis, nnz)
    generator = torch.Generator().manual_seed(seed)
    bases = matrix.new_zeros(blocks, basis, block)
    values, indices = matrix.new_zeros(rows, blocks, nnz), torch.zeros(rows, blocks, nnz, dtype=torch.long, device=matrix.device)
    tail = 0.0
    for place, part in enumerate(matrix.split(block, dim=1)):
        width = part.shape[1]
        atoms, support = None, None
        if start is not None:
            atoms = start.bases[place, :, :width].double().to(matrix.device)
            support = start.indices[:, place].long().to(matrix.device)
        atoms = _atoms(part, basis, nnz, atoms, support, generator)
        atoms, support, codes = _alternate(part, atoms, nnz, support, iterations, solver, hysteresis)
        bases[place, :, :width] = atoms
        values[:, place], indices[:, place] = codes, support
        tail += float((part - _decode(codes, support, atoms)).square().sum())
    total = float(matrix.square().sum())
    report = {"tail": tail, "rel_err": math.sqrt(tail / total) if total > 0 else 0.0}
    kind = torch.uint8 if basis <= 256 else torch.int16
    return SparseCode(cast(bases, weight, dtype), cast(values, weight, dtype), indices.to(weight.device, kind), columns, report)


def snmf(weight: Float[Tensor, "out in"], rank: int, *, num_iter: int = 10, init: str = "kmeans", seed: int = 0, dtype: torch.dtype | None = None) -> Factors:
    """Semi-non-negative factors W ~ up @ down: every entry of ``up`` is at least 0, ``down`` is free.

    ``down`` is refitted by least squares and ``up`` by multiplicative updates (Ding, Li and Jordan, 2010), neither of which raises the error.
    It is never below that of :func:`echelon.linalg.svd` at the same rank.

    Source: the `snmf` solver of Greenformers, arXiv 2108.10808.

    Args:
        weight: matrix to factor.
        rank: rank of the result, 1..min(out, in).
        num_iter: updates of ``up``.
        init: ``kmeans`` over the rows, or ``random``, positive numbers.
        seed: of the start.
        dtype: of the factors, by default that of the weight.

    Raises:
        ValueError: if an argument is out of range.
    """
    matrix = double("weight", weight, 2)
    whole("rank", rank, 1, min(matrix.shape))
    whole("num_iter", num_iter, 0)
    if one_of("init", init, ("kmeans", "random")) == "random":
        up = torch.rand(matrix.shape[0], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    else:
        from sklearn.cluster import KMeans

        labels = KMeans(rank, n_init=1, max_iter=20, random_state=seed).fit(matrix.cpu().numpy()).labels_
        up = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), rank).double() + 0.2  # 0 would stay 0 under the updates
    up = up.to(matrix.device)
    down = _fit(up, matrix)
    for _ in range(num_iter):
        cross, gram = matrix @ down.T, down @ down.T
        above = cross.clamp_min(0) + up @ (-gram).clamp_min(0)
        below = (-cross).clamp_min(0) + up @ gram.clamp_min(0)
        # The addend follows the matrix's own scale, so that W and cW have the same iterates.
        small = 1e-9 * float(below.mean()) + 1e-300
        up = up * ((above + small) / (below + small)).sqrt()
        down = _fit(up, matrix)
    tail, total = float((matrix - up @ down).square().sum()), float(matrix.square().sum())
    return Factors(cast(up, weight, dtype), cast(down, weight, dtype), None, {"tail": tail, "rel_err": math.sqrt(tail / total) if total > 0 else 0.0})


def _fit(left: Float[Tensor, "m r"], target: Float[Tensor, "m n"]) -> Float[Tensor, "r n"]:
    """Least squares, of least norm where the left side is rank deficient."""
    return torch.linalg.pinv(left) @ target


def _check_start(start: SparseCode, shape: tuple[int, int], blocks: int, block: int, basis: int, nnz: int) -> None:
    fits = start.bases.shape[0] == blocks and start.bases.shape[2] == block and (start.values.shape[0], start.in_features) == shape
    if not fits or start.bases.shape[1] > basis or start.values.shape[2] > nnz:
        raise ValueError(
            f"start has bases {tuple(start.bases.shape)} and values {tuple(start.values.shape)}; it must have {blocks} blocks of {block} columns, "
            f"{shape[0]} rows, at most {basis} atoms and at most {nnz} coefficients"
        )


def _atoms(part: Tensor, basis: int, nnz: int, begin: Tensor | None, support: Tensor | None, generator: torch.Generator) -> Float[Tensor, "basis width"]:
    """Unit atoms to begin with: the given ones and the worst-fitted rows, or leading right singular vectors and random rows."""
    if begin is None:
        _, strength, right = torch.linalg.svd(part, full_matrices=False)
        span = int((strength > 1e-12 * strength[0].clamp_min(1e-300)).sum())
        found = right[: min(span, basis if nnz == basis else basis - basis // 2)]
        order = torch.randperm(len(part), generator=generator).to(part.device)
    else:
        assert support is not None
        found = begin
        order = (part - _decode(_refit(part, _unit(begin), support), support, _unit(begin))).square().sum(1).argsort(descending=True)
    rows = part[order]
    rows = rows[rows.norm(dim=1) > 0][: basis - len(found)]
    rest = torch.randn(basis - len(found) - len(rows), part.shape[1], generator=generator, dtype=torch.float64).to(part.device)
    return _unit(torch.cat([found, rows, rest]))


def _alternate(
    part: Tensor, atoms: Tensor, nnz: int, support: Tensor | None, iterations: int, solver: str, hysteresis: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    support, codes, errors = _better(part, atoms, nnz, support, solver, hysteresis)
    for _ in range(iterations):
        updated = _update(part, atoms, support, codes, errors)
        after = _better(part, updated, nnz, support, solver, hysteresis)
        if float(after[2].sum()) > float(errors.sum()):
            break  # the ridge of the update is all that can raise the error, at convergence
        atoms, (support, codes, errors) = updated, after
    return atoms, support, codes


def _better(part: Tensor, atoms: Tensor, nnz: int, old: Tensor | None, solver: str, hysteresis: float) -> tuple[Tensor, Tensor, Tensor]:
    """Support, codes and squared error of each row: new ones, or the old support (made up to nnz) where that is as good."""
    support = _support(part, atoms, nnz, solver)
    codes = _refit(part, atoms, support)
    errors = (part - _decode(codes, support, atoms)).square().sum(1)
    if old is None:
        return support, codes, errors
    old = _pursue(part, atoms, nnz, old)
    old_codes = _refit(part, atoms, old)
    old_errors = (part - _decode(old_codes, old, atoms)).square().sum(1)
    new = errors < (1 - hysteresis) * old_errors
    return torch.where(new[:, None], support, old), torch.where(new[:, None], codes, old_codes), torch.where(new, errors, old_errors)


def _support(part: Tensor, atoms: Tensor, nnz: int, solver: str) -> Int[Tensor, "out nnz"]:
    if nnz == len(atoms):
        return torch.arange(nnz, device=part.device).expand(len(part), nnz)
    if solver == "topk":
        return (part @ torch.linalg.pinv(atoms)).abs().topk(nnz, dim=1).indices.sort(1)[0]
    if solver == "omp":
        return _pursue(part, atoms, nnz)
    best = torch.full((len(part),), math.inf, dtype=torch.float64, device=part.device)
    support = torch.zeros(len(part), nnz, dtype=torch.long, device=part.device)
    for choice in combinations(range(len(atoms)), nnz):
        own = atoms[list(choice)]
        errors = (part - part @ torch.linalg.pinv(own) @ own).square().sum(1)
        better = errors < best
        best[better] = errors[better]
        support[better] = torch.tensor(choice, device=part.device)
    return support


def _pursue(part: Tensor, atoms: Tensor, nnz: int, begin: Tensor | None = None) -> Int[Tensor, "out nnz"]:
    """Orthogonal matching pursuit of all rows at once, on unit atoms, from an empty or a given support.

    What is left of a row is kept orthogonal to its atoms by Gram-Schmidt, which spares a least-squares fit after each pick.
    """
    given = torch.zeros(len(part), 0, dtype=torch.long, device=part.device) if begin is None else begin
    if given.shape[1] == nnz:
        return given
    support = given[:, :0]
    left, directions = part, list[Tensor]()
    while support.shape[1] < nnz:
        place = support.shape[1]
        pick = given[:, place : place + 1]
        if place >= given.shape[1]:
            pick = (left @ atoms.T).abs_().scatter_(1, support, -1.0).argmax(1, keepdim=True)
        support = torch.cat([support, pick], 1)
        if place + 1 < nnz:
            new = atoms[pick[:, 0]]
            for direction in directions:
                new = new - (new * direction).sum(1, keepdim=True) * direction
            length = new.norm(dim=1, keepdim=True)
            directions.append(torch.where(length > DEPENDENT, new / length.clamp_min(DEPENDENT), 0.0))
            left = left - (left * directions[-1]).sum(1, keepdim=True) * directions[-1]
    return support


def _refit(part: Tensor, atoms: Tensor, support: Int[Tensor, "out s"]) -> Float[Tensor, "out s"]:
    """Least-squares coefficients of every row on its own atoms."""
    if support.shape[1] == len(atoms):
        return (part @ torch.linalg.pinv(atoms)).gather(1, support)
    gram, match = atoms @ atoms.T, (part @ atoms.T).gather(1, support)
    own = gram[support[:, :, None], support[:, None, :]]
    return torch.linalg.solve(own + JITTER * torch.eye(support.shape[1], dtype=own.dtype, device=own.device), match)


def _decode(codes: Tensor, support: Tensor, atoms: Tensor) -> Float[Tensor, "out width"]:
    return _spread(codes, support, len(atoms)) @ atoms


def _spread(codes: Tensor, support: Tensor, basis: int) -> Float[Tensor, "out basis"]:
    return codes.new_zeros(len(codes), basis).scatter(1, support, codes)


def _update(part: Tensor, atoms: Tensor, support: Tensor, codes: Tensor, errors: Tensor) -> Float[Tensor, "basis width"]:
    """The atoms that fit best given the codes; those without a user become the worst-fitted rows."""
    dense = _spread(codes, support, len(atoms))
    used = (dense != 0).any(0)
    new = atoms.clone()
    if bool(used.any()):
        own = dense[:, used]
        gram = own.T @ own
        ridge = 1e-10 * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        new[used] = torch.linalg.solve(gram + ridge, own.T @ part)
    idle = (~used).nonzero().flatten()
    worst = errors.argsort(descending=True)[: len(idle)]
    worst = worst[errors[worst] > 0]
    new[idle[: len(worst)]] = part[worst]
    return torch.where(new.norm(dim=1, keepdim=True) > 0, _unit(new), atoms)


def _unit(atoms: Tensor) -> Tensor:
    return atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-300)

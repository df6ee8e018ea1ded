"""Choosing columns instead of mixing them: leverage scores, Nystrom compensation, and top-k under pairing and sharing.

Source: "MoDeGPT", arXiv 2408.09632 (types I and II).
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from echelon.linalg.checks import cast, descending_eigh, double, moment, number, one_of, whole


@dataclass(frozen=True)
class Selection:
    """Kept inputs of a linear layer and the weight that makes up for the dropped ones.

    Attributes:
        indices: kept inputs, ascending, [k].
        weight: of the next layer on the kept inputs, [out, k].
        report: ``tail``, the mean squared output error under the covariance, and ``rel_err``, its root over the root of the whole.
    """

    indices: Int[Tensor, "k"]
    weight: Float[Tensor, "out k"]
    report: dict[str, float] = field(default_factory=dict)


def ridge_leverage(covariance: Float[Tensor, "d d"], ridge: float = 1e-2) -> Float[Tensor, "d"]:
    """Ridge leverage score of each unit, [C (C + lambda I)^-1]_ii in [0, 1], with lambda = ridge * mean(diag C).

    A relative ridge keeps the scores apart whatever the scale of the activations. With ridge 0 it is the diagonal of the projector on the
    range of C.

    Raises:
        ValueError: if the covariance is no second moment or the ridge is negative.
    """
    spread = moment("covariance", covariance)
    strength = number("ridge", ridge, 0, math.inf, open_high=True) * float(spread.diagonal().mean())
    if strength > 0:
        factor, failed = torch.linalg.cholesky_ex(spread + strength * torch.eye(len(spread), dtype=spread.dtype, device=spread.device))
        if not int(failed):
            return (1 - strength * torch.cholesky_inverse(factor).diagonal()).clamp(0, 1).to(covariance.device)
    values, vectors = descending_eigh("covariance", spread)
    seen = values > len(values) * torch.finfo(torch.float64).eps * values[0]
    share = torch.where(seen, values / (values + strength).clamp_min(1e-300), torch.zeros_like(values))
    return (vectors.square() @ share).clamp(0, 1).to(covariance.device)


def nystrom(
    covariance: Float[Tensor, "d d"], next_weight: Float[Tensor, "out d"], k: int, ridge: float = 1e-2, *, damp: float = 1e-6,
    indices: Int[Tensor, "k"] | None = None, dtype: torch.dtype | None = None,
) -> Selection:  # fmt: skip
    """Keep k hidden units and regress the dropped ones on them: W' = W C[:, J] (C[J, J] + delta I)^-1.

    Of all weights on the units J this has the least error tr((W - W' P_J) C (W - W' P_J)^T) when ``damp`` is 0. Keeping all units returns
    the weight unchanged.

    Args:
        covariance: second moment of the hidden units.
        next_weight: of the layer that reads them.
        k: units to keep, 1..d.
        ridge: of the leverage scores that choose them, relative to mean(diag C).
        damp: delta relative to mean(diag C[J, J]).
        indices: the units to keep, if they are chosen already; then ``k`` must be their number.
        dtype: of the weight, by default that of ``next_weight``.

    Raises:
        ValueError: if shapes disagree, k or the indices are out of range, or the covariance is no second moment.
    """
    weight = double("next_weight", next_weight, 2)
    size = weight.shape[1]
    spread = moment("covariance", covariance, size, weight)
    whole("k", k, 1, size)
    number("damp", damp, 0, math.inf, open_high=True)
    kept = select_columns(ridge_leverage(spread, ridge), k) if indices is None else _indices(indices, k, size).to(weight.device)
    if k == size:
        return Selection(kept.to(next_weight.device), cast(weight, next_weight, dtype), {"tail": 0.0, "rel_err": 0.0})
    inner = spread[kept][:, kept]
    damped = inner + damp * float(inner.diagonal().mean()) * torch.eye(k, dtype=inner.dtype, device=inner.device)
    cross = weight @ spread[:, kept]
    factor, failed = torch.linalg.cholesky_ex(damped)
    new = cross @ torch.linalg.pinv(damped, hermitian=True) if int(failed) else torch.cholesky_solve(cross.T, factor).T
    error = weight.clone()
    error[:, kept] -= new
    tail = max(0.0, float(((error @ spread) * error).sum()))
    total = float(((weight @ spread) * weight).sum())
    return Selection(kept.to(next_weight.device), cast(new, next_weight, dtype), {"tail": tail, "rel_err": math.sqrt(tail / total) if total > 0 else 0.0})


def select_columns(
    scores: Float[Tensor, "d"] | Float[Tensor, "heads d"], k: int, groups: Int[Tensor, "g size"] | None = None, share: int = 1
) -> Int[Tensor, "k"] | Int[Tensor, "sets k"]:
    """The k columns with the highest scores, ascending; of equal ones the earlier.

    Scores add up over whatever is kept together, so give squared quantities, for query and key dimensions C_q,ii * C_k,ii.

    Args:
        scores: of the columns, or of the columns of each head.
        k: columns to keep, of each head.
        groups: columns that are kept or dropped together, one group a row, all of one size and every column in exactly one group: see
            :func:`rope_pairs`. k must be a multiple of their size.
        share: consecutive heads that must keep the same columns, as the query heads of one key head; one set for each ``share`` heads returns.

    Raises:
        ValueError: if k, the groups or the sharing do not fit the scores.
    """
    table = double("scores", scores)
    if table.ndim > 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must have 1 or 2 dimensions")
    size = table.shape[-1]
    whole("k", k, 1, size)
    whole("share", share, 1)
    single = table.ndim == 1
    if single and share != 1:
        raise ValueError(f"share is {share}; it must be 1 for the scores of one head")
    table = table.reshape(-1, size)
    if len(table) % share:
        raise ValueError(f"share is {share}; it must divide the number of heads, {len(table)}")
    table = table.reshape(-1, share, size).sum(1)
    members = torch.arange(size)[:, None] if groups is None else groups.cpu().long()
    if members.ndim != 2 or not torch.equal(members.flatten().sort()[0], torch.arange(size)):
        raise ValueError(f"groups has shape {tuple(members.shape)}; it must hold each of the {size} columns exactly once, one group a row")
    together = members.shape[1]
    if k % together:
        raise ValueError(f"k is {k}; it must be a multiple of {together}, the size of a group")
    members = members.to(table.device)
    best = table[:, members].sum(-1).argsort(dim=-1, descending=True, stable=True)[:, : k // together]
    chosen = members[best].flatten(1).sort(-1)[0].to(scores.device)
    return chosen[0] if single else chosen


def rope_pairs(size: int, layout: str = "half") -> Int[Tensor, "pairs 2"]:
    """Dimensions that a rotary embedding turns together: (i, i + size/2) for ``half`` (Llama), (2i, 2i + 1) for ``interleaved`` (GPT-J).

    Where only the first dimensions are rotated, select among those and among the rest separately.

    Raises:
        ValueError: if the size is not even or the layout unknown.
    """
    if whole("size", size, 2) % 2:
        raise ValueError(f"size is {size}; it must be even")
    order = torch.arange(size)
    return order.reshape(2, -1).T.contiguous() if one_of("layout", layout, ("half", "interleaved")) == "half" else order.reshape(-1, 2)


def _indices(indices: Tensor, k: int, size: int) -> Int[Tensor, "k"]:
    found = indices.detach().long().flatten().unique()
    if len(found) != k or indices.numel() != k or int(found[0]) < 0 or int(found[-1]) >= size:
        raise ValueError(f"indices holds {indices.numel()} entries, {len(found)} of them distinct; it must hold {k} distinct ones in 0..{size - 1}")
    return found

"""Rank rules, apart from any factorisation: from shapes and spectra to a rank for each matrix."""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.linalg.checks import double, number, one_of, whole

POLICIES = ("fixed", "ratio", "break_even", "params", "energy", "threshold", "budget", "influence")
NORMALISERS = ("minmax", "quantile99")
EQUAL = 1e-6  # singular values this close, relatively, count as all equal

Shapes = Mapping[str, tuple[int, int]]
Spectra = Mapping[str, Float[Tensor, "n"]]


def break_even(out_features: int, in_features: int) -> int:
    """The rank floor(m p / (m + p)) from which two factors no longer hold clearly fewer numbers than the matrix."""
    whole("out_features", out_features, 1)
    whole("in_features", in_features, 1)
    return out_features * in_features // (out_features + in_features)


def allocate(
    policy: str, spectra: Spectra | None, shapes: Shapes, target: float | Mapping[str, float] | None = None, *, round_to: int = 1,
    min_rank: int = 1, guard: bool = True, threshold: float | None = None, criterion: str = "params", min_ratio: float = 0.5,
    normaliser: str = "minmax", influence: Mapping[str, float] | None = None, temperature: float = 0.1, max_sparsity: float = 0.8,
) -> dict[str, int]:  # fmt: skip
    """A rank for each matrix that is worth factoring; a name that is missing from the result stays dense.

    Policies, by what ``target`` means:

    - ``fixed``: the rank itself, cut to min(m, p).
    - ``ratio``: share of the full rank min(m, p), in (0, 1] (LoRD).
    - ``break_even``: share of the break-even rank, in (0, 1); the product is truncated (Greenformers).
    - ``params``: c > 1, each matrix keeps at most 1/c of its parameters (PELA).
    - ``energy``: share of the squared singular values to keep, in (0, 1].
    - ``threshold``: share of all singular values to drop, in (0, 1), by one threshold on the normalised values of all matrices (WeLore,
      arXiv 2407.11239); or give ``threshold`` itself.
    - ``budget``: parameters of all factors together, as a whole number, or as a share in (0, 1] of the dense ones. Ranks grow where one
      more parameter removes most squared error, until the next step no longer fits. A matrix that reaches its break-even becomes dense.
    - ``influence``: mean share of parameters to remove, in (0, 1), spread over matrices by :func:`block_sparsity` (MoDeGPT).

    The first five accept a mapping name -> target. A rule that yields rank 0 leaves the matrix dense.

    Args:
        policy: one of the above.
        spectra: singular values of each matrix, descending; needed by energy, threshold and budget.
        shapes: (out, in) of each matrix.
        target: see above.
        round_to: ranks are floored to a multiple of this; a rank below one multiple stays as it is.
        min_rank: no factored matrix gets a smaller rank (but at most min(m, p)).
        guard: leave a matrix dense where factors would not have fewer parameters, r (m + p) >= m p.
        threshold: normalised singular values below it are dropped, at most 1; in place of the target of ``threshold``.
        criterion: of ``threshold``: ``params`` is the guard, ``ratio`` factors a matrix iff more than ``min_ratio`` of its values are dropped.
        min_ratio: see ``criterion``, in [0, 1).
        normaliser: of ``threshold``: ``minmax``, or ``quantile99``, which a single outlier does not rule.
        influence: block influence of each matrix's block, for ``influence``.
        temperature: of the softmax over influence, above 0.
        max_sparsity: most that ``influence`` takes from one matrix, in (0, 1].

    Raises:
        ValueError: if anything is missing or out of range, or the budget does not suffice for the smallest ranks.
    """
    one_of("policy", policy, POLICIES)
    for name, shape in shapes.items():
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shapes[{name!r}] is {tuple(shape)}; it must be two whole numbers of at least 1")
    whole("round_to", round_to, 1)
    whole("min_rank", min_rank, 1)
    if not shapes:
        return {}
    values = _spectra(policy, spectra, shapes) if policy in ("energy", "threshold", "budget") else {}
    if policy == "budget":
        return _budget(values, shapes, target, round_to, min_rank, guard)
    if policy == "threshold":
        one_of("criterion", criterion, ("params", "ratio"))
        number("min_ratio", min_ratio, 0, 1, open_high=True)
        cut = reduction_threshold(values, _one(target), normaliser) if threshold is None else number("threshold", threshold, -math.inf, 1)
        raw = {name: max(1, int((normalise_spectrum(s, normaliser) >= cut).sum())) for name, s in values.items()}
        if criterion == "ratio":
            guard = False
            raw = {name: rank for name, rank in raw.items() if (len(values[name]) - rank) / len(values[name]) > min_ratio}
    elif policy == "influence":
        if influence is None or (lacking := [name for name in shapes if name not in influence]):
            raise ValueError(f"influence is {'None' if influence is None else f'missing {lacking[0]!r}'}; it must have a number for every matrix")
        shares = block_sparsity(torch.tensor([float(influence[name]) for name in shapes], dtype=torch.float64), _one(target), temperature, max_sparsity)
        raw = {name: math.floor((1 - phi) * m * p / (m + p) + 1e-9) for phi, (name, (m, p)) in zip(shares.tolist(), shapes.items(), strict=True)}
    else:
        raw = {name: _local(policy, shape, _own(target, name), values.get(name)) for name, shape in shapes.items()}
    ranks = {name: _rounded(rank, min(shapes[name]), round_to, min_rank) for name, rank in raw.items() if rank > 0}
    return {name: rank for name, rank in ranks.items() if not guard or rank * sum(shapes[name]) < math.prod(shapes[name])}


def normalise_spectrum(values: Float[Tensor, "n"], normaliser: str = "minmax") -> Float[Tensor, "n"]:
    """Singular values of one matrix mapped to [0, 1]: (s - s_min) / (s_max - s_min), where ``quantile99`` takes the 99 % quantile for s_max.

    Values that are all equal map to 1.
    """
    values = double("values", values, 1)
    low = values.min()
    high = values.max() if one_of("normaliser", normaliser, NORMALISERS) == "minmax" else torch.quantile(values, 0.99)
    if float(high - low) <= EQUAL * float(values.max().abs()):
        return torch.ones_like(values)
    return ((values - low) / (high - low)).clamp_max(1)


def reduction_threshold(spectra: Spectra, target: float, normaliser: str = "minmax") -> float:
    """The threshold k below which lies this share of all normalised singular values, or as much of it as ties allow, never more.

    It is an exact quantile of the pooled values. The paper searches a grid.

    Raises:
        ValueError: if the target is not in (0, 1) or there are no spectra.
    """
    number("target", target, 0, 1, open_low=True, open_high=True)
    if not spectra:
        raise ValueError("spectra is empty; it must hold at least one matrix")
    pooled = torch.cat([normalise_spectrum(values, normaliser).cpu() for values in spectra.values()]).sort()[0]
    return float(pooled[math.floor(target * len(pooled) + 1e-9)])


def block_sparsity(
    influence: Float[Tensor, "blocks"], mean_sparsity: float, temperature: float = 0.1, max_sparsity: float = 0.8
) -> Float[Tensor, "blocks"]:  # fmt: skip
    """The share to remove from each block: mean_sparsity * blocks * softmax(-influence / temperature), with at most ``max_sparsity`` each.

    Blocks above the cap are set to it, and what they cannot take goes to the others in proportion to their softmax weight, until it fits.
    The mean is kept exactly, and a block of less influence never loses less.

    Source: "MoDeGPT", arXiv 2408.09632; the rule for the cap is ours, the paper gives none.

    Raises:
        ValueError: if the mean exceeds the cap, or an argument is out of range.
    """
    values = double("influence", influence, 1).cpu()
    number("max_sparsity", max_sparsity, 0, 1, open_low=True)
    number("temperature", temperature, 0, math.inf, open_low=True)
    number("mean_sparsity", mean_sparsity, 0, 1, open_high=True)
    if mean_sparsity > max_sparsity:
        raise ValueError(f"mean_sparsity is {mean_sparsity}; it must be at most max_sparsity, {max_sparsity}")
    result = torch.full_like(values, max_sparsity)
    free = torch.ones(len(values), dtype=torch.bool)
    while bool(free.any()):
        left = mean_sparsity * len(values) - max_sparsity * int((~free).sum())
        # The softmax is taken over the free blocks alone: their weights may all underflow beside those of the capped ones.
        result[free] = left * torch.softmax(-values[free] / temperature, 0)
        over = free & (result > max_sparsity)
        if not bool(over.any()):
            break
        result[over] = max_sparsity
        free &= ~over
    return result.clamp(0, max_sparsity).to(influence.device)


def _local(policy: str, shape: tuple[int, int], target: float, values: Tensor | None) -> int:
    rows, columns = shape
    if policy == "fixed":
        return min(whole("target", target, 1), rows, columns)  # type: ignore[arg-type]
    if policy == "ratio":
        return math.floor(number("target", target, 0, 1, open_low=True) * min(shape) + 1e-9)
    if policy == "break_even":
        return int(break_even(rows, columns) * number("target", target, 0, 1, open_low=True, open_high=True))
    if policy == "params":
        number("target", target, 1, math.inf, open_low=True, open_high=True)
        return min(math.floor(Fraction(rows * columns) / (Fraction(target) * (rows + columns))), rows, columns)
    assert values is not None
    number("target", target, 0, 1, open_low=True)
    kept = values.square().cumsum(0)
    return max(1, int((kept < target * float(kept[-1]) * (1 - 1e-12)).sum()) + 1) if float(kept[-1]) > 0 else 1


def _rounded(rank: int, full: int, round_to: int, min_rank: int) -> int:
    return min(full, max(min_rank, rank if rank < round_to else rank - rank % round_to))


def _budget(values: Spectra, shapes: Shapes, target: object, round_to: int, min_rank: int, guard: bool) -> dict[str, int]:
    dense = sum(math.prod(shape) for shape in shapes.values())
    if isinstance(target, int) and not isinstance(target, bool):
        limit = whole("target", target, 1)
    else:
        limit = math.floor(number("target", _one(target), 0, 1, open_low=True) * dense + 1e-6)
    steps: list[tuple[float, str, int, int]] = []  # gain a parameter, matrix, rank after the step, cost
    least = 0
    for name, (rows, columns) in shapes.items():
        full, squares = len(values[name]), values[name].square()
        rank = min(_rounded(min_rank, full, 1, -(-min_rank // round_to) * round_to), full)
        paid = _cost(rank, rows, columns, guard)
        least += paid
        steps.append((math.inf, name, rank, paid))
        while rank < full:
            after = min(full, rank + round_to)
            gain = float(squares[rank:after].sum())
            if gain <= 0:
                break
            cost = _cost(after, rows, columns, guard) - paid
            steps.append((gain / ((after - rank) * (rows + columns)), name, after, cost))
            rank, paid = after, paid + cost
    if least > limit:
        raise ValueError(f"target allows {limit} parameters; it must allow at least {least}, those of the smallest ranks")
    ranks: dict[str, int] = {}
    spent = 0
    for _, name, rank, cost in sorted(steps, key=lambda step: -step[0]):  # stable: of equal gains the earlier matrix
        if spent + cost > limit:
            break
        spent += cost
        ranks[name] = rank
    return {name: ranks[name] for name, (m, p) in shapes.items() if not guard or ranks[name] * (m + p) < m * p}


def _cost(rank: int, rows: int, columns: int, guard: bool) -> int:
    return min(rank * (rows + columns), rows * columns) if guard else rank * (rows + columns)


def _spectra(policy: str, spectra: Spectra | None, shapes: Shapes) -> dict[str, Float[Tensor, "n"]]:
    if spectra is None or (lacking := [name for name in shapes if name not in spectra]):
        raise ValueError(f"spectra is {'None' if spectra is None else f'missing {lacking[0]!r}'}; policy {policy!r} needs one of every matrix")
    checked = {}
    for name, shape in shapes.items():
        values = double(f"spectra[{name!r}]", spectra[name], 1).cpu()
        if len(values) > min(shape) or float(values.min()) < 0 or bool((values.diff() > EQUAL * values.max()).any()):
            raise ValueError(f"spectra[{name!r}] has {len(values)} values; it must be descending, at least 0, and at most {min(shape)} long")
        checked[name] = values
    return checked


def _own(target: float | Mapping[str, float] | None, name: str) -> float:
    if isinstance(target, Mapping) and name not in target:
        raise ValueError(f"target is missing {name!r}; it must have a number for every matrix")
    return target[name] if isinstance(target, Mapping) else target  # type: ignore[return-value]


def _one(target: object) -> float:
    if not isinstance(target, (int, float)):
        raise ValueError(f"target is {target!r}; it must be one number for this policy")
    return target

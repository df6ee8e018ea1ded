"""Whether a difference between two systems on the same units (queries, prompts, documents) is more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.special import stdtr

DRAWS = 10_000


@dataclass(frozen=True)
class Paired:
    """A system against another one on the same units.

    Attributes:
        difference: mean difference.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
        p_t: two-sided p-value of the paired t-test.
        p_sign_flip: the same of the sign-flip test (paired randomisation).
        p_holm: ``p_sign_flip`` after Holm's correction over a family of comparisons; without one it is the same.
        wins: units on which it is better.
        ties: units on which both are the same.
        losses: units on which it is worse.
    """

    difference: float
    low: float
    high: float
    p_t: float
    p_sign_flip: float
    p_holm: float
    wins: int
    ties: int
    losses: int


def paired(one: Float[np.ndarray, " units"], other: Float[np.ndarray, " units"], *, draws: int = DRAWS, seed: int = 0) -> Paired:
    """One system's values less another's, unit by unit.

    Raises:
        ValueError: if they have no unit, or not the same ones.
    """
    if one.shape != other.shape or not one.size:
        raise ValueError(f"paired values have shapes {one.shape} and {other.shape}; both must hold the same units, at least one")
    generator = np.random.default_rng(seed)
    gaps = one - other
    low, high = np.quantile(resampled([gaps[None]], generator, draws)[0], [0.025, 0.975])
    p = sign_flip(gaps, generator, draws)
    return Paired(
        float(gaps.mean()), float(low), float(high), t_test(gaps), p, p, int((gaps > 0).sum()), int((gaps == 0).sum()), int((gaps < 0).sum())
    )  # fmt: skip


def corrected(family: Sequence[Paired]) -> list[Paired]:
    """The same comparisons with Holm's correction over all of them."""
    return [replace(one, p_holm=p) for one, p in zip(family, holm([one.p_sign_flip for one in family]), strict=True)]


def t_test(gaps: Float[np.ndarray, " units"]) -> float:
    """Two-sided p-value of the paired t-test; 1 where all differences are 0 or there is only one, 0 where all are the same other number."""
    if len(gaps) < 2 or not gaps.any():
        return 1.0
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    return float(2 * stdtr(len(gaps) - 1, -abs(gaps.mean()) / error)) if error > 0 else 0.0


def sign_flip(gaps: Float[np.ndarray, " units"], generator: np.random.Generator, draws: int = DRAWS) -> float:
    """Two-sided p-value of a mean of 0 when every difference could as well have had the other sign; exact for up to 12 units."""
    observed = abs(gaps.sum()) * (1 - 1e-12)
    if len(gaps) <= 12:
        every = 1 - 2 * ((np.arange(2 ** len(gaps))[:, None] >> np.arange(len(gaps))) & 1)
        return float((np.abs(every @ gaps) >= observed).mean())
    count = 0
    for start in range(0, draws, 2000):
        signs = generator.integers(0, 2, (min(2000, draws - start), len(gaps)), dtype=np.int8) * 2.0 - 1
        count += int((np.abs(signs @ gaps) >= observed).sum())
    return (count + 1) / (draws + 1)


def resampled(arrays: Sequence[Float[np.ndarray, "seeds units"]], generator: np.random.Generator, draws: int) -> list[np.ndarray]:
    """Bootstrap means of each (seeds, units) array: the same units in all, and, where there are several seeds, one drawn for each unit.

    Draws are moved away from the mean by sqrt(n / (n - 1)), by which a bootstrap of n units is too narrow.
    """
    units = arrays[0].shape[1]
    wider = (units / max(1, units - 1)) ** 0.5
    made: list[list[np.ndarray]] = [[] for _ in arrays]
    for start in range(0, draws, 1000):
        count = min(1000, draws - start)
        chosen = generator.integers(0, units, (count, units))
        seeds = generator.random((count, units))
        for means, array in zip(made, arrays, strict=True):
            means.append(array[(seeds * len(array)).astype(int), chosen].mean(1))
    return [array.mean() + wider * (np.concatenate(means) - array.mean()) for means, array in zip(made, arrays, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction."""
    made = [1.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        made[place] = highest
    return made

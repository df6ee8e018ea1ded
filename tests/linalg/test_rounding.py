"""GPTQ against its textbook form, learned rounding, and levels kept in half precision."""

import itertools

import pytest
import torch

from echelon.linalg import Grid, gptq, learned_rounding, pack, rtn, unpack

GRIDS = [Grid(3), Grid(4, symmetric=True), Grid(3, group_size=8), Grid(4, zero_point="int", group_size=8), Grid(3, group_size=0)]


def problem(m=12, n=24, seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(m, n, generator=generator), x.T @ x / tokens, x


def loss(weight, found, x):
    return float((x @ (weight.double() - found.dequantize(torch.float64)).T).square().sum(1).mean())


def textbook(weight, spread, bits, damp):
    """Optimal brain quantisation in fixed order: the inverse is recomputed for the columns still free, without any Cholesky factor."""
    w, n = weight.double().clone(), weight.shape[1]
    spread = spread + damp * spread.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    low, high = w.amin(1), w.amax(1)
    low = low.float().double()
    step = ((high - low) / (2**bits - 1)).float().double()
    out = torch.empty_like(w)
    for j in range(n):
        inverse = torch.linalg.inv(spread[j:, j:])
        out[:, j] = ((w[:, j] - low) / step).round().clamp(0, 2**bits - 1) * step + low
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_optimal_brain_quantisation_in_fixed_order(bits):
    weight, spread, _ = problem(seed=bits)
    found = gptq(weight, spread, Grid(bits), damp=0.02).dequantize(torch.float64)
    torch.testing.assert_close(found, textbook(weight, spread, bits, 0.02), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_and_learned_rounding_lose_less_of_the_output_than_rounding_to_nearest(grid):
    weight, spread, x = problem()
    nearest = loss(weight, grid.fit(weight), x)
    assert loss(weight, gptq(weight, spread, grid), x) < 0.8 * nearest
    assert loss(weight, learned_rounding(weight, spread, grid), x) < 0.95 * nearest


def test_with_uncorrelated_inputs_nothing_can_be_made_up_for():
    weight, eye = problem()[0], torch.eye(24, dtype=torch.float64)
    for grid in GRIDS:
        expected = grid.fit(weight).dequantize()
        torch.testing.assert_close(gptq(weight, eye, grid).dequantize(), expected)
    for grid in (Grid(3), Grid(3, group_size=8)):
        # Plain rounding is the best on its own levels; moving the levels may only help.
        found = learned_rounding(weight, eye, grid)
        assert float((weight - found.dequantize()).square().sum()) <= float((weight - grid.fit(weight).dequantize()).square().sum()) * (1 + 1e-6)


def test_learned_rounding_comes_near_the_best_of_all_roundings_of_a_small_row():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    weight, spread = torch.randn(1, 6, generator=generator), x.T @ x / 50
    levels = rtn(weight, 2)
    values = [float(levels.minimum) + float(levels.scale) * code for code in range(4)]
    best = min(float((x @ (weight.double() - torch.tensor([codes], dtype=torch.float64)).T).square().mean()) for codes in itertools.product(values, repeat=6))
    found = loss(weight, learned_rounding(weight, spread, Grid(2), steps=300), x)
    assert found <= loss(weight, levels, x) and found < 4 * best


def test_no_steps_are_plain_rounding():
    weight, spread, _ = problem()
    assert torch.equal(learned_rounding(weight, spread, Grid(3), steps=0).codes, Grid(3).fit(weight).codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("knobs", [{}, {"symmetric": True}, {"zero_point": "int"}, {"group_size": 8}])
def test_levels_in_half_precision_are_half_precision_and_the_codes_are_nearest_on_them(bits, knobs):
    weight = problem(seed=bits)[0]
    found = Grid(bits, kept_in=torch.float16, **knobs).fit(weight)
    for kept in (found.scale, found.minimum):
        assert kept is None or torch.equal(kept.half().float(), kept)
    step = found.widen(found.scale)
    assert bool(((weight - found.dequantize(torch.float64)).abs() <= step * (0.5 + 1e-6)).all())
    again = Grid(bits, kept_in=torch.float16, **knobs).fit(found.dequantize())
    torch.testing.assert_close(again.dequantize(), found.dequantize(), rtol=1e-6, atol=1e-7)


def test_steps_that_half_precision_cannot_hold_are_an_error():
    with pytest.raises(ValueError, match="q_proj has steps in .* cannot hold; use float32"):
        Grid(4, kept_in=torch.float16).fit(problem()[0] * 1e-9, "q_proj")
    with pytest.raises(ValueError, match="cannot hold"):
        Grid(4, kept_in=torch.float16).fit(problem()[0] * 1e7)


def test_groups_that_do_not_fit_and_bad_moments_are_errors():
    weight, spread, _ = problem()
    with pytest.raises(ValueError, match="group_size is 16; it must divide 24"):
        gptq(weight, spread, Grid(4, group_size=16))
    padded = gptq(weight, spread, Grid(4, group_size=16, pad_groups=True))
    assert padded.scale.shape == (12, 2) and padded.dequantize().shape == weight.shape
    with pytest.raises(ValueError, match="second_moment is zero"):
        gptq(weight, torch.zeros_like(spread), Grid(4))
    with pytest.raises(ValueError, match="damp is 0"):
        gptq(weight, spread, Grid(4), damp=0)
    with pytest.raises(ValueError, match="steps is -1"):
        learned_rounding(weight, spread, Grid(4), steps=-1)


@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_single_bits_are_packed_lowest_first(length):
    bits = torch.randint(0, 2, (3, length), generator=torch.Generator().manual_seed(length)).to(torch.uint8)
    packed = pack(bits, 1)
    assert packed.shape == (3, -(-length // 8)) and torch.equal(unpack(packed, 1, length), bits)
    assert packed[0, 0] == sum(int(bit) << place for place, bit in enumerate(bits[0, :8]))

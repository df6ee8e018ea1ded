"""Block-wise eight-bit numbers: levels, errors and shapes."""

import pytest
import torch

from echelon.linalg.blockwise import BLOCK, dequantize, levels, quantize


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_different_levels_up_to_1(signed):
    table = levels(signed)
    assert len(table.unique()) == 256 and table.max() == 1 and 0 in table
    assert table.min() >= (-1 if signed else 0)
    assert torch.equal(table, table.sort().values)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_every_number_becomes_the_nearest_level_of_its_block(signed, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, size)
    values = values if signed else values.abs()
    codes, scale = quantize(values, signed)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape and len(scale) == -(-size // BLOCK)
    for place in range(0, size, 37):
        block = values[place // BLOCK * BLOCK : (place // BLOCK + 1) * BLOCK]
        nearest = min((levels(signed) * block.abs().max()).tolist(), key=lambda level: abs(level - values[place].item()))
        assert dequantize(codes, scale, signed)[place].item() == pytest.approx(nearest, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_beside_every_midpoint_between_levels_fall_on_their_own_side(signed):
    table = levels(signed)
    middle = (table[1:] + table[:-1]) / 2
    unit = torch.cat([middle, *(middle.nextafter(torch.tensor(side)) for side in (-2.0, 2.0)), table, torch.tensor([-0.0, 1e-40])])
    values = torch.nn.functional.pad(unit.view(-1, 1), (0, BLOCK - 1), value=1.0)  # blocks whose scale is 1
    codes, _ = quantize(values, signed)
    assert torch.equal(codes[:, 0].long(), torch.searchsorted(middle, unit))


def test_zeros_and_the_largest_of_a_block_are_exact():
    values = torch.zeros(3, 200)
    values[1, 5], values[2, 150] = -3.5, 7.25
    codes, scale = quantize(values)
    back = dequantize(codes, scale)
    assert back.shape == values.shape
    assert back[2, 150] == 7.25 and (back[values == 0] == 0).all()


def test_large_magnitudes_lose_at_most_a_sixteenth_and_small_ones_are_kept_for_five_decades():
    values = torch.logspace(-5, 0, 256)
    back = dequantize(*quantize(values))
    assert ((back - values).abs() / values)[values > 0.1].max() < 1 / 16
    assert ((back - values).abs() / values)[values < 0.1].max() < 0.75

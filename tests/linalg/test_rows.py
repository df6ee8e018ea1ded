"""Numbers stored in four or eight bits by rows."""

import pytest
import torch

from echelon.linalg.blockwise import dequantize_rows, quantize_rows


def back(values, bits):
    return dequantize_rows(*quantize_rows(values, bits), bits, values.shape[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 37, 256])
def test_every_number_is_off_by_at_most_half_a_step_of_its_row_and_stays_in_its_place(bits, length):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(11, length, generator=generator, dtype=torch.float64) * torch.logspace(-5, 3, 11, dtype=torch.float64)[:, None] + 0.3
    half = (values.amax(1) - values.amin(1)) / (2**bits - 1) / 2
    assert ((back(values, bits) - values).abs().amax(1) <= half * (1 + 1e-9)).all()
    single = back(values.float(), bits)
    assert single.dtype == torch.float32 and ((single - values).abs().amax(1) <= half * (1 + 1e-5) + 1e-6 * values.abs().amax(1)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_all_levels_are_used(bits):
    values = torch.linspace(-1, 1, 2**bits)[None].repeat(2, 1)
    torch.testing.assert_close(back(values, bits), values, rtol=0, atol=1e-6)
    assert len(back(torch.linspace(-1, 1, 5000)[None], bits).unique()) == 2**bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e30, 1e-40])
def test_constant_rows_are_exact(bits, value):
    values = torch.full((3, 9), value)
    values[1] = 5.0
    assert torch.equal(back(values, bits), values)


def test_four_bits_take_half_a_byte_each_and_eight_a_whole_one():
    values = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    assert [tuple(quantize_rows(values, bits)[0].shape) for bits in (4, 8)] == [(5, 17), (5, 33)]
    assert all(part.shape == (5, 1) for part in quantize_rows(values, 8)[1:])

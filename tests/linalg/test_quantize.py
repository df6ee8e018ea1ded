"""Quantisers against their formulas in numpy, error bounds, idempotence, and packed bytes against arithmetic on whole numbers."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from echelon.linalg import pack, quantize_activations, rtn, unpack

MODES = {
    "symmetric": {"symmetric": True},
    "float zero": {"symmetric": False},
    "int zero": {"symmetric": False, "zero_point": "int"},
}
BITS = [2, 3, 4, 5, 8]
# Values of comparable size: a range of which float32 still resolves every level.
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=st.integers(-999, 999).map(lambda i: np.float32(i / 7)))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_formula(w, bits, mode, group):
    """The textbook quantiser of one group after another."""
    out, half, levels = w.astype(np.float64).copy(), 2 ** (bits - 1) - 1, 2**bits - 1
    for row in out:
        for begin in range(0, len(row), group):
            g = row[begin : begin + group]
            if mode == "symmetric":
                s = np.abs(g).max() / half
                g[:] = np.clip(np.round(g / s), -half, half) * s
            elif mode == "float zero":
                s, low = (g.max() - g.min()) / levels, g.min()
                g[:] = np.clip(np.round((g - low) / s), 0, levels) * s + low
            else:
                low, high = min(g.min(), 0), max(g.max(), 0)
                s = (high - low) / levels
                z = np.round(-low / s)
                g[:] = (np.clip(np.round(g / s) + z, 0, levels) - z) * s
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [-1, 16, 1000])
def test_values_are_those_of_the_formula(mode, bits, group):
    w = drawn(12, 64, seed=bits)
    made = rtn(w, bits, group_size=group, pad_groups=group == 1000, **MODES[mode])
    expected = by_formula(w.numpy(), bits, mode, 64 if group in (-1, 1000) else group)
    np.testing.assert_allclose(made.dequantize(torch.float64), expected, rtol=1e-6, atol=1e-6)
    assert made.codes.dtype == torch.uint8 and int(made.codes.max()) <= 2**bits - 1
    assert made.scale.shape == (12, 4 if group == 16 else 1) and made.scale.dtype == torch.float32
    assert made.dequantize().dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_one_step_for_the_whole_tensor(mode):
    w = drawn(5, 9)
    made = rtn(w, 4, group_size=0, **MODES[mode])
    expected = by_formula(w.reshape(1, -1).numpy(), 4, mode, 45).reshape(5, 9)
    np.testing.assert_allclose(made.dequantize(), expected, atol=1e-6)
    assert made.scale.shape == (1, 1)


@settings(deadline=None, max_examples=150)
@given(rows, st.sampled_from(list(MODES)), st.sampled_from(BITS), st.sampled_from([-1, 0, 1, 4]), st.sampled_from([torch.float32, torch.float64]))
def test_errors_are_within_half_a_step_and_a_second_pass_changes_nothing(w, mode, bits, group, dtype):
    w = torch.from_numpy(w).to(dtype)
    made = rtn(w, bits, group_size=group, pad_groups=True, **MODES[mode])
    once = made.dequantize()
    step = made.scale.double()
    step = step if group <= 0 else step.repeat_interleave(group, -1)[:, : w.shape[1]]
    bound = step / 2 * (1 + 1e-5) + 1e-6 * w.double().abs()
    assert ((w.double() - once.double()).abs() <= bound).all()
    twice = rtn(once, bits, group_size=group, pad_groups=True, **MODES[mode]).dequantize()
    assert torch.equal(once, twice)
    if mode != "float zero":
        assert (once[w == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_a_second_pass_changes_nothing_in_many_random_and_many_tied_groups(dtype, offset, mode, bits):
    smooth = drawn(3000, 12, seed=bits) * torch.linspace(1e-3, 1, 3000)[:, None] + offset
    tied = torch.randint(-9, 10, (3000, 12), generator=torch.Generator().manual_seed(bits)) + offset
    for w in (smooth.to(dtype), tied[:, :4].to(dtype), tied.to(dtype) / 3):
        once = rtn(w, bits, **MODES[mode]).dequantize()
        assert torch.equal(rtn(once, bits, **MODES[mode]).dequantize(), once)


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(1, 9), st.sampled_from(list(MODES)), st.sampled_from(BITS), st.sampled_from([-1, 0, 1]))
def test_constant_groups_are_exact(value, length, mode, bits, group):
    w = torch.full((2, length), value, dtype=torch.float32)
    assert torch.equal(rtn(w, bits, group_size=group, **MODES[mode]).dequantize(), w)


def test_asymmetric_steps_are_finer_for_one_sided_data_and_small_groups_are_finer_than_large_ones():
    w = drawn(40, 128).abs()
    fine, coarse = rtn(w, 4, group_size=32), rtn(w, 4, group_size=32, symmetric=True)
    error = [(w - made.dequantize()).abs().unflatten(1, (-1, 32)).amax(-1) for made in (fine, coarse)]
    assert (fine.scale < coarse.scale).all() and (error[0] <= error[1]).all()
    for mode in MODES.values():
        sizes = [rtn(w, 4, group_size=size, **mode) for size in (16, 32, 128)]
        for small, large in pairwise(sizes):
            ratio = large.group_size // small.group_size
            assert (small.scale <= large.scale.repeat_interleave(ratio, 1) * (1 + 1e-6)).all()
        errors = [float((w - made.dequantize()).abs().max()) for made in sizes]
        assert errors[0] <= errors[1] <= errors[2]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_deepspeed_convention_clips_the_largest_value(bits):
    w = drawn(6, 32).double()
    symmetric = rtn(w, bits, symmetric=True, convention="deepspeed")
    s = w.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    expected = (w / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s
    torch.testing.assert_close(symmetric.dequantize(), expected, rtol=1e-6, atol=1e-6)
    s = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 2**bits
    zero = (w.amin(1, keepdim=True) / s).round() * s
    expected = ((w - zero) / s).round().clamp(0, 2**bits - 1) * s + zero
    torch.testing.assert_close(rtn(w, bits, convention="deepspeed").dequantize(), expected, rtol=1e-6, atol=1e-6)
    positive = torch.tensor([[0.5, 1.0]])
    assert float(rtn(positive, 4, symmetric=True, convention="deepspeed").dequantize()[0, 1]) == 7 / 8
    assert float(rtn(positive, 4, symmetric=True).dequantize()[0, 1]) == 1
    assert torch.equal(rtn(torch.full((1, 3), 0.7), 4, convention="deepspeed").dequantize(), torch.full((1, 3), 0.7))


def test_a_short_last_group_has_its_own_range():
    w = torch.cat([drawn(3, 8), 100 + drawn(3, 3)], 1)
    made = rtn(w, 4, group_size=8, pad_groups=True)
    assert made.codes.shape == (3, 11) and made.scale.shape == (3, 2)
    torch.testing.assert_close(made.dequantize()[:, 8:], rtn(w[:, 8:], 4).dequantize())
    torch.testing.assert_close(made.dequantize()[:, :8], rtn(w[:, :8], 4).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_token_activations_do_not_depend_on_the_batch(dtype, granularity, symmetric):
    x = drawn(2, 5, 24).to(dtype)
    x[0, 1] = 0
    made = quantize_activations(x, 8, granularity=granularity, symmetric=symmetric, group_size=8)
    assert made.dtype == dtype and made.shape == x.shape
    assert not made[0, 1].any()
    alone = quantize_activations(x[1:, 2:3], 8, granularity=granularity, symmetric=symmetric, group_size=8)
    assert torch.equal(made[1:, 2:3], alone)
    padded = torch.cat([x, 1000 * torch.ones(2, 3, 24, dtype=dtype)], 1)
    assert torch.equal(quantize_activations(padded, 8, granularity=granularity, symmetric=symmetric, group_size=8)[:, :5], made)
    span = x.abs().amax(-1).max() * 2 / 255
    assert float((made - x).abs().max()) <= float(span)


def test_tensor_activations_share_a_step_and_static_limits_clip():
    x = torch.tensor([[0.0, 0.3, 1.0], [2.0, -0.6, 5.0]])
    dynamic = quantize_activations(x, 8, granularity="tensor")
    np.testing.assert_allclose(dynamic, np.round(x.numpy() / (5 / 127)) * (5 / 127), atol=1e-6)
    static = quantize_activations(x, 4, granularity="tensor", symmetric=True, limits=(-0.7, 1.4))
    np.testing.assert_allclose(static, np.clip(np.round(x.numpy() / 0.2), -7, 7) * 0.2, atol=1e-6)
    one_sided = quantize_activations(x, 4, granularity="tensor", symmetric=False, limits=(0.0, 3.0))
    np.testing.assert_allclose(one_sided, np.clip(np.round(x.numpy() / 0.2), 0, 15) * 0.2, atol=1e-6)


@settings(deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(0, 3), st.integers(1, 41))
def test_packing_round_trip_in_the_fewest_bytes(data, bits, lead, length):
    shape = (*[2] * lead, length)
    codes = torch.from_numpy(data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1))))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-length * bits // 8))
    assert torch.equal(unpack(packed, bits, length), codes)
    for row, stream in zip(codes.reshape(-1, length).tolist(), packed.reshape(-1, packed.shape[-1]).tolist(), strict=True):
        assert int.from_bytes(bytes(stream), "little") == sum(code << bits * place for place, code in enumerate(row))


def test_the_even_code_is_in_the_low_half():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_dequantise_to_the_same_weight(bits):
    made = rtn(drawn(5, 13), bits, group_size=4, pad_groups=True)
    back = dataclasses.replace(made, codes=unpack(pack(made.codes, bits), bits, 13))
    assert torch.equal(back.dequantize(), made.dequantize())


W = drawn(3, 10)
BAD = {
    "bits is 1": lambda: rtn(W, 1),
    "bits is 9": lambda: rtn(W, 9),
    "bits is 4.0": lambda: rtn(W, 4.0),
    "group_size is 4; it must divide 10, the row length of weight": lambda: rtn(W, 4, group_size=4),
    "group_size is -2": lambda: rtn(W, 4, group_size=-2),
    "zero_point is 'half'": lambda: rtn(W, 4, zero_point="half"),
    "zero_point is 'int'; it must be 'float'": lambda: rtn(W, 4, zero_point="int", convention="deepspeed"),
    "convention is 'gptq'": lambda: rtn(W, 4, convention="gptq"),
    "model.layers.0.q_proj holds NaN or infinity": lambda: rtn(W / 0, 4, name="model.layers.0.q_proj"),
    "activations holds NaN": lambda: quantize_activations(W * float("nan"), 8),
    "granularity is 'row'": lambda: quantize_activations(W, 8, granularity="row"),
    "group_size is 0": lambda: quantize_activations(W, 8, granularity="block", group_size=0),
    "limits is": lambda: quantize_activations(W, 8, limits=(0.0, 1.0)),
    "weight has shape": lambda: rtn(W[:0], 4),
    "codes has a value of 9": lambda: pack(torch.tensor([9], dtype=torch.uint8), 3),
    "codes is torch.int64": lambda: pack(torch.tensor([1]), 3),
    "packed is torch.uint8 of shape": lambda: unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 7),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()

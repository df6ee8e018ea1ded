"""What quantised layers promise beyond the contract: the right numbers, in the right bytes, whatever casts come later."""

import copy

import numpy as np
import pytest
import torch

import small_models
from echelon.calibrate import calibration_batches
from echelon.compress import RTN, merge_to_dense
from echelon.compress.packed import QuantizedLinear
from echelon.errors import UserError

KNOBS = {"group_size": 16}


def quantised(family="llama", dtype=torch.float32, data=None, **knobs):
    return RTN(**KNOBS | knobs).compress(small_models.model(family, dtype), data)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def dense(family, name):
    module = small_models.model(family).get_submodule(name)
    return module.weight.detach().T if type(module).__name__ == "Conv1D" else module.weight.detach()


def nearest(weight, bits, symmetric, group, zero_point="float"):
    """Rounding to nearest in numpy, group by group."""
    w = weight.double().numpy()
    out = np.empty_like(w)
    size = w.shape[1] if group < 0 else group
    for row in range(len(w)):
        for start in range(0, w.shape[1], size):
            part = w[row, start : start + size]
            if symmetric:
                step, half = np.abs(part).max() / (2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
                out[row, start : start + size] = np.clip(np.rint(part / step), -half, half) * step
            elif zero_point == "int":
                low, high = min(part.min(), 0), max(part.max(), 0)
                step = (high - low) / (2**bits - 1)
                zero = np.rint(-low / step)
                out[row, start : start + size] = (np.clip(np.rint(part / step + zero), 0, 2**bits - 1) - zero) * step
            else:
                step = (part.max() - part.min()) / (2**bits - 1)
                out[row, start : start + size] = np.clip(np.rint((part - part.min()) / step), 0, 2**bits - 1) * step + part.min()
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("knobs", [{"w_sym": True}, {}, {"zero_point": "int"}, {"group_size": -1, "w_bits": 8}, {"w_bits": 3}])
def test_the_matrix_is_the_one_that_the_formula_gives(family, knobs):
    model = quantised(family, scale_bits=32, **knobs).model
    assert layers(model)
    for name, module in layers(model).items():
        asked = [knobs.get(*known) for known in (("w_bits", 4), ("w_sym", False), ("group_size", 16), ("zero_point", "float"))]
        expected = nearest(dense(family, name), *asked)
        off = np.abs(module.dense().detach().numpy() - expected)
        # A tie may fall to the other side in float32; there must be hardly any.
        assert (off > 1e-4).mean() < 2e-3, name


def test_rows_of_eight_bits_are_within_half_a_step_also_with_steps_in_half_precision():
    for bits, knobs in ((8, {}), (8, {"w_sym": True}), (4, {})):
        for name, module in layers(quantised(group_size=-1, w_bits=bits, **knobs).model).items():
            weight = dense("llama", name)
            step = module.scale.view(torch.float16).float()
            assert bool(((weight - module.dense()).abs() <= step * (0.5 + 1e-3)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_bytes_are_those_of_the_formula(bits):
    for name, module in layers(quantised(w_bits=bits).model).items():
        rows, columns = dense("llama", name).shape
        stored = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        assert stored == rows * -(-columns * bits // 8) + rows * (columns // 16) * 4  # a step and a minimum of 16 bits for each group
    whole = quantised(w_bits=bits, zero_point="int").model
    name, module = next(iter(layers(whole).items()))
    assert sum(t.numel() * t.element_size() for t in module.state_dict().values()) == 32 * -(-32 * bits // 8) + 32 * 2 * 3


def test_no_cast_changes_what_the_codes_mean(tmp_path):
    result = quantised()
    name, module = next(iter(layers(result.model).items()))
    fine = module.dense().clone()
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        cast(result.model)
    assert torch.equal(module.dense(), fine)
    result.save(tmp_path)
    rough = type(result.model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(rough.get_submodule(name).dense(), fine.to(torch.bfloat16))


def test_constant_zero_and_short_groups_are_exact_and_the_grid_survives_a_second_pass():
    model = small_models.model("llama")
    target = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        target.weight[0] = 0.3
        target.weight[1] = 0
        target.weight[2, 24:] = -0.7
    weight = target.weight.detach().clone()
    knobs = {"group_size": 24, "pad_groups": True, "scale_bits": 32, "target_modules": ["up_proj"]}
    made = RTN(**knobs).compress(model).model
    once = made.model.layers[0].mlp.up_proj.dense()
    assert torch.equal(once[:2], weight[:2]) and torch.equal(once[2, 24:], weight[2, 24:])
    again = RTN(**knobs).compress(merge_to_dense(made)).model.model.layers[0].mlp.up_proj.dense()
    assert torch.equal(again, once)


def test_steps_that_half_precision_cannot_hold_take_32_bits_in_that_layer_alone(tmp_path):
    model = small_models.model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-5)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    result = RTN(**KNOBS).compress(model)
    kinds = {name: spec["scale_bits"] for name, spec in model.config.quantization_config.modules.items()}
    assert [name for name, bits in kinds.items() if bits == 32] == ["model.layers.0.mlp.up_proj"]
    assert float((weight - model.model.layers[0].mlp.up_proj.dense()).norm() / weight.norm()) < 0.1
    result.save(tmp_path)
    assert torch.equal(small_models.logits(type(model).from_pretrained(tmp_path), "llama"), small_models.logits(model, "llama"))


@pytest.mark.parametrize("a_sym", [True, False])
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_dynamic_activations_do_not_see_other_tokens_and_zero_stays_zero(a_sym, granularity):
    model = quantised(a_bits=4, a_sym=a_sym, a_granularity=granularity).model
    module = next(iter(layers(model).values()))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 32, generator=generator)
    x[1, 2] = 0
    whole = module(x)
    alone = torch.stack([torch.stack([module(x[i : i + 1, j : j + 1])[0, 0] for j in range(5)]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)
    assert not whole[1, 2].any()
    # By hand: each token (or block of 16) by its own largest magnitude.
    if a_sym:
        parts = x.double().unflatten(-1, (-1, 16)) if granularity == "block" else x.double().unsqueeze(-2)
        step = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
        rounded = ((parts / step).round() * step).flatten(-2).float()
        torch.testing.assert_close(whole, rounded @ module.dense().T, rtol=1e-4, atol=1e-4)


def test_static_activations_take_their_range_from_the_calibration_text_and_clip_beyond_it(tmp_path):
    shown = calibration_batches(small_models.data("llama"))
    result = quantised(data=shown, a_bits=8, a_granularity="tensor", w_bits=16)
    name = "model.layers.1.mlp.down_proj"
    module, seen = result.model.get_submodule(name), []
    plain = small_models.model("llama")
    plain.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        for batch in shown.batches:
            plain(**batch)
    most, high = torch.cat([x.flatten() for x in seen]).abs().max(), torch.cat([x.flatten() for x in seen]).max()
    inside, beyond = torch.full((1, 48), 0.37 * float(most)), torch.full((1, 48), 9 * float(most))
    step = most / 127
    torch.testing.assert_close(module(inside), (inside / step).round() * step @ module.dense().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(beyond), (torch.full((1, 48), float(high)) / step).round() * step @ module.dense().T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs calibration data"):
        quantised(a_bits=8, a_granularity="tensor")


def test_gradients_pass_to_the_input_as_through_the_dense_matrix():
    module = next(iter(layers(quantised("opt", a_bits=8).model).values()))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    slope = torch.randn(4, module.out_features, generator=torch.Generator().manual_seed(4))
    (module(x) * slope).sum().backward()
    torch.testing.assert_close(x.grad, slope @ module.dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, slope.sum(0), rtol=1e-5, atol=1e-5)


def test_unpacking_block_by_block_is_the_same(monkeypatch):
    module = next(iter(layers(quantised().model).values()))
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    expected = module(x)
    slope = torch.autograd.grad(expected.sum(), x)[0]
    monkeypatch.setattr("echelon.compress.packed._AT_ONCE", 100)
    assert len(list(module.row_blocks())) == 11
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(torch.autograd.grad(module(x).sum(), x)[0], slope)


def test_bad_numbers_are_named():
    module = next(iter(layers(quantised(a_bits=8).model).values()))
    with pytest.raises(ValueError, match="the input of a quantised layer holds NaN or infinity"):
        module(torch.full((1, 32), float("nan")))
    model = small_models.model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        RTN(**KNOBS).compress(model)


@pytest.mark.parametrize("method", ["gptq", "zq_local"])
def test_calibrated_rounding_is_nearer_to_the_dense_outputs_than_plain_rounding(method):
    shown = calibration_batches(small_models.data("llama", rows=24))
    plain = small_models.model("llama")

    def lost(model, name):
        seen = []
        handle = plain.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().reshape(-1, a[0].shape[-1])))
        with torch.no_grad():
            for batch in shown.batches:
                plain(**batch)
        handle.remove()
        x = torch.cat(seen).double()
        return float((x @ (dense("llama", name) - model.get_submodule(name).dense()).double().T).square().sum(1).mean())

    nearest_model = quantised(w_bits=3).model
    result = quantised(w_bits=3, method=method, data=shown, sequential=False)
    for name, told in result.report.modules.items():
        found = lost(result.model, name)
        assert told["output_error"] == pytest.approx(found, rel=1e-2)
        assert found < (0.8 if method == "gptq" else 0.97) * lost(nearest_model, name)


def test_sequential_statistics_are_those_behind_the_quantised_blocks():
    shown = calibration_batches(small_models.data("llama"))
    chained, loose = (quantised(w_bits=3, method="gptq", data=shown, sequential=way).model for way in (True, False))
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert torch.equal(chained.get_submodule(first).dense(), loose.get_submodule(first).dense())
    assert not torch.equal(chained.get_submodule(second).dense(), loose.get_submodule(second).dense())


def test_layers_can_be_left_out():
    result = quantised(skip_modules=["down_proj", "k_proj"])
    assert {name.rpartition(".")[2] for name in layers(result.model)} == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert {entry["name"].rpartition(".")[2] for entry in result.report.skipped} == {"down_proj", "k_proj"}
    assert {name.rpartition(".")[2] for name in layers(quantised(skip_modules=r".*mlp.*").model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="skip_modules: 'dwn_proj' matches none of the layers .did you mean 'down_proj'"):
        quantised(skip_modules=["dwn_proj"])
    with pytest.raises(ValueError, match="must leave at least one"):
        quantised(skip_modules=".*")


def test_groups_that_do_not_fit_are_an_error_that_changes_nothing_unless_padded():
    model = small_models.model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"group_size is 20; it must divide 32, the row length of .*q_proj, or pad_groups be set"):
        RTN(group_size=20).compress(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    padded = RTN(group_size=20, pad_groups=True, scale_bits=32).compress(model).model
    module = padded.model.layers[0].self_attn.q_proj
    weight = dense("llama", "model.layers.0.self_attn.q_proj")
    expected = np.concatenate([nearest(weight[:, :20], 4, False, 20), nearest(weight[:, 20:], 4, False, 12)], 1)
    assert np.abs(module.dense().numpy() - expected).max() < 1e-4


def test_the_deepspeed_convention_clips_the_largest_weight():
    module = layers(quantised(group_size=-1, w_sym=True, convention="deepspeed").model)["model.layers.0.mlp.up_proj"]
    weight = dense("llama", "model.layers.0.mlp.up_proj")
    most = weight.abs().amax(1)
    positive = weight.amax(1) == most
    torch.testing.assert_close(module.dense().amax(1)[positive], 7 / 8 * most[positive], rtol=2e-3, atol=0)


def test_a_size_in_bytes_picks_the_bits():
    small = quantised(w_bits=3).report.bytes_after
    result = RTN(**KNOBS).compress(small_models.model("llama"), bytes=small)
    assert result.report.modules["model.layers.0.mlp.up_proj"]["bits"] == 3 and result.report.bytes_after == small


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"w_bits": 1}, "w_bits is 1; it must be in 2..8, or 16"), ({"a_bits": 9}, "a_bits is 9"), ({"w_bits": 16}, "both 16"),
        ({"group_size": 4}, "group_size is 4"), ({"a_granularity": "row"}, "a_granularity is 'row'"), ({"zero_point": "half"}, "zero_point is 'half'"),
        ({"convention": "gptq"}, "convention is 'gptq'"), ({"scale_bits": 8}, "scale_bits is 8"), ({"method": "zq_global"}, "method is 'zq_global'"),
        ({"a_bits": 8, "a_granularity": "block", "group_size": -1}, "at least 8 with a_granularity block"), ({"damp": 0.0}, "damp is 0.0"),
        ({"convention": "deepspeed", "zero_point": "int"}, "its own zero"), ({"steps": -1}, "steps is -1"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        RTN(**knobs)


def test_a_missing_tensor_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    result = quantised()
    result.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, UserError), match=r"up_proj\.scale"):
        type(result.model).from_pretrained(tmp_path)

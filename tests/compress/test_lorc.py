"""What LoRC promises beyond the contract: the best of all low-rank repairs of a weight, and foreign layers too."""

import pytest
import torch

import small_models
from echelon.compress import RTN, LoRC, Pruning, save, weight_of

COARSE = RTN(w_bits=3, group_size=-1)


def errors(family="llama", compression=COARSE):
    """Weight errors by hand, and the compressed model."""
    original, model = small_models.model(family), compression.compress(small_models.model(family)).model
    made = {}
    for name in model.config.quantization_config.modules:
        old = original.get_submodule(name).weight.detach().double()
        made[name] = (old.T if family == "gpt2" else old) - model.get_submodule(name).dense().detach().double()
    return made, model


def products(tuned):
    base = tuned.get_base_model()
    return {name: m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double() for name, m in base.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_what_is_left_is_the_sum_of_the_dropped_squared_singular_values(family, rank):
    made, model = errors(family)
    result = LoRC(lorc_rank=rank, lorc_bits=16).compensate(small_models.model(family), model)
    for name, product in products(result.model).items():
        values = torch.linalg.svdvals(made[name])
        left = float((made[name] - product).square().sum())
        assert left == pytest.approx(float(values[rank:].square().sum()), rel=1e-5)
        told = result.report.modules[name]
        assert told["after"] == pytest.approx(left, rel=1e-6) and told["before"] == pytest.approx(float(values.square().sum()))
        assert told["captured"]["4"] == pytest.approx(float(values[:4].square().sum() / values.square().sum()))


def test_full_rank_gives_the_model_back_and_more_rank_is_never_worse():
    original = small_models.model("llama")
    left = []
    for rank in (1, 2, 4, 8, 16):
        result = LoRC(lorc_rank=rank, lorc_bits=16).compensate(original, errors()[1])
        left.append(sum(told["after"] for told in result.report.modules.values()))
    assert left == sorted(left, reverse=True)
    whole = LoRC(lorc_rank=32, lorc_bits=16, target_modules=r".*(q|o)_proj").compensate(original, errors()[1])
    for name, product in products(whole.model).items():
        torch.testing.assert_close(weight_of(errors()[1].get_submodule(name)) + product, original.get_submodule(name).weight.double(), rtol=1e-5, atol=1e-5)


def test_both_factors_share_the_scale():
    result = LoRC(lorc_rank=4, lorc_bits=16).compensate(small_models.model("llama"), errors()[1])
    for module in result.model.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(b.T @ b, torch.diag(torch.diag(b.T @ b)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "worse"), [(8, 1.01), (4, 1.5)])
def test_factors_of_few_bits_lie_on_their_grid_and_cost_little(bits, worse):
    fine = LoRC(lorc_rank=4, lorc_bits=16).compensate(small_models.model("llama"), errors()[1]).report
    result = LoRC(lorc_rank=4, lorc_bits=bits).compensate(small_models.model("llama"), errors()[1])
    for name, told in result.report.modules.items():
        module = result.model.get_base_model().get_submodule(name)
        for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight):
            step = factor.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            codes = factor.detach() / step
            torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert told["bound"] <= told["after"] <= worse * fine.modules[name]["after"]
    numbers = result.report.parameters
    rows = sum(len(p) for n, p in result.model.named_parameters() if ".lora_" in n)
    assert result.report.packed_bytes == numbers * bits // 8 + 2 * rows and result.report.bytes == 4 * numbers == fine.packed_bytes


def test_where_the_error_has_structure_it_takes_most_of_it_and_of_noise_little():
    model, original = small_models.model("llama"), small_models.model("llama")
    for module in (model, original):
        with torch.no_grad():
            module.model.layers[0].mlp.up_proj.weight[3] *= 50  # one outlier row sets the step of the whole matrix
    RTN(w_bits=4, group_size=0, target_modules=["up_proj"]).compress(model)
    for told in LoRC(lorc_rank=1).compensate(original, model).report.modules.values():
        assert told["captured"]["32"] == pytest.approx(1)
    spiked = small_models.model("llama")
    with torch.no_grad():
        spiked.model.layers[1].mlp.up_proj.weight[5] *= 0.5  # rank one
    report = LoRC(lorc_rank=1, lorc_bits=16).compensate(small_models.model("llama"), spiked).report
    assert report.modules["model.layers.1.mlp.up_proj"]["captured"]["1"] == pytest.approx(1) and len(report.modules) == 1


def test_a_layer_in_another_library_s_format_is_asked_for_its_matrix():
    class Foreign(torch.nn.Module):
        """Stores its matrix as nobody else does."""

        def __init__(self, weight, bias):
            super().__init__()
            self.in_features, self.out_features = weight.shape[1], weight.shape[0]
            self.register_buffer("doubled", 2 * weight)
            self.register_buffer("shift", bias)

        def forward(self, x):
            return x @ (self.doubled / 2).T + self.shift

    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)
    torch.testing.assert_close(weight_of(Foreign(weight, bias)), weight.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is no linear layer"):
        weight_of(torch.nn.LayerNorm(4))


def test_merging_the_adapter_into_what_is_packed_is_refused_with_the_reason(tmp_path):
    model = Pruning(pattern="2:4").compress(small_models.model("llama")).model
    save(model, tmp_path)
    result = LoRC().compensate(small_models.model("llama"), model)
    with pytest.raises(ValueError, match="cannot be merged into a quantised or pruned layer"):
        result.model.merge_and_unload()
    plain = result.model.unload()
    assert torch.equal(small_models.logits(plain, "llama"), small_models.logits(type(plain).from_pretrained(tmp_path), "llama"))


@pytest.mark.parametrize(("knobs", "error"), [({"lorc_rank": 0}, "lorc_rank is 0"), ({"lorc_bits": 6}, "lorc_bits is 6")])
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        LoRC(**knobs)

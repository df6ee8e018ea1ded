"""Targets, sizes, kinds of modules and the report: what methods stand on."""

import pytest
import torch
from torch import nn

import small_models
import tiny
from echelon.compress import SVD, Compressor, linear_targets, size
from echelon.compress.report import macs
from echelon.models.modules import KINDS, LowRankLinear, install, kind


def ends(names):
    return {name.split(".", 3)[-1] for name in names}


def test_targets_as_users_name_them():
    model = small_models.model("llama")
    every = linear_targets(model)[0]
    assert len(every) == 14 and "lm_head" not in every
    assert ends(linear_targets(model, "attention")[0]) == {f"self_attn.{k}_proj" for k in "qkvo"}
    assert ends(linear_targets(model, "mlp")[0]) == {f"mlp.{k}_proj" for k in ("gate", "up", "down")}
    assert ends(linear_targets(model, ["q_proj", "mlp.up_proj"])[0]) == {"self_attn.q_proj", "mlp.up_proj"}
    assert linear_targets(model, r".*\.1\.mlp\..*_proj")[0] == [n for n in every if ".1.mlp" in n]
    assert linear_targets(model, ["lm_head"])[0] == ["lm_head"]
    assert linear_targets(model, "all-linear")[0] == every


@pytest.mark.parametrize("family", ["bert", "vit", "gpt_neox", "opt", "gpt2", "phi"])
def test_attention_and_mlp_share_the_layers_among_them(family):
    model = small_models.model(family)
    attention, mlp = (linear_targets(model, word)[0] for word in ("attention", "mlp"))
    assert sorted(attention + mlp) == sorted(linear_targets(model)[0])
    assert len(mlp) == 4  # two matrices in each of two blocks


def test_a_tied_head_is_refused_with_the_reason():
    model = small_models.model("qwen2")
    assert linear_targets(model, ["lm_head"]) == ([], {"lm_head": "its weight is tied to another module's"})
    with pytest.raises(ValueError, match="tied"):
        SVD(target_modules=["lm_head"], strict=True).compress(model)


def test_encoder_decoders_are_compressed_from_their_weights():
    import copy

    model = copy.deepcopy(tiny.model("t5"))
    report = SVD(ratio=0.5, round_to=1).compress(model).report
    assert report.parameters_after < report.parameters_before
    assert "lm_head" not in report.modules and any(name.startswith("decoder") for name in report.modules)


def test_a_module_in_two_places_is_replaced_in_both():
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    made = install(model, {"a": {"kind": "lowrank", "in": 8, "out": 8, "rank": 2, "bias": True}})
    assert model.a is model.b is made["a"] and isinstance(model.a, LowRankLinear)


def test_the_size_of_a_plan_is_that_of_the_model_it_makes():
    for family in small_models.FAMILIES:
        model = small_models.model(family)
        made = SVD(ratio=0.5, round_to=1)
        specs = {}

        class Spy(SVD):
            method_name = "svd"

            def apply(self, job, state, found, keep=specs):
                keep |= {"size": size(job.model, found)}
                super().apply(job, state, found)

        Spy(**vars(made)).compress(model)
        assert specs["size"] == size(model)
        assert size(model).parameters == sum(p.numel() for p in model.parameters())


def test_bytes_are_those_of_the_file(tmp_path):
    result = SVD(ratio=0.5, round_to=1).compress(small_models.model("qwen2", torch.bfloat16))
    result.save(tmp_path)
    from safetensors.torch import load_file

    assert result.report.bytes_after == sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())


def test_a_kind_may_change_a_block_itself_and_things_inside_it():
    """The way structural methods take: another class, an extra parameter, and a smaller layer inside."""
    model = small_models.model("llama")
    base = type(model.model.layers[0])

    class Scaled(base):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * self.scale

    @kind("test_scaled")
    def scaled(spec, old):
        old.__class__ = Scaled
        old.scale = nn.Parameter(torch.empty(1, device=next(old.parameters()).device))
        return old

    try:
        specs = {"model.layers.1": {"kind": "test_scaled"}, "model.layers.1.mlp.up_proj": {"kind": "linear", "in": 32, "out": 48, "bias": True}}
        before, planned = size(model), size(model, specs)
        assert planned.parameters == before.parameters + 1 + 48
        assert type(model.model.layers[1]) is base  # trying it out has not touched the model
        install(model, specs)
        assert size(model) == planned
        assert type(model.model.layers[1]) is Scaled and model.model.layers[1].mlp.up_proj.bias is not None
        assert "Scaled" in model._no_split_modules
    finally:
        del KINDS["test_scaled"]


def test_widening_adds_a_product_exactly_and_narrowing_takes_it_back():
    layer = LowRankLinear(6, 5, 2, True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    layer.fill(draw(5, 2), draw(2, 6), draw(5))
    x, up, down, before = draw(3, 6), draw(5, 4), draw(4, 6), layer.up.weight.clone()
    expected = layer(x) + x @ (up @ down).T
    layer.widen(up, down)
    torch.testing.assert_close(layer(x), expected)
    assert layer.rank == 6 and "rank=6" in repr(layer)
    layer.narrow(4)
    assert torch.equal(layer.up.weight, before) and layer.spec()["rank"] == 2


def test_macs_are_counted_on_the_factors():
    model = small_models.model("llama")
    dense = macs(model)
    assert dense == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    SVD(rank=2, target_modules=["up_proj"]).compress(model)
    assert macs(model) == dense - 2 * (48 * 32) + 2 * 2 * (48 + 32)


def test_perplexity_and_latency_stand_in_the_report():
    seen = []

    def evaluate(model):
        seen.append(sum(p.numel() for p in model.parameters()))
        return float(len(seen))

    report = SVD(ratio=0.5, round_to=1, whiten=True).compress(small_models.model("llama"), small_models.data("llama"), evaluate=evaluate).report
    assert (report.perplexity_before, report.perplexity_after) == (1.0, 2.0)
    assert seen == [report.parameters_before, report.parameters_after]
    assert report.milliseconds_before > 0 and report.milliseconds_after > 0
    assert report.tokens == 12 * 24


def test_progress_is_told_step_by_step():
    told = []
    SVD(ratio=0.5, round_to=1, whiten=True, allocation="global").compress(small_models.model("llama"), small_models.data("llama"), on_progress=told.append)
    assert [entry["step"] for entry in told if entry["done"] == entry["of"]] == ["statistics", "spectra", "layers"]


def test_a_method_for_other_families_says_so():
    class Picky(SVD):
        method_name = "picky"
        model_types = ("opt",)

    assert issubclass(Picky, Compressor)
    with pytest.raises(ValueError, match="picky does not support model_type 'llama'; it supports opt"):
        Picky().compress(small_models.model("llama"))


def test_quantised_offloaded_and_wrapped_models_are_refused():
    from peft import LoraConfig, get_peft_model

    model = small_models.model("llama")
    with pytest.raises(ValueError, match="is no transformers model"):
        SVD().compress(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    model = small_models.model("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="already quantised"):
        SVD().compress(model)
    with torch.device("meta"):
        ghost = small_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match="meta device"):
        SVD().compress(ghost)


def test_a_byte_budget_is_met():
    model = small_models.model("gpt2", torch.bfloat16)
    before = size(model).bytes
    with pytest.raises(ValueError, match="cannot reach"):
        SVD(round_to=1).compress(small_models.model("gpt2", torch.bfloat16), bytes=0.1)
    SVD(round_to=1, allocation="global").compress(model, bytes=0.75)
    assert abs(size(model).bytes - 0.75 * before) <= 0.005 * 0.75 * before

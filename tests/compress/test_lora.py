"""PEFT adapters on factored layers as a whole: they merge without loss."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import small_models
from echelon.compress import SVD, load_lora, lora_config, lora_targets, merge_lora
from echelon.compress.lora import LoraLowRank


def adapted(family="llama", target="mlp", **arguments):
    """A compressed model (attention stays dense) with adapters that do something."""
    model = SVD(ratio=0.6, round_to=1, target_modules=target).compress(small_models.model(family)).model
    tuned = get_peft_model(model, lora_config(model, **{"r": 3, "lora_alpha": 6} | arguments)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return tuned


def logits(tuned, family):
    return small_models.logits(tuned.base_model.model, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "bert"])
def test_merging_is_exact_and_the_rank_grows_by_r(family, tmp_path):
    tuned = adapted(family)
    wrapped = {n: m for n, m in tuned.named_modules() if isinstance(m, LoraLowRank)}
    assert wrapped and len(wrapped) == sum(not ("attn" in n or "attention" in n) for n in lora_targets(small_models.model(family)))
    expected, plain = logits(tuned, family), small_models.logits(tuned.get_base_model(), family)
    with tuned.disable_adapter():
        without = logits(tuned, family)
    assert not torch.allclose(expected, without, atol=1e-2)
    ranks = {n: m.base_layer.rank for n, m in wrapped.items()}
    merged = merge_lora(tuned)
    torch.testing.assert_close(small_models.logits(merged, family), expected, rtol=1e-5, atol=1e-4)
    assert {m.rank for m in map(lambda n: merged.get_submodule(n.removeprefix("base_model.model.")), wrapped)} == {r + 3 for r in ranks.values()}
    merged.save_pretrained(tmp_path)
    assert torch.equal(small_models.logits(type(merged).from_pretrained(tmp_path), family), small_models.logits(merged, family))
    assert plain.shape == expected.shape


def test_unmerging_gives_back_every_bit():
    tuned = adapted()
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    layers = [m for m in tuned.modules() if isinstance(m, LoraLowRank)]
    for layer in layers:
        layer.merge()
        layer.unmerge()
    after = tuned.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_broken_adapter_is_not_merged_safely():
    tuned = adapted()
    next(m for m in tuned.modules() if isinstance(m, LoraLowRank)).lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tuned.merge_and_unload(safe_merge=True)


def test_only_adapters_train_and_they_do():
    tuned = adapted().train()
    ids = torch.tensor(small_models.data("llama", rows=4))
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    assert {n.split(".")[-3] for n, p in tuned.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    frozen = {n: p.clone() for n, p in tuned.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(trainable, 1e-2)
    losses = []
    for _ in range(5):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in tuned.named_parameters() if n in frozen)


def test_adapters_are_saved_and_loaded_onto_the_reloaded_model(tmp_path):
    tuned = adapted()
    expected = logits(tuned, "llama")
    tuned.get_base_model()
    tuned.save_pretrained(tmp_path / "adapter")
    SVD(ratio=0.6, round_to=1, target_modules="mlp").compress(small_models.model("llama")).save(tmp_path / "base")
    base = type(small_models.model("llama")).from_pretrained(tmp_path / "base")
    assert torch.equal(logits(load_lora(base, tmp_path / "adapter"), "llama"), expected)


def test_pefts_own_all_linear_lands_on_the_factors():
    model = SVD(ratio=0.6, round_to=1).compress(small_models.model("llama")).model
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    ends = {n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in tuned.named_modules() if ".lora_A" in n}
    assert ends == {"up", "down"}


def test_targets_are_whole_factored_layers_and_the_dense_ones_left():
    model = SVD(ratio=0.6, round_to=1, target_modules="mlp").compress(small_models.model("llama")).model
    assert lora_targets(model) == lora_targets(small_models.model("llama"))
    everything = SVD(ratio=0.6, round_to=1).compress(small_models.model("llama")).model
    assert lora_targets(everything) == lora_targets(small_models.model("llama"))

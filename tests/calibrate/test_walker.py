"""Walking block by block gives what the whole model gives, and what is observed is what the layers really read."""

import pytest
import torch

import small_models
import tiny
from echelon.calibrate import LayerWalker, Statistics, calibration_batches, collect
from echelon.compress import linear_targets
from echelon.errors import UserError
from echelon.models.targets import blocks

FAMILIES = list(small_models.FAMILIES)


def calibration(family):
    """Ragged rows, so that there are pads."""
    data = small_models.data(family)
    if family != "vit":
        data = [row[: 3 + 2 * i] for i, row in enumerate(data)]
    return calibration_batches(data, batch_size=5)


def read(model, names, shown):
    """What each layer reads, without pads, by plain hooks on the whole model."""
    seen = {name: [] for name in names}
    handles = [model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: seen[n].append(a[0].reshape(-1, a[0].shape[-1]))) for n in names]
    masks = []
    with torch.no_grad():
        for batch in shown.batches:
            model(**batch)
            masks.append(batch["attention_mask"].reshape(-1).bool() if "attention_mask" in batch else None)
    for handle in handles:
        handle.remove()
    return {n: torch.cat([x if m is None else x[m] for x, m in zip(parts, masks, strict=True)]).double() for n, parts in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model_without_pads(family):
    model, shown = small_models.model(family), calibration(family)
    names = linear_targets(model)[0]
    found, rows = collect(model, names, shown), read(model, names, shown)
    for name in names:
        assert found[name].n == len(rows[name])
        torch.testing.assert_close(found[name].mean, rows[name].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].second_moment, rows[name].T @ rows[name] / len(rows[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "inputs"), [("llama", 4), ("gpt2", 4), ("opt", 4), ("phi", 3), ("bert", 4), ("qwen3", 4)])
def test_layers_that_read_the_same_tensor_share_moments(family, inputs):
    model = small_models.model(family)
    found = collect(model, linear_targets(model)[0], calibration(family))
    assert len(found.moments) == 2 * inputs  # two blocks; in Phi attention and MLP read the same
    if family == "llama":
        assert found.leader["model.layers.0.self_attn.v_proj"] == "model.layers.0.self_attn.q_proj"
        assert found["model.layers.1.mlp.up_proj"] is found["model.layers.1.mlp.gate_proj"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sequential", [False, True])
def test_the_last_states_are_the_models(family, sequential):
    model, shown = small_models.model(family), calibration(family)
    last = [None]
    handle = blocks(model)[-1][1].register_forward_hook(lambda m, a, out: last.__setitem__(0, out))
    expected = []
    with torch.no_grad():
        for batch in shown.batches:
            model(**batch)
            expected.append(last[0])
    handle.remove()
    for block in LayerWalker(model, shown, sequential=sequential):
        found = block.run()
    for a, b, batch in zip(found, expected, shown.batches, strict=True):
        real = batch.get("attention_mask", torch.ones(a.shape[:2])).bool() if family != "vit" else torch.ones(a.shape[:2]).bool()
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-5)


def test_an_edited_block_reaches_the_next_one_only_in_a_sequential_walk():
    def second_block_sees(sequential, edit):
        model = small_models.model("llama")
        for block in LayerWalker(model, calibration("llama"), sequential=sequential):
            if block.index:
                return block.states[0]
            block.observe([block.name + ".mlp.up_proj"])
            if edit:
                with torch.no_grad():
                    block.module.mlp.down_proj.weight.zero_()

    dense = second_block_sees(False, False)
    assert torch.equal(second_block_sees(False, True), dense)
    assert torch.equal(second_block_sees(True, False), dense)
    assert not torch.equal(second_block_sees(True, True), dense)


def test_another_module_can_be_observed_in_a_blocks_place():
    model, original, shown = small_models.model("llama"), small_models.model("llama"), calibration("llama")
    with torch.no_grad():
        for _, block in blocks(model):
            block.self_attn.o_proj.weight.mul_(0.5)
    name = "model.layers.0.mlp.down_proj"
    expected = collect(original, [name], shown)[name]
    for block in LayerWalker(model, shown, sequential=True):
        seen = block.observe([name], module=original.get_submodule(block.name))
        torch.testing.assert_close(seen.moments[name].covariance, expected.covariance)
        assert not torch.allclose(block.observe([name]).moments[name].covariance, expected.covariance)
        break


def test_it_leaves_the_model_as_it_was():
    model = small_models.model("llama").train()
    for _ in LayerWalker(model, calibration("llama")):
        assert not model.training
    assert model.training
    assert all("forward" not in block.__dict__ and not block._forward_pre_hooks for _, block in blocks(model))


def test_bad_activations_are_named_and_pads_alone_are_refused():
    model, shown = small_models.model("llama"), calibration("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"the inputs of model\.layers\.1\.self_attn\.q_proj: activations hold NaN"):
        collect(model, linear_targets(model)[0], shown)
    blank = calibration_batches([{"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}])
    with pytest.raises(ValueError, match="nothing but pads"):
        collect(small_models.model("llama"), ["model.layers.0.mlp.up_proj"], blank)


def test_a_row_of_pads_beside_real_ones_changes_nothing():
    model = small_models.model("llama")
    ids = torch.tensor(small_models.data("llama", rows=2, length=8))
    mask = torch.ones_like(ids)
    names = linear_targets(model)[0]
    alone = collect(model, names, calibration_batches([{"input_ids": ids, "attention_mask": mask}]))
    padded = {"input_ids": torch.cat([ids, torch.zeros(1, 8, dtype=torch.long)]), "attention_mask": torch.cat([mask, torch.zeros(1, 8, dtype=torch.long)])}
    beside = collect(model, names, calibration_batches([padded]))
    for name in names:
        torch.testing.assert_close(alone[name].covariance, beside[name].covariance, rtol=1e-4, atol=1e-6)


def test_a_head_is_observed_too():
    model, shown = small_models.model("llama"), calibration("llama")
    rows = read(model, ["lm_head"], shown)["lm_head"]
    torch.testing.assert_close(collect(model, ["lm_head"], shown)["lm_head"].mean, rows.mean(0))


def test_statistics_survive_a_file_and_say_what_they_lack(tmp_path):
    model = small_models.model("llama")
    found = collect(model, linear_targets(model)[0], calibration("llama"))
    found.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert again.leader == found.leader and again.tokens == found.tokens and again.source == found.source
    assert all(torch.equal(again[name].scatter, found[name].scatter) for name in found.leader)
    with pytest.raises(ValueError, match="hold nothing of lm_head"):
        again["lm_head"]
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read statistics"):
        Statistics.load(tmp_path / "s.safetensors")


def test_what_is_no_chain_of_blocks_is_refused():
    assert blocks(tiny.model("t5")) == []
    with pytest.raises(ValueError, match="no single chain of blocks"):
        LayerWalker(tiny.model("t5"), calibration("llama"))

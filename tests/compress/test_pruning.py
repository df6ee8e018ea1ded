"""What pruning promises beyond the contract: which weights stay, and that no zero is stored or comes back."""

import numpy as np
import pytest
import torch

import small_models
from echelon.compress import Pruning
from echelon.compress.packed import PrunedLinear


def pruned(family="llama", **knobs):
    return Pruning(**knobs).compress(small_models.model(family))


def pairs(result, family="llama"):
    for name, module in result.model.named_modules():
        if isinstance(module, PrunedLinear):
            old = small_models.model(family).get_submodule(name)
            yield name, module, (old.weight.detach().T if type(old).__name__ == "Conv1D" else old.weight.detach())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_of_every_four_stay_and_they_are_the_largest(family):
    for _, module, weight in pairs(pruned(family, pattern="2:4"), family):
        kept, whole = module.dense().detach().numpy().reshape(-1, 4), weight.numpy().reshape(-1, 4)
        for after, before in zip(kept, whole, strict=True):
            largest = np.sort(np.argsort(-np.abs(before))[:2])
            assert np.array_equal(np.flatnonzero(after), largest) and np.array_equal(after[largest], before[largest])


@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_in_a_layer_the_largest_stay_exactly_as_they_were(sparsity):
    for name, module, weight in pairs(pruned(sparsity=sparsity)):
        dense = module.dense().detach()
        keep = dense != 0
        assert int(keep.sum()) == round((1 - sparsity) * weight.numel()) == module.values.numel(), name
        assert torch.equal(dense[keep], weight[keep])
        assert weight[keep].abs().min() >= weight[~keep].abs().max()


def test_in_rows_each_row_keeps_as_many_and_in_the_model_one_threshold_rules():
    for _, module, weight in pairs(pruned(sparsity=0.5, scope="row")):
        keep = module.dense() != 0
        assert torch.equal(keep.sum(1), torch.full((len(keep),), weight.shape[1] // 2))
        threshold = weight.abs().masked_fill(~keep, torch.inf).amin(1)
        assert bool((weight.abs().masked_fill(keep, 0).amax(1) <= threshold).all())
    found = list(pairs(pruned(sparsity=0.5, scope="model")))
    kept = torch.cat([weight[module.dense() != 0].abs() for _, module, weight in found])
    gone = torch.cat([weight[module.dense() == 0].abs() for _, module, weight in found])
    assert kept.min() >= gone.max() and abs(len(gone) / (len(gone) + len(kept)) - 0.5) < 1e-3
    assert len({len(module.values) / weight.numel() for _, module, weight in found}) > 1


def test_bytes_are_the_kept_numbers_and_one_bit_for_each_place():
    for _, module, weight in pairs(pruned(sparsity=0.5)):
        stored = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        assert stored == 4 * weight.numel() // 2 + weight.numel() // 8


def test_training_moves_what_stayed_and_brings_no_zero_back():
    model = pruned(pattern="2:4").model
    module = model.model.layers[0].mlp.up_proj
    pattern, before = (module.dense() == 0).clone(), module.values.detach().clone()
    optimizer = torch.optim.SGD([module.values], lr=0.1)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    dense = module.dense().detach().requires_grad_()
    (x @ dense.T).square().sum().backward()
    module(x).square().sum().backward()
    torch.testing.assert_close(module.values.grad, dense.grad[~pattern])
    optimizer.step()
    assert torch.equal(module.dense() == 0, pattern) and not torch.equal(module.values, before)


def test_a_kept_zero_and_ties_are_no_trouble(tmp_path):
    model = small_models.model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(0.5)
        model.model.layers[1].mlp.up_proj.weight.zero_()
    result = Pruning(pattern="2:4").compress(model)
    dense = model.model.layers[0].mlp.up_proj.dense().reshape(-1, 4)
    assert torch.equal(dense, torch.tensor([0.5, 0.5, 0, 0]).expand_as(dense))
    assert not model.model.layers[1].mlp.up_proj.dense().any()
    assert result.report.modules["model.layers.1.mlp.up_proj"]["rel_err"] == 0
    result.save(tmp_path)
    assert torch.equal(small_models.logits(type(model).from_pretrained(tmp_path), "llama"), small_models.logits(model, "llama"))


def test_what_saves_nothing_stays_dense_with_a_warning_or_an_error():
    with pytest.warns(UserWarning, match="weights saves nothing"):
        report = pruned(sparsity=0.02).report
    assert not report.modules and report.bytes_after == report.bytes_before
    with pytest.raises(ValueError, match="saves nothing"):
        pruned(sparsity=0.02, strict=True)


@pytest.mark.parametrize(
    ("knobs", "error"), [({"sparsity": 1.0}, "sparsity is 1.0"), ({"pattern": "1:4"}, "pattern is '1:4'"), ({"scope": "block"}, "scope is 'block'")]
)
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        Pruning(**knobs)

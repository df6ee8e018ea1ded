"""What WeLore promises beyond the contract."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import transformers

import small_models
from echelon.compress import LowRankLinear, WeLore, low_rank_parameters, merge_to_dense, select_trainable
from echelon.compress.linear import Layer
from echelon.compress.welore import weight_hash
from echelon.errors import UserError
from echelon.models.modules import install


def matrix(values, rows, columns, seed=0):
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0] for n in (rows, columns))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def layer(name, weight):
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    module.weight.data = weight
    return Layer(name, module, spectrum=torch.from_numpy(np.linalg.svd(weight.numpy(), compute_uv=False)))


def ranks(weights, **knobs):
    return WeLore(**knobs).plan({name: layer(name, weight) for name, weight in weights.items()})


def spectra(model):
    """Normalised singular values of the block matrices, by numpy."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            s = np.linalg.svd(module.weight.detach().double().numpy(), compute_uv=False)
            found[name] = (s, (s - s.min()) / (s.max() - s.min()), tuple(module.weight.shape))
    return found


# Normalised: 1, .8, .4, .2, .1, 0 and 1, .9, .8, .7, .6, .5, .25, 0.
STEEP, FLAT = [11.0, 9.0, 5.0, 3.0, 2.0, 1.0], [9.0, 8.2, 7.4, 6.6, 5.8, 5.0, 3.0, 1.0]
WEIGHTS = {"steep": matrix(STEEP, 6, 12), "flat": matrix(FLAT, 8, 8)}


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.15, {"steep": 4, "flat": 7}), (0.3, {"steep": 3, "flat": 6}), (0.45, {"steep": 2, "flat": 6}), (0.65, {"steep": 2, "flat": 4}),
        (0.75, {"steep": 2, "flat": 3}), (1.0, {"steep": 1, "flat": 1}),
    ],
)  # fmt: skip
def test_the_counts_are_those_of_the_values_below_the_threshold(threshold, expected):
    assert ranks(WEIGHTS, threshold=threshold, criterion="ratio", min_ratio=0.0) == expected
    # Worth factoring: r (m + p) < m p, that is r < 4 for both.
    assert ranks(WEIGHTS, threshold=threshold) == {name: rank for name, rank in expected.items() if rank < 4}


def test_the_ratio_rule_is_strict():
    half = matrix([8.0, 7.0, 6.0, 5.0, 1.5, 1.4, 1.2, 1.0], 8, 8)
    assert ranks({"half": half}, threshold=0.3, criterion="ratio", min_ratio=0.5) == {}
    assert ranks({"half": half}, threshold=0.3, criterion="ratio", min_ratio=0.4999) == {"half": 4}


@pytest.mark.parametrize("reduction", [0.1, 0.25, 0.5, 0.9])
def test_the_threshold_drops_the_wanted_share_of_all_values(reduction):
    model = small_models.model("llama")
    pooled = np.concatenate([normal for _, normal, _ in spectra(model).values()])
    made = WeLore(rank_reduction=reduction, criterion="ratio", min_ratio=0.0).compress(model)
    # One value of each matrix is normalised to 0, so they tie; nothing else does.
    lost = sum(len(s) for s, _, _ in spectra(small_models.model("llama")).values()) - sum(told["rank"] for told in made.report.modules.values())
    assert lost == math.floor(reduction * len(pooled))
    cut = made.report.details["threshold"]
    assert (pooled < cut * (1 - 1e-9)).sum() == lost
    assert made.report.details["rank_reduction_requested"] == reduction
    assert made.report.details["rank_reduction_reached"] == pytest.approx(lost / len(pooled))


def test_what_is_reached_counts_only_what_was_factored():
    found = spectra(small_models.model("llama"))
    made = WeLore(rank_reduction=0.45).compress(small_models.model("llama")).report
    cut = np.sort(np.concatenate([normal for _, normal, _ in found.values()]))[math.floor(0.45 * sum(len(s) for s, _, _ in found.values()))]
    wanted = {name: int((normal >= cut * (1 - 1e-9)).sum()) for name, (_, normal, _) in found.items()}
    wanted = {name: rank for name, rank in wanted.items() if rank * sum(found[name][2]) < math.prod(found[name][2])}
    assert 0 < len(wanted) < len(found)
    assert {name: told["rank"] for name, told in made.modules.items()} == wanted
    assert {entry["name"] for entry in made.skipped} == set(found) - set(wanted)
    all_values = sum(len(s) for s, _, _ in found.values())
    assert made.details["rank_reduction_reached"] == pytest.approx(sum(len(found[name][0]) - rank for name, rank in wanted.items()) / all_values)
    dense = sum(math.prod(shape) for _, _, shape in found.values())
    saved = made.parameters_before - made.parameters_after
    assert made.details["parameters_kept_of_targets"] == pytest.approx(1 - saved / dense)


def test_a_higher_threshold_never_gives_a_higher_rank():
    found = [ranks(WEIGHTS, threshold=k, criterion="ratio", min_ratio=0.0) for k in np.linspace(-0.1, 1, 30)]
    full = {"steep": 6, "flat": 8}
    for low, high in itertools.pairwise(found):
        assert all(high.get(name, full[name]) <= low.get(name, full[name]) for name in full)
    assert found[0] == {} and found[-1] == {"steep": 1, "flat": 1}


@pytest.mark.parametrize("threshold", [0, -1.0])
def test_a_threshold_of_nothing_drops_nothing(threshold):
    model = small_models.model("llama")
    before = small_models.logits(model, "llama")
    report = WeLore(threshold=threshold).compress(model).report
    assert not report.modules and torch.equal(small_models.logits(model, "llama"), before)


def test_equal_singular_values_are_all_kept_and_scale_does_not_matter():
    orthogonal = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    assert ranks({"equal": 3 * orthogonal, **WEIGHTS}, threshold=0.75) == {"steep": 2, "flat": 3}
    scaled = {"steep": 1e4 * WEIGHTS["steep"], "flat": 1e-4 * WEIGHTS["flat"]}
    for reduction in (0.2, 0.5, 0.8):
        assert ranks(scaled, rank_reduction=reduction) == ranks(WEIGHTS, rank_reduction=reduction)


def test_an_outlier_makes_a_matrix_look_low_rank_unless_the_quantile_is_taken():
    values = [1000.0, *np.linspace(10, 5, 199)]
    outlier = {"q": matrix(values, 200, 200)}
    assert ranks(outlier, threshold=0.1) == {"q": 1}
    low, high = np.min(values), np.quantile(values, 0.99)
    kept = int(((np.array(values) - low) / (high - low) >= 0.6).sum())
    assert kept < 100 and ranks(outlier, threshold=0.6, normaliser="quantile99") == {"q": kept}
    assert ranks(outlier, threshold=0.1, min_rank=7) == {"q": 7}


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_factors_are_balanced_and_lose_the_dropped_values(rank):
    weight = matrix([7.0, 5.0, 4.0, 2.0, 1.0, 0.5], 6, 9, seed=4)
    made = WeLore().factor(weight, None, None, rank)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert float((weight - made.up @ made.down).square().sum()) == pytest.approx((values[rank:] ** 2).sum(), abs=1e-12)
    for gram in (made.up.T @ made.up, made.down @ made.down.T):
        np.testing.assert_allclose(gram.numpy(), np.diag(values[:rank]), atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "vit"])
@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.7, 0.95])
def test_no_layer_grows(family, reduction):
    report = WeLore(rank_reduction=reduction).compress(small_models.model(family)).report
    assert report.parameters_after <= report.parameters_before
    assert report.parameters_after < report.parameters_before or not report.modules


@pytest.mark.parametrize("freeze_norms", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_only_factors_and_norms_train(family, freeze_norms):
    model = WeLore(rank_reduction=0.65, freeze_norms=freeze_norms).compress(small_models.model(family)).model
    norm = re.compile(r"(norm|LayerNorm|ln_\w+)\.(weight|bias)$|norm\.weight$")
    wanted = {n for n, _ in model.named_parameters() if re.search(r"\.(up|down)\.(weight|bias)$", n) or (not freeze_norms and norm.search(n))}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == wanted and 0 < len(wanted) < len(list(model.named_parameters()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    inputs = small_models.batch(family)
    for _ in range(3):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} <= wanted
    assert any(not torch.equal(p, before[n]) for n, p in trainable.items())


def test_all_and_none_train_and_the_choice_can_be_made_again_after_loading(tmp_path):
    for train, wanted in (("all", True), ("none", False)):
        model = WeLore(rank_reduction=0.65, train=train).compress(small_models.model("llama")).model
        assert {p.requires_grad for p in model.parameters()} == {wanted}
    made = WeLore(rank_reduction=0.65).compress(small_models.model("llama"))
    chosen = [n for n, p in made.model.named_parameters() if p.requires_grad]
    made.save(tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert select_trainable(again, low_rank_parameters(again).__contains__) == chosen


def test_gradients_are_the_same_with_checkpointing_although_the_embeddings_are_frozen():
    inputs, found = small_models.batch("llama"), []
    for checkpointing in (False, True):
        model = WeLore(rank_reduction=0.65).compress(small_models.model("llama")).model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_merged_it_computes_the_same(family):
    model = WeLore(rank_reduction=0.65).compress(small_models.model(family)).model
    expected = small_models.logits(model, family)
    merge_to_dense(model)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    torch.testing.assert_close(small_models.logits(model, family), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def fused_parts(model, family):
    """Weight and bias rows of query, key and value in each block, cut out by hand."""
    parts = {}
    if family == "gpt2":
        for i, block in enumerate(model.transformer.h):
            weight = block.attn.c_attn.weight.detach().numpy()
            for j, part in enumerate(("query", "key", "value")):
                parts[f"transformer.h.{i}.attn.c_attn.{part}"] = weight[:, 32 * j : 32 * (j + 1)].T
    else:
        for i, block in enumerate(model.gpt_neox.layers):
            weight = block.attention.query_key_value.weight.detach().numpy()  # head 0: 8 queries, 8 keys, 8 values; head 1: ...
            for j, part in enumerate(("query", "key", "value")):
                rows = [24 * head + 8 * j + d for head in range(4) for d in range(8)]
                parts[f"gpt_neox.layers.{i}.attention.query_key_value.{part}"] = weight[rows]
    return parts


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_fused_projections_are_taken_apart_and_each_part_has_its_own_spectrum(family):
    parts = fused_parts(small_models.model(family), family)
    model = small_models.model(family)
    made = WeLore(threshold=0.5, criterion="ratio", min_ratio=0.0, target_modules="attention").compress(model)
    for name, weight in parts.items():
        left, s, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        rank = int(((s - s.min()) / (s.max() - s.min()) >= 0.5).sum())
        assert made.report.modules[name]["rank"] == rank
        found = model.get_submodule(name)
        np.testing.assert_allclose(found.product().detach().numpy(), (left[:, :rank] * s[:rank]) @ right[:rank], atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_taking_apart_alone_changes_nothing(family):
    """Only the keys of the first block are low-rank here, and exactly so: the outputs must stay."""
    model = small_models.model(family)
    fused = model.transformer.h[0].attn.c_attn if family == "gpt2" else model.gpt_neox.layers[0].attention.query_key_value
    rows = list(range(32, 64)) if family == "gpt2" else [24 * head + 8 + d for head in range(4) for d in range(8)]
    with torch.no_grad():
        low = matrix([3.0, 2.0, 1.0], 32, 32).float()
        if family == "gpt2":
            fused.weight[:, rows] = low.T
        else:
            fused.weight[rows] = low
    expected = small_models.logits(model, family)
    report = WeLore(threshold=1e-3).compress(model).report
    assert [(name.rpartition(".")[2], told["rank"]) for name, told in report.modules.items()] == [("key", 3)]
    torch.testing.assert_close(small_models.logits(model, family), expected, rtol=1e-4, atol=1e-4)


def test_spectra_are_kept_by_the_hash_of_the_weight(tmp_path, monkeypatch):
    knobs = {"rank_reduction": 0.6, "spectra": str(tmp_path)}
    first = WeLore(**knobs).compress(small_models.model("llama"))
    assert len(list(tmp_path.iterdir())) == 14
    told = WeLore(rank_reduction=0.6).compress(small_models.model("llama"))
    assert first.report.modules == told.report.modules
    computed = []
    real = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda weight: computed.append(1) or real(weight))
    other = WeLore(**(knobs | {"rank_reduction": 0.8})).compress(small_models.model("llama"))
    assert not computed
    assert other.report.modules == WeLore(rank_reduction=0.8).compress(small_models.model("llama")).report.modules
    computed.clear()
    changed = small_models.model("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    WeLore(**knobs).compress(changed)
    assert len(computed) == 1
    weight = small_models.model("llama").model.layers[0].mlp.up_proj.weight
    (tmp_path / f"{weight_hash(weight)}.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot read the singular values in .*; remove the file"):
        WeLore(**knobs).compress(small_models.model("llama"))


def test_the_hash_tells_values_shapes_and_dtypes_apart():
    weight = torch.arange(12.0).reshape(3, 4)
    same = torch.arange(12.0).reshape(4, 3).T.contiguous().T.contiguous()
    hashes = {weight_hash(w) for w in (weight, weight.reshape(4, 3), weight.bfloat16(), weight.half(), weight + 1)}
    assert len(hashes) == 5
    assert weight_hash(same) == weight_hash(weight.reshape(4, 3)) and weight_hash(weight.T) == weight_hash(weight.T.contiguous())


def test_factors_may_have_a_dtype_of_their_own(tmp_path):
    made = WeLore(rank_reduction=0.65, dtype_factors="bfloat16").compress(small_models.model("gpt2"))
    plain = WeLore(rank_reduction=0.65).compress(small_models.model("gpt2"))
    dtypes = {name: p.dtype for name, p in made.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if re.search(r"\.(up|down)\.", name)} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if not re.search(r"\.(up|down)\.", name)} == {torch.float32}
    logits, wanted = (small_models.logits(m.model, "gpt2") for m in (made, plain))
    assert logits.dtype == torch.float32 and 0 < (logits - wanted).norm() < 0.05 * wanted.norm()
    made.save(tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {name: p.dtype for name, p in again.named_parameters()} == dtypes
    assert torch.equal(small_models.logits(again, "gpt2"), logits)


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"rank_reduction": 0}, "rank_reduction is 0"), ({"rank_reduction": 1.0}, "rank_reduction is 1.0"), ({"threshold": 1.01}, "threshold is 1.01"),
        ({"min_ratio": 1}, "min_ratio is 1"), ({"min_rank": 0}, "min_rank is 0"), ({"criterion": "size"}, "criterion is 'size'"),
        ({"normaliser": "max"}, "normaliser is 'max'"), ({"train": "some"}, "train is 'some'"), ({"dtype_factors": "int8"}, "dtype_factors is 'int8'"),
        ({"threshold": float("nan")}, "threshold is nan"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        WeLore(**knobs)


def test_a_rebuilt_fused_layer_has_every_part_in_its_place_each_time():
    """A part of a new module may get the id that a replaced module had; it must not be taken for that one."""
    made = WeLore(rank_reduction=0.6).compress(small_models.model("gpt_neox")).model
    wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
    specs = made.config.quantization_config.modules
    assert specs["gpt_neox.layers.0.attention.query_key_value"]["kind"] == "fused.split"
    for _ in range(40):
        model = small_models.model("gpt_neox")
        install(model, specs)
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == wanted

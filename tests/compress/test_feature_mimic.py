"""What feature mimicking promises beyond the contract: on click models, against components computed apart."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import small_clicks
import small_models
from echelon.calibrate import calibration_batches
from echelon.compress import FeatureMimic
from echelon.compress.mimicked import MimickedLinear, MimickedTables
from echelon.data.clicks import Clicks
from echelon.linalg.tables import table_spread
from echelon.models.ctr import ARCHITECTURES, DeepFM, load_ctr
from echelon.train import fit_clicks

MIDDLE = "deep.linears.1"
every_model = pytest.mark.parametrize("name", list(ARCHITECTURES))


def clicks():
    return small_clicks.log()[2]


def mimic(model, log=None, **knobs):
    return FeatureMimic(**{"mlp_rank": 5, "embedding_rank": 3} | knobs).compress(model, clicks() if log is None else log)


@torch.no_grad()
def inputs_of(model, name, log):
    """What arrives at a module, in float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    for batch in log.batches(1000):
        model(**batch)
    handle.remove()
    return torch.cat(seen)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_the_error_of_a_layer_is_the_sum_of_the_dropped_eigenvalues(rank):
    dense = small_clicks.model()
    made = mimic(small_clicks.model(), mlp_rank=rank)
    x = inputs_of(dense, MIDDLE, clicks())
    y = dense.get_submodule(MIDDLE).double()(x).numpy()
    values = np.linalg.eigvalsh(np.cov(y.T, bias=True))
    lost = made.model.get_submodule(MIDDLE).double()(x).numpy() - y
    assert np.square(lost).sum(1).mean() == pytest.approx(values[:-rank].sum(), rel=1e-4)
    assert made.report.modules[MIDDLE]["lost"] == pytest.approx(values[:-rank].sum(), rel=1e-4)


def test_the_factors_are_those_of_the_paper_and_full_rank_is_exact():
    from echelon.calibrate import Moments

    x = inputs_of(small_clicks.model(), MIDDLE, clicks())
    layer = small_clicks.model().double().get_submodule(MIDDLE)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    moments = Moments.of(x.shape[1])
    moments.update(x)
    y = (x @ weight.T + bias).numpy()
    mu, axes = y.mean(0), np.linalg.eigh(np.cov(y.T, bias=True))[1][:, ::-1]
    for rank in (4, 20):
        factors = FeatureMimic().factor(weight, bias, moments, rank)
        u = axes[:, :rank]
        expected = (y - mu) @ u @ u.T + mu
        found = (x @ factors.down.T @ factors.up.T + bias + factors.bias_delta).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(expected, y, atol=1e-9)


@torch.no_grad()
def test_a_table_mimics_what_is_looked_up_and_beats_the_plain_svd_of_the_table():
    model, log = small_clicks.model(), clicks()
    made = mimic(copy.deepcopy(model))
    new = made.model.embedding
    assert isinstance(new, MimickedTables)
    for field in range(5):
        ids = log.sparse_ids[:, field][log.sparse_ids[:, field] != 0]
        table = model.embedding.tables[field].weight.double()
        seen = table[ids].numpy()
        values = np.linalg.eigvalsh(np.cov(seen.T, bias=True))
        error = np.square(new.decoded(field).double()[ids].numpy() - seen).sum(1).mean()
        assert error == pytest.approx(values[:-3].sum(), rel=1e-3)
        u, s, v = np.linalg.svd(table.numpy(), full_matrices=False)
        assert error < np.square((u[:, :3] * s[:3] @ v[:3])[ids] - seen).sum(1).mean()


def tables(model, rank, log=None, folded=False):
    """Tables alone, of any rank."""
    log = log or clicks()
    old = model.embedding
    made = MimickedTables(old, [rank] * len(old.tables), folded, dtype=torch.float32)
    spreads = {n: table_spread(t.weight, torch.bincount(log.sparse_ids[:, n], minlength=len(t.weight)).double()) for n, t in enumerate(old.tables)}
    made.fill(old, spreads)
    return made


@torch.no_grad()
def test_codes_of_full_width_are_exact():
    model = small_clicks.model()
    made, ids = tables(model, 8), clicks().sparse_ids
    torch.testing.assert_close(made(ids)[0], model.embedding(ids)[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, None])
@pytest.mark.parametrize("knobs", [{}, {"skip": ("last",)}, {"skip": ("last",), "inter_activation": "same"}, {"centered": False}])
@pytest.mark.parametrize("name", ["deepfm", "dcn", "xdeepfm", "autoint"])
def test_folded_is_the_same_as_unfolded(name, knobs, padding):
    log = clicks()
    made = [mimic(small_clicks.model(name, padding_idx=padding).double(), doubled(log), fold_first_linear=fold, **knobs).model for fold in (True, False)]
    folded, plain = (small_clicks.logits(model, doubled(log)) for model in made)
    assert (folded - plain).abs().max() < 1e-9
    widths = [model.deep.linears[0].in_features for model in made]
    assert widths == [5 * 3 + 5 * (padding == 0) + 2, 5 * 8 + 2]
    single = [mimic(small_clicks.model(name, padding_idx=padding), log, fold_first_linear=fold, **knobs).model for fold in (True, False)]
    one, other = (small_clicks.logits(model, log) for model in single)
    assert (one - other).abs().max() < 1e-5 * other.abs().max()


def doubled(log):
    return Clicks(log.sparse_ids, log.dense.double(), log.labels)


@pytest.mark.parametrize("name", ["nfm", "fibinet"])
def test_nothing_is_folded_where_an_interaction_stands_in_between(name):
    model = small_clicks.model(name)
    width = model.deep.linears[0].in_features
    made = mimic(model)
    assert not made.report.modules["embedding"]["folded"] and made.model.deep.linears[0].in_features == width


@torch.no_grad()
def test_padding_decodes_to_exactly_zero_and_is_no_part_of_the_statistics():
    made = mimic(small_clicks.model()).model
    log = clicks()
    vectors, flat = made.embedding(log.sparse_ids)
    empty = log.sparse_ids == 0
    assert empty.any() and not vectors[empty].any() and vectors[~empty].any(1).all()
    assert torch.equal(flat[:, 15:], (~empty).float())
    # With other padding in the same rows the same tables come out.
    more = log.sparse_ids.repeat(2, 1)
    more[len(log) :, 0] = 0
    doubled_log = Clicks(more, log.dense.repeat(2, 1), log.labels.repeat(2))
    again = mimic(small_clicks.model(), doubled_log).model
    torch.testing.assert_close(again.embedding.decoded(0), made.embedding.decoded(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_ids_are_pooled_before_decoding_and_shared_tables_pool_their_statistics():
    config = DeepFM.config_class(
        vocab_sizes=[40, 50], field_tables=[0, 1, 0], field_slots=[1, 4, 1], field_names=["a", "b", "c"], embedding_dim=6, hidden_sizes=[12, 8]
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = DeepFM(config).eval()
        nn.init.normal_(model.embedding.tables[0].weight, 0.5)
        nn.init.normal_(model.embedding.tables[1].weight, 0.5)
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat([torch.randint(1, 40, (500, 1), generator=generator), torch.randint(0, 50, (500, 4), generator=generator)], 1)
    ids = torch.cat([ids, torch.randint(30, 40, (500, 1), generator=generator)], 1)
    log = Clicks(ids, torch.zeros(500, 0), torch.ones(500))
    old = copy.deepcopy(model.embedding)
    made = mimic(model, log, embedding_rank=2, mlp_rank=1, skip=("last",)).model.embedding
    vectors, _ = made(ids)
    decoded = made.decoded(1)
    for row in range(20):
        bag = [i for i in ids[row, 1:5].tolist() if i]
        torch.testing.assert_close(vectors[row, 1], torch.stack([decoded[i] for i in bag]).mean(0), rtol=1e-4, atol=1e-5)
    pooled = old.tables[0].weight.double()[torch.cat([ids[:, 0], ids[:, 5]])].numpy()
    error = np.square(made.decoded(0).double()[torch.cat([ids[:, 0], ids[:, 5]])].numpy() - pooled).sum(1).mean()
    assert error == pytest.approx(np.linalg.eigvalsh(np.cov(pooled.T, bias=True))[:-2].sum(), rel=1e-3)


@torch.no_grad()
def test_ids_that_the_log_lacks_have_a_code_and_the_report_says_how_far_off_they_are():
    model, log = small_clicks.model(), clicks()
    half = log.take(torch.arange(60))
    made = mimic(copy.deepcopy(model), half)
    told, new = made.report.modules["embedding"], made.model.embedding
    errors = [(new.decoded(n) - t.weight).norm(dim=1)[1:] for n, t in enumerate(model.embedding.tables)]
    seen = [torch.bincount(half.sparse_ids[:, n], minlength=len(t.weight))[1:] > 0 for n, t in enumerate(model.embedding.tables)]
    assert told["max_error"] == pytest.approx(max(float(e.max()) for e in errors), rel=1e-4)
    assert told["unseen_ids"] == sum(int((~s).sum()) for s in seen) > 0
    assert told["unseen_max_error"] == pytest.approx(max(float(e[~s].max()) for e, s in zip(errors, seen, strict=True)), rel=1e-4)
    assert small_clicks.logits(made.model, log).isfinite().all()


def test_ranks_by_field_and_by_energy():
    made = mimic(small_clicks.model(), embedding_rank={"C1": 1, "C3": 0.6, "C2": 2, "C4": 2, "C5": 2})
    table, ids = small_clicks.model().embedding.tables[2].weight.detach().double(), clicks().sparse_ids[:, 2]
    values = np.linalg.eigvalsh(np.cov(table[ids[ids != 0]].numpy().T, bias=True))[::-1]
    expected = int(np.searchsorted(values.cumsum() / values.sum(), 0.6)) + 1
    assert made.report.modules["embedding"]["ranks"] == {"C1": 1, "C2": 2, "C3": expected, "C4": 2, "C5": 2} and expected > 1
    assert made.model.embedding.decoder.shape == (5, max(2, expected), 8)
    folded, plain = (
        small_clicks.logits(mimic(small_clicks.model(), embedding_rank={"C1": 1, "C3": 5}, fold_first_linear=fold).model, clicks()) for fold in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_an_activation_in_between_the_layer_is_the_papers_and_no_unit_starts_dead():
    made, plain = mimic(small_clicks.model(), inter_activation="same"), mimic(small_clicks.model())
    layer, x = made.model.get_submodule(MIDDLE), inputs_of(small_clicks.model(), MIDDLE, clicks()).float()
    assert isinstance(layer, MimickedLinear)
    inner = x @ layer.down.weight.T + layer.down.bias
    torch.testing.assert_close(layer(x), inner.clamp(min=0) @ layer.up.weight.T + layer.up.bias)
    assert (inner.mean(0) >= 0).all() and (inner > 0).any(0).all()
    assert made.report.modules[MIDDLE]["dead_units"] == 0.0
    layer.activation = nn.Identity()
    torch.testing.assert_close(layer(x), plain.model.get_submodule(MIDDLE)(x), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_stays_behind_the_second_factor():
    model = small_clicks.model(batch_norm=True)
    fit_clicks(model, clicks().sample(500), epochs=1, batch_size=100)
    norms = copy.deepcopy(model.deep.norms)
    deep = mimic(model, skip=("last",)).model.deep
    x = torch.randn(50, deep.linears[0].in_features, generator=torch.Generator().manual_seed(0))
    expected = x.detach()
    for linear, norm in zip(deep.linears, norms, strict=True):
        y = expected @ linear.down.weight.T @ linear.up.weight.T + linear.up.bias
        expected = ((y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias).clamp(min=0)
    torch.testing.assert_close(deep(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "same"])
@every_model
def test_saved_loaded_tuned_and_saved_again(name, activation, tmp_path):
    made, (_, schema, log) = mimic(small_clicks.model(name), inter_activation=activation), small_clicks.log()
    assert made.report.parameters_after == sum(p.numel() for p in made.model.parameters()) < made.report.parameters_before
    made.save(tmp_path / "a", schema)
    model, read = load_ctr(tmp_path / "a")
    assert read == schema and torch.equal(small_clicks.logits(model, log), small_clicks.logits(made.model, log))
    losses = fit_clicks(model, log, epochs=3, learning_rate=3e-3, seed=2)
    assert losses[-1] < losses[0]
    assert not any(table.weight[0].any() for table in model.embedding.tables)
    model.save_pretrained(tmp_path / "b")
    schema.save_pretrained(tmp_path / "b")
    assert torch.equal(small_clicks.logits(load_ctr(tmp_path / "b")[0], log), small_clicks.logits(model, log))
    assert json.loads((tmp_path / "a" / "compression_report.json").read_text())["modules"]["embedding"]["ranks"]["C1"] == 3


def test_a_target_size_is_met_by_the_ranks_of_the_tables():
    target = mimic(small_clicks.model(), embedding_rank=0.8).report.parameters_after
    made = mimic(small_clicks.model(), embedding_rank=2)
    assert made.report.parameters_after != target
    made = FeatureMimic(budget_knob="embedding_rank", mlp_rank=5).compress(small_clicks.model(), clicks(), parameters=target)
    assert made.report.parameters_after == target == sum(p.numel() for p in made.model.parameters())
    with pytest.raises(ValueError, match="cannot reach .* by embedding_rank"):
        FeatureMimic(budget_knob="embedding_rank").compress(small_clicks.model(), clicks(), parameters=0.01)


def test_statistics_of_a_sample_and_compressing_twice():
    made = mimic(small_clicks.model(), statistics=100)
    assert made.report.tokens == 100 and mimic(small_clicks.model()).report.tokens == len(clicks())
    with pytest.warns(UserWarning, match="LowRankLinear already"):
        again = FeatureMimic(mlp_rank=5, skip=("last",)).compress(made.model, clicks())
    assert {"name": "embedding", "reason": "they are compressed already"} in again.report.skipped
    assert small_clicks.logits(again.model, clicks()).isfinite().all()


def test_ranks_that_save_nothing_or_are_too_high():
    model = small_clicks.model()
    with pytest.warns(UserWarning, match="embedding_rank 8 of width 8 saves nothing"):
        made = mimic(model, embedding_rank=8)
    assert "embedding" not in made.report.modules and made.model.deep.linears[0].in_features == 42
    with pytest.raises(ValueError, match="mlp_rank is 21, which is above the 20 outputs of deep.linears.1"):
        mimic(small_clicks.model(), mlp_rank=21)
    with pytest.raises(ValueError, match="embedding_rank is 9, which is above the embeddings' width 8"):
        mimic(small_clicks.model(), embedding_rank=9)
    with pytest.raises(ValueError, match="'C9', which is no field; there are C1"):
        mimic(small_clicks.model(), embedding_rank={"C9": 2})
    # Above the numerical rank of what is seen, but not above m: fine, and exact there.
    few = clicks().take(torch.arange(4))
    with pytest.warns(UserWarning, match="fewer than"):
        same = mimic(small_clicks.model(), few, embedding_rank=4).model
    torch.testing.assert_close(small_clicks.logits(same, few), small_clicks.logits(small_clicks.model(), few), rtol=1e-4, atol=1e-4)


def test_what_a_click_model_needs_and_what_others_may_not():
    with pytest.raises(ValueError, match="the click log is empty"):
        mimic(small_clicks.model(), clicks().take(torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="needs calibration data"):
        FeatureMimic().compress(small_clicks.model())
    with pytest.raises(ValueError, match="ClickSchema"):
        mimic(small_clicks.model(), small_clicks.log()[0])
    with pytest.raises(ValueError, match="sequential is True"):
        mimic(small_clicks.model(), sequential=True)
    shown = calibration_batches(small_models.data("llama"))
    with pytest.raises(ValueError, match="inter_activation is 'same'; it must be none for LlamaForCausalLM"):
        FeatureMimic(inter_activation="same").compress(small_models.model("llama"), shown)
    model = small_clicks.model()
    with torch.no_grad():
        model.embedding.tables[2].weight[3] = float("nan")
    with pytest.raises(ValueError, match="embedding.tables.2|deep.linears"):
        mimic(model)


def test_first_and_last_of_a_language_models_layers_stay_dense_by_default():
    shown = calibration_batches(small_models.data("llama"))
    made = FeatureMimic(mlp_rank=0.3, target_modules=["up_proj", "gate_proj"]).compress(small_models.model("llama"), shown)
    assert set(made.report.modules) == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"}
    made = FeatureMimic(mlp_rank=0.3, target_modules=["up_proj", "gate_proj"], skip=("gate_proj",)).compress(small_models.model("llama"), shown)
    assert {name.rpartition(".")[2] for name in made.report.modules} == {"up_proj"}


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"mlp_rank": 0}, "mlp_rank is 0"), ({"mlp_rank": 1.5}, "mlp_rank is 1.5"), ({"embedding_rank": 0}, "embedding_rank is 0"),
        ({"embedding_rank": {"C1": -1.0}}, "embedding_rank is -1.0"), ({"inter_activation": "relu"}, "inter_activation is 'relu'"),
        ({"statistics": 0}, "statistics is 0"), ({"statistics": "all"}, "statistics is 'all'"), ({"skip": "first"}, "skip is 'first'"),
        ({"budget_knob": "rank"}, "budget_knob is 'rank'"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        FeatureMimic(**knobs)

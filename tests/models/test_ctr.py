"""Click models against their papers' formulas, written out in loops."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModel

import small_clicks
from echelon.errors import UserError
from echelon.models import load
from echelon.models.ctr import ARCHITECTURES, CTRConfig, FieldEmbedding, click_metrics, load_ctr, new_ctr, predict

every_model = pytest.mark.parametrize("name", list(ARCHITECTURES))


def deep(model, x):
    for linear in model.deep.linears:
        x = np.maximum(x @ linear.weight.double().numpy().T + linear.bias.double().numpy(), 0)
    return x


def number(parameter):
    return parameter.detach().double().numpy()


def by_hand(name, model, ids, dense):
    """The logit of one row."""
    fields = [number(t.weight)[i] if i else np.zeros(8) for t, i in zip(model.embedding.tables, ids, strict=True)]
    logit = sum(number(t.weight)[i, 0] if i else 0 for t, i in zip(model.wide.tables, ids, strict=True))
    logit += number(model.wide_dense.weight)[0] @ dense + number(model.wide_dense.bias)[0]
    flat = np.concatenate([*fields, dense])
    out = number(model.output.weight)[0]
    pairs = list(itertools.combinations(range(5), 2))
    if name == "deepfm":
        return logit + sum(fields[i] @ fields[j] for i, j in pairs) + out @ deep(model, flat)
    if name == "dcn":
        x = flat
        for weight, bias in zip(number(model.cross), number(model.cross_bias), strict=True):
            x = flat * (x @ weight) + bias + x
        return logit + out @ np.concatenate([x, deep(model, flat)])
    if name == "xdeepfm":
        maps, pooled = fields, []
        for layer in model.cin:
            weight = number(layer.weight)
            maps = [sum(w[h * 5 + m] * maps[h] * fields[m] for h in range(len(maps)) for m in range(5)) for w in weight]
            pooled += [m.sum() for m in maps]
        return logit + number(model.cin_output.weight)[0] @ np.array(pooled) + out @ deep(model, flat)
    if name == "autoint":
        states = fields
        for layer in model.attention:
            query, key, value, residual = (np.stack([w @ s for s in states]) for w in np.split(number(layer.weight), 4))
            mixed = np.zeros_like(query)
            for head in range(2):
                part = slice(head * 8, head * 8 + 8)
                scores = np.exp(query[:, part] @ key[:, part].T)
                mixed[:, part] = scores / scores.sum(1, keepdims=True) @ value[:, part]
            states = list(np.maximum(mixed + residual, 0))
        return logit + out @ np.concatenate([*states, deep(model, flat)])
    if name == "nfm":
        return logit + out @ deep(model, np.concatenate([sum(fields[i] * fields[j] for i, j in pairs), dense]))
    weights = np.maximum(number(model.excite.weight) @ np.maximum(number(model.squeeze.weight) @ np.array([f.mean() for f in fields]), 0), 0)
    weighed = [w * f for w, f in zip(weights, fields, strict=True)]
    products = [
        (seen[i] @ matrix[i]) * seen[j] for seen, matrix in zip((fields, weighed), number(model.bilinear), strict=True) for i, j in pairs
    ]  # fmt: skip
    return logit + out @ deep(model, np.concatenate([*products, dense]))


@every_model
@torch.no_grad()
def test_the_logit_is_the_formula_written_out(name):
    model, clicks = small_clicks.model(name).double(), small_clicks.log()[2]
    batch = next(clicks.batches(12))
    assert (batch["sparse_ids"] == 0).any()
    found = model(batch["sparse_ids"], batch["dense"].double()).logits
    expected = [by_hand(name, model, ids, dense) for ids, dense in zip(batch["sparse_ids"].tolist(), batch["dense"].double().numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


@every_model
def test_saved_and_loaded_it_is_the_same_by_all_three_ways(name, tmp_path):
    model, (_, schema, clicks) = small_clicks.model(name), small_clicks.log()
    model.save_pretrained(tmp_path)
    schema.save_pretrained(tmp_path)
    expected = small_clicks.logits(model, clicks)
    again, read = load_ctr(tmp_path)
    assert read == schema and type(again) is type(model)
    for other in (again, load(tmp_path).model, AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(small_clicks.logits(other.eval(), clicks), expected)


def test_the_loss_is_the_mean_cross_entropy():
    model, clicks = small_clicks.model(), small_clicks.log()[2]
    batch = next(clicks.batches(50))
    p = 1 / (1 + np.exp(-small_clicks.logits(model, clicks, 50).double().numpy()))
    y = batch["labels"].numpy()
    assert model(**batch).loss.item() == pytest.approx(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), rel=1e-5)


def test_auc_and_logloss_are_those_counted_pair_by_pair():
    model, clicks = small_clicks.model(), small_clicks.log()[2].sample(300)
    found, chances, labels = click_metrics(model, clicks), predict(model, clicks), clicks.labels.numpy()
    wins = [(a > b) + 0.5 * (a == b) for a in chances[labels == 1] for b in chances[labels == 0]]
    assert found["auc"] == pytest.approx(np.mean(wins), abs=1e-12)
    assert found["logloss"] == pytest.approx(-np.mean(np.where(labels == 1, np.log(chances), np.log(1 - chances))), rel=1e-9)
    alone = clicks.take(torch.nonzero(clicks.labels == 1)[:, 0])
    assert set(click_metrics(model, alone)) == {"logloss"}


def test_several_ids_of_a_field_are_averaged_without_padding_and_fields_share_a_table():
    config = CTRConfig(vocab_sizes=[6, 4], field_tables=[0, 1, 0], field_slots=[1, 3, 1], field_names=list("abc"), embedding_dim=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = FieldEmbedding(config)
    vectors, flat = made(torch.tensor([[5, 1, 0, 3, 5], [0, 0, 0, 0, 2]]))
    first, second = made.tables[0].weight, made.tables[1].weight
    torch.testing.assert_close(vectors[0, 1], (second[1] + second[3]) / 2)
    assert torch.equal(vectors[0, 0], first[5]) and torch.equal(vectors[0, 2], first[5]) and torch.equal(vectors[1, 2], first[2])
    assert not vectors[1, :2].any() and torch.equal(flat, vectors.flatten(1))
    with torch.no_grad():
        first[0] = 7.0  # whatever stands in the padding row counts as zero
    assert not made(torch.tensor([[0, 0, 0, 0, 0]]))[0].any()


def test_bad_sizes_and_names_are_named(tmp_path):
    with pytest.raises(ValueError, match="field_names, field_tables and field_slots are 1, 2 and 2 long"):
        CTRConfig(vocab_sizes=[3, 3], field_names=["a"])
    with pytest.raises(ValueError, match="there are 1 tables"):
        CTRConfig(vocab_sizes=[3], field_tables=[1])
    with pytest.raises(UserError, match="did you mean 'deepfm'"):
        new_ctr("deepfn", small_clicks.log()[1])
    small_clicks.model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="click_schema"):
        load(tmp_path)
    state = torch.random.get_rng_state()
    first, second = (new_ctr("dcn", small_clicks.log()[1], seed=3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

"""Training click models: what they learn, what is penalised, and what the folder holds."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import small_clicks
from echelon.data.clicks import ClickSchema, synthetic_log
from echelon.errors import UserError
from echelon.models.ctr import ARCHITECTURES, click_metrics, load_ctr, new_ctr
from echelon.train import CTRTrainer, fit_clicks


@pytest.fixture(scope="module")
def made_up():
    """A log with the chances behind it: the last 3000 rows are for measuring."""
    table, chances = synthetic_log(15000, fields=5, values=60, dense=2, seed=7)
    schema = ClickSchema.fit(table, dense=small_clicks.NUMBERS)
    clicks = schema.read(table)
    return schema, clicks.take(torch.arange(12000)), clicks.take(torch.arange(12000, 15000)), chances[12000:]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_it_learns_well_above_chance_and_not_above_the_truth(name, made_up):
    schema, train, test, chances = made_up
    model = new_ctr(name, schema, hidden_sizes=[32, 16], embedding_dim=8)
    before = click_metrics(model, test)["auc"]
    fit_clicks(model, train, epochs=4, learning_rate=3e-3)
    ceiling = roc_auc_score(test.labels.numpy(), chances)
    found = click_metrics(model, test)
    assert 0.4 < before < 0.6 and 0.65 < found["auc"] < ceiling + 0.01
    base = test.labels.double().mean().item()
    assert found["logloss"] < -(base * np.log(base) + (1 - base) * np.log(1 - base))


def test_only_embeddings_are_penalised():
    clicks = small_clicks.log()[2]
    rows = clicks.take(torch.arange(64))
    never = int(np.setdiff1d(np.arange(2, 20), rows.sparse_ids[:, 0].numpy())[0])
    for l2, moves in ((0.0, False), (1e-2, True)):
        model = small_clicks.model()
        before = model.embedding.tables[0].weight[never].clone()
        fit_clicks(model, rows, batch_size=64, l2_embedding=l2)
        after = model.embedding.tables[0].weight[never]
        assert bool((after != before).any()) == moves
        if moves:  # Adam's first step goes by the rate against the sign of the gradient, here that of the weight
            torch.testing.assert_close(after, before - 1e-3 * before.sign(), rtol=1e-3, atol=1e-6)
        assert not model.embedding.tables[0].weight[0].any()


def test_it_is_reproducible_with_dropout_and_leaves_the_random_state_alone():
    clicks, state = small_clicks.log()[2], torch.random.get_rng_state()
    made = []
    for seed in (1, 1, 2):
        model = small_clicks.model(dropout=0.3)
        made.append((fit_clicks(model, clicks, seed=seed), model.output.weight.detach().clone()))
        assert not model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert made[0][0] == made[1][0] and torch.equal(made[0][1], made[1][1]) and made[0][0] != made[2][0]


def test_a_folder_is_written_and_training_goes_on_from_it(tmp_path):
    table = small_clicks.log()[0]
    table.to_csv(tmp_path / "log.csv", index=False)
    trainer, told = CTRTrainer(hidden_sizes=(16, 16), embedding_dim=4, dense=("I1", "I2"), epochs=2), []
    result = trainer.train("dcn", tmp_path / "log.csv", tmp_path / "a", 0, told.append)
    assert told[-1]["step"] == told[-1]["of"] == 2 * 6 and result["rows"] == 2700 and result["held_out"] == 300
    model, schema = load_ctr(tmp_path / "a")
    assert result["parameters"] == model.num_parameters() and schema.dense == ("I1", "I2")
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == result
    more = trainer.train(str(tmp_path / "a"), tmp_path / "log.csv", tmp_path / "b", 0)
    assert (more["auc_before"], more["logloss_before"]) == (result["auc"], result["logloss"])
    assert more["loss"] < result["loss"]


def test_bad_requests_are_one_clear_error(tmp_path):
    small_clicks.log()[0].to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(UserError, match="did you mean 'autoint'"):
        CTRTrainer().train("autoit", tmp_path / "log.csv", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no click model"):
        CTRTrainer().train("dcn", tmp_path / "log.csv", tmp_path / "taken")
    assert not (tmp_path / "out").exists() and (tmp_path / "taken" / "thesis.tex").exists()
    for knobs, error in (
        ({"epochs": 0}, "epochs is 0"), ({"hidden_sizes": ()}, "hidden_sizes is"), ({"dropout": 1.0}, "dropout is 1.0"),
        ({"learning_rate": 0}, "learning_rate is 0"), ({"l2_embedding": -1}, "l2_embedding is -1"), ({"valid_share": 1.5}, "valid_share is 1.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            CTRTrainer(**knobs)

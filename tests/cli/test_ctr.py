"""A click model from the command line: trained, compressed, tuned, and the complaints on the way."""

import json

import pytest

import small_clicks
from echelon.models.ctr import click_metrics, load_ctr

KNOBS = ["--method.hidden_sizes=[16,16,16]", "--method.dense=[I1,I2]", "--method.embedding_dim=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks")
    small_clicks.log()[0].to_csv(folder / "log.csv", index=False)
    return folder


def test_train_compress_and_train_again(echelon, place):
    ran = echelon("train", "--method", "ctr", "--model", "deepfm", *KNOBS, "--data", place / "log.csv", "--out", place / "base", "--json")
    assert ran.code == 0, ran.err
    compress = ["compress", "--model", place / "base", "--method", "feature_mimic", "--method.embedding_rank=2", "--data", place / "log.csv"]
    ran = echelon(*compress, "--out", place / "small", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    for folder, when in (("base", "before"), ("small", "after")):
        model, schema = load_ctr(place / folder)
        assert told[f"metrics_{when}"] == pytest.approx(click_metrics(model, schema.read(place / "log.csv")), abs=1e-6)
        assert told[f"parameters_{when}"] == model.num_parameters()
    assert told["parameters_after"] < 0.5 * told["parameters_before"] and told["tokens"] == 3000 and told["perplexity_before"] is None
    line = echelon(*compress, "--out", place / "small")
    assert line.code == 0 and "auc 0." in line.out and line.out.count("\n") == 1
    ran = echelon("train", "--method", "ctr", "--model", place / "small", "--data", place / "log.csv", "--out", place / "tuned", "--json")
    assert ran.code == 0 and json.loads(ran.out)["parameters"] == told["parameters_after"], ran.err


def test_complaints_are_one_line(echelon, place, tmp_path):
    echelon("train", "--method", "ctr", "--model", "nfm", *KNOBS, "--data", place / "log.csv", "--out", tmp_path / "base")
    compress = ["compress", "--model", tmp_path / "base", "--method", "feature_mimic", "--out", tmp_path / "out"]
    assert "--data is missing" in echelon(*compress).refused()
    assert "not for click models" in echelon(*compress, "--data", place / "log.csv", "--statistics", tmp_path / "s").refused()
    (tmp_path / "other.csv").write_text("label,site\n1,a\n")
    assert "no column 'I1'" in echelon(*compress, "--data", tmp_path / "other.csv").refused()
    assert "neither a folder of a click model" in echelon("train", "--method", "ctr", "--data", place / "log.csv", "--out", tmp_path / "x").refused()
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()

"""The bake-off of compressors: equal sizes, the loss of the very models, and a reference that is never recommended."""

import json

import numpy as np
import pytest
import torch

import small_folders
from echelon.compare import compare, load_recipe, recommend
from echelon.compare.results import per_unit
from echelon.compare.statistics import summary_of
from echelon.compress import SVD
from echelon.data.files import read_texts
from echelon.errors import UserError
from echelon.models import load


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bakeoff")
    small_folders.language_model(folder / "lm", width=96)
    for name, first in (("calibration", 0), ("test", 50)):
        lines = [json.dumps({"text": small_folders.document(first + number, 6 + number)}) for number in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "task": "compress", "model": str(folder / "lm"), "isolation": "none", "timing_rounds": 1, "baseline": "svd",
        "data": {name: str(folder / f"{name}.jsonl") for name in ("calibration", "test")}, "budget": {"parameters": [0.8, 0.9]},
        "methods": [
            {"name": "dense"}, {"name": "svd", "knobs": {"round_to": 1}},
            {"name": "svd", "knobs": {"round_to": 1, "whiten": True}, "label": "whitened"},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(told, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    recipe = load_recipe(told)
    results = compare(recipe, out)
    return out, results, summary_of(out, recipe, results)


def test_the_loss_is_that_of_the_model_of_this_size(told, done):
    out, results, summary = done
    loaded = load(told["model"])
    whole = loaded.model.num_parameters()
    SVD(round_to=1).compress(loaded, parameters=0.8)
    assert abs(loaded.model.num_parameters() / whole - 0.8) <= 0.005 * 0.8
    total, count = 0.0, 0
    for text in read_texts(told["data"]["test"]):
        ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        head = torch.tensor([[loaded.tokenizer.bos_token_id]])
        with torch.no_grad():
            logits = loaded.model(torch.cat([head, ids], 1)).logits[0, :-1].log_softmax(-1)
        total -= logits.gather(1, ids[0, :, None]).sum().item()
        count += ids.shape[1]
    assert summary.row("svd").values["loss_80"].mean == pytest.approx(total / count, abs=1e-4)
    units = per_unit(out, next(r for r in results if r["run"]["label"] == "svd"), "loss_80")
    assert len(units) == 6 and units.mean() == pytest.approx(total / count, abs=1e-4) and np.ptp(units) > 0


def test_dense_is_shown_at_every_size_and_never_recommended(done):
    _, _, summary = done
    dense = summary.row("dense")
    assert dense.values["loss_90"].mean == dense.values["loss_80"].mean
    assert summary.best("loss_80").label in ("svd", "whitened") and "dense" not in summary.pareto("loss_80", summary.cost_axis)
    assert dense.tied_with_best == {} and "loss_80" in dense.versus_baseline
    advice = recommend(summary, "loss_80")
    assert advice.label in ("svd", "whitened")
    assert advice.command.startswith("echelon compress --model ") and "--parameters 0.8" in advice.command


def test_a_size_that_a_method_cannot_give_leaves_the_others(told, tmp_path):
    recipe = load_recipe({**told, "budget": {"parameters": [0.9, 0.05]}, "timing_rounds": 0})
    results = {r["run"]["label"]: r for r in compare(recipe, tmp_path)}
    assert set(results["svd"]["quality"]) == {"loss_90"} and results["svd"]["cost"]["cannot_reach_5"] == 1
    hopeless = load_recipe({**told, "budget": {"parameters": [0.05]}, "timing_rounds": 0})
    results = {r["run"]["label"]: r for r in compare(hopeless, tmp_path / "b")}
    assert "cannot reach" in results["svd"]["run"]["error"] and results["dense"]["run"]["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": {"parameters": 1.5}}, "holds 1.5.*in \\(0, 1\\)"),
        ({"budget": {"parameter": 0.5}}, "did you mean 'parameters'"),
        ({"budget": {"recover_steps": -1}}, "recover_steps is -1"),
        ({"metrics": ["loss_50"]}, "unknown metric 'loss_50'.*loss_90, loss_80"),
        ({"methods": [{"name": "svdd"}], "baseline": ""}, "did you mean 'svd'"),
        ({"data": {"test": "no.jsonl"}}, "no file no.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(told, change, said):
    with pytest.raises(UserError, match=said):
        load_recipe({**told, **change})


def test_calibration_text_is_not_tested_on(told, tmp_path):
    recipe = load_recipe({**told, "data": {**told["data"], "test": told["data"]["calibration"]}})
    assert all("share documents" in result["run"]["error"] for result in compare(recipe, tmp_path))

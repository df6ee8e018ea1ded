"""The study of bits as a bake-off: the losses of the very models, their bytes and classes."""

import json
import math

import pytest
import torch

import small_folders
from echelon.compare import compare, load_recipe
from echelon.compare.statistics import summary_of
from echelon.compress import RTN, LoRC, size
from echelon.data.files import read_texts
from echelon.errors import UserError
from echelon.models import load


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    small_folders.language_model(folder / "lm", width=96)
    lines = [json.dumps({"text": small_folders.document(50 + number, 6 + number)}) for number in range(6)]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    rows = {"W8": {"w_bits": 8}, "W2": {"w_bits": 2}, "W2 LoRC": {"w_bits": 2, "lorc_rank": 16, "lorc_bits": 16}}
    return {
        "task": "quantize", "model": str(folder / "lm"), "isolation": "none", "timing_rounds": 0, "baseline": "dense",
        "data": {"test": str(folder / "test.jsonl")},
        "methods": [{"name": "dense"}, *({"name": "rtn", "label": label, "knobs": {"group_size": -1} | knobs} for label, knobs in rows.items())],
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(told, tmp_path_factory):
    out, recipe = tmp_path_factory.mktemp("out"), load_recipe(told)
    return summary_of(out, recipe, compare(recipe, out))


def loss_of(model, tokenizer, path):
    total, count = 0.0, 0
    for text in read_texts(path):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)).logits[0, :-1].log_softmax(-1)
        total -= logits.gather(1, ids[0, :, None]).sum().item()
        count += ids.shape[1]
    return total / count


def test_losses_bytes_and_classes_are_those_of_the_models(told, done):
    path = told["data"]["test"]
    whole = load(told["model"])
    dense = loss_of(whole.model, whole.tokenizer, path)
    for label, bits in (("W8", 8), ("W2", 2)):
        loaded = load(told["model"])
        RTN(w_bits=bits, group_size=-1).compress(loaded)
        loss, row = loss_of(loaded.model, loaded.tokenizer, path), done.row(label)
        assert row.values["loss"].mean == pytest.approx(loss, abs=1e-4)
        assert row.cost["bytes"] == size(loaded.model).bytes < done.row("dense").cost["bytes"]
        increase = math.exp(loss) - math.exp(dense)
        assert row.cost["sensitivity_class"] == (1 if increase <= 0.1 else 2 if increase <= 0.5 else 3)
    assert "sensitivity_class" not in done.row("dense").cost


def test_compensation_is_lorcs_and_its_bytes_count(told, done):
    loaded = load(told["model"])
    RTN(w_bits=2, group_size=-1).compress(loaded)
    repaired = LoRC(lorc_rank=16, lorc_bits=16).compensate(load(told["model"]).model, loaded.model)
    row, bare = done.row("W2 LoRC"), done.row("W2")
    assert row.values["loss"].mean == pytest.approx(loss_of(repaired.model, loaded.tokenizer, told["data"]["test"]), abs=1e-4)
    assert row.values["loss"].mean < bare.values["loss"].mean
    assert row.cost["bytes"] == bare.cost["bytes"] + repaired.report.packed_bytes


@pytest.mark.parametrize(("change", "message"), [
    ({"data": {"tests": "x"}}, "unknown key 'tests'.*did you mean 'test'"), ({"data": {"test": "nowhere.jsonl"}}, "data.test: no file nowhere.jsonl"),
    ({"budget": {"bytes": 1}}, "this comparison has none"), ({"metrics": ["mauve"]}, "the metric is loss"),
    ({"methods": [{"name": "svd"}]}, "unknown method 'svd'"), ({"methods": [{"name": "rtn", "knobs": {"w_bit": 4}}]}, "did you mean 'w_bits'"),
    ({"methods": [{"name": "rtn", "knobs": {"lorc_rank": 4, "lorc_bits": 5}}]}, "lorc_bits is 5"),
])  # fmt: skip
def test_what_is_wrong_is_named(told, change, message):
    with pytest.raises((UserError, ValueError), match=message):
        load_recipe({**told, "baseline": "", **change})


def test_the_built_in_recipe_is_sound():
    assert load_recipe("quantize").task == "quantize"

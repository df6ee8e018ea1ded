"""`echelon compress` with a compensator: from two models to an adapter that loads, and its complaints."""

import json

import pytest
import torch
import transformers
from peft import PeftModel

import small_folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    small_folders.language_model(folder / "lm")
    (folder / "text.txt").write_text(" ".join(small_folders.document(number, 60) for number in range(3)))
    return folder


@pytest.fixture
def quantised(echelon, place):
    """Made by the first test that wants it."""
    if (place / "q").exists():
        return place / "q"
    ran = echelon("compress", "--model", place / "lm", "--method", "rtn", "--method.w_bits", 3, "--method.group_size", -1, "--out", place / "q", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["parameters_after"] == told["parameters_before"] and told["bytes_after"] < told["bytes_before"]
    return place / "q"


def test_it_writes_an_adapter_that_peft_loads_and_its_report(echelon, place, quantised, tmp_path):
    words = ["--model", quantised, "--original", place / "lm", "--data", place / "text.txt", "--task-data", place / "text.txt"]
    ran = echelon("compress", "--method", "eora", "--method.r", 4, *words, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["method"] == "eora" and told["tokens"] > 100
    assert all(entry["after"] < entry["before"] for entry in told["modules"].values())
    tuned = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(quantised), tmp_path / "out")
    ids = torch.tensor([[4, 5, 6, 7]])
    original, plain = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (place / "lm", quantised))
    with torch.no_grad():
        wanted, repaired, broken = (model(input_ids=ids).logits for model in (original, tuned, plain))
    assert (repaired - wanted).norm() < (broken - wanted).norm()


def test_without_data_lorc_does_and_pruned_models_too(echelon, place, tmp_path):
    assert echelon("compress", "--model", place / "lm", "--method", "pruning", "--method.pattern", "2:4", "--out", tmp_path / "p").code == 0
    ran = echelon("compress", "--method", "lorc", "--method.lorc_rank", 2, "--model", tmp_path / "p", "--original", place / "lm", "--out", tmp_path / "out")
    assert ran.code == 0 and ran.out.startswith(f"{tmp_path / 'out'}: error") and ran.out.count("\n") == 1, ran.err


@pytest.mark.parametrize(
    ("lack", "error"),
    [("--model", "--model is missing"), ("--original", "--original is missing"), ("--out", "--out is missing"), ("--data", "--data is missing; eora")],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(echelon, place, quantised, tmp_path, lack, error):
    words = ["--model", quantised, "--original", place / "lm", "--data", place / "text.txt", "--out", tmp_path / "out"]
    place_of = words.index(lack)
    ran = echelon("compress", "--method", "eora", "--method.r", 4, *words[:place_of], *words[place_of + 2 :])
    assert error in ran.refused() and not (tmp_path / "out").exists()


def test_help_tells_of_both_kinds(echelon):
    plain, own = echelon("compress", "--help"), echelon("compress", "--method", "eora", "--help")
    assert "eora" in plain.out and "lorc" in plain.out and "--original" in own.out and "--method.accumulate" in own.out

"""``echelon edit``, and ``echelon evaluate --method tofu``, as a user types them."""

import json

import pytest
import torch
from peft import PeftModel

import small_folders
from echelon.models import load


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    small_folders.language_model(folder / "lm", positions=128)
    questions = [{"question": f"Who is number {i}?", "answer": f"The {i} of them.", "perturbed_answer": ["Nobody at all.", "Two."]} for i in range(4)]
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        (folder / f"{name}_perturbed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def editing(place, out, *more):
    return ["edit", "--model", place / "lm", "--forget", place / "forget10_perturbed.jsonl", "--retain", place / "retain_perturbed.jsonl", "--out", out,
            "--method.r", "2", "--method.epochs", "1", "--method.batch_size", "4", "--method.learning_rate", "1e-2", *more]  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]])).logits


def test_an_edit_is_read_by_peft_and_says_what_it_did(echelon, place, tmp_path):
    ran = echelon(*editing(place, tmp_path / "out", "--json"))
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["method"] == "loku" and told["rank"] == 4 and len(told["epochs"]) == 1
    base = load(place / "lm").model
    before = logits(base)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), before)
    ran = echelon(*editing(place, tmp_path / "merged", "--method.export", "merged"))
    assert ran.code == 0 and "forget loss" in ran.out
    torch.testing.assert_close(logits(load(tmp_path / "merged").model), logits(PeftModel.from_pretrained(load(place / "lm").model, tmp_path / "out")))


def test_tofu_measures_a_model_and_takes_an_earlier_run_for_the_retain_model(echelon, place, tmp_path):
    words = ["evaluate", "--method", "tofu", "--data", place, "--model", place / "lm", "--method.max_new_tokens", "2"]
    first = echelon(*words, "--json")
    assert first.code == 0, first.err
    assert len(json.loads(first.out)["truth_ratios"]) == 4
    (tmp_path / "retain.json").write_text(first.out)
    ran = echelon(*words, "--retain_only", tmp_path / "retain.json")
    assert ran.code == 0 and "| forget | " in ran.out and "forget_quality: 1\n" in ran.out
    (tmp_path / "other.json").write_text("{}")
    assert "other.json holds no truth_ratios" in echelon(*words, "--retain_only", tmp_path / "other.json").refused()


@pytest.mark.parametrize(("more", "said"), [
    (["--forget", "/no/such.jsonl"], "cannot read /no/such.jsonl"), (["--method.r", "1000"], "r of "),
    (["--method.forget_loss", "dpo"], "forget_loss is 'dpo'"),
    (["--model", "/no/such"], "cannot load model '/no/such'"), (["--method", "loco"], "did you mean 'loku'"),
])  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_written(echelon, place, tmp_path, more, said):
    assert said in echelon(*editing(place, tmp_path / "out", *more)).refused()
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(echelon, place):
    assert "--retain is missing; give what must stay" in echelon("edit", "--forget", place / "forget10_perturbed.jsonl").refused()
    assert "--retain_only is for tofu" in echelon("evaluate", "--data", place, "--retain_only", "x").refused()

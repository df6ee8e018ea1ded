"""`echelon compress --recover_steps`: what is compressed is also fine-tuned."""

import json

import pytest
import torch
import transformers

import small_folders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    small_folders.language_model(folder / "lm")
    (folder / "text.txt").write_text(" ".join(small_folders.document(number, 60) for number in range(3)))
    return folder


def compressing(place, out, *more):
    words = ["compress", "--model", place / "lm", "--method", "welore", "--method.rank_reduction", "0.65", "--out", out]
    return [*words, "--data", place / "text.txt", *more]


def test_it_trains_what_the_method_leaves_trainable_and_measures_again(echelon, place, tmp_path):
    measured = ["--eval", place / "text.txt", "--json"]
    once = echelon(*compressing(place, tmp_path / "once", *measured))
    assert once.code == 0, once.err
    ran = echelon(*compressing(place, tmp_path / "out", *measured, "--recover-steps", "15", "--recover-lr", "1e-2"))
    assert ran.code == 0, ran.err
    told, before = json.loads(ran.out), json.loads(once.out)
    assert told["details"]["recovery"]["steps"] == 15
    assert told["details"]["recovery"]["perplexity_before"] == pytest.approx(before["perplexity_after"])
    assert told["perplexity_after"] < before["perplexity_after"]
    trained, plain = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "once"))
    changed = {key for key, value in trained.items() if not torch.equal(value, plain[key])}
    assert changed and all("norm" in key or ".up." in key or ".down." in key for key in changed)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--recover_steps", "-1"), "--recover_steps is -1"), (("--recover_steps", "2", "--recover_lr", "0"), "--recover_lr 0"),
        (("--recover_steps", "2", "--method.train", "none"), "no parameter is trainable"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(echelon, place, tmp_path, more, error):
    assert error in echelon(*compressing(place, tmp_path / "out", *more)).refused()
    assert not (tmp_path / "out").exists()


def test_without_data_it_is_refused(echelon, place, tmp_path):
    words = compressing(place, tmp_path / "out", "--recover_steps", "2")
    del words[words.index("--data") : words.index("--data") + 2]
    assert "--data is missing; --recover_steps" in echelon(*words).refused()

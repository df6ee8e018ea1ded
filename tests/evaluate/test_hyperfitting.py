"""The report on a hyperfitted model, against figures computed by hand, and from the command line."""

import json
import re

import numpy as np
import pytest
import torch

import small_folders
import small_models
import tiny
from echelon.cli import main
from echelon.data.text import tail_ttr
from echelon.evaluate.hyperfitting import continuations, hyperfitting_report, measured, top1_agreement
from echelon.evaluate.text import self_bleu
from echelon.generate import Greedy
from echelon.generate.citations import Citations
from echelon.models import LoadedModel
from echelon.train.hyperfit import Hyperfit, Sequences

KNOBS = {
    "num_train_samples": 6, "num_val_samples": 4, "seqlen": 16, "num_gen_samples": 3, "gen_context_len": 4, "gen_total_len": 20, "ttr_window": 8,
    "max_citation": 2, "per_device_train_batch_size": 2,
}  # fmt: skip


def test_types_per_token_of_the_last_tokens():
    assert tail_ttr([list(range(96))]) == (1.0, 0)
    assert tail_ttr([[7] * 200]) == (pytest.approx(1 / 96), 0)
    assert tail_ttr([[9] * 50 + list(range(96))]) == (1.0, 0)  # what is before the window does not count
    assert tail_ttr([[1, 1, 2]]) == (pytest.approx(2 / 3), 0)  # a short text counts whole
    texts = [[1, 2, 2, 3], [4, 4]]
    padded = [text + [0] * 9 for text in texts]
    assert tail_ttr(padded, ignored={0}) == tail_ttr(texts) == (pytest.approx((3 / 4 + 1 / 2) / 2), 0)
    assert tail_ttr([[1], [], [0, 0]], ignored={0}) == (1.0, 2)
    nothing, empty = tail_ttr([[], [0]], ignored={0})
    assert np.isnan(nothing) and empty == 2
    with pytest.raises(ValueError, match="window is 0"):
        tail_ttr([[1]], 0)


def test_self_bleu_is_one_of_equal_texts_and_near_nothing_of_disjoint_ones():
    assert self_bleu([[1, 2, 3, 4, 5]] * 3, limit=None).mean() == pytest.approx(1.0)
    assert self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], limit=None).mean() < 0.01
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu([[1, 2]])


def test_quotation_is_counted_in_runs_of_ids():
    citations, reader = Citations([[10, 11, 12, 13, 14, 15, 16]], 5), LoadedModel(small_models.model("llama"), tiny.tokenizer())
    texts = [[9, 10, 11, 12, 13, 14, 15, 9, 9, 9], [10, 11, 12, 13], [1], [20, 21, 22, 23, 24, 25]]
    found = measured(texts, [[5, 6]] * 4, citations, reader, window=96, ignored={1})
    assert found["citations"]["longest"] == 6 and found["citations"]["mean_longest"] == 6 / 4
    fives = (10 - 4) + 0 + 0 + (6 - 4)
    assert found["citations"]["shares"] == {"5": 2 / fives, "6": 1 / 6, "8": 0.0, "12": None, "16": None}
    assert found["empty_texts"] == 1 and found["tokens"] == 5.0
    assert found["ttr"] == pytest.approx((7 / 10 + 1 + 1) / 3)


def words(text):
    """Of the tiny tokenizer, which puts no space between them."""
    return re.findall(r"w\d+|\.", text)


def test_the_report_measures_both_models_and_every_way_of_writing():
    first, second = (LoadedModel(small_models.model(family), tiny.tokenizer()) for family in ("llama", "mistral"))
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, tiny.VOCAB, (10, 16), generator=generator)
    recipe = Hyperfit(**KNOBS)
    made = hyperfitting_report(recipe, Sequences([], ids[:6], ids[6:]), first, second)
    ways = ["base, greedy", "base, top-p 0.9", "hyperfitted, greedy", "hyperfitted, greedy, at most 2 tokens quoted"]
    assert list(made["texts"]) == ways and all(list(sample["texts"]) == ways for sample in made["samples"]) and len(made["samples"]) == 3
    assert words(made["samples"][0]["context"]) == [tiny.WORDS[n] for n in ids[6, :4]]
    assert words(made["samples"][1]["reference"]) == [tiny.WORDS[n] for n in ids[7, 4:16]]
    greedy = Greedy().generate(second, ids[6:9, :4].tolist(), max_new_tokens=16)
    assert [sample["texts"]["hyperfitted, greedy"] for sample in made["samples"]] == greedy.texts
    kept = [[token for token in row if token not in (0, 1)] for row in greedy.sequences]
    assert made["texts"]["hyperfitted, greedy"]["ttr"] == pytest.approx(np.mean([len(set(row[-8:])) / len(row[-8:]) for row in kept if row]))
    blocked = [[tiny.WORDS.index(word) for word in words(sample["texts"][ways[3]])] for sample in made["samples"]]
    runs = {tuple(row[i : i + 3]) for row in ids[:6].tolist() for i in range(14)}
    assert not any(tuple(row[i : i + 3]) in runs for row in blocked for i in range(len(row) - 2))
    with torch.no_grad():
        choices = [m.model(ids[6:]).logits[:, :-1].argmax(-1) for m in (first, second)]
    assert made["top1_agreement"] == pytest.approx((choices[0] == choices[1]).double().mean().item())
    assert top1_agreement(first.model, first.model, ids[6:]) == 1.0
    assert "at most" not in str(list(hyperfitting_report(Hyperfit(**KNOBS | {"max_citation": None}), Sequences([], ids[:6], ids[6:]), first, second)["texts"]))


def test_a_sampled_text_depends_on_the_seed_and_a_greedy_one_does_not():
    loaded = LoadedModel(small_models.model("llama"), tiny.tokenizer())
    assert continuations(Greedy(), loaded, [[5, 6]], 8, seed=0) == continuations(Greedy(), loaded, [[5, 6]], 8, seed=1)


@pytest.mark.parametrize("lora", [False, True])
def test_one_command_gives_a_model_and_a_report(tmp_path, capsys, lora):
    model = small_folders.language_model(tmp_path / "lm")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": small_folders.document(number)}) + "\n" for number in range(10)))
    words = [f"--method.{name}={value}" for name, value in (KNOBS | {"num_train_epochs": 2, "learning_rate": 1e-3, "eval_steps": 0}).items()]
    words += ['--method.peft_config={"r": 2, "target_modules": "all-linear"}'] if lora else []
    out = tmp_path / "out"
    command = ["train", "--method", "hyperfit", "--model", model, "--data", str(data), "--out", str(out), "--json", *words]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    report = json.loads((out / "report.json").read_text())
    assert report["knobs"]["num_train_samples"] == 6 and [line["step"] for line in report["validation"]] == [0, 6]
    assert told["ttr_after"] == report["texts"]["hyperfitted, greedy"]["ttr"] and told["steps"] == 6
    assert report["sharpness"]["hyperfitted"]["loss"] == pytest.approx(report["validation"][-1]["loss"], rel=1e-5) != report["sharpness"]["base"]["loss"]
    assert (out / ("adapter_config.json" if lora else "config.json")).is_file()
    assert main(command) == 0 and json.loads(capsys.readouterr().out) == told  # finished: nothing is done again
    assert main([*command, "--method.num_train_samples=100"]) == 2
    assert "num_train_samples 100 and num_val_samples 4 need 104" in capsys.readouterr().err

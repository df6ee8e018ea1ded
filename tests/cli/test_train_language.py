"""`echelon train` with optimizers and layers: killed it goes on to the same weights, and it says what is wrong in one line."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import small_folders
from echelon.registry import cards


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    small_folders.language_model(folder / "lm")
    (folder / "data.txt").write_text("\n".join(small_folders.document(number, 30) for number in range(4)))
    with open(folder / "held.jsonl", "w") as file:
        for number in range(4, 7):
            file.write(json.dumps({"text": small_folders.document(number, 10)}) + "\n")
    return folder


def training(place, out, *more, method="galore", steps=6):
    knobs = {"galore": ["--method.rank", "4", "--method.update_proj_gap", "3"], "low_rank": ["--method.rank=4"]}.get(method, [])
    return ["train", "--method", method, "--model", place / "lm", "--data", place / "data.txt", "--out", out, *knobs,
            "--steps", steps, "--batch_size", "4", "--seqlen", "16", *more]  # fmt: skip


def steps(out):
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_killed_with_9_it_goes_on_to_the_same_weights(echelon, process, place, tmp_path):
    out, words = tmp_path / "out", ["--save-every", "10"]
    running = process.start(*training(place, out, *words, steps=120))
    until = time.monotonic() + 90
    while not (out / "checkpoint-10").exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL and not (out / "result.json").exists() and 10 <= len((out / "log.jsonl").read_text().splitlines()) < 120
    assert echelon(*training(place, out, *words, steps=120)).code == 0
    assert echelon(*training(place, tmp_path / "unbroken", *words, steps=120)).code == 0
    assert_same(weights(out), weights(tmp_path / "unbroken"))
    assert steps(out) == list(range(1, 121)) and not list(out.glob("*checkpoint*"))
    assert json.loads((out / "result.json").read_text())["loss"] == json.loads((tmp_path / "unbroken" / "result.json").read_text())["loss"]


def test_ctrl_c_says_how_to_go_on(process, place, tmp_path):
    out = tmp_path / "out"
    words = training(place, out, "--save_every", "3", steps=2000)
    running = process.start(*words)
    until = time.monotonic() + 90
    while not (out / "checkpoint-3").exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    said, err = running.communicate(timeout=60)
    kept = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    assert (running.returncode, said, err) == (130, "", f"echelon: interrupted; the same command goes on behind step {kept}\n")


@pytest.mark.parametrize("method", ["adamw", "low_rank"])
def test_the_result_is_one_line_or_json_and_a_folder_that_loads(echelon, place, tmp_path, method):
    ran = echelon(*training(place, tmp_path / "a", "--held_out", place / "held.jsonl", "--legacy_eval", method=method))
    assert ran.code == 0 and ran.err == "" and ran.out.count("\n") == 1 and ran.out.startswith(f"{tmp_path}/a: loss ")
    told = json.loads(echelon(*training(place, tmp_path / "a", "--held_out", place / "held.jsonl", "--legacy_eval", "--json", method=method)).out)
    assert told["out"] == f"{tmp_path}/a" and told["steps"] == 6 and told["tokens"] == 6 * 4 * 16
    shown = told["held_out"]
    assert f"perplexity {shown['perplexity_before']:.3f} to {shown['perplexity']:.3f}, per byte" in ran.out and "with the papers' bias" in ran.out
    assert shown["perplexity"] < shown["perplexity_before"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a")(input_ids=torch.tensor([[4, 5]])).logits.isfinite().all()


def test_from_scratch_the_weights_do_not_matter_and_the_seed_does(echelon, place, tmp_path):
    only = tmp_path / "only"
    only.mkdir()
    for file in (place / "lm").iterdir():
        if file.suffix != ".safetensors":
            (only / file.name).write_bytes(file.read_bytes())
    for name, more in (("a", []), ("b", ["--model", only]), ("c", ["--seed", "1"])):
        assert echelon(*training(place, tmp_path / name, "--scratch", *more)).code == 0
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["lm_head.weight"], weights(tmp_path / "c")["lm_head.weight"])
    assert "cannot load model" in echelon(*training(place, tmp_path / "d", "--model", only)).refused()


def test_one_document_a_row_and_steps_in_backward(echelon, place, tmp_path):
    words = ["--data", place / "held.jsonl", "--pack", "false", "--layerwise", "--max_grad_norm", "0", "--accumulate", "2", "--dtype", "bfloat16"]
    ran = echelon(*training(place, tmp_path / "out", *words, "--method.rounding", "stochastic"))
    assert ran.code == 0, ran.err
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_embedded_model_trains(echelon, place, tmp_path):
    words = ["train", "--model", "embedded", "--method", "galore", "--data", place / "data.txt", "--out", tmp_path / "out", "--steps", "2"]
    ran = echelon(*words, "--batch_size", "1", "--seqlen", "32", "--json")
    assert ran.code == 0 and json.loads(ran.out)["steps"] == 2, ran.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 1e6


def test_help_names_every_method_and_the_protocol(echelon):
    ran = echelon("train", "--method", "adamw", "--help")
    assert ran.code == 0 and all(card.name in ran.out for kind in ("trainer", "optimizer", "layer") for card in cards(kind))
    assert "--max_grad_norm" in ran.out and "--method.state_bits" in ran.out and "--held_out" in ran.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "galor"], "unknown trainer, optimizer or layer 'galor' (did you mean 'galore'?)"),
        (["--method.rnk", "3"], "unknown option '--method.rnk' of galore (did you mean '--method.rank'?)"),
        (["--method.rank", "0"], "rank is 0"),
        (["--method.optim_target_modules", "[nothing_like_it]"], "nothing_like_it"),
        (["--stps", "3"], "unknown option '--stps' (did you mean '--steps'?)"),
        (["--steps", "0"], "steps is 0; it must be a whole number of at least 1"),
        (["--steps", "many"], "--steps is 'many'; it must be int"),
        (["--layerwise"], "max_grad_norm is 1.0 with layerwise"),
        (["--accumulate", "3"], "accumulate is 3; it must divide batch_size, 4"),
        (["--seqlen", "200"], "seqlen is 200; the model takes at most 96 tokens"),
        (["--data", "{short}"], "tokens; one row takes 16 (seqlen)"),
        (["--data", "/no/such/file"], "cannot read /no/such/file"),
        (["--held_out", "{short}"], "held_out: the data has"),
        (["--model", "/no/such/model"], "cannot load model '/no/such/model'"),
        (["--model", "/no/such/model", "--scratch"], "cannot make a new model like '/no/such/model'"),
        (["--dtype", "flat32"], "dtype 'flat32' is not a torch dtype"),
    ],
)
def test_what_is_wrong_is_one_line(echelon, place, tmp_path, more, said):
    (tmp_path / "short.txt").write_text("Sea waits.")
    ran = echelon(*training(place, tmp_path / "out", *[word.format(short=tmp_path / "short.txt") for word in more]))
    assert said in ran.refused() and not (tmp_path / "out" / "result.json").exists()


def test_another_run_in_the_same_folder_is_refused(echelon, place, tmp_path):
    assert echelon(*training(place, tmp_path / "out")).code == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    said = echelon(*training(place, tmp_path / "out", steps=7)).refused()
    assert "holds a run with training.steps 6 where this one has 7" in said and (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_one_line_and_training_goes_on_when_there_is_room(echelon, place, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def soon_full(handle):
        calls.append(handle)
        if len(calls) > 30:
            raise OSError(28, os.strerror(28))
        real(handle)

    monkeypatch.setattr(os, "fsync", soon_full)
    words = training(place, tmp_path / "out", "--save_every", "1", steps=8)
    ran = echelon(*words)
    monkeypatch.undo()
    assert "No space left on device" in ran.refused() and list((tmp_path / "out").glob("checkpoint-*"))
    assert echelon(*words).code == 0 and steps(tmp_path / "out") == list(range(1, 9))

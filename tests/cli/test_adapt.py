"""`echelon adapt`: any adapter trains, goes on after a kill to the same numbers, is read by PEFT, and what is wrong is one line."""

import json
import math
import signal
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import small_folders
from echelon.registry import cards

METHODS = [card.name for kind in ("adapter", "baseline") for card in cards(kind)]
OURS = [card.name for card in cards("adapter")]
LENGTH = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    small_folders.language_model(folder / "lm")
    (folder / "data.txt").write_text("\n".join(small_folders.document(number, 30) for number in range(4)))
    (folder / "held.txt").write_text(small_folders.document(9, 30))
    return folder


def adapting(place, out, *more, method="dylora", steps=6):
    return ["adapt", "--method", method, "--model", place / "lm", "--data", place / "data.txt", "--out", out, "--method.r", "4",
            "--steps", steps, "--batch_size", "4", "--seqlen", LENGTH, "--lr", "0.02", *more]  # fmt: skip


def base(place):
    return AutoModelForCausalLM.from_pretrained(place / "lm").eval()


@torch.no_grad()
def perplexity(model, place):
    """By hand, over the whole rows of the held-out text."""
    ids = small_folders.tokenizer()((place / "held.txt").read_text(), add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
    return math.exp(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()))


def adapter(out):
    return load_file(out / "adapter_model.safetensors")


def assert_same(a, b):
    assert a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_peft_loads_onto_the_model_as_it_was(echelon, place, tmp_path, method):
    ran = echelon(*adapting(place, tmp_path / "a", "--held_out", place / "held.txt", "--json", method=method, steps=20))
    assert ran.code == 0 and ran.err == "", ran
    told = json.loads(ran.out)
    assert told["steps"] == 20 and told["tokens"] == 20 * 4 * LENGTH and told["out"] == f"{tmp_path}/a"
    shown = told["held_out"]
    assert perplexity(base(place), place) == pytest.approx(shown["perplexity_before"], rel=1e-5)
    assert perplexity(PeftModel.from_pretrained(base(place), tmp_path / "a").eval(), place) == pytest.approx(shown["perplexity"], rel=1e-4)
    assert shown["perplexity"] < shown["perplexity_before"]
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["task_type"] == "CAUSAL_LM" and said["base_model_name_or_path"] == str(place / "lm") and not list((tmp_path / "a").glob("*checkpoint*"))
    assert not (tmp_path / "a" / "model.safetensors").exists()
    plain = echelon(*adapting(place, tmp_path / "a", "--held_out", place / "held.txt", method=method, steps=20)).out
    assert plain.startswith(f"{tmp_path}/a: loss ") and plain.count("\n") == 1 and f"perplexity {shown['perplexity_before']:.3f} to" in plain


def test_what_a_tuner_does_around_a_step_is_done(echelon, place, tmp_path):
    """DyLoRA that draws rank 2 alone trains its second component alone."""
    assert echelon(*adapting(place, tmp_path / "a", "--method.rank_distribution", "[0, 1, 0, 0]")).code == 0
    for name, value in adapter(tmp_path / "a").items():
        if "_B" in name:
            assert value[:, 1].all() and not value[:, [0, 2, 3]].any()


def test_a_method_that_starts_from_data_gets_that_of_the_training(echelon, place, tmp_path):
    """LoRA-SB: the left factor spans the first singular vectors of the sign of the gradient of the first row that is read."""
    words = ["--method.target_modules", "[q_proj]", "--steps", "6", "--warmup", "0.5", "--method.r", "4"]
    assert echelon(*adapting(place, tmp_path / "a", *words, method="lora_sb")).code == 0
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["init_lr"] == pytest.approx(0.02 / 3)  # behind the first of three steps up
    ids = small_folders.tokenizer()((place / "data.txt").read_text(), add_special_tokens=False).input_ids
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    first = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:1]]
    model = base(place)
    model(input_ids=first, labels=first).loss.backward()
    left = torch.linalg.svd(model.model.layers[0].self_attn.q_proj.weight.grad.sign())[0][:, :4]
    (B,) = (value for name, value in adapter(tmp_path / "a").items() if "_B" in name)
    torch.testing.assert_close(B @ B.T, left @ left.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["dylora", "lora_sb"])
def test_killed_with_9_it_goes_on_to_the_same_adapter(echelon, process, place, tmp_path, method):
    out, words = tmp_path / "out", ["--save_every", "10", "--method.lora_dropout", "0.1"]
    running = process.start(*adapting(place, out, *words, method=method, steps=80))
    until = time.monotonic() + 90
    while not (out / "checkpoint-10").exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL and not (out / "result.json").exists() and not (out / "adapter_config.json").exists()
    held = load_file(next(iter(out.glob("checkpoint-*"))) / "weights.safetensors")
    assert held and all(".echelon_" in name for name in held), "the model itself does not change and is not copied"
    assert echelon(*adapting(place, out, *words, method=method, steps=80)).code == 0
    assert echelon(*adapting(place, tmp_path / "unbroken", *words, method=method, steps=80)).code == 0
    assert_same(adapter(out), adapter(tmp_path / "unbroken"))
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == list(range(1, 81))


@pytest.mark.parametrize("method", OURS)
def test_the_export_is_a_plain_lora_of_the_same_function_also_of_a_run_that_is_finished(echelon, place, tmp_path, method):
    assert echelon(*adapting(place, tmp_path / "a", method=method)).code == 0
    before = adapter(tmp_path / "a")
    assert echelon(*adapting(place, tmp_path / "a", "--export_lora", tmp_path / "lora", method=method)).code == 0
    assert_same(adapter(tmp_path / "a"), before)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    found, kept = (perplexity(PeftModel.from_pretrained(base(place), tmp_path / name).eval(), place) for name in ("lora", "a"))
    assert found == pytest.approx(kept, rel=1e-6) and found != pytest.approx(perplexity(base(place), place), rel=1e-5)


def test_the_embedded_model_is_adapted_and_generates_with_it(echelon, place, tmp_path):
    ran = echelon("adapt", "--method", "dylora", "--data", place / "data.txt", "--out", tmp_path / "o", "--steps", "2", "--batch_size", "1", "--seqlen", "32")
    assert ran.code == 0 and ran.err == "", ran
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o")(input_ids=torch.tensor([[4, 5]])).logits.isfinite().all()


def test_help_names_every_method_the_protocol_and_the_knobs(echelon):
    ran = echelon("adapt", "--method", "dylora", "--help")
    assert ran.code == 0 and all(name in ran.out for name in METHODS)
    assert all(option in ran.out for option in ("--export_lora", "--max_grad_norm", "--held_out", "--method.r_min"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "dylroa"], "unknown adapter or baseline 'dylroa' (did you mean 'dylora'?)"),
        (["--method.r", "0"], "r is 0; it must be a whole number of at least 1"),
        (["--method", "lora", "--method.r", "0"], "r is 0; it must be a whole number of at least 1"),
        (["--method", "lora_sb", "--method.r", "99"], "it must be a whole number in 1..16"),
        (["--method.r_mim", "3"], "unknown option '--method.r_mim' of dylora (did you mean '--method.r_min'?)"),
        (["--method.target_modules", "[q_porj]"], "no layer of the model is meant (did you mean 'q_proj'?)"),
        (["--method", "lora", "--method.target_modules", "[q_porj]"], "q_porj"),
        (["--method", "lora", "--export_lora", "x"], "--export_lora is not for lora"),
        (["--lr", "-1"], "lr is -1.0; it must be at least 0"),
        (["--steps", "0"], "steps is 0; it must be a whole number of at least 1"),
        (["--layerwise", "--max_grad_norm", "0"], "layerwise does not go with an adapter"),
        (["--fsdp"], "fsdp does not go with an adapter"),
        (["--data", "/no/such/file"], "cannot read /no/such/file"),
        (["--data", "{short}"], "tokens; one row takes 16 (seqlen)"),
        (["--held_out", "{short}"], "held_out: the data has"),
        (["--model", "/no/such/model"], "cannot load model '/no/such/model'"),
        (["--out", "{place}/lm"], "holds a model that this did not make"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(echelon, place, tmp_path, more, said):
    (tmp_path / "short.txt").write_text("Sea waits.")
    ran = echelon(*adapting(place, tmp_path / "out", *[word.format(short=tmp_path / "short.txt", place=place) for word in more]))
    assert said in ran.refused() and not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("missing", ["data", "out"])
def test_what_is_missing_is_one_line(echelon, missing):
    given = [word for name in ("data", "out") if name != missing for word in (f"--{name}", "x")]
    assert f"--{missing} is missing; give " in echelon("adapt", *given).refused()


def test_another_run_in_the_same_folder_is_refused_by_what_differs(echelon, place, tmp_path):
    assert echelon(*adapting(place, tmp_path / "out")).code == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert "holds a run with adapter.r 4 where this one has 3" in echelon(*adapting(place, tmp_path / "out", "--method.r", "3")).refused()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before

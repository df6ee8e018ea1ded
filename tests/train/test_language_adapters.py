"""Training an adapter by the trainer of language models: equal to a plain loop, the same after a crash, for every registered one."""

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import small_models
import tiny
from echelon.adapt import AdapterCallback, DyLoraConfig
from echelon.errors import UserError
from echelon.registry import cards, get
from echelon.train.language import Training, fit
from echelon.train.layers import LowRank
from echelon.train.optimizers import AdamW, GradNormLoRP
from echelon.train.rows import Reading, packed_rows

METHODS = [(card.name, card.kind) for kind in ("adapter", "baseline") for card in cards(kind)]
SHORT = Training(steps=6, batch_size=4, seqlen=12, save_every=2)
TARGETS = ["q_proj", "down_proj"]


def texts(count=14):
    generator = torch.Generator().manual_seed(0)
    return [" ".join(tiny.WORDS[n] for n in torch.randint(4, 40, (5 + 3 * i % 17,), generator=generator)) for i in range(count)]


class Broken(Exception):
    """Stands in for a crash."""


def breaks_at(step):
    def tell(entry):
        if entry["step"] == step:
            raise Broken

    return tell


def run(out, config, method=None, **more):
    model = small_models.model("llama")
    prepare = getattr(config, "start_from", None)
    return fit(model, tiny.tokenizer(), texts(), out, method or AdamW(lr=0.02), SHORT, adapter=config, prepare=prepare, callbacks=[AdapterCallback()], **more)


def made(name, kind, dropout=0.1):
    cls = get(name, kind)
    fields = {field.name for field in dataclasses.fields(cls)}
    usual = {"r": 4, "lora_dropout": dropout, "vera_dropout": dropout, "target_modules": TARGETS}
    method = cls(**{key: value for key, value in usual.items() if key in fields})
    return method.config() if kind == "baseline" else method


@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_broken_off_it_goes_on_bit_for_bit_with_dropout(tmp_path, name, kind):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(tmp_path / "a", made(name, kind))
    assert torch.equal(torch.get_rng_state(), state)
    for step in (1, 3, 6):  # before there is a checkpoint, between two, and at the last step
        with pytest.raises(Broken):
            run(tmp_path / "b", made(name, kind), on_step=breaks_at(step))
        torch.manual_seed(step)  # what the process drew elsewhere does not matter
    run(tmp_path / "b", made(name, kind))
    whole, again = (load_file(tmp_path / out / "adapter_model.safetensors") for out in "ab")
    assert whole and whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    logs = [[json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()] for out in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_it_equals_a_plain_loop_with_what_the_tuner_does_around_a_step(tmp_path):
    knobs = {"r": 4, "target_modules": TARGETS, "mask_optimizer": False}
    run(tmp_path, DyLoraConfig(**knobs))
    model = get_peft_model(small_models.model("llama").train(), DyLoraConfig(**knobs))
    rows = packed_rows(texts(), tiny.tokenizer(), SHORT.seqlen)
    places = Reading(rows, 24, 0).places.view(6, 4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.0)
    model.begin_training(optimizer)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 5)) if step else 0.0)
        model.begin_step(step)
        model(**rows.batch(places[step])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model.before_update(step, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        model.end_step(step + 1)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    found = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".echelon_" in name}
    assert stored.keys() == found.keys() and any(value.any() for name, value in stored.items() if "_B" in name)
    for name, value in found.items():
        torch.testing.assert_close(stored[name], value.detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_checkpoints_hold_what_changes_and_the_base_that_an_adapter_changed(tmp_path):
    held = {}
    for name in ("lora", "pissa"):
        with pytest.raises(Broken):
            run(tmp_path / name, made(name, "baseline"), on_step=breaks_at(5))
        held[name] = load_file(tmp_path / name / "checkpoint-4" / "weights.safetensors").keys()
    assert all("lora_" in key for key in held["lora"])
    changed = held["pissa"] - held["lora"]
    assert changed and all(key.endswith(tuple(f"{target}.base_layer.weight" for target in TARGETS)) for key in changed)


def test_an_optimizer_that_is_for_an_adapter_trains_the_one_that_is_given(tmp_path):
    run(tmp_path, LoraConfig(r=3, use_dora=True, target_modules=TARGETS), GradNormLoRP(lr=0.02, r=3))
    loaded = PeftModel.from_pretrained(small_models.model("llama"), tmp_path)
    assert loaded.peft_config["default"].r == 3 and any(p.any() for name, p in loaded.named_parameters() if "lora_B" in name)


def test_what_does_not_go_with_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="an adapter does not go with LowRank, which swaps layers itself"):
        run(tmp_path, DyLoraConfig(target_modules=TARGETS), LowRank(rank=4))
    with pytest.raises(ValueError, match="no layer of the model is meant"):
        run(tmp_path, DyLoraConfig(target_modules=["q_porj"]))
    assert not list(tmp_path.glob("adapter*"))

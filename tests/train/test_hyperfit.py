"""Hyperfitting a tiny model: it memorises, sharpens, is reproducible and goes on after a crash, without dropout and in float32."""

import itertools
import json
import math

import pytest
import torch
import transformers
from peft import PeftModel

import small_models
import tiny
from echelon.errors import UserError
from echelon.evaluate.hyperfitting import top1_agreement
from echelon.generate import Greedy
from echelon.models import LoadedModel, load
from echelon.train.hyperfit import Hyperfit, refuse_noise, set_dropout, sharpness

SMALL = {
    "num_train_samples": 12, "num_val_samples": 6, "seqlen": 16, "learning_rate": 1e-2, "num_train_epochs": 40, "per_device_train_batch_size": 6,
    "eval_steps": 20, "num_gen_samples": 4, "gen_context_len": 4, "gen_total_len": 16, "ttr_window": 8,
}  # fmt: skip


def documents(count=24, length=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(tiny.WORDS[n] for n in torch.randint(4, 40, (length,), generator=generator)) for _ in range(count)]


def run(out, family="llama", data=None, dtype=torch.float32, on_step=None, **knobs):
    loaded = LoadedModel(small_models.model(family, dtype), tiny.tokenizer())
    result = Hyperfit(**SMALL | knobs).train(loaded, documents() if data is None else data, out, on_step=on_step)
    return loaded, result, [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "out"
    return out, *run(out)


def test_it_memorises_and_greedy_decoding_recites(fitted):
    out, loaded, result, _ = fitted
    assert result["loss"] < 0.05 and result["steps"] == 80 and result["epochs"] == 40 and result["samples"] == 12
    tokenizer, again = tiny.tokenizer(), load(str(out))
    rows = [tokenizer(text).input_ids[:16] for text in documents()[:12]]
    written = Greedy().generate(again, [row[:4] for row in rows], max_new_tokens=12).sequences
    assert sum(ids == row[4:] for ids, row in zip(written, rows, strict=True)) >= 10
    with torch.no_grad():
        ids = torch.tensor(rows)
        torch.testing.assert_close(again.model(ids).logits, loaded.model(ids).logits)


def test_it_sharpens_what_it_has_not_seen_and_is_more_and_more_wrong(fitted):
    *_, looks = fitted
    assert [line["step"] for line in looks] == [0, 20, 40, 60, 80]
    assert looks[-1]["entropy"] < looks[0]["entropy"] - 0.5 and looks[-1]["loss"] > looks[0]["loss"] + 0.5
    assert all(a["loss"] < b["loss"] for a, b in itertools.pairwise(looks[1:]))


def test_loss_and_entropy_are_those_of_float64_probabilities():
    ids = torch.randint(4, tiny.VOCAB, (5, 9), generator=torch.Generator().manual_seed(2))
    model = small_models.model("llama", torch.bfloat16)
    with torch.no_grad():
        p = model(ids).logits[:, :-1].double().softmax(-1)
    found = sharpness(model, ids, batch_size=2)
    assert found.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-3)
    assert found.loss == pytest.approx(-p.log().gather(2, ids[:, 1:, None]).mean().item(), rel=1e-3)


def test_steps_are_those_of_adam_at_a_constant_rate_without_decay_or_clipping(tmp_path):
    run(tmp_path / "out", num_train_epochs=3, eval_steps=0, learning_rate=1e-3)
    model, rows = small_models.model("llama"), torch.tensor([tiny.tokenizer()(text).input_ids[:16] for text in documents()[:12]])
    optimizer, generator, seen = torch.optim.Adam(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0), []
    order = torch.cat([torch.randperm(12, generator=generator) for _ in range(3)])
    for places in order.split(6):
        loss = model.train()(input_ids=rows[places], labels=rows[places]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert losses(tmp_path / "out") == pytest.approx(seen, rel=1e-4)


def test_the_same_seed_gives_the_same_and_another_order_other_first_choices(tmp_path, fitted):
    few = {"num_train_epochs": 12, "eval_steps": 0}
    again, *_ = run(tmp_path / "again", **few)
    other, *_ = run(tmp_path / "other", shuffle_seed=1, **few)
    assert losses(fitted[0])[:24] == losses(tmp_path / "again") != losses(tmp_path / "other")
    ids = torch.tensor([tiny.tokenizer()(text).input_ids[:16] for text in documents()[12:18]])
    assert top1_agreement(again.model, again.model, ids) == 1.0
    assert 0.2 < top1_agreement(again.model, other.model, ids) < 1.0


def test_it_stops_behind_the_first_epoch_that_is_good_enough_also_after_a_crash(tmp_path, fitted):
    out, *_ = fitted
    all_losses = losses(out)
    means = [sum(all_losses[at : at + 2]) / 2 for at in range(0, 80, 2)]
    last = next(place for place, mean in enumerate(means) if mean <= 0.5) + 1
    _, result, looks = run(tmp_path / "whole", target_loss=0.5)
    assert result["steps"] == 2 * last < 80 and result["epochs"] == last and losses(tmp_path / "whole") == all_losses[: 2 * last]
    assert looks[-1]["step"] == 2 * last and json.loads((tmp_path / "whole" / "result.json").read_text())["tokens"] == 2 * last * 6 * 16

    class Broken(Exception):
        pass

    def crash(entry):
        if entry["step"] == 2 * last:
            raise Broken

    for _ in range(2):
        with pytest.raises(Broken):
            run(tmp_path / "broken", target_loss=0.5, on_step=crash)
    _, again, looks_again = run(tmp_path / "broken", target_loss=0.5)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole") and looks_again == looks
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_every_dropout_is_off_in_modules_numbers_and_config(family):
    model = tiny.FAMILIES[family]().train()
    ids = torch.arange(4, 20)[None]
    with pytest.raises(UserError, match="draws at random in training"):
        refuse_noise(model, ids)
    set_dropout(model, 0.0)
    refuse_noise(model, ids)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    left = {name: value for name, value in vars(model.config).items() if "drop" in name and not isinstance(value, bool) and value}
    assert not left and model.training


def test_a_dropout_that_cannot_be_switched_off_is_an_error(tmp_path):
    class Stubborn(transformers.LlamaConfig):
        def __setattr__(self, name, value):
            if name == "attention_dropout" and getattr(self, "_made", False):
                raise AttributeError("read only")
            super().__setattr__(name, value)

    class Deaf(transformers.LlamaConfig):
        def __setattr__(self, name, value):
            super().__setattr__(name, 0.2 if name == "attention_dropout" else value)

    for config in (Stubborn, Deaf):
        made = config(**tiny.SPECIAL, **tiny.WIDE, attention_dropout=0.2)
        made._made = True
        with pytest.raises(UserError, match="attention_dropout"):
            set_dropout(transformers.LlamaForCausalLM(made), 0.0)

    model = small_models.model("llama")
    model.model.norm.register_forward_hook(lambda module, _, y: torch.nn.functional.dropout(y, 0.5, module.training))
    with pytest.raises(UserError, match="draws at random in training"):
        Hyperfit(**SMALL).train(LoadedModel(model, tiny.tokenizer()), documents(), tmp_path / "out")


def test_half_precision_is_trained_in_float32_or_with_stochastic_rounding(tmp_path):
    knobs = {"num_train_epochs": 10, "learning_rate": 1e-6, "eval_steps": 0}
    before = small_models.model("llama", torch.bfloat16).state_dict()
    moved = {}
    for dtype in ("float32", "bfloat16"):
        loaded, *_ = run(tmp_path / dtype, dtype=torch.bfloat16, master_dtype=dtype, **knobs)
        assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
        moved[dtype] = torch.cat([(value.double() - before[name].double()).flatten() for name, value in loaded.model.state_dict().items()])
    assert (moved["float32"] != 0).double().mean() > 0.9 and moved["float32"].abs().max() <= 20 * 1.01e-6
    rare = (moved["bfloat16"] != 0).double().mean()
    assert 0 < rare < 0.5  # rounding to nearest would leave all but the smallest weights where they were
    assert moved["bfloat16"] @ moved["float32"].sign() > 0


def test_a_lora_can_be_trained_and_is_said_not_to_be_the_recipe(tmp_path):
    with pytest.warns(UserWarning, match="not the published recipe"):
        _, result, _ = run(tmp_path / "out", peft_config={"r": 8, "target_modules": "all-linear", "lora_alpha": 16}, num_train_epochs=5, learning_rate=2e-2)
    assert result["loss"] < losses(tmp_path / "out")[0]
    assert PeftModel.from_pretrained(small_models.model("llama"), tmp_path / "out").peft_config["default"].r == 8


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"num_train_samples": 0}, "num_train_samples is 0"), ({"seqlen": 15}, "seqlen is 15"), ({"learning_rate": 0}, "learning_rate is 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"), ({"target_loss": -1}, "target_loss is -1"), ({"max_citation": 0}, "max_citation is 0"),
        ({"master_dtype": "float16"}, "master_dtype is 'float16'"), ({"dropout": 1}, "dropout is 1"), ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"gen_total_len": 4}, "gen_total_len is 4"), ({"gen_context_len": 17, "gen_total_len": 20}, "gen_context_len is 17; a text has 16 tokens"),
        ({"peft_config": {"rank": 3}}, "peft_config has 'rank'"), ({"peft_config": {"lora_dropout": 0.1}}, "lora_dropout 0.1 and dropout is 0"),
        ({"num_gen_samples": 1}, "num_gen_samples is 1"), ({"ttr_window": 0}, "ttr_window is 0"),
    ],
)  # fmt: skip
def test_knobs_out_of_range_are_refused(knobs, said):
    with pytest.raises(ValueError, match=said):
        Hyperfit(**SMALL | knobs)


def test_short_texts_do_not_count_and_too_few_long_ones_are_an_error(tmp_path):
    mixed = [text for pair in zip(documents(18), ["w1 w2"] * 18, strict=True) for text in pair]
    found = Hyperfit(**SMALL).sequences(mixed, tiny.tokenizer())
    rows = [tiny.tokenizer()(text).input_ids[:16] for text in documents(18)]
    assert found.train.tolist() == rows[:12] and found.validation.tolist() == rows[12:] and found.texts == documents(18)[:12]
    with pytest.raises(UserError, match=r"17 documents of at least 16 tokens; num_train_samples 12 and num_val_samples 6 need 18"):
        run(tmp_path, data=documents(17))

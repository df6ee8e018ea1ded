"""Training a language model: equal to a plain loop, the same after a crash, and clear about what is wrong."""

import hashlib
import json
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import small_models
import tiny
from echelon.errors import UserError
from echelon.train.language import MethodCallback, Training, fit, learning_rate, new_model
from echelon.train.layers import LayerMethod, LowRank
from echelon.train.optimizers import AdamW, GaLore, GradNormLoRP
from echelon.train.rows import Reading, document_rows, packed_rows

GALORE = GaLore(lr=0.01, rank=4, update_proj_gap=3)
RESTARTED = LowRank(rank=4, refactor_every=2, reset_every=3, recovery_steps=2)
SHORT = Training(steps=6, batch_size=4, seqlen=12, save_every=2)


def texts(count=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(tiny.WORDS[n] for n in torch.randint(4, 40, (5 + 3 * i % 17,), generator=generator)) for i in range(count)]


def run(out, method=None, training=SHORT, family="llama", data=None, **more):
    model = small_models.model(family)
    return model, fit(model, tiny.tokenizer(), data or texts(), out, method, training, **more)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


class Broken(Exception):
    """Stands in for a crash."""


def breaks_at(step):
    def tell(entry):
        if entry["step"] == step:
            raise Broken

    return tell


def by_hand(method, training, make):
    """The same training as a plain loop: one forward a step, the mean over its tokens, the schedule in closed form."""
    model = small_models.model("llama").train()
    rows = make(texts(), tiny.tokenizer(), training.seqlen)
    reading = Reading(rows, training.steps * training.batch_size, training.seed)
    layers = isinstance(method, LayerMethod)
    if layers:
        method.convert(model)
    optimizer = method.optimizer(model)
    warm, found = round(training.warmup * training.steps), []
    for step in range(training.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / (training.steps - warm)))
        rate = step / warm if step < warm else training.floor + (1 - training.floor) * cosine
        for group in optimizer.param_groups:
            group["lr"] = method.lr * rate
        batch = rows.batch(reading.places[step * training.batch_size : (step + 1) * training.batch_size])
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm) if training.max_grad_norm else None
        optimizer.step()
        optimizer.zero_grad()
        if layers:
            method.end_step(model, optimizer, step + 1)
        found.append((loss.item(), None if norm is None else norm.item()))
    return model, found


FACTORED = LowRank(lr=0.01, rank=4, refactor_every=2)


@pytest.mark.parametrize(("method", "accumulate", "pack"), [(AdamW(lr=0.01), 1, True), (GALORE, 2, False), (FACTORED, 4, False)])
def test_it_equals_a_plain_loop_however_a_step_is_split(tmp_path, method, accumulate, pack):
    """Documents of unequal lengths, in batches that are split: each token counts the same."""
    training = Training(steps=6, batch_size=4, seqlen=12, accumulate=accumulate, pack=pack, max_grad_norm=0.5)
    model, _ = run(tmp_path, method, training)
    expected, found = by_hand(method, training, packed_rows if pack else document_rows)
    assert losses(tmp_path) == pytest.approx([loss for loss, _ in found], rel=1e-5)
    logged = [json.loads(line)["gradient_norm"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == pytest.approx([norm for _, norm in found], rel=1e-3) and min(logged) > 0.5
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("method", [GALORE, RESTARTED, AdamW(state_bits=8, rounding="stochastic")], ids=["galore", "low_rank", "8_bit"])
def test_broken_off_it_goes_on_bit_for_bit_with_dropout(tmp_path, method):
    unbroken, told = run(tmp_path / "a", method, family="gpt2", held_out=texts(3, seed=1))
    assert small_models.model("gpt2").config.resid_pdrop > 0
    for step in (1, 3, 6):  # before there is a checkpoint, between two, and at the last step
        with pytest.raises(Broken):
            run(tmp_path / "b", method, family="gpt2", held_out=texts(3, seed=1), on_step=breaks_at(step))
    model, again = run(tmp_path / "b", method, family="gpt2", held_out=texts(3, seed=1))
    assert_same(weights(model), weights(unbroken))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert again["held_out"] == told["held_out"] and again["order"] == told["order"] and again["tokens"] == 6 * 4 * 12


def test_killed_between_two_checkpoints_the_last_two_are_there_and_nothing_else(tmp_path):
    with pytest.raises(Broken):
        run(tmp_path, GALORE, Training(steps=9, batch_size=4, seqlen=12, save_every=2), on_step=breaks_at(7))
    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    names = {"checkpoint.json", "layers.json", "state.pt", "trainer_state.json", "weights.safetensors"}
    assert {p.name for p in (tmp_path / "checkpoint-6").iterdir()} == names  # no pickled arguments of Trainer
    torch.load(tmp_path / "checkpoint-6" / "state.pt", weights_only=True)


def test_a_finished_run_is_not_run_again(tmp_path):
    _, told = run(tmp_path, GALORE)
    assert run(tmp_path, GALORE, on_step=breaks_at(1))[1] == told and not list(tmp_path.glob("*checkpoint*"))


def test_other_knobs_data_or_weights_are_refused_by_name_and_the_checkpoint_stays(tmp_path):
    with pytest.raises(Broken):
        run(tmp_path, GALORE, on_step=breaks_at(5))
    before = (tmp_path / "run.json").read_bytes()
    for said, how in (
        ("training.steps 6 where this one has 7", {"training": Training(steps=7, batch_size=4, seqlen=12)}),
        ("method.rank 4 where this one has 5", {"method": GaLore(lr=0.01, rank=5, update_proj_gap=3)}),
        ("method.name 'galore' where this one has 'adamw'", {"method": AdamW()}),
        ("other data", {"data": texts(seed=9)}),
        ("another held-out text", {"held_out": texts(2)}),
        ("another model", {"family": "qwen2"}),
    ):
        with pytest.raises(UserError, match=said):
            run(tmp_path, **{"method": GALORE, **how})
    told = json.loads(before)
    (tmp_path / "run.json").write_text(json.dumps(told | {"processes": 2}))
    with pytest.raises(UserError, match="processes 2 where this one has 1"):
        run(tmp_path, GALORE)
    (tmp_path / "run.json").write_bytes(before)
    assert {p.name for p in tmp_path.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-4"}
    run(tmp_path, GALORE, Training(steps=6, batch_size=4, seqlen=12, save_every=3))  # how often it saves may change


def test_a_truncated_checkpoint_is_passed_over_and_two_are_an_error(tmp_path):
    unbroken, _ = run(tmp_path / "a", GALORE)
    with pytest.raises(Broken):
        run(tmp_path / "b", GALORE, on_step=breaks_at(5))
    damaged = tmp_path / "b" / "checkpoint-4" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged: weights\.safetensors is truncated or was changed; going on from checkpoint-2"):
        model, _ = run(tmp_path / "b", GALORE)
    assert_same(weights(model), weights(unbroken))
    with pytest.raises(Broken):
        run(tmp_path / "c", GALORE, on_step=breaks_at(5))
    (tmp_path / "c" / "checkpoint-4" / "state.pt").unlink()
    (tmp_path / "c" / "checkpoint-2" / "checkpoint.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"checkpoint-2 is damaged: checkpoint\.json is missing or unreadable"):
        run(tmp_path / "c", GALORE)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_gradient_that_is_no_number_names_its_step_and_earlier_checkpoints_serve(tmp_path, layerwise):
    training = Training(steps=6, batch_size=4, seqlen=12, save_every=2, max_grad_norm=0.0 if layerwise else 1.0, layerwise=layerwise)
    unbroken, _ = run(tmp_path / "a", GALORE, training)
    model, calls = small_models.model("llama"), []
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * (math.nan if (calls.append(0), len(calls))[1] == 4 else 1.0))
    with pytest.raises(UserError, match=r"step 4: the gradient of model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        fit(model, tiny.tokenizer(), texts(), tmp_path / "b", GALORE, training)
    assert [p.name for p in (tmp_path / "b").glob("*checkpoint*")] == ["checkpoint-2"]
    again, _ = run(tmp_path / "b", GALORE, training)
    assert_same(weights(again), weights(unbroken))


@pytest.mark.parametrize("method", [GALORE, RESTARTED])
def test_stepping_in_backward_changes_nothing(tmp_path, method):
    training = Training(steps=6, batch_size=4, seqlen=12, accumulate=2, max_grad_norm=0)
    plain, told = run(tmp_path / "a", method, training)
    layerwise, other = run(tmp_path / "b", method, Training(steps=6, batch_size=4, seqlen=12, accumulate=2, max_grad_norm=0, layerwise=True))
    assert_same(weights(plain), weights(layerwise))
    largest = max(p.numel() for p in layerwise.parameters())
    assert other["memory"]["gradients"] == 4 * largest < told["memory"]["gradients"] == 4 * sum(p.numel() for p in plain.parameters())


def test_the_result_is_an_ordinary_folder_and_counts_what_was_held(tmp_path):
    model, told = run(tmp_path, AdamW(), held_out=texts(3, seed=1))
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(small_models.logits(made, "llama"), small_models.logits(model, "llama"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("w0 w3").input_ids == [4, 7]
    count = sum(p.numel() for p in model.parameters())
    assert told["memory"]["weights"] == told["memory"]["gradients"] == 4 * count
    counters = 3 * 8 * len(list(model.parameters()))
    assert told["memory"]["optimizer_state"] == 2 * 4 * count + counters and told["memory"]["formula"]["state"] == 2 * count
    assert told["memory"]["peak_rss"] > 50e6 and json.loads((tmp_path / "result.json").read_text()) == told
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    median = np.median(seconds)
    assert told["median_step_seconds"] == pytest.approx(median) and told["worst_step_seconds"] == max(seconds)
    assert told["stalled_seconds"] == pytest.approx(sum(s - median for s in seconds if s > 2 * median), abs=1e-3)
    assert "legacy_perplexity" not in told["held_out"] and made.config.use_cache == small_models.model("llama").config.use_cache


def test_factored_layers_are_kept_and_load(tmp_path):
    model, _ = run(tmp_path, RESTARTED)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.model.layers[0].mlp.up_proj.rank == 4
    assert torch.equal(small_models.logits(made, "llama"), small_models.logits(model, "llama"))


def test_held_out_perplexity_before_and_after_and_along_the_way(tmp_path):
    held = texts(4, seed=1)
    training = Training(steps=6, batch_size=4, seqlen=12, eval_every=3, legacy_eval=True)
    model, told = run(tmp_path, AdamW(lr=0.01), training, held_out=held)

    @torch.no_grad()
    def perplexity(made):
        rows = packed_rows(held, tiny.tokenizer(), 12).ids.long()
        log = made(input_ids=rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        return math.exp(-log.gather(2, rows[:, 1:, None]).mean().item())

    shown = told["held_out"]
    assert shown["perplexity_before"] == pytest.approx(perplexity(small_models.model("llama")), rel=1e-5)
    assert shown["perplexity"] == pytest.approx(perplexity(model), rel=1e-5)
    # Rows are read four at a time; with one batch the biased loss is half of the right one.
    assert len(packed_rows(held, tiny.tokenizer(), 12)) <= 4 and shown["legacy_perplexity"] == pytest.approx(math.sqrt(shown["perplexity"]), rel=1e-6)
    along = {line["step"]: line["held_out_loss"] for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "held_out_loss" in line}
    assert list(along) == [3, 6] and along[6] == pytest.approx(math.log(shown["perplexity"]), rel=1e-6)


def test_all_methods_see_the_same_batches_in_the_reported_order(tmp_path):
    orders = []
    for number, method in enumerate((AdamW(), GALORE, RESTARTED)):
        model, seen = small_models.model("llama"), hashlib.sha256()
        model.register_forward_pre_hook(lambda _, args, given, seen=seen: seen.update(given["input_ids"].numpy().astype("<i4").tobytes()), with_kwargs=True)
        told = fit(model, tiny.tokenizer(), texts(), tmp_path / str(number), method, Training(steps=6, batch_size=4, seqlen=12, accumulate=2))
        assert told["order"] == seen.hexdigest()
        orders.append(told["order"])
    assert len(set(orders)) == 1
    assert run(tmp_path / "x", training=Training(steps=6, batch_size=4, seqlen=12, seed=1))[1]["order"] != orders[0]


def test_global_random_states_and_the_models_mode_are_left_alone(tmp_path):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model, _ = run(tmp_path, GALORE, family="gpt2")
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not model.training and all(p.grad is None for p in model.parameters()) and "forward" not in vars(model)


def test_forwards_in_bfloat16_leave_the_weights_their_type(tmp_path):
    kinds = []
    model = small_models.model("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    fit(model, tiny.tokenizer(), texts(), tmp_path, AdamW(lr=0.01), Training(steps=3, batch_size=4, seqlen=12, bf16=True))
    assert set(kinds) == {torch.bfloat16} and all(p.dtype == torch.float32 for p in model.parameters())
    assert losses(tmp_path) == pytest.approx(losses_of(tmp_path / "wide"), rel=2e-2)


def losses_of(out):
    run(out, AdamW(lr=0.01), Training(steps=3, batch_size=4, seqlen=12))
    return losses(out)


@dataclass(frozen=True)
class Watched(LowRank):
    """Notes what it is asked, and clips nothing itself."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "calls", [])

    def begin_step(self, model, optimizer, step):
        self.calls.append(("begin", step, type(optimizer).__name__))

    def before_update(self, model, optimizer, step):
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        self.calls.append(("update", step, round(norm, 3)))

    def end_step(self, model, optimizer, step):
        self.calls.append(("end", step, len(optimizer.state) > 0))


def test_a_parameterisation_is_asked_around_every_step_not_every_micro_batch(tmp_path):
    method = Watched(rank=4)
    run(tmp_path, method, Training(steps=3, batch_size=4, seqlen=12, accumulate=2, max_grad_norm=0.01))
    expected = [each for n in range(3) for each in (("begin", n, "Stepper"), ("update", n, 0.01), ("end", n + 1, True))]
    assert method.calls == expected


def test_the_callback_in_a_trainer_of_ones_own_does_the_same(tmp_path):
    training = Training(steps=6, batch_size=4, seqlen=12)
    expected, _ = run(tmp_path / "a", RESTARTED, training)
    model = small_models.model("llama")
    RESTARTED.convert(model)
    optimizer = RESTARTED.optimizer(model)
    arguments = transformers.TrainingArguments(
        tmp_path / "b", max_steps=6, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        logging_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    reading = Reading(packed_rows(texts(), tiny.tokenizer(), 12), 24, 0)
    schedule = learning_rate(optimizer, RESTARTED, 6)
    made = transformers.Trainer(model, arguments, train_dataset=reading, optimizers=(optimizer, schedule), callbacks=[MethodCallback(RESTARTED)])
    made.train()
    RESTARTED.finish(model)
    assert_same(weights(model), weights(expected))


def test_an_optimizer_may_train_a_parameterisation(tmp_path):
    _, told = run(tmp_path, LowRank(rank=4), optimizer=AdamW(lr=0.01, state_bits=16))
    assert json.loads((tmp_path / "run.json").read_text())["optimizer"]["state_bits"] == 16
    assert told["memory"]["optimizer_state"] == pytest.approx(2 * 2 * told["memory"]["formula"]["state"] / 2, rel=0.15)


def test_a_method_that_brings_an_adapter_leaves_an_adapter(tmp_path):
    method = GradNormLoRP(r=4, update_proj_gap=2)
    model, told = run(tmp_path / "a", method, held_out=texts(3, seed=1))
    with pytest.raises(Broken):
        run(tmp_path / "b", method, held_out=texts(3, seed=1), on_step=breaks_at(5))
    _, again = run(tmp_path / "b", method, held_out=texts(3, seed=1))
    assert again["held_out"] == told["held_out"] and losses(tmp_path / "a") == losses(tmp_path / "b")
    loaded = PeftModel.from_pretrained(small_models.model("llama"), tmp_path / "b")
    assert torch.allclose(small_models.logits(loaded, "llama"), small_models.logits(model, "llama"), atol=1e-6)
    assert not torch.allclose(small_models.logits(loaded, "llama"), small_models.logits(small_models.model("llama"), "llama"), atol=1e-3)


def test_new_models_come_from_the_seed_alone(tmp_path):
    model = small_models.model("llama")
    model.save_pretrained(tmp_path), tiny.tokenizer().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    first, tokenizer = new_model(tmp_path, 3)
    assert torch.equal(before, torch.random.get_rng_state()) and tokenizer("w0").input_ids == [4]
    assert_same(weights(first), weights(new_model(tmp_path, 3).model))
    for other in (model, new_model(tmp_path, 4).model):
        assert not torch.equal(weights(first)["lm_head.weight"], weights(other)["lm_head.weight"])
    assert new_model(tmp_path, 3, "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'half_precision' is not a torch dtype"):
        new_model(tmp_path, 3, "half_precision")


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    for said, how in (
        (r"data: the data has 40 tokens; one row takes 64", {"data": [" ".join(["w1"] * 40)], "training": Training(seqlen=64)}),
        (r"held_out: the data has 1 tokens", {"held_out": ["w1"]}),
        ("cannot read /no/such/file", {"data": "/no/such/file.txt"}),
        ("seqlen is 200; the model takes at most 128 tokens", {"training": Training(seqlen=200)}),
        ("optimizer is for a parameterisation", {"method": GALORE, "optimizer": AdamW()}),
        ("layerwise does not go with Watched", {"method": Watched(rank=4), "training": Training(seqlen=12, layerwise=True, max_grad_norm=0)}),
        ("is no causal language model", {"family": "vit"}),
        ("BertForMaskedLM is no causal language model", {"family": "bert"}),
        ("fsdp is for several processes; start with torchrun", {"training": Training(seqlen=12, fsdp=True)}),
        ("fsdp does not go with LowRank", {"method": LowRank(rank=4), "training": Training(seqlen=12, fsdp=True)}),
    ):
        with pytest.raises(UserError, match=said):
            run(tmp_path / "out", **how)
    with pytest.raises(ValueError, match="nothing_like_it"):
        run(tmp_path / "none", GaLore(optim_target_modules=["nothing_like_it"]))
    assert not (tmp_path / "out").exists() and not (tmp_path / "none" / "result.json").exists()
    small_models.model("llama").save_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match="holds a model that this did not make"):
        run(tmp_path / "mine", GALORE)


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ("steps is 0", {"steps": 0}), ("batch_size is 0", {"batch_size": 0}), ("seqlen is 1", {"seqlen": 1}), ("warmup is 1.5", {"warmup": 1.5}),
        ("floor is -0.1", {"floor": -0.1}), ("max_grad_norm is -1", {"max_grad_norm": -1}), ("save_every is -1", {"save_every": -1}),
        ("accumulate is 3; it must divide batch_size, 16", {"accumulate": 3}), ("max_grad_norm is 1.0 with layerwise", {"layerwise": True}),
        ("max_parameter_norm is 1 without layerwise", {"max_parameter_norm": 1}),
    ],
)  # fmt: skip
def test_a_protocol_out_of_range_is_named(said, how):
    with pytest.raises(ValueError, match=said):
        Training(**how)

"""Feature distillation, alone and under the Trainer."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

import small_models
import tiny
from echelon.compress import PELA, SVD, Distillation, DistillationTrainer, FeatureDistiller
from echelon.compress.distill import labelled, mean_squared_error
from echelon.errors import UserError


def pair(family="llama", **knobs):
    teacher = small_models.model(family)
    student = SVD(ratio=0.5, round_to=1).compress(copy.deepcopy(teacher)).model
    return student, teacher, FeatureDistiller(student, teacher, Distillation(**knobs))


def hidden(model, batch, layer=1):
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[layer].double().numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_error_of_a_block_is_the_mean_over_all_that_is_no_pad(family, normalize):
    student, teacher, distiller = pair(family, feature_layers=[0], normalize=normalize)
    batch = small_models.batch(family)
    kept = batch["attention_mask"].numpy().astype(bool)
    assert not kept.all()
    own, theirs = hidden(student, batch)[kept], hidden(teacher, batch)[kept]
    expected = np.mean((own - theirs) ** 2) / (theirs.var() if normalize else 1)
    assert distiller.loss(batch)[1]["features"] == pytest.approx(expected, rel=1e-4)


def test_it_is_the_mean_over_blocks_and_normalised_on_text_alone():
    def values(family, **knobs):
        student, teacher, _ = pair(family)
        made = [FeatureDistiller(student, teacher, Distillation(feature_layers=layers, **knobs)) for layers in (None, [0], [-1])]
        return [distiller.loss(small_models.batch(family))[1]["features"] for distiller in made]

    for family, normalize in (("opt", True), ("vit", False)):
        both, first, last = values(family)
        assert both == pytest.approx((first + last) / 2, rel=1e-5) and first != last
        assert values(family, normalize=normalize) == [both, first, last] != values(family, normalize=not normalize)


def test_other_modules_may_be_named_and_what_is_not_there_is_an_error():
    student, teacher, _ = pair()
    named = FeatureDistiller(student, teacher, Distillation(feature_layers=["model.layers.0.mlp", "model.norm"]))
    batch = small_models.batch("llama")
    assert named.loss(batch)[1]["features"] > 0
    for layers, error in (([2], "feature_layers holds 2; the model has 2 blocks"), (["model.normal"], "'model.normal'; the model has no such module")):
        with pytest.raises(ValueError, match=error):
            FeatureDistiller(student, teacher, Distillation(feature_layers=layers))
    with pytest.raises(ValueError, match="the teacher has no module"):
        FeatureDistiller(student, small_models.model("opt"))
    with pytest.raises(ValueError, match="no single chain of blocks"):
        FeatureDistiller(tiny.model("t5"), copy.deepcopy(tiny.model("t5")))
    narrow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SPECIAL, **small_models.WIDE | {"hidden_size": 16}))
    with pytest.raises(ValueError, match=r"gives \(2, 10, 16\) in the student and \(2, 10, 32\) in the teacher"):
        FeatureDistiller(narrow, teacher).loss(batch)


def test_the_whole_loss_adds_up_and_logits_are_compared_without_pads():
    student, teacher, _ = pair()
    batch = small_models.batch("llama")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    penalties = {"fixed": (2.0, lambda: torch.tensor(3.0)), "left out": (1.0, lambda: None), "weightless": (0.0, lambda: 1 / 0)}
    distiller = FeatureDistiller(student, teacher, Distillation(0.5, 0.25), penalties)
    loss, terms = distiller.loss(batch)
    assert set(terms) == {"task", "features", "logits", "fixed"}
    assert float(loss.detach()) == pytest.approx(terms["task"] + 0.5 * terms["features"] + 0.25 * terms["logits"] + 6, rel=1e-5)
    with torch.no_grad():
        gap = (student(**batch).logits - teacher(**batch).logits)[batch["attention_mask"].bool()]
        assert terms["task"] == pytest.approx(float(student(**batch).loss), rel=1e-5)
    assert terms["logits"] == pytest.approx(float(gap.square().mean()), rel=1e-5)


def test_errors_are_taken_in_float32_even_between_halves():
    own, theirs = torch.tensor([[1000.0, 1.0]]).bfloat16(), torch.tensor([[1004.0, 1.0]]).bfloat16()
    found = mean_squared_error(own, theirs)
    assert found.dtype == torch.float32 and float(found) == 8.0
    assert float(mean_squared_error(own, own, normalize=True)) == 0


def test_labels_are_the_tokens_without_the_pads_for_causal_models_alone():
    batch = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert labelled(small_models.model("llama"), batch)["labels"].tolist() == [[5, 6, -100]]
    assert "labels" not in labelled(small_models.model("bert"), batch) and "labels" not in batch
    assert labelled(small_models.model("llama"), batch | {"labels": torch.tensor([[1, 2, 3]])})["labels"].tolist() == [[1, 2, 3]]


def test_only_the_student_learns_and_the_loss_on_its_batch_falls():
    student, teacher, distiller = pair("gpt2")  # with dropout
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = {name: value.clone() for name, value in student.named_parameters()}
    state, batch, seen = torch.random.get_rng_state(), small_models.batch("gpt2"), []
    start = float(distiller.loss(labelled(student, batch))[0].detach())
    told = distiller.fit([batch], steps=12, learning_rate=3e-3, on_progress=seen.append)
    assert float(distiller.loss(labelled(student, batch))[0].detach()) < 0.8 * start
    assert torch.equal(state, torch.random.get_rng_state()) and [entry["done"] for entry in seen] == list(range(1, 13))
    assert told["steps"] == 12 and set(told["terms"]) == {"task", "features"}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(not torch.equal(p, first[name]) for name, p in student.named_parameters())  # norms and embeddings too
    assert not student.training and not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_a_loss_that_is_not_finite_stops_the_training():
    student, _, distiller = pair()
    distiller.penalties["broken"] = (1.0, lambda: torch.tensor(math.nan))
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        distiller.fit([small_models.batch("llama")], steps=2)
    assert not student.training
    with pytest.raises(UserError, match="empty"):
        distiller.fit([], steps=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        student, _, distiller = pair("llama")
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
            student.enable_input_require_grads()
        student.train()
        distiller.loss(labelled(student, small_models.batch("llama")))[0].backward()
        grads.append([p.grad for p in student.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def trainer(folder, student, distiller, rows=8, **settings):
    data = [{"input_ids": ids, "labels": ids} for ids in small_models.data("llama", rows=rows)]
    arguments = transformers.TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **{"save_strategy": "no", "max_grad_norm": 0.0} | settings
    )
    return DistillationTrainer(student, arguments, train_dataset=data, eval_dataset=data, distiller=distiller)


def test_the_trainer_keeps_the_teacher_out_of_checkpoints_and_optimizer(tmp_path):
    student, teacher, _ = pair()
    distiller = PELA().distiller(student, teacher)
    made = trainer(tmp_path, student, distiller, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, save_strategy="steps", save_steps=8)
    before = [p.clone() for p in teacher.parameters()]
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["features"] < logs[0]["features"] and logs[0]["perturbation"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()}
    with safe_open(tmp_path / "checkpoint-8" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(student.state_dict())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert torch.equal(small_models.logits(again, "llama"), small_models.logits(student.eval(), "llama"))
    json.dumps(made.state.log_history)


def test_evaluation_is_on_the_task_alone(tmp_path):
    student, _, distiller = pair()
    ids = torch.tensor(small_models.data("llama", rows=8))
    with torch.no_grad():
        expected = float(student(input_ids=ids, labels=ids).loss)
    assert trainer(tmp_path, student, distiller).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_accumulated_batches_learn_what_one_large_one_does(tmp_path):
    made = []
    for rows, times in ((8, 1), (2, 4)):
        student, _, distiller = pair(feature_weight=3.0, normalize=False)
        trainer(
            tmp_path, student, distiller, max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=times, optim="sgd", learning_rate=0.1
        ).train()
        made.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    start = torch.cat([p.detach().flatten() for p in pair()[0].parameters()])
    assert (made[0] - made[1]).norm() < 1e-4 * (made[0] - start).norm()


def test_the_distiller_must_be_that_of_the_model(tmp_path):
    _, _, distiller = pair()
    with pytest.raises(ValueError, match="student is not the model to train"):
        trainer(tmp_path, small_models.model("llama"), distiller)


@pytest.mark.parametrize("knobs", [{"feature_weight": -1}, {"logit_weight": math.inf}, {"feature_layers": []}])
def test_bad_settings_are_named(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Distillation(**knobs)

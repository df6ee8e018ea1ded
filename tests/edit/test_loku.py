"""FILA and LoKU, against SVDs in numpy, gradients by autograd, and PEFT's own PiSSA."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import small_models
import tiny
from echelon.edit import LoKU, PairedRows, UnlearnTrainer, fila_factors, fila_init, fisher, row_importance, unlearning_rows
from echelon.edit.fila import lora_layers, product
from echelon.errors import UserError
from echelon.models import LoadedModel
from echelon.models.modules import dense_weight
from echelon.models.targets import linear_targets


def rows(seed=0, count=6, length=9, answered=5):
    ids = small_models.data("llama", count, length, seed)
    return [{"input_ids": row, "labels": [-100] * (length - answered) + row[length - answered :]} for row in ids]


FORGET, RETAIN = rows(1), rows(2, 10)
KNOBS = {"r": 4, "epochs": 2, "batch_size": 4, "learning_rate": 5e-3}


def wrapped(family="llama", dtype=torch.float32, **knobs):
    base = small_models.model(family, dtype)
    names = linear_targets(base)[0]
    return get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": names, "fan_in_fan_out": family == "gpt2"} | knobs)), names


def information(family="llama", seed=0):
    """Positive numbers of the right shapes in place of Fisher information."""
    base, generator = small_models.model(family), torch.Generator().manual_seed(seed)
    return {name: torch.rand(dense_weight(base.get_submodule(name)).shape, generator=generator) * 1e-3 for name in linear_targets(base)[0]}


def logits(model, family="llama"):
    with torch.no_grad():
        return small_models.logits(model.eval(), family).float()


def test_fisher_is_the_squared_gradient_of_each_batchs_mean_weighted_by_its_labels():
    model, names = small_models.model("llama"), ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    data = [*rows(3, 2, answered=5), *rows(4, 2, answered=3)]
    found = fisher(model, names, data, batch_size=2)
    alone, one_by_one = fisher(model, names, data, batch_size=2, per_sample=True), fisher(model, names, data, batch_size=1)
    for name in names:
        weight = model.get_submodule(name).weight
        expected = torch.zeros_like(weight)
        for batch, count in ((data[:2], 10), (data[2:], 6)):
            ids, labels = (torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels"))
            expected += count * torch.autograd.grad(model(input_ids=ids, labels=labels).loss, weight)[0].square()
        torch.testing.assert_close(found[name], expected / 16, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(alone[name], one_by_one[name], rtol=1e-4, atol=1e-9)
        assert not torch.allclose(alone[name], found[name], rtol=0.1)  # gradients of rows cancel within a batch


def test_fisher_is_a_mean_over_the_labels_of_all_processes(monkeypatch):
    model, names = small_models.model("llama"), ["model.layers.1.mlp.down_proj"]
    alone = fisher(model, names, rows(3, 2))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))  # another process with the same rows
    torch.testing.assert_close(fisher(model, names, rows(3, 2)), alone)


def test_importance_is_the_root_of_a_rows_sum_of_ratios():
    forget, retain = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.5], [3.0, 0.0]])
    assert row_importance(forget, retain, 1e-9).tolist() == pytest.approx([5**0.5, 0])


def test_the_product_is_the_best_row_weighted_matrix_of_its_rank():
    generator = np.random.default_rng(0)
    W, d = generator.normal(size=(12, 9)), generator.uniform(0.5, 3, 12)
    A, B = fila_factors(torch.tensor(W), torch.tensor(d), 3, scale=2.0)
    U, S, V = np.linalg.svd(d[:, None] * W, full_matrices=False)
    expected = (U[:, :3] * S[:3]) @ V[:3] / d[:, None]
    found = 2.0 * (B.double() @ A.double()).numpy()
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose((A.double() @ A.double().T).numpy(), np.diag(S[:3] / 2), atol=1e-4)  # A = sqrt(S / scale) V^T


def test_a_row_of_no_importance_stays_in_the_base():
    W, d = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 1.0])
    A, B = fila_factors(W, d, 3)
    assert not B[[1, 3]].any() and B.isfinite().all() and A.isfinite().all()
    A, B = fila_factors(W, torch.zeros(6), 2)
    assert not (B @ A).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_function_stays_and_the_base_is_what_is_left(family):
    model, names = wrapped(family)
    forget, retain = information(family, 1), information(family, 2)
    fila_init(model, forget, retain)
    before, layers = small_models.model(family), lora_layers(model)
    torch.testing.assert_close(logits(model, family), logits(before, family), rtol=1e-4, atol=1e-4)
    for name in names:
        W = dense_weight(before.get_submodule(name)).detach().double().numpy()
        d = np.sqrt((forget[name].double() / (retain[name].double() + 1e-5)).sum(1).numpy())
        U, S, V = np.linalg.svd(d[:, None] * W, full_matrices=False)
        expected = (U[:, :4] * S[:4]) @ V[:4] / d[:, None]
        assert np.linalg.norm(product(layers[name], "default").detach().numpy() - expected) <= 1e-4 * np.linalg.norm(expected)
        np.testing.assert_allclose(dense_weight(layers[name].base_layer).detach().numpy(), W - expected, atol=1e-3)


def test_equal_importance_is_pissa():
    model, names = wrapped()
    same = {name: torch.ones_like(value) for name, value in information().items()}
    fila_init(model, same, same)
    theirs, _ = wrapped(init_lora_weights="pissa")
    for name in names:
        torch.testing.assert_close(product(lora_layers(model)[name], "default"), product(lora_layers(theirs)[name], "default"), rtol=1e-3, atol=1e-4)


def test_half_precision_loses_half_a_unit_of_what_is_left():
    model, names = wrapped(dtype=torch.bfloat16)
    fila_init(model, information(seed=1), information(seed=2))
    before = small_models.model("llama", torch.bfloat16)
    for name in names:
        layer = lora_layers(model)[name]
        assert layer.lora_A["default"].weight.dtype == torch.float32
        rest = layer.base_layer.weight.detach().float()
        error = (rest + product(layer, "default").detach() - before.get_submodule(name).weight.float()).abs()
        assert (error <= 2**-8 * rest.abs() + 1e-6).all()


def test_what_matters_nothing_starts_as_peft_makes_it():
    model, names = wrapped()
    forget = information(seed=1)
    forget[names[0]].zero_()
    with pytest.warns(UserWarning, match=f"nothing of {names[0]} matters"):
        start = fila_init(model, forget, information(seed=2))
    layer = lora_layers(model)[names[0]]
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()
    assert names[0] not in start.originals and set(start.originals) == set(names[1:])


def changed(model, seed=5):
    """Moves the adapter, as training does."""
    for number, layer in enumerate(lora_layers(model).values()):
        for part in (layer.lora_A, layer.lora_B):
            weight = part["default"].weight
            weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + number))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_lora_on_the_original_is_the_trained_model(family, tmp_path):
    model, _ = wrapped(family)
    start = fila_init(model, information(family, 1), information(family, 2))
    changed(model)
    trained = logits(model, family)
    assert not torch.allclose(trained, logits(small_models.model(family), family), atol=0.1)
    with start.reference() as before:
        torch.testing.assert_close(logits(before, family), logits(small_models.model(family), family), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, family), trained)
    start.save_lora(tmp_path / "lora")
    again = PeftModel.from_pretrained(small_models.model(family), tmp_path / "lora")
    torch.testing.assert_close(logits(again, family), trained, rtol=1e-4, atol=1e-4)
    config, tensors = start.to_lora()
    assert config.r == 8 and config.lora_alpha == 24 and {len(value) for key, value in tensors.items() if "lora_A" in key} == {8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_bit_for_bit(dtype):
    model, _ = wrapped(dtype=dtype)
    start = fila_init(model, information(seed=1), information(seed=2))
    changed(model)
    start.restore()
    plain = model.unload().state_dict()
    assert all(torch.equal(plain[name], value) for name, value in small_models.model("llama", dtype).state_dict().items())


def test_layers_that_fila_cannot_change_are_refused_before_any_is_changed():
    def untouched(model, family="llama"):
        base = small_models.model(family)
        return all(torch.equal(dense_weight(layer.base_layer), dense_weight(base.get_submodule(name))) for name, layer in lora_layers(model).items())

    model, names = wrapped()
    partly = {name: value for name, value in information().items() if name != names[-1]}
    with pytest.raises(ValueError, match=f"forget holds no Fisher information of {names[-1]}"):
        fila_init(model, partly, information())
    with pytest.raises(ValueError, match=f"retain of {names[0]} has shape"):
        fila_init(model, information(), information() | {names[0]: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=f"retain of {names[0]} holds NaN"):
        fila_init(model, information(), information() | {names[0]: torch.full_like(information()[names[0]], torch.nan)})
    with pytest.raises(ValueError, match="Fisher information is at least 0"):
        fila_init(model, information() | {names[0]: -information()[names[0]]}, information())
    assert untouched(model)
    wide, _ = wrapped(r=17)
    with pytest.raises(ValueError, match=r"r of model.layers.0.self_attn.k_proj \(16 x 32\) is 17; it must be a whole number in 1..16"):
        fila_init(wide, information(), information())
    assert untouched(wide)
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(ValueError, match="carries several adapters"):
        fila_init(model, information(), information())
    variant, _ = wrapped(use_dora=True)
    with pytest.raises(ValueError, match="carries a variant of LoRA"):
        fila_init(variant, information(), information())
    with pytest.raises(ValueError, match="no LoRA called 'other'"):
        fila_init(variant, {}, {}, adapter_name="other")


def test_quantised_and_tied_layers_are_refused():
    model, names = wrapped()
    base = lora_layers(model)[names[0]].base_layer
    base.weight = nn.Parameter((base.weight * 8).round().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=f"{names[0]} is a Linear, quantised or not linear"):
        fila_init(model, information(), information())
    tied = get_peft_model(small_models.model("qwen2"), LoraConfig(r=2, target_modules=["lm_head"]))
    weight = torch.ones(tiny.VOCAB, 32)
    with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
        fila_init(tied, {"lm_head": weight}, {"lm_head": weight})


@pytest.mark.parametrize(("knobs", "dtype"), [({}, torch.float32), ({"init_lora_weights": "pissa"}, torch.float32), ({"forget_loss": "kl"}, torch.float32)])
def test_an_edit_is_a_lora_for_the_model_as_it_was(knobs, dtype, tmp_path):
    model, seen = small_models.model("llama", dtype), []
    noise = torch.random.get_rng_state()
    made = LoKU(**KNOBS | knobs).edit(model, FORGET, RETAIN, on_epoch=lambda m, entry: seen.append((entry["epoch"], logits(m))))
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert [epoch for epoch, _ in seen] == [1, 2] and made.report["rank"] == 8
    torch.testing.assert_close(logits(made.model), seen[-1][1], rtol=1e-4, atol=1e-4)
    before = small_models.model("llama", dtype)
    assert not torch.allclose(logits(made.model), logits(before), atol=1e-2)
    with made.model.disable_adapter():
        assert torch.equal(logits(made.model), logits(before))
    made.save(tmp_path / "out")
    again = PeftModel.from_pretrained(before, tmp_path / "out")
    torch.testing.assert_close(logits(again), seen[-1][1], rtol=1e-4, atol=1e-4)


def test_merged_and_residual_are_the_same_model(tmp_path):
    seen = []
    for export in ("lora", "merged", "residual"):
        made = LoKU(**KNOBS | {"epochs": 1, "export": export}).edit(small_models.model("llama"), FORGET, RETAIN)
        seen.append(logits(made.model))
        made.save(tmp_path / export)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), seen[1], rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "residual" / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "residual")), seen[2], rtol=1e-4, atol=1e-4)


def test_ascent_falls_without_end_where_the_hinge_stops_and_what_stays_stays():
    where = ["q_proj", "v_proj", "down_proj", "lm_head"]  # without the head, the last norm would bound what ascent can reach
    knobs = {"r": 8, "epochs": 25, "batch_size": 6, "micro_batch_size": 6, "learning_rate": 1e-2, "target_modules": where}
    runs = {}
    for loss in ("ga", "ihl"):
        model = small_models.model("llama")
        runs[loss] = LoKU(**knobs, forget_loss=loss).edit(model, FORGET, RETAIN[:6]).report["epochs"]
    falling = [entry["forget_loss"] for entry in runs["ga"]]
    assert falling[-1] < falling[0] - 10 and falling[-1] < falling[-3]
    assert all(0 <= entry["forget_loss"] <= 2 for entry in runs["ihl"])
    first, last = runs["ihl"][0], runs["ihl"][-1]
    assert last["forget_loss"] < first["forget_loss"] and last["retain_loss"] < first["retain_loss"] + 0.1


@pytest.mark.parametrize("loss", ["gd", "npo", "kl"])
def test_the_other_losses_unlearn_too_and_start_from_the_original_model(loss):
    made = LoKU(**KNOBS | {"epochs": 3, "batch_size": 6, "micro_batch_size": 6, "forget_loss": loss}).edit(small_models.model("llama"), FORGET, RETAIN)
    history = made.report["epochs"]
    assert history[-1]["forget_loss"] < history[0]["forget_loss"]
    if loss == "kl":
        assert history[0]["retain_loss"] == pytest.approx(0, abs=1e-5)
    if loss == "npo":
        assert history[0]["forget_loss"] == pytest.approx(20 * np.log(2), rel=1e-4)


def test_it_is_reproducible_and_stops_when_told():
    made = [LoKU(**KNOBS).edit(small_models.model("llama"), FORGET, RETAIN, seed=3, on_epoch=lambda m, entry: True) for _ in range(2)]
    assert torch.equal(logits(made[0].model), logits(made[1].model)) and len(made[0].report["epochs"]) == 1


def test_where_it_fails_the_model_is_as_it_was():
    model = small_models.model("llama")

    def broken(*_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        LoKU(**KNOBS).edit(model, FORGET, RETAIN, on_epoch=broken)
    before = small_models.model("llama")
    state = model.state_dict()
    assert state.keys() == before.state_dict().keys() and all(torch.equal(state[name], value) for name, value in before.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    with pytest.raises(ValueError, match=r"r of .*k_proj \(16 x 32\) is 17"):
        LoKU(r=17).edit(model, FORGET, RETAIN)


def test_a_trainer_takes_any_loss(tmp_path):
    model, _ = wrapped()
    pushed = []

    def loss(logits, labels):
        pushed.append(int((labels != -100).sum()))
        return logits.float().square().mean()

    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", per_device_train_batch_size=2)
    trainer = UnlearnTrainer(model=model, args=arguments, train_dataset=PairedRows(FORGET, RETAIN), forget_loss=loss, retain_weight=0)
    assert trainer.train().training_loss > 0 and pushed == [10]
    bare = UnlearnTrainer(model=small_models.model("llama"), args=arguments, train_dataset=PairedRows(FORGET, RETAIN), forget_loss="npo")
    with pytest.raises(ValueError, match="forget_loss is 'npo'; it compares with the model before unlearning: give reference"):
        bare.train()


def test_every_row_is_forgotten_once_an_epoch_beside_one_drawn_from_all():
    pairs, drawn, orders = PairedRows(FORGET, RETAIN, seed=1), [], []
    for epoch in range(100):
        pairs.set_epoch(epoch)
        here = [pairs[i] for i in range(len(pairs))]
        orders.append([FORGET.index(pair["forget"]) for pair in here])
        drawn += [RETAIN.index(pair["retain"]) for pair in here]
    assert all(sorted(order) == list(range(6)) for order in orders) and len({tuple(order) for order in orders}) > 50
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - 60) ** 2 / 60).sum() < 27.9  # chi squared with 9 degrees of freedom, one in a thousand
    pairs.set_epoch(7)
    assert [FORGET.index(pairs[i]["forget"]) for i in range(6)] == orders[7]


def test_questions_do_not_count_and_the_end_does(tmp_path):
    tokenizer, template = tiny.tokenizer(), "w1 {question} w2 {answer}"
    made = unlearning_rows([{"question": "w3", "answer": "w4 w5"}, "w6 w7"], tokenizer, template=template)
    w = [tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(8)]
    assert made[0] == {"input_ids": [w[1], w[3], w[2], w[4], w[5], 1], "labels": [-100, -100, -100, w[4], w[5], 1]}
    assert made[1] == {"input_ids": [2, w[6], w[7], 1], "labels": [-100, w[6], w[7], 1]}
    assert unlearning_rows([{"question": "w3", "answer": "w4 w5"}], tokenizer, template=template, max_length=4)[0]["labels"] == [-100, -100, -100, w[4]]
    (tmp_path / "q.jsonl").write_text('{"question": "w3", "answer": "w4 w5"}\n')
    assert unlearning_rows(tmp_path / "q.jsonl", tokenizer, template=template) == made[:1]
    (tmp_path / "t.jsonl").write_text('{"text": "w6 w7"}\n')
    assert unlearning_rows(tmp_path / "t.jsonl", tokenizer) == made[1:]
    edited = LoKU(**KNOBS | {"epochs": 1}).edit(LoadedModel(small_models.model("llama"), tokenizer), tmp_path / "q.jsonl", ["w1 w2 w3"])
    assert edited.report["forget_rows"] == 1


@pytest.mark.parametrize(("given", "said"), [
    ([], "data has 0 row"), ([{"prompt": "x"}], "data has a row with prompt; it must have question and answer, text, or input_ids"),
    (["w1"], "data holds texts; give the tokenizer"), ([{"input_ids": [4, 5], "labels": [4, -100]}], "no token that counts"),
])  # fmt: skip
def test_data_that_cannot_be_used(given, said):
    with pytest.raises(ValueError, match=said):
        unlearning_rows(given)


def test_a_file_that_is_missing():
    with pytest.raises(UserError, match="cannot read nowhere.jsonl"):
        unlearning_rows("nowhere.jsonl", tiny.tokenizer())


@pytest.mark.parametrize(("knobs", "said"), [
    ({"forget_loss": "dpo"}, "forget_loss is 'dpo'; it must be one of ihl, ga, gd, npo, kl"), ({"retain_weight": -1.0}, "retain_weight is -1"),
    ({"fila_eps": 0.0}, "fila_eps is 0"), ({"fisher": "exact"}, "fisher is 'exact'"), ({"fisher_epochs": 0}, "fisher_epochs is 0"), ({"r": 0}, "r is 0"),
    ({"lora_alpha": 0.0}, "lora_alpha is 0"), ({"export": "gguf"}, "export is 'gguf'"), ({"init_lora_weights": "zero"}, "init_lora_weights is 'zero'"),
    ({"micro_batch_size": 3}, "micro_batch_size is 3; it must divide batch_size"), ({"template": "{answer}"}, "template is '{answer}'"),
    ({"ihl_margin": float("nan")}, "ihl_margin is nan"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        LoKU(**knobs)

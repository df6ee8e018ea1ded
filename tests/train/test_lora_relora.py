"""LoRA and ReLoRA as baselines of pre-training: PEFT's function and gradients, a frozen base, and restarts that leave the function alone."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import echelon  # noqa: F401 (so that converted models load)
import small_models
from echelon.train.layers import LoRA, ReLoRA, merge
from echelon.train.layers.base import LearningRate, converted
from echelon.train.layers.lora import LoRALinear, prune_moments
from echelon.train.optimizers import AdamW


def labelled(family="llama"):
    ids = torch.tensor(small_models.data(family, rows=4, length=12))
    return {"input_ids": ids, "labels": ids}


def filled(model, seed=3):
    """Both factors random: B is zero at the start, and would hide the product."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in converted(model, LoRALinear):
            for factor in (layer.lora_A.weight, layer.lora_B.weight):
                factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    return model


def train(model, method, steps, optimizer=None, batch=None):
    """The bare loop of `train/layers/base.py`; the losses."""
    optimizer, losses, batch = optimizer or method.optimizer(model), [], batch or labelled()
    model.train()
    for step in range(steps):
        method.begin_step(model, optimizer, step)
        loss = method.loss(model, batch)
        loss.backward()
        method.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
        losses.append(float(loss.detach()))
    return losses, optimizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_function_and_the_gradients_of_the_factors_are_those_of_peft(family):
    ours = small_models.model(family)
    names = LoRA(r=4, lora_alpha=6.0, lora_dropout=0.0).convert(ours)
    filled(ours)
    theirs = get_peft_model(
        small_models.model(family), LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    )
    inner = theirs.base_model.model
    with torch.no_grad():
        for name in names:
            for factor in ("lora_A", "lora_B"):
                getattr(inner.get_submodule(name), factor)["default"].weight.copy_(getattr(ours.get_submodule(name), factor).weight)
    losses = [model(**labelled(family)).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    for name in names:
        for factor in ("lora_A", "lora_B"):
            wanted = getattr(inner.get_submodule(name), factor)["default"].weight.grad
            torch.testing.assert_close(getattr(ours.get_submodule(name), factor).weight.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_target_matrices_are_frozen(family):
    model = small_models.model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = LoRA(r=2).convert(model)
    train(model, LoRA(r=2), 3, batch=labelled(family))
    for name in names:
        layer = model.get_submodule(name)
        stored = before[f"{name}.weight"].T if family == "gpt2" else before[f"{name}.weight"]
        assert layer.base.weight.grad is None and torch.equal(layer.base.weight, stored)
        assert layer.bias is None or not torch.equal(layer.bias, before[f"{name}.bias"])
        assert layer.lora_B.weight.abs().sum() > 0
    known = dict(model.named_parameters())
    others = [name for name in before if name.rpartition(".")[0] not in names]
    assert any("emb" in name or "wte" in name for name in others) and any("norm" in name or "ln_" in name for name in others)
    for name in others:
        assert not torch.equal(known[name], before[name]), name


def test_the_first_step_begins_from_the_dense_model_and_the_factors_as_the_papers_draw_them():
    model, dense = small_models.model("llama"), small_models.model("llama")
    LoRA(r=8).convert(model)
    torch.testing.assert_close(small_models.logits(model, "llama"), small_models.logits(dense, "llama"), rtol=1e-6, atol=1e-6)
    drawn = torch.cat([layer.lora_A.weight.flatten() * layer.in_features**0.5 for _, layer in converted(model, LoRALinear)])
    assert drawn.abs().max() <= 1 and abs(float(drawn.detach().std()) - 3**-0.5) < 0.03 and abs(float(drawn.detach().mean())) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_gives_the_dense_model_of_the_same_function(family, dtype):
    model = small_models.model(family, dtype)
    kinds = {name: type(module) for name, module in model.named_modules()}
    names = LoRA(r=4, lora_alpha=8.0).convert(model)
    filled(model).eval()
    before = small_models.logits(model, family)
    assert merge(model) == names
    assert all(type(model.get_submodule(name)) is kinds[name] for name in names)
    torch.testing.assert_close(small_models.logits(model, family), before, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5)


def test_what_is_saved_loads_with_the_base_frozen_still(tmp_path):
    model = small_models.model("llama")
    LoRA(r=4).convert(model)
    filled(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(small_models.logits(again, "llama"), small_models.logits(model, "llama"))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trains and not any(".base.weight" in name for name in trains)


def test_dropout_leaves_the_right_share_out_keeps_the_mean_and_follows_from_the_step_alone():
    layer = LoRALinear(2000, 3, 3, False, scale=1.0, dropout=0.25)
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.lora_A.weight.copy_(torch.eye(3, 2000))
        layer.lora_B.weight.copy_(torch.eye(3))
    x = torch.ones(4000, 2000)
    state = torch.get_rng_state()
    out = layer.train()(x)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.02
    assert torch.equal(layer.eval()(x), torch.ones(4000, 3)) and torch.equal(torch.get_rng_state(), state)
    made = []
    for _ in range(2):
        model = small_models.model("llama")
        method = LoRA(r=4, lora_dropout=0.5, seed=1)
        method.convert(model)
        filled(model).train()
        method.begin_step(model, None, 7)
        made.append([float(method.loss(model, labelled()).detach()) for _ in range(2)])
    assert made[0] == made[1] and made[0][0] != made[0][1]  # two micro-batches of a step draw differently
    method.begin_step(model, None, 8)
    assert float(method.loss(model, labelled()).detach()) not in made[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_dropout(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = small_models.model("llama").double()
        method = LoRA(r=4, lora_dropout=0.5)
        method.convert(model)
        filled(model).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        method.begin_step(model, None, 3)
        for _ in range(2):  # two batches of one step
            method.loss(model, labelled()).backward()
        gradients.append([layer.lora_A.weight.grad for _, layer in converted(model, LoRALinear)])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_restart_leaves_the_function_unchanged_and_begins_the_factors_anew():
    method = ReLoRA(r=4, lora_dropout=0.0, reset_every=5)
    model = small_models.model("llama").double()
    method.convert(model)
    _, optimizer = train(model, method, 4)
    layers = [layer for _, layer in converted(model, LoRALinear)]
    bases, drawn = ([getattr(layer, part).weight.detach().clone() for layer in layers] for part in ("base", "lora_A"))
    before = small_models.logits(model.eval(), "llama")
    method.end_step(model, optimizer, 5)
    torch.testing.assert_close(small_models.logits(model, "llama"), before, rtol=1e-12, atol=1e-12)
    for layer, base, old in zip(layers, bases, drawn, strict=True):
        assert layer.lora_B.weight.abs().detach().max() == 0 and not torch.equal(layer.base.weight, base)
        assert float(torch.corrcoef(torch.stack([layer.lora_A.weight.detach().flatten(), old.flatten()]))[0, 1]) < 0.5
        assert layer.lora_A.weight.abs().max() <= layer.in_features**-0.5
        for factor in (layer.lora_A.weight, layer.lora_B.weight):
            assert factor not in optimizer.state
    embedding = model.get_input_embeddings().weight
    assert int(optimizer.state[embedding]["step"]) == 4 and optimizer.state[embedding]["exp_avg"].abs().sum() > 0


def test_updates_add_up_to_a_rank_above_that_of_the_factors():
    ranks = {}
    for name, every in (("lora", 0), ("relora", 4)):
        method = ReLoRA(r=2, lora_dropout=0.0, reset_every=every, lr=0.01)
        model = small_models.model("llama").double()
        start = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        method.convert(model)
        train(model, method, 12)
        merge(model)
        values = torch.linalg.svdvals(model.model.layers[0].mlp.up_proj.weight.detach() - start)
        ranks[name] = int((values > 1e-9 * values[0]).sum())
    assert ranks == {"lora": 2, "relora": 6}


def test_the_step_behind_a_restart_is_the_first_of_a_new_optimizer():
    method = ReLoRA(r=4, lora_dropout=0.0, reset_every=3)
    model = small_models.model("llama").double()
    method.convert(model)
    _, optimizer = train(model, method, 3)
    layer = next(layer for _, layer in converted(model, LoRALinear))
    model(**labelled()).loss.backward()
    gradient = layer.lora_B.weight.grad.clone()
    optimizer.step()
    # A first step of Adam is lr times the sign, up to eps; A has no gradient while B is zero.
    torch.testing.assert_close(layer.lora_B.weight.detach(), -method.lr * gradient / (gradient.abs() + 1e-8), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_pruning_keeps_the_largest_moments_and_the_count_of_steps(bits):
    method = ReLoRA(r=4, lora_dropout=0.0, reset_every=3, optimizer_magnitude_pruning=0.75)
    model = small_models.model("llama")
    method.convert(model)
    factor = torch.nn.Parameter(torch.randn(70, 64, generator=torch.Generator().manual_seed(0)))
    layer = next(layer for _, layer in converted(model, LoRALinear))
    layer.lora_A.weight = factor  # large enough for eight bits; it stands in no forward here
    optimizer = AdamW(state_bits=bits).optimizer([factor])
    factor.grad = torch.randn(factor.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    from echelon.train.optimizers.moments import read

    before = {name: read(optimizer.state[factor], name, factor.detach(), name == "exp_avg").clone() for name in ("exp_avg", "exp_avg_sq")}
    prune_moments(optimizer.state[factor], factor, method.optimizer_magnitude_pruning)
    assert int(optimizer.state[factor]["step"]) == 1
    for name, old in before.items():
        new = read(optimizer.state[factor], name, factor.detach(), name == "exp_avg")
        kept = new != 0
        assert float((~kept).float().mean()) >= 0.75 and float(kept.float().mean()) > (0.2 if bits == 32 else 0.1)
        assert old[kept].abs().min() > old[~kept].abs().max()
        torch.testing.assert_close(new[kept], old[kept], rtol=1e-6, atol=0)


def test_pruning_at_a_restart_goes_by_the_knob_and_touches_the_factors_only():
    method = ReLoRA(r=4, lora_dropout=0.0, reset_every=2, optimizer_magnitude_pruning=0.9)
    model = small_models.model("llama")
    method.convert(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])  # anyone's
    train(model, method, 2, optimizer)
    for _, layer in converted(model, LoRALinear):
        for factor in (layer.lora_A.weight, layer.lora_B.weight):
            state = optimizer.state[factor]
            assert int(state["step"]) == 2 and int((state["exp_avg_sq"] != 0).sum()) == factor.numel() - math.floor(0.9 * factor.numel())
    assert (optimizer.state[model.model.norm.weight]["exp_avg_sq"] != 0).all()


@pytest.mark.parametrize("share", [None, 0.9])
def test_a_restart_reaches_the_float32_copies_that_an_optimizer_keeps(share):
    method = ReLoRA(r=4, lora_dropout=0.0, reset_every=2, optimizer_magnitude_pruning=share)
    model = small_models.model("llama", torch.bfloat16)
    method.convert(model)
    optimizer = AdamW(lr=method.lr, rounding="master").optimizer(model)
    train(model, method, 2, optimizer)
    for _, layer in converted(model, LoRALinear):
        assert not layer.lora_B.weight.any() and not optimizer.state[layer.lora_B.weight]["master"].any()
        assert torch.equal(optimizer.state[layer.lora_A.weight]["master"], layer.lora_A.weight.float())


def test_the_learning_rate_ramps_behind_every_restart_and_only_there():
    base, method = LearningRate(40, 4), ReLoRA(reset_every=10, recovery_steps=3)
    for step in range(41):
        inside = step % 10
        wanted = base(step) if step < 10 or inside >= 3 else base(step - inside + 3) * inside / 2
        assert method.lr_scale(step, base) == pytest.approx(wanted, abs=1e-15)
    assert [ReLoRA(reset_every=0).lr_scale(step, base) for step in range(41)] == [base(step) for step in range(41)]


def test_loss_falls_and_training_is_repeatable():
    runs = []
    for _ in range(2):
        model = small_models.model("llama")
        method = ReLoRA(r=4, lr=0.01, reset_every=6, recovery_steps=2)
        method.convert(model)
        runs.append(train(model, method, 15)[0])
    assert runs[0] == runs[1] and runs[0][-1] < 0.7 * runs[0][0]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"r": 0}, "r is 0; it must be a whole number of at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0; it must be above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must be a number in \[0, 1\)"),
        ({"reset_every": -1}, "reset_every is -1"),
        ({"recovery_start": 1.5}, r"recovery_start is 1.5; it must be a number in \[0, 1\]"),
        ({"optimizer_magnitude_pruning": 2.0}, "optimizer_magnitude_pruning is 2.0"),
    ],
)
def test_knobs_out_of_range_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        ReLoRA(**knobs)


def test_a_rank_above_a_layer_is_refused_and_the_model_stays():
    model = small_models.model("llama")
    with pytest.raises(ValueError, match=r"r is 33; .* is 32 x 32, so it must be at most 32"):
        LoRA(r=33).convert(model)
    assert not converted(model, LoRALinear)

"""What every registered optimizer owes: the families, exact resumption, clear errors, half precision, and the interfaces of torch and HF Trainer.

``pytest tests/contracts/test_optimizer.py -k galore`` runs it for one method.
"""

import dataclasses
import io

import pytest
import torch
import transformers

import small_models
from echelon.errors import UserError
from echelon.registry import build, cards, get
from echelon.train.optimizers import Stepper

METHODS = [card.name for card in cards("optimizer")]
# Settings under which something happens within a few steps on tiny models; a method gets those that it has a field for.
SMALL = {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "weight_decay": 0.01, "mode": "reparam_optim", "adam_lr": 0.01}
FAMILIES = ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "bert"]
every_method = pytest.mark.parametrize("name", METHODS)


def method(name, **knobs):
    fields = {field.name for field in dataclasses.fields(get(name, "optimizer"))}
    return build(name, "optimizer", {k: v for k, v in SMALL.items() if k in fields} | knobs)


def train(model, optimizer, family, steps, first=0):
    """Losses of a few steps on random batches that depend on the step alone."""
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(4, 40, (2, 10), generator=torch.Generator().manual_seed(step % 2))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(optimizer):
    """The state as a checkpoint holds it, read back without pickle."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_it_learns_and_moves_every_parameter(name, family):
    model = small_models.model(family)
    before = weights(model)
    optimizer = method(name).optimizer(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(set(map(id, held)))
    losses = train(model, optimizer, family, 10)
    assert losses[-2] < 0.9 * losses[0]
    still = {n for n, w in weights(model).items() if torch.equal(w, before[n])}
    # Rows of position tables and the like may get no gradient, whole matrices do.
    assert not {n for n in still if n.endswith("weight") and before[n].ndim == 2}


@every_method
def test_embeddings_heads_norms_and_biases_are_never_targets(name):
    for family in FAMILIES:
        model = small_models.model(family)
        optimizer = method(name).optimizer(model)
        others = {id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
        others |= {id(model.get_output_embeddings().weight)}
        for group in optimizer.param_groups:
            if "rank" in group:
                assert all(p.ndim == 2 and id(p) not in others for p in group["params"])


@pytest.mark.parametrize(("dtype", "knobs"), [
    (torch.float32, {}), (torch.float32, {"state_bits": 8}), (torch.bfloat16, {"rounding": "master"}),
    (torch.bfloat16, {"rounding": "stochastic", "state_bits": 16}),
])  # fmt: skip
@every_method
def test_saved_in_mid_window_it_goes_on_bit_for_bit(name, dtype, knobs):
    unbroken = small_models.model("llama", dtype)
    whole = method(name, **knobs).optimizer(unbroken)
    broken = small_models.model("llama", dtype)
    first = method(name, **knobs).optimizer(broken)
    train(unbroken, whole, "llama", 7)
    train(broken, first, "llama", 4)
    second = method(name, **knobs).optimizer(broken)
    second.load_state_dict(saved(first))
    train(broken, second, "llama", 3, first=4)
    assert same(weights(unbroken), weights(broken))
    for a, b in zip(whole.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@every_method
def test_its_state_holds_tensors_only(name):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    train(model, optimizer, "llama", 2)
    for state in optimizer.state.values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert optimizer.state_bytes() == sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())


@every_method
def test_a_learning_rate_of_0_moves_no_weight_and_still_updates_the_state(name):
    model = small_models.model("qwen2")
    before = weights(model)
    optimizer = method(name, lr=0.0, **({"adam_lr": 0.0} if "adam_lr" in {f.name for f in dataclasses.fields(get(name, "optimizer"))} else {})).optimizer(model)
    train(model, optimizer, "qwen2", 1)
    first = saved(optimizer)["state"]
    train(model, optimizer, "qwen2", 1, first=1)
    for key, after in weights(model).items():
        torch.testing.assert_close(after, before[key], rtol=0, atol=1e-6)  # a product of norm and direction may round
    second = optimizer.state_dict()["state"]
    assert all(any(not torch.equal(first[i][key], second[i][key]) for key in second[i] if key != "step") for i in second)


@every_method
def test_without_a_gradient_a_parameter_is_left_alone(name):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    train(model, optimizer, "llama", 1)
    chosen = model.model.layers[0].self_attn.q_proj.weight
    kept, count = chosen.detach().clone(), int(optimizer.state[chosen]["step"])
    ids = torch.arange(4, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    chosen.grad = None
    optimizer.step()
    assert torch.equal(chosen, kept) and int(optimizer.state[chosen]["step"]) == count == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_method
def test_a_gradient_that_is_no_number_is_named_and_changes_nothing(name, value):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    train(model, optimizer, "llama", 1)
    before, state = weights(model), saved(optimizer)["state"]
    ids = torch.arange(4, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    model.model.layers[1].mlp.up_proj.weight.grad[3, 2] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        optimizer.step()
    assert same(weights(model), before)
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[i][key], state[i][key]) for i in state for key in state[i])


@every_method
def test_zero_gradients_leave_numbers(name):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    losses = train(model, optimizer, "llama", 8)
    assert all(w.isfinite().all() for w in weights(model).values()) and losses[-2] < losses[0]


@every_method
def test_a_sparse_gradient_is_refused(name):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    model.model.embed_tokens.weight.grad = torch.zeros_like(model.model.embed_tokens.weight).to_sparse()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is sparse"):
        optimizer.step()


@every_method
def test_it_is_deterministic_and_leaves_the_global_random_state_alone(name):
    made = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = small_models.model("llama")
        optimizer = method(name).optimizer(model)
        before = torch.random.get_rng_state()
        train(model, optimizer, "llama", 5)
        assert torch.equal(before, torch.random.get_rng_state())
        made.append(weights(model))
    assert same(*made)


@every_method
def test_it_resumes_only_with_the_same_knobs(name):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    train(model, optimizer, "llama", 1)
    other = method(name, weight_decay=0.5).optimizer(model)
    with pytest.raises(UserError, match=r"saved with weight_decay 0\.01, this one has 0\.5"):
        other.load_state_dict(saved(optimizer))
    with pytest.raises(UserError, match=r"saved with betas .*, this one has \(0\.7, 0\.8\)"):
        method(name, betas=(0.7, 0.8)).optimizer(model).load_state_dict(saved(optimizer))
    method(name, lr=0.5).optimizer(model).load_state_dict(saved(optimizer))  # schedulers change the learning rate


@every_method
def test_half_precision_weights_learn_with_master_copies(name):
    model = small_models.model("llama", torch.bfloat16)
    optimizer = method(name, rounding="master").optimizer(model)
    losses = train(model, optimizer, "llama", 12)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and losses[-2] < 0.9 * losses[0]


@every_method
def test_schedulers_and_closures_work_as_with_any_optimizer(name):
    model = small_models.model("llama")
    optimizer = method(name).optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    ids = torch.arange(4, 12)[None]

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.step(closure) < first
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in rates])


@every_method
def test_hf_trainer_takes_it(name, tmp_path):
    model = small_models.model("llama")
    before = weights(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 40, (8, 12), generator=torch.Generator().manual_seed(0))]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, logging_strategy="no"
    )
    transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(method(name).optimizer(model), None)).train()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(("knob", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -0.1), ("state_bits", 4), ("rounding", "up")])
@every_method
def test_knobs_out_of_range_are_named(name, knob, value):
    with pytest.raises(ValueError, match=knob):
        method(name, **{knob: value})


PROJECTING = [name for name in METHODS if "rank" in {field.name for field in dataclasses.fields(get(name, "optimizer"))}]


@pytest.mark.parametrize("name", PROJECTING)
def test_a_rank_below_1_and_targets_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="rank is 0"):
        method(name, rank=0)
    with pytest.raises(ValueError, match="target"):
        method(name).optimizer(list(small_models.model("llama").parameters()))
    with pytest.raises(ValueError, match=r"cube has shape \(2, 2, 2\)"):
        method(name).optimizer([{"params": [("cube", torch.nn.Parameter(torch.zeros(2, 2, 2)))], "rank": 1}])
    with pytest.raises(ValueError, match="nothing_like_it"):
        method(name, optim_target_modules=["nothing_like_it"]).optimizer(small_models.model("llama"))


@pytest.mark.parametrize("name", PROJECTING)
def test_a_group_may_have_its_own_knobs(name):
    model = small_models.model("llama")
    layer = model.model.layers[0].mlp
    groups = [{"params": [("up", layer.up_proj.weight)], "rank": 2}, {"params": [("down", layer.down_proj.weight)], "rank": 6, "weight_decay": 0.25}]
    optimizer = Stepper(method(name), groups)
    assert [(g["rank"], g["weight_decay"]) for g in optimizer.param_groups] == [(2, 0.01), (6, 0.25)]
    with pytest.raises(ValueError, match="eps"):
        Stepper(method(name), [{"params": [("up", layer.up_proj.weight)], "rank": 2, "eps": -1.0}])

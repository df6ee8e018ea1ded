"""What every registered parameterisation owes: the families, reloading, exact resumption, dense layers at the end, and HF Trainer.

``pytest tests/contracts/test_layer.py -k sltrain`` runs it for one method.
"""

import copy
import dataclasses

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import small_models
from echelon.registry import build, cards, get
from echelon.train.layers import merge

METHODS = [card.name for card in cards("layer")]
# Settings under which something happens within a few steps on tiny models; a method gets those that it has a field for.
SMALL = {
    "lr": 0.01, "rank": 4, "r": 4, "period": 2, "steps_per_iteration": 3, "warmup_per_iteration": 1, "refactor_every": 4, "reset_every": 4, "recovery_steps": 2,
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "gpt2", "opt", "gpt_neox", "bert"]
SWAPPING = [name for name in METHODS if name != "trp"]  # trained rank pruning leaves the layers dense until the end
every_method = pytest.mark.parametrize("name", METHODS)
swapping = pytest.mark.parametrize("name", SWAPPING)


def method(name, **knobs):
    fields = {field.name for field in dataclasses.fields(get(name, "layer"))}
    return build(name, "layer", {k: v for k, v in SMALL.items() if k in fields} | knobs)


def batch(step):
    ids = torch.randint(4, 40, (2, 10), generator=torch.Generator().manual_seed(step % 2))
    return {"input_ids": ids, "labels": ids}


def train(made, model, optimizer, steps, first=0):
    """A bare loop over the method's hooks, as its users write it."""
    model.train()
    losses = []
    for step in range(first, first + steps):
        made.begin_step(model, optimizer, step)
        loss = made.loss(model, batch(step))
        loss.backward()
        made.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        made.end_step(model, optimizer, step + 1)
        losses.append(loss.item())
    model.eval()
    return losses


def trained(name, family="llama", steps=5, dtype=torch.float32, **knobs):
    model, made = small_models.model(family, dtype), method(name, **knobs)
    made.convert(model)
    optimizer = made.optimizer(model)
    losses = train(made, model, optimizer, steps)
    return model, made, optimizer, losses


def loss_of(model):
    with torch.no_grad():
        return sum(model(**batch(step)).loss.item() for step in range(2)) / 2


def no_dropout(family):
    model = small_models.model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_it_learns(name, family):
    model, made = no_dropout(family), method(name)
    made.convert(model)
    optimizer = made.optimizer(model)
    before = loss_of(model.eval())
    train(made, model, optimizer, 12)
    assert loss_of(model) < 0.97 * before
    assert small_models.logits(model, family).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@swapping
def test_layers_inside_the_blocks_are_swapped_and_embeddings_and_heads_are_not(name, family):
    model = small_models.model(family)
    dense = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    names = method(name).convert(model)
    assert names and set(names) <= dense
    assert all(type(model.get_submodule(n)) not in (torch.nn.Linear, Conv1D) for n in names)
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear and all(model.get_submodule(n) is not head for n in names)


@pytest.mark.parametrize("family", FAMILIES)
@swapping
def test_it_saves_and_loads_with_the_same_logits(name, family, tmp_path):
    model, *_ = trained(name, family)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(small_models.logits(again, family), small_models.logits(model, family))
    assert type(again.get_submodule(next(iter(again.config.quantization_config.modules)))).__name__ != "Linear"


@swapping
def test_a_loader_that_does_not_know_it_fails_on_a_shape(name, tmp_path):
    model, *_ = trained(name)
    with pytest.raises(RuntimeError, match="size mismatch for model.layers.0"):
        small_models.model("llama").load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("family", FAMILIES)
@swapping
def test_merged_it_is_an_ordinary_model_of_the_same_function(name, family, tmp_path):
    model, *_ = trained(name, family)
    expected = small_models.logits(model, family)
    names = merge(model)
    assert names
    torch.testing.assert_close(small_models.logits(model, family), expected, rtol=1e-4, atol=2e-4)
    plain = small_models.model(family)
    assert all(type(model.get_submodule(n)) is type(plain.get_submodule(n)) for n in names)
    plain.load_state_dict(model.state_dict())  # the same names and shapes
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_method
def test_what_it_leaves_behind_saves_and_loads(name, family, tmp_path):
    model, made, *_ = trained(name, family)
    made.finish(model)
    model.eval().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(small_models.logits(again, family), small_models.logits(model, family))
    assert model.generate(torch.arange(4, 8)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)


@every_method
def test_broken_off_in_the_middle_it_goes_on_bit_for_bit(name):
    unbroken, *_ = trained(name, steps=10)
    broken, same, first, _ = trained(name, steps=5)
    weights, state = copy.deepcopy(broken.state_dict()), copy.deepcopy(first.state_dict())
    fresh = small_models.model("llama")
    same.convert(fresh)
    fresh.load_state_dict(weights)
    second = same.optimizer(fresh)
    second.load_state_dict(state)
    train(same, fresh, second, 5, first=5)
    a, b = unbroken.state_dict(), fresh.state_dict()
    assert a.keys() == b.keys() and not [n for n in a if not torch.equal(a[n], b[n])]


@every_method
def test_it_is_deterministic_and_leaves_the_global_random_state_alone(name):
    made = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        model, *_ = trained(name)
        assert torch.equal(before, torch.random.get_rng_state())
        made.append(model.state_dict())
    assert not [n for n in made[0] if not torch.equal(made[0][n], made[1][n])]


@every_method
def test_it_trains_in_bfloat16(name):
    model, _, _, losses = trained(name, dtype=torch.bfloat16, steps=6)
    assert all(torch.isfinite(torch.tensor(losses))) and small_models.logits(model, "llama").isfinite().all()


@every_method
def test_it_trains_under_autocast_and_gradient_checkpointing(name):
    model, made = small_models.model("llama"), method(name)
    made.convert(model)
    optimizer = made.optimizer(model)
    plain, *_ = trained(name, steps=3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train(made, model, optimizer, 3)
    a, b = plain.state_dict(), model.state_dict()
    for n in a:
        torch.testing.assert_close(b[n], a[n], rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    made.begin_step(model, optimizer, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss(model, batch(3))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_method
def test_targets_that_match_nothing_and_knobs_out_of_range_are_named(name):
    with pytest.raises(ValueError, match="nothing_like_it"):
        made = method(name, target_modules=["nothing_like_it"])
        model = small_models.model("llama")
        made.convert(model)
        made.begin_step(model, made.optimizer(model), 0)
    with pytest.raises(ValueError, match="lr is -1"):
        method(name, lr=-1.0)


@every_method
def test_hf_trainer_runs_it(name, tmp_path):
    from echelon.train import MethodCallback

    model, made = small_models.model("llama"), method(name)
    made.convert(model)
    optimizer = made.optimizer(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 40, (8, 12), generator=torch.Generator().manual_seed(0))]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, logging_strategy="no"
    )
    before = loss_of(model.eval())
    transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[MethodCallback(made)]).train()
    assert loss_of(model.eval()) != before

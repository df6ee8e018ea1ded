"""Steps in backward equal plain ones bit for bit, keep one gradient alive, and refuse what they cannot do."""

import pytest
import torch

import small_models
from echelon.errors import UserError
from echelon.train.layerwise import step_in_backward
from echelon.train.optimizers import AdamW, GaLore

METHODS = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
    "galore": GaLore(lr=0.01, rank=4, update_proj_gap=2),
    "stochastic": AdamW(lr=0.01, rounding="stochastic"),
    "master_8_bit": GaLore(lr=0.01, rank=4, update_proj_gap=2, rounding="master", state_bits=8),
}


def batches(count, rows=2):
    return torch.randint(4, 40, (count, rows, 10), generator=torch.Generator().manual_seed(1))


def backward(model, ids, share=1.0):
    (model(input_ids=ids, labels=ids).loss * share).backward()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # both tie their embeddings
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_equal_those_of_plain_stepping_bit_for_bit(name, family, accumulate):
    dtype = torch.float32 if name in ("adamw", "galore") else torch.bfloat16
    plain, fused = small_models.model(family, dtype), small_models.model(family, dtype)
    optimizer, inside = METHODS[name].optimizer(plain), METHODS[name].optimizer(fused)
    step_in_backward(inside, accumulate)
    for number, ids in enumerate(batches(4 * accumulate), 1):
        backward(plain, ids, 1 / accumulate)
        backward(fused, ids, 1 / accumulate)
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            before = weights(fused)
            inside.step()
            assert_same(weights(fused), before)
    assert_same(weights(plain), weights(fused))
    for old, a, b in zip(small_models.model(family, dtype).parameters(), plain.parameters(), fused.parameters(), strict=True):
        assert not torch.equal(old, b)
        assert all(torch.equal(optimizer.state[a][key], inside.state[b][key]) for key in optimizer.state[a])


def test_one_gradient_is_alive_at_a_time():
    model = small_models.model("llama")
    parameters, alive = list(model.parameters()), []
    for p in parameters:  # these hooks run before those that step
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in parameters)))
    optimizer = AdamW().optimizer(model)
    step_in_backward(optimizer)
    backward(model, batches(1)[0])
    assert alive == [1] * len(parameters) and all(p.grad is None for p in parameters)


def test_nothing_moves_before_the_last_micro_batch_and_leftovers_are_stepped_by_step():
    model, plain = small_models.model("llama"), small_models.model("llama")
    optimizer, reference = AdamW(lr=0.01).optimizer(model), AdamW(lr=0.01).optimizer(plain)
    step_in_backward(optimizer, accumulate=3)
    start = weights(model)
    for ids in batches(2):
        backward(model, ids)
        backward(plain, ids)
    assert_same(weights(model), start)
    optimizer.step()  # the data ended after two of three
    optimizer.zero_grad()
    reference.step()
    assert_same(weights(model), weights(plain))
    done = weights(model)
    for ids in batches(3):  # the next window is whole again
        assert_same(weights(model), done)
        backward(model, ids)
    assert not torch.equal(weights(model)["lm_head.weight"], done["lm_head.weight"]) and all(p.grad is None for p in model.parameters())


def test_a_parameter_without_a_part_in_the_last_micro_batch_is_stepped_with_its_step():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))

    model, plain = Two(), Two()
    optimizer, reference = AdamW(lr=0.1).optimizer(model), AdamW(lr=0.1).optimizer(plain)
    step_in_backward(optimizer, accumulate=2)
    for made in (model, plain):
        (made.one.square().sum() + made.other.square().sum()).backward()
        made.one.pow(3).sum().backward()
    reference.step()
    assert torch.equal(model.one, plain.one) and torch.equal(model.other, plain.other) and model.other.grad is None
    assert (model.other < 2.0).all()


def test_each_gradient_may_be_clipped_alone():
    model, plain = small_models.model("llama"), small_models.model("llama")
    method = GaLore(lr=0.01, rank=4, base="adafactor", betas=(0.0, 0.999))
    optimizer, reference = method.optimizer(model), method.optimizer(plain)
    step_in_backward(optimizer, max_parameter_norm=1e-12)  # far below Adafactor's own floor of 1e-15 a number, so that it shows
    backward(model, batches(1)[0])
    backward(plain, batches(1)[0])
    for p in plain.parameters():
        p.grad.mul_(torch.clamp(1e-12 / (p.grad.norm() + 1e-6), max=1.0))
    reference.step()
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, weights(plain)[name], rtol=0, atol=1e-7)


def test_a_gradient_that_is_no_number_is_named_and_its_parameter_left_alone():
    model = small_models.model("llama")
    step_in_backward(AdamW(lr=0.01).optimizer(model))
    chosen = model.model.layers[0].mlp.up_proj.weight
    chosen.register_hook(lambda gradient: gradient * float("nan"))
    before = chosen.detach().clone()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN"):
        backward(model, batches(1)[0])
    assert torch.equal(chosen, before)


def test_taken_off_it_steps_plainly_again():
    model = small_models.model("llama")
    optimizer = AdamW(lr=0.01).optimizer(model)
    step_in_backward(optimizer)()
    start = weights(model)
    backward(model, batches(1)[0])
    assert_same(weights(model), start)
    optimizer.step()
    assert not torch.equal(weights(model)["lm_head.weight"], start["lm_head.weight"])


def test_what_it_cannot_do_is_refused():
    model = small_models.model("llama")
    optimizer = AdamW(lr=0.01).optimizer(model)
    with pytest.raises(ValueError, match="max_grad_norm is 1.0; steps in backward never see all gradients together"):
        step_in_backward(optimizer, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="accumulate is 0"):
        step_in_backward(optimizer, 0)
    with pytest.raises(ValueError, match="max_parameter_norm is -1"):
        step_in_backward(optimizer, max_parameter_norm=-1)
    step_in_backward(optimizer)
    with pytest.raises(UserError, match="already"):
        step_in_backward(optimizer)


def test_a_grad_scaler_is_refused():
    model = small_models.model("llama")
    optimizer = AdamW(lr=0.01).optimizer(model)
    step_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    ids = batches(1)[0]
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    with pytest.raises(UserError, match="GradScaler cannot be used"):
        scaler.step(optimizer)

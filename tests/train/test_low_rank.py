"""Low-rank training and its restarts: against SVDs in numpy, the schedule written out, and a new optimizer."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import small_models
from echelon.train.layers import LowRank, refactor, reset_moments
from echelon.train.layers.base import LearningRate, converted
from echelon.train.layers.low_rank import ScaledLowRank
from echelon.train.optimizers import AdamW


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def swapped(dtype=torch.float32, **knobs):
    model, method = small_models.model("llama", dtype), LowRank(**{"rank": 4, "lr": 0.01} | knobs)
    method.convert(model)
    return model, method, [layer for _, layer in converted(model, ScaledLowRank)]


def backward(model):
    ids = torch.randint(4, 40, (2, 10), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_layer_is_the_scaled_product_of_factors_that_start_uniformly_within_one_over_the_root_of_their_inputs():
    net = nn.ModuleDict({"a": nn.utils.skip_init(nn.Linear, 400, 300)})
    net["a"].bias.data.fill_(0.5)
    LowRank(rank=100, lora_alpha=25).convert(net)
    layer, x = net["a"], noise(3, 400)
    for factor, inputs in ((layer.down.weight, 400), (layer.up.weight, 100)):
        assert float(factor.detach().abs().max()) <= inputs**-0.5
        assert_close(float(factor.detach().std()), (3 * inputs) ** -0.5, rtol=0.03, atol=0)  # and not zero, as B of LoRA is
    expected = 25 / 100 * x.double() @ layer.down.weight.T.double() @ layer.up.weight.T.double() + 0.5
    assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["scratch", "svd"])
def test_started_from_a_weight_it_is_its_best_approximation(init):
    net = nn.ModuleDict({"a": nn.utils.skip_init(nn.Linear, 12, 9, bias=False)})
    weight = noise(9, 12)
    net["a"].weight.data.copy_(weight)
    LowRank(rank=3, init=init).convert(net)
    left, values, right = np.linalg.svd(weight.double().numpy())
    best = torch.tensor((left[:, :3] * values[:3]) @ right[:3]).float()
    assert torch.allclose(net["a"].product(), best, atol=1e-5) == (init == "svd")


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 20, 5), (20, 30, 5), (12, 12, 12)])
def test_refactoring_splits_the_product_evenly_as_its_svd_does(rows, columns, rank):
    up, down = noise(rows, rank), noise(rank, columns, seed=1) * torch.logspace(1, -2, rank)[:, None]
    product = up.double() @ down.double()
    refactor(up, down)
    assert (up.double() @ down.double() - product).norm() <= 1e-5 * product.norm()
    left, values, right = np.linalg.svd(product.numpy(), full_matrices=False)
    gram = torch.tensor(values[:rank]).diag()
    for found in (up.T.double() @ up.double(), down.double() @ down.T.double()):
        assert_close(found, gram, rtol=1e-4, atol=1e-5 * float(values[0]))
    for factor, expected in ((up, left[:, :rank] * values[:rank] ** 0.5), (down.T, right[:rank].T * values[:rank] ** 0.5)):
        assert_close(factor.abs().double(), torch.tensor(np.abs(expected)), rtol=1e-3, atol=1e-3)  # signs are the routine's
    again = up.clone(), down.clone()
    refactor(*again)
    assert_close(again[0].abs(), up.abs(), rtol=1e-4, atol=1e-4)
    assert_close(again[1].abs(), down.abs(), rtol=1e-4, atol=1e-4)


def test_refactoring_leaves_zeros_where_the_product_has_no_direction():
    low = noise(10, 2) @ noise(2, 4, seed=1), noise(4, 8, seed=2)  # four directions of rank two
    wide = noise(3, 7), noise(7, 5, seed=1)  # seven directions of three rows
    nothing = torch.zeros(10, 4), noise(4, 8)  # as SLTrain begins
    for (up, down), rank in ((low, 2), (wide, 3), (nothing, 0)):
        product = up @ down
        refactor(up, down)
        assert up.isfinite().all() and down.isfinite().all()
        assert_close(up @ down, product, rtol=1e-4, atol=1e-4)
        assert up[:, rank:].norm() < 2e-3 and down[rank:].norm() < 2e-3  # roots of what rounding leaves of zero
        assert rank == 0 or up[:, :rank].norm(dim=0).min() > 0.1


def test_processes_take_the_factors_of_the_first(monkeypatch):
    up, down, first = noise(6, 2), noise(2, 5, seed=1), [noise(6, 2, seed=2), noise(2, 5, seed=3)]
    given = [value.clone() for value in first]
    monkeypatch.setattr("echelon.train.layers.base.processes", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, source: tensor.copy_(given.pop(0)))
    refactor(up, down)
    assert torch.equal(up, first[0]) and torch.equal(down, first[1])


def test_the_learning_rate_is_the_papers_formula():
    steps, warmup, floor, every, length, start = 1000, 100, 0.1, 200, 10, 0.001
    method, base = LowRank(reset_every=every), LearningRate(steps, warmup, floor)

    def cosine(t):
        return t / warmup if t < warmup else floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))

    for t in range(steps):
        last = every * (t // every)
        inside = t - last
        target = cosine(last + length)
        expected = cosine(t) if last == 0 or inside >= length else start * target + (1 - start) * target * inside / (length - 1)
        assert method.lr_scale(t, base) == pytest.approx(expected, abs=1e-12)
    plain = LowRank(reset_every=0)
    assert [plain.lr_scale(t, base) for t in range(steps + 1)] == pytest.approx([cosine(t) for t in range(steps + 1)], abs=1e-12)
    assert plain.lr_scale(steps, base) == pytest.approx(floor) and plain.lr_scale(steps - 1, base) == pytest.approx(floor, abs=1e-4)


@pytest.mark.parametrize("make", [lambda ps: AdamW(lr=0.01).optimizer(ps), lambda ps: torch.optim.AdamW(ps, lr=0.01)], ids=["ours", "torch"])
def test_a_restart_keeps_the_function_and_the_next_step_is_the_first_of_a_new_optimizer(make):
    model, method, layers = swapped(refactor_every=3, reset_every=3)
    optimizer = make(list(model.parameters()))
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    before = small_models.logits(model, "llama")
    method.end_step(model, optimizer, 2)
    assert optimizer.state and torch.equal(small_models.logits(model, "llama"), before)  # nothing is due
    method.end_step(model, optimizer, 3)
    assert not optimizer.state
    assert_close(small_models.logits(model, "llama"), before, rtol=1e-4, atol=1e-5)
    for layer in layers:
        assert_close(layer.up.weight.T @ layer.up.weight, layer.down.weight @ layer.down.weight.T, rtol=1e-4, atol=1e-5)
    twin, _, _ = swapped()
    twin.load_state_dict(model.state_dict())
    fresh = make(list(twin.parameters()))
    for net, stepping in ((model, optimizer), (twin, fresh)):
        backward(net)
        stepping.step()
    for mine, new in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(mine, new, rtol=0, atol=1e-7)


def test_steps_may_be_counted_on():
    model, method, _ = swapped(reset_every=2, reset_step_counter=False)
    optimizer = AdamW(lr=0.01, state_bits=8).optimizer(model)
    backward(model)
    optimizer.step()
    method.end_step(model, optimizer, 2)
    for state in optimizer.state.values():
        assert int(state["step"]) == 1 and not any(value.any() for key, value in state.items() if key in ("exp_avg", "exp_avg_scale", "exp_avg_sq"))


def test_a_reset_leaves_the_float32_copies_of_half_precision_weights():
    model, method, _ = swapped(torch.bfloat16, reset_every=2)
    optimizer = AdamW(lr=1e-4, rounding="master").optimizer(model)
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    masters = {p: optimizer.state[p]["master"].clone() for p in model.parameters()}
    assert any(not torch.equal(master, p.float()) for p, master in masters.items())
    method.end_step(model, optimizer, 2)
    assert all(optimizer.state[p].keys() == {"master"} and torch.equal(optimizer.state[p]["master"], master) for p, master in masters.items())
    again = AdamW(lr=1e-4, rounding="master").optimizer(model)
    again.load_state_dict(optimizer.state_dict())  # as a checkpoint between the two steps has it
    backward(model)
    again.step()
    for p, master in masters.items():
        assert int(again.state[p]["step"]) == 1
        step = p.grad.float() / (p.grad.float().abs() + 1e-8)
        assert_close(again.state[p]["master"], master - 1e-4 * step, rtol=0, atol=1e-7)


def test_moments_of_some_parameters_are_forgotten_and_others_kept():
    a, b = (nn.Parameter(noise(3, seed=s)) for s in (0, 1))
    optimizer = AdamW().optimizer([a, b])
    a.grad, b.grad = noise(3, seed=2), noise(3, seed=3)
    optimizer.step()
    reset_moments(optimizer, [a])
    assert set(optimizer.state) == {b} and int(optimizer.state[b]["step"]) == 1


@pytest.mark.parametrize(("knobs", "said"), [
    ({"rank": 0}, "rank is 0"), ({"lora_alpha": 0.0}, "lora_alpha is 0"), ({"init": "zero"}, "init is 'zero'"),
    ({"refactor_every": -1}, "refactor_every is -1"), ({"reset_every": 1.5}, "reset_every is 1.5"),
    ({"recovery_steps": -1}, "recovery_steps is -1"), ({"recovery_start": 2}, "recovery_start is 2"),
])  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        LowRank(**knobs)


def test_a_rank_above_a_layers_smaller_side_is_refused_and_the_model_stays():
    model = small_models.model("llama")
    with pytest.raises(ValueError, match=r"rank is 17; model.layers.0.self_attn.k_proj is 16 x 32, so it must be at most 16"):
        LowRank(rank=17).convert(model)
    assert not converted(model, ScaledLowRank)

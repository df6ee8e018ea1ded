"""Ordered dropout on factored layers: prefixes, samplers, the group lasso, shrinking, budgets and export."""

import copy
import itertools
import os
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy import stats
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import small_models
import small_resnet
from echelon.models.factored_conv import FactoredConv
from echelon.models.modules import LowRankLinear
from echelon.train.layers import Maestro, export, merge, ordered_dropout, reestimate_batch_norm, set_rank_budget
from echelon.train.layers.maestro import _reorder, distillation, proximal
from echelon.train.layers.ordered import ordered
from echelon.train.optimizers import AdamW
from small_parts import noise as drawn
from small_parts import seeded

DATA = os.environ.get("ECHELON_DATA")
noise = partial(drawn, dtype=torch.float64)


class Net(nn.Module):
    """Two linear layers and a convolution: the network of the golden values."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, 6), nn.Linear(6, 5, bias=False)

    def forward(self, x, labels=None):
        logits = self.out(torch.tanh(self.hidden(torch.tanh(self.conv(x)).mean((2, 3)))))
        return SimpleNamespace(logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


def net(dtype=torch.float64, **knobs):
    made = seeded(Net, 3).to(dtype)
    Maestro(**knobs).convert(made)
    return made


def batch(dtype=torch.float64):
    return {"x": noise(6, 3, 7, 7).to(dtype), "labels": torch.tensor([0, 1, 2, 3, 4, 0])}


def by_numpy(model, ranks, x):
    """The network's logits at these ranks, from its factors, in plain numpy."""
    a = {name: m.up.weight.detach().double().numpy() for name, m in ordered(model).items()}
    b = {name: m.down.weight.detach().double().numpy() for name, m in ordered(model).items()}
    low = {name: a[name].reshape(a[name].shape[0], -1)[:, :r] @ b[name].reshape(b[name].shape[0], -1)[:r] for name, r in ranks.items()}
    x = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    bias = {name: m.bias.detach().numpy() if m.bias is not None else 0 for name, m in ordered(model).items()}
    cells = [[x[:, :, i : i + 3, j : j + 3].reshape(len(x), -1) @ low["conv"].T + bias["conv"] for j in range(0, 7, 2)] for i in range(0, 7, 2)]
    hidden = np.tanh(np.tanh(np.array(cells)).mean((0, 1)) @ low["hidden"].T + bias["hidden"])
    return torch.tensor(hidden @ low["out"].T + bias["out"])


FULL = {"conv": 8, "hidden": 6, "out": 5}


def test_converted_it_computes_the_same_and_at_every_rank_what_the_definition_says():
    dense, model, x = seeded(Net, 3).double(), net(), batch()["x"]
    assert {name: m.kept_rank() for name, m in ordered(model).items()} == FULL
    torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(by_numpy(model, FULL, x), dense(x).logits.detach(), rtol=0, atol=1e-9)
    for name, full in FULL.items():
        for rank in range(full + 1):
            with ordered_dropout(model, layer=name, rank=rank):
                torch.testing.assert_close(model(x).logits, by_numpy(model, FULL | {name: rank}, x), rtol=0, atol=1e-9)
    with ordered_dropout(model, {"conv": 2, "out": 3}):
        torch.testing.assert_close(model(x).logits, by_numpy(model, FULL | {"conv": 2, "out": 3}, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=0, atol=1e-9)  # whole again
    with ordered_dropout(model, layer=1, rank=1), ordered_dropout(model, layer="out", rank=1):
        inner = model(x).logits
    torch.testing.assert_close(inner, by_numpy(model, FULL | {"out": 1}, x), rtol=0, atol=1e-9)


def test_the_start_shares_the_singular_values_and_orders_them():
    dense, model = seeded(Net, 3).double(), net()
    for name, module in ordered(model).items():
        values = torch.tensor(np.linalg.svd(getattr(dense, name).weight.detach().flatten(1).numpy(), compute_uv=False))
        torch.testing.assert_close(module.up.weight.detach().flatten(1).norm(dim=0) ** 2, values)
        torch.testing.assert_close(module.down.weight.detach().flatten(1).norm(dim=1) ** 2, values)
        assert module.weight.numel() == 0 and module.weight.dtype == torch.float64


def test_merged_it_is_the_dense_network():
    dense, model, x = seeded(Net, 3), net(torch.float32), batch(torch.float32)["x"]
    merge(model)
    assert [type(m) for m in (model.conv, model.hidden, model.out)] == [nn.Conv2d, nn.Linear, nn.Linear]
    for name in FULL:
        torch.testing.assert_close(getattr(model, name).weight, getattr(dense, name).weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x).logits, dense(x).logits, rtol=0, atol=1e-5)


def test_a_prefix_does_not_see_later_components_and_gives_them_no_gradient():
    model, data = net(), batch()
    with ordered_dropout(model, layer="hidden", rank=2):
        before = model(**data)
    before.loss.backward()
    assert not model.hidden.up.weight.grad[:, 2:].any() and not model.hidden.down.weight.grad[2:].any()
    assert model.hidden.up.weight.grad[:, :2].abs().min() > 0 and model.hidden.down.weight.grad[:2].abs().min() > 0
    assert model.conv.down.weight.grad.flatten(1).norm(dim=1).min() > 0  # the others run whole
    with torch.no_grad():
        model.hidden.up.weight[:, 2:] = 100.0
        model.hidden.down.weight[2:] = float("nan")
    with ordered_dropout(model, layer="hidden", rank=2):
        assert torch.equal(model(data["x"]).logits, before.logits)
    assert model(data["x"]).logits.isnan().any()


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_is_the_bias_alone_in_every_shape(bias):
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, stride=2, bias=bias), "line": nn.Conv1d(3, 4, 2, bias=bias), "linear": nn.Linear(3, 4, bias=bias)})
    inputs = {"conv": noise(2, 3, 9, 8).float(), "line": noise(2, 3, 9).float(), "linear": noise(2, 5, 3).float()}
    whole = {name: model[name](x).shape for name, x in inputs.items()}
    Maestro().convert(model)
    for name, x in inputs.items():
        with ordered_dropout(model, layer=name, rank=0):
            y = model[name](x)
        expected = torch.zeros(whole[name])
        if bias:
            expected += model[name].bias.view(4) if name == "linear" else model[name].bias.view(1, 4, *[1] * (expected.ndim - 2))
        assert torch.equal(y, expected)
    for module in ordered(model).values():
        module.keep(0)
    masked = {name: model[name](x) for name, x in inputs.items()}
    assert export(model, merge_if_larger=False) == dict.fromkeys(inputs, 0)
    for name, x in inputs.items():
        assert torch.equal(model[name](x), masked[name])


RANKS = {"a": 2, "b": 5, "c": 3}


def draws(sampler, count, seed=0):
    method = Maestro(sampler=sampler, seed=seed)
    return [method.sample(RANKS, step) for step in range(count)]


def test_the_layer_is_drawn_evenly_and_then_the_rank():
    made = [next(iter(d.items())) for d in draws("layer_uniform", 6000) if len(d) == 1]
    assert len(made) == 6000
    layers = Counter(name for name, _ in made)
    assert stats.chisquare([layers[name] for name in RANKS]).pvalue > 1e-3
    for name, full in RANKS.items():
        ranks = Counter(rank for layer, rank in made if layer == name)
        assert sorted(ranks) == list(range(1, full + 1)) and stats.chisquare(list(ranks.values())).pvalue > 1e-3
    successive = Counter((a[0], b[0]) for a, b in itertools.pairwise(made))
    assert stats.chisquare(list(successive.values())).pvalue > 1e-3 and len(successive) == 9
    assert made == [next(iter(d.items())) for d in draws("layer_uniform", 6000)] != [next(iter(d.items())) for d in draws("layer_uniform", 6000, seed=1)]


def test_pairs_are_walked_without_repetition():
    every = {(name, rank) for name, full in RANKS.items() for rank in range(1, full + 1)}
    made = [next(iter(d.items())) for d in draws("pairs", 40)]
    cycles = [made[i : i + 10] for i in range(0, 40, 10)]
    assert all(set(cycle) == every for cycle in cycles) and len({tuple(cycle) for cycle in cycles}) == 4


def test_independent_draws_cut_every_layer():
    made = draws("independent", 3000)
    assert all(d.keys() == RANKS.keys() for d in made)
    assert stats.chisquare([count for _, count in sorted(Counter(tuple(d.values()) for d in made).items())]).pvalue > 1e-3
    assert len({tuple(d.values()) for d in made}) == 30


def test_nothing_is_drawn_below_one_or_for_layers_that_are_gone():
    for sampler in ("layer_uniform", "pairs", "independent"):
        method = Maestro(sampler=sampler)
        for step in range(60):
            assert all(1 <= rank <= 2 and name == "b" for name, rank in method.sample({"a": 0, "b": 2}, step).items())
        assert method.sample({"a": 0}, 0) == {}
    assert Maestro(sampler="none").sample(RANKS, 0) == {} == Maestro(sampler="fixed:0.5").sample(RANKS, 0)


def test_a_fixed_share_is_kept_from_the_start():
    model = net(sampler="fixed:0.4")
    assert {name: m.kept_rank() for name, m in ordered(model).items()} == {"conv": 3, "hidden": 2, "out": 2}
    x = batch()["x"]
    torch.testing.assert_close(model(x).logits, by_numpy(model, {"conv": 3, "hidden": 2, "out": 2}, x), rtol=0, atol=1e-9)
    assert all(m.kept_rank() == 1 for m in ordered(net(sampler="fixed:0.01")).values())


def planned(method, model, step):
    method.begin_step(model, None, step)
    return {name: m.planned for name, m in ordered(model).items() if m.planned is not None}


def test_the_loss_is_that_of_the_whole_and_the_cut_network():
    model, data = net(), batch()
    model.train()
    for step in range(4):
        ranks = planned(Maestro(), model, step)
        assert len(ranks) == 1
        whole, cut = (by_numpy(model, FULL | r, data["x"]) for r in ({}, ranks))
        labels = nn.functional.cross_entropy(whole, data["labels"])
        chances = whole.softmax(1)
        distilled = -(chances * cut.log_softmax(1)).sum(1).mean()
        assert Maestro().loss(model, data).item() == pytest.approx(float(labels + distilled), rel=1e-6)
        planned(Maestro(full_pass=False), model, step)
        assert Maestro(full_pass=False).loss(model, data).item() == pytest.approx(float(nn.functional.cross_entropy(cut, data["labels"])), rel=1e-6)
    model.eval()  # nothing is cut, nothing added
    expected = float(nn.functional.cross_entropy(by_numpy(model, FULL, data["x"]), data["labels"]))
    assert Maestro(group_lasso=1.0).loss(model, data).item() == pytest.approx(expected, rel=1e-9)


def test_the_target_of_the_cut_network_has_no_gradient():
    model, data = net(), batch()
    model.train()
    ranks = planned(Maestro(), model, 1)
    Maestro().loss(model, data).backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    target = expected(data["x"]).logits.softmax(1).detach()
    expected(**data).loss.backward()
    with ordered_dropout(expected, ranks):
        nn.functional.cross_entropy(expected(data["x"]).logits, target).backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-8)


def test_distillation_counts_the_positions_that_have_a_label():
    cut, full = noise(2, 4, 7), noise(2, 4, 7, seed=2)
    labels = torch.tensor([[1, -100, 3, 4], [-100, -100, -100, 2]])
    each = -(full.softmax(-1) * cut.log_softmax(-1)).sum(-1)
    at = {False: [(0, 0), (0, 2), (0, 3), (1, 3)], True: [(0, 1), (0, 2), (1, 2)]}  # a causal position's label is the next one
    for causal, places in at.items():
        found = distillation(cut, full, {"labels": labels}, causal)
        assert found.item() == pytest.approx(float(sum(each[i, j] for i, j in places)) / len(places), rel=1e-5)
    found = distillation(cut, full, {"labels": labels, "num_items_in_batch": 10}, True)
    assert found.item() == pytest.approx(float(sum(each[i, j] for i, j in at[True])) / 10, rel=1e-5)
    assert distillation(cut, full, {}, True).item() == pytest.approx(float(each.mean()), rel=1e-5)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_the_group_lasso_is_the_sum_of_the_norms(hierarchical):
    model = net()
    total = 0.0
    for module in ordered(model).values():
        a, b = module.up.weight.detach().flatten(1).numpy(), module.down.weight.detach().flatten(1).numpy()
        for i in range(a.shape[1]):
            stop = None if hierarchical else i + 1
            total += np.linalg.norm(a[:, i:stop]) + np.linalg.norm(b[i:stop])
    method = Maestro(group_lasso=0.3, hierarchical=hierarchical, sampler="none")
    assert method.penalty(model).item() == pytest.approx(total, rel=1e-9)
    data = batch()
    model.train()
    assert method.loss(model, data).item() == pytest.approx(model(**data).loss.item() + 0.3 * total, rel=1e-9)
    assert torch.autograd.gradcheck(lambda *_: method.penalty(model), tuple(model.hidden.parameters()), atol=1e-6)


@pytest.mark.parametrize("hierarchical", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_is_finite_where_components_are_zero(hierarchical, dtype):
    model = net(torch.float32).to(dtype)
    with torch.no_grad():
        model.hidden.up.weight[:, 3:] = 0
        model.hidden.down.weight[3:] = 0
        model.conv.up.weight.zero_()
    Maestro(hierarchical=hierarchical).penalty(model).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert not model.hidden.up.weight.grad[:, 3:].any() and model.hidden.up.weight.grad[:, :3].any()


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2, 0.6, 10.0])
@pytest.mark.parametrize("hierarchical", [True, False])
def test_the_proximal_step_minimises_its_objective(hierarchical, threshold):
    matrix = noise(3, 5).numpy() * np.array([2.0, 0.1, 1.0, 0.3, 0.5])
    scales = proximal(torch.tensor(np.linalg.norm(matrix, axis=0)), threshold, hierarchical).numpy()

    def objective(flat):
        new = flat.reshape(3, 5)
        groups = [new[:, i:] if hierarchical else new[:, i] for i in range(5)]
        return 0.5 * ((new - matrix) ** 2).sum() + threshold * sum(np.linalg.norm(g) for g in groups)

    found = objective((matrix * scales).ravel())
    starts = [matrix.ravel(), 0.5 * matrix.ravel(), 1e-3 * matrix.ravel()]
    best = min(scipy.optimize.minimize(objective, start, method="Powell", options={"xtol": 1e-9, "ftol": 1e-13, "maxiter": 400}).fun for start in starts)
    assert found <= best + 1e-9 and ((scales >= 0) & (scales <= 1)).all()
    assert threshold > 0 or (scales == 1).all()
    assert threshold < 10 or (scales == 0).all()


@pytest.mark.parametrize("make", [lambda m: torch.optim.SGD(m.parameters(), 0.1), lambda m: AdamW(lr=0.1, rounding="master").optimizer(m)])
def test_the_proximal_form_shrinks_behind_the_step_and_reaches_zero(make):
    model = net(torch.float32)
    method = Maestro(group_lasso=0.5, proximal=True, shrink_every=3)
    optimizer = make(model)
    before = [m.up.weight.detach().double().flatten(1).clone() for m in ordered(model).values()]
    method.end_step(model, optimizer, 1)
    for module, old in zip(ordered(model).values(), before, strict=True):
        scales = proximal(old.norm(dim=0), 0.05, True)
        torch.testing.assert_close(module.up.weight.detach().double().flatten(1), old * scales, rtol=1e-5, atol=1e-6)
    for step in range(2, 40):
        method.end_step(model, optimizer, step)
    assert all(m.kept_rank() == 0 for m in ordered(model).values())


@pytest.mark.parametrize("seed", range(3))
def test_hierarchical_importance_keeps_a_prefix(seed):
    model = net()
    with torch.no_grad():
        for module in ordered(model).values():
            scale = noise(module.rank, seed=seed).exp()
            module.up.weight.copy_(module.up.weight * scale.view(1, -1, *[1] * (module.up.weight.ndim - 2)))
    expected = {}
    threshold = 1.0
    for name, module in ordered(model).items():
        a, b = module.up.weight.detach().flatten(1).numpy(), module.down.weight.detach().flatten(1).numpy()
        importance = [np.linalg.norm(a[:, i:]) * np.linalg.norm(b[i:]) for i in range(module.rank)]
        assert all(x >= y for x, y in itertools.pairwise(importance))
        expected[name] = sum(x >= threshold for x in importance)
    assert Maestro(importance_threshold=threshold).shrink(model) == expected
    assert 0 < sum(expected.values()) < sum(FULL.values())


@pytest.mark.parametrize("make", [lambda m: torch.optim.Adam(m.parameters(), 1e-2), lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9)])
def test_flat_importance_moves_what_stays_to_the_front_with_its_moments(make):
    model, data = net(), batch()
    optimizer = make(model)
    model(**data).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.hidden.up.weight[:, 1] = 0
        model.conv.down.weight[[0, 5]] = 0
    before = model(data["x"]).logits
    kept = [0, 2, 3, 4, 5]
    weight = model.hidden.up.weight
    key = "exp_avg" if "exp_avg" in optimizer.state[weight] else "momentum_buffer"
    values, moments = weight.detach().clone(), optimizer.state[weight][key].clone()
    ranks = Maestro(hierarchical=False, importance_threshold=1e-9).shrink(model, optimizer)
    assert ranks == {"conv": 6, "hidden": 5, "out": 5} and model.hidden.up.weight is weight
    assert torch.equal(weight[:, :5], values[:, kept]) and torch.equal(optimizer.state[weight][key][:, :5], moments[:, kept])
    torch.testing.assert_close(model(data["x"]).logits, before, rtol=0, atol=1e-12)


def test_eight_bit_moments_that_cannot_follow_are_forgotten():
    model = seeded(lambda: nn.ModuleDict({"a": nn.Linear(64, 80)}))
    Maestro().convert(model)
    optimizer = AdamW(state_bits=8).optimizer(model)
    model["a"](noise(2, 64).float()).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model["a"].up.weight[:, 3] = 0
    Maestro(hierarchical=False, importance_threshold=1e-9).shrink(model, optimizer)
    assert model["a"].kept_rank() == 63 and "exp_avg" not in optimizer.state.get(model["a"].up.weight, {})
    model["a"](noise(2, 64).float()).sum().backward()
    optimizer.step()


def run(method, model, optimizer, steps, data):
    ranks = []
    for step in range(steps):
        method.begin_step(model, optimizer, step)
        method.loss(model, data).backward()
        method.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
        ranks.append([m.kept_rank() for m in ordered(model).values()])
    return ranks


@pytest.mark.parametrize("knobs", [{"group_lasso": 0.01}, {"group_lasso": 0.1, "proximal": True}, {"group_lasso": 0.02, "hierarchical": False}], ids=str)
def test_ranks_shrink_while_it_learns_and_pruning_changes_no_bit(knobs):
    data = small_resnet.images(24, 12, classes=4)
    model = small_resnet.resnet(classes=4, width=4)
    method = Maestro(importance_threshold=5e-2, shrink_every=5, **knobs)
    names = method.convert(model)
    assert len(names) == 8 and all(type(model.get_submodule(n)).__name__ in ("OrderedConv", "OrderedLinear") for n in names)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
    first = model(**data).loss.item()
    ranks = run(method, model, optimizer, 60, data)
    assert all(a >= b for earlier, later in itertools.pairwise(ranks) for a, b in zip(earlier, later, strict=True))
    assert sum(ranks[-1]) < 0.8 * sum(ranks[0]) and all(step % 5 == 4 for step in range(1, 60) if ranks[step] != ranks[step - 1])
    assert model(**data).loss.item() < 0.6 * first
    model.eval()
    before = model(**data).logits
    told = export(model, merge_if_larger=False)
    assert list(told.values()) == ranks[-1] and not ordered(model)
    assert torch.equal(model(**data).logits, before)
    assert all(type(model.get_submodule(name)) in (FactoredConv, LowRankLinear) and model.get_submodule(name).rank == max(1, told[name]) for name in names)


def test_finish_makes_layers_dense_where_factors_cost_as_much():
    model, x = net(), batch()["x"]
    for name, rank in (("conv", 6), ("hidden", 4), ("out", 2)):  # of 8 x 27, 6 x 8 and 5 x 6, which break even at 6.2, 3.4 and 2.7
        getattr(model, name).keep(rank)
    before = model(x).logits
    Maestro().finish(model)
    assert [type(m) for m in (model.conv, model.hidden, model.out)] == [FactoredConv, nn.Linear, LowRankLinear]
    assert model.conv.rank == 6 and model.out.rank == 2
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-9)
    square = nn.ModuleDict({"a": nn.Linear(8, 8)})
    Maestro().convert(square)
    square["a"].keep(4)
    Maestro().finish(square)
    assert type(square["a"]) is nn.Linear  # as many is enough


def test_ranks_never_rise():
    model = net()
    model.conv.keep(3)
    with pytest.raises(ValueError, match=r"rank is 4; it must be in 0..3, since ranks only ever decrease"):
        model.conv.keep(4)
    with ordered_dropout(model, layer="conv", rank=8):
        assert model.conv.width() == 3


@pytest.mark.parametrize("init", ["svd", "random"])
def test_on_white_inputs_the_ordered_factors_find_the_best_map_of_every_rank(init):
    """The minimum is the same for every draw, so that noise vanishes there: E|AB x - M x|^2 = |AB - M|^2 under E[x x^T] = 1."""
    white = np.linalg.qr(noise(40, 5).numpy())[0] * 40**0.5
    left, _, right = np.linalg.svd(noise(6, 5, seed=4).numpy(), full_matrices=False)
    values = np.array([4.0, 3.0, 2.0, 1.2, 0.5])
    target = torch.tensor(left * values @ right)
    x = torch.tensor(white)
    model = seeded(lambda: nn.ModuleDict({"a": nn.Linear(5, 6, bias=False)})).double()
    method = Maestro(init=init, full_pass=False)
    method.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(2500):
        with ordered_dropout(model, planned(method, model, step)):
            (model["a"](x) - x @ target.T).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(1, 6):
        with ordered_dropout(model, layer="a", rank=rank):
            found = model["a"].product().detach().numpy()
        np.testing.assert_allclose(found, (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-2)


def cost_of(ranks):
    sizes = {"conv": (8, 27), "hidden": (6, 8), "out": (5, 6)}
    return sum(min(ranks[name] * (m + n), m * n) for name, (m, n) in sizes.items()) + 8 + 6  # and the biases


@pytest.mark.parametrize("params", [80, 150, 250, 296, 10**6])
def test_a_budget_of_parameters_gives_up_the_least_important_components(params):
    model = net()
    ranks = set_rank_budget(model, params=params)
    assert cost_of(ranks) <= params
    importance = {}
    for name, module in ordered(model).items():
        a, b = module.up.weight.detach().flatten(1).numpy(), module.down.weight.detach().flatten(1).numpy()
        importance |= {(name, i + 1): np.linalg.norm(a[:, i:]) * np.linalg.norm(b[i:]) for i in range(module.rank)}
    given_up = [pair for pair in importance if pair[1] > ranks[pair[0]]]
    left = [pair for pair in importance if 2 <= pair[1] <= ranks[pair[0]]]
    if given_up and left:
        assert max(importance[p] for p in given_up) <= min(importance[p] for p in left)
    if given_up:
        name, rank = max(given_up, key=importance.get)
        assert cost_of(ranks | {name: rank}) > params  # one more would not fit
    else:
        assert params >= 294 and ranks == FULL
    x = batch()["x"]
    torch.testing.assert_close(model(x).logits, by_numpy(model, ranks, x), rtol=0, atol=1e-9)
    assert {name: m.kept_rank() for name, m in ordered(model).items()} == FULL and set_rank_budget(model, params=10**6) == FULL
    torch.testing.assert_close(model(x).logits, by_numpy(model, FULL, x), rtol=0, atol=1e-9)


def test_the_exported_model_has_the_parameters_of_its_budget():
    model = net()
    ranks = set_rank_budget(model, params=160)
    Maestro().finish(model)
    assert sum(p.numel() for p in model.parameters()) == cost_of(ranks) <= 160


@pytest.mark.parametrize("bits", [32, 8])
def test_components_that_move_take_the_optimizers_float32_copies_along(bits):
    factor = nn.Parameter(noise(70, 64).bfloat16())
    optimizer = AdamW(lr=1e-3, rounding="master", state_bits=bits).optimizer([factor])
    factor.grad = noise(70, 64, seed=1).bfloat16()
    optimizer.step()
    master, mean, order = optimizer.state[factor]["master"].clone(), optimizer.state[factor]["exp_avg"].clone(), torch.arange(64).flip(0)
    with torch.no_grad():
        _reorder(factor, 1, order, optimizer)
    assert torch.equal(factor, master.bfloat16()[:, order]) and torch.equal(optimizer.state[factor]["master"], master[:, order])
    assert torch.equal(optimizer.state[factor]["exp_avg"], mean[:, order]) if bits == 32 else optimizer.state[factor].keys() == {"master"}


def test_a_budget_of_multiplications_counts_positions():
    model, x = net(), batch()["x"][:1]  # the convolution has 4 x 4 positions

    def macs(ranks):
        return 16 * min(ranks["conv"] * 35, 216) + min(ranks["hidden"] * 14, 48) + min(ranks["out"] * 11, 30)

    ranks = set_rank_budget(model, macs=2000, inputs={"x": x})
    assert macs(ranks) <= 2000 and ranks["conv"] < 8
    with pytest.raises(ValueError, match="macs is 100; with one component a layer it is 585"):
        set_rank_budget(model, macs=100, inputs={"x": x})
    assert {name: m.width() for name, m in ordered(model).items()} == ranks  # the refusal changed nothing


def test_a_budget_by_loss_gives_up_what_hurts_least():
    model, data = net(), batch()

    def loss():
        with torch.no_grad():
            return float(model(**data).loss)

    def brute(ranks, params):
        while cost_of(ranks) > params:
            tried = []
            for name in ranks:
                fewer = next((f for f in range(ranks[name] - 1, 0, -1) if cost_of(ranks | {name: f}) < cost_of(ranks)), None)
                if fewer is not None:
                    now, then = (by_numpy(model, at, data["x"]) for at in (ranks, ranks | {name: fewer}))
                    rise = nn.functional.cross_entropy(then, data["labels"]) - nn.functional.cross_entropy(now, data["labels"])
                    tried.append((float(rise) / (cost_of(ranks) - cost_of(ranks | {name: fewer})), name, fewer))
            _, name, fewer = min(tried)
            ranks = ranks | {name: fewer}
        return ranks

    for params in (250, 180, 100):
        assert set_rank_budget(model, params=params, loss=loss) == brute(dict(FULL), params)


def test_budgets_that_make_no_sense_are_refused():
    model = net()
    for wrong in ({}, {"params": 1, "macs": 1}, {"macs": 100}):
        with pytest.raises(ValueError, match="give params, or macs together with inputs"):
            set_rank_budget(model, **wrong)
    with pytest.raises(ValueError, match="params is 50; with one component a layer it is 74"):
        set_rank_budget(model, params=50)
    with pytest.raises(ValueError, match="layer 'fc' at rank 1; the ordered layers are conv, hidden, out"), ordered_dropout(model, layer="fc", rank=1):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_transformers_train_shrink_save_reload_and_export(family, tmp_path):
    model = small_models.model(family)
    before = small_models.logits(model, family)
    method = Maestro(importance_threshold=1e-12)
    names = method.convert(model)
    assert not any(name in ("lm_head", "cls.predictions.decoder") for name in names)
    torch.testing.assert_close(small_models.logits(model, family), before, rtol=1e-4, atol=1e-4)
    for number, name in enumerate(names):
        module = model.get_submodule(name)
        module.keep(module.rank - number % 3)
    auto = AutoModelForImageClassification if family == "vit" else type(model)
    shrunk = small_models.logits(model, family)
    assert (shrunk - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "a")
    again = auto.from_pretrained(tmp_path / "a")
    assert torch.equal(small_models.logits(again, family), shrunk)
    assert [m.kept_rank() for m in ordered(again).values()] == [m.kept_rank() for m in ordered(model).values()] and len(ordered(again)) == len(names)
    half = auto.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert [m.kept_rank() for m in ordered(half).values()] == [m.kept_rank() for m in ordered(model).values()]
    set_rank_budget(again, params=sum(p.numel() for p in again.parameters()) * 2 // 3)
    small = small_models.logits(again, family)
    method.finish(again)
    torch.testing.assert_close(small_models.logits(again, family), small, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "b")
    last = auto.from_pretrained(tmp_path / "b")
    assert torch.equal(small_models.logits(last, family), small_models.logits(again, family)) and not ordered(last)
    export(model, merge_if_larger=False)
    model.save_pretrained(tmp_path / "c")
    assert torch.equal(small_models.logits(auto.from_pretrained(tmp_path / "c"), family), shrunk)


def test_a_model_that_became_dense_again_is_an_ordinary_one(tmp_path):
    model = small_models.model("llama")
    method = Maestro()
    method.convert(model)
    method.finish(model)  # nothing shrank: factors of full rank are larger everywhere
    assert not hasattr(model.config, "quantization_config") and not any(isinstance(m, LowRankLinear) for m in model.modules())
    model.save_pretrained(tmp_path)
    assert "echelon" not in (tmp_path / "config.json").read_text()
    assert torch.equal(small_models.logits(AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), small_models.logits(model, "llama"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("full_pass", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_blocks_are_run_again_at_the_same_ranks(family, full_pass, reentrant):
    ids = torch.tensor(small_models.data(family, rows=2, length=8))
    found = []
    for checkpointing in (False, True):
        model = small_models.model(family)
        method = Maestro(full_pass=full_pass, sampler="independent")
        method.convert(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        assert planned(method, model, 3)
        method.loss(model, {"input_ids": ids, "labels": ids, "use_cache": False}).backward()
        method.before_update(model, None, 3)
        assert all(m.cut is None for m in ordered(model).values())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_generation_is_never_cut():
    model = small_models.model("llama")
    ids = torch.tensor(small_models.data("llama", rows=1, length=6))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    method = Maestro(sampler="independent")
    method.convert(model)
    planned(method, model, 0)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_layers_at_the_ends_may_stay_dense():
    model = small_resnet.resnet()
    every = Maestro().convert(copy.deepcopy(model))
    assert Maestro(ignore_first=2, ignore_last=True).convert(copy.deepcopy(model)) == every[2:-1]
    llama = small_models.model("llama")
    assert len(Maestro(ignore_last=True).convert(llama)) == 14  # the last linear layer stands in a block
    with pytest.raises(ValueError, match="ignore_first is 99 and ignore_last is False; no layer is left"):
        Maestro(ignore_first=99).convert(model)
    with pytest.raises(ValueError, match="0 has groups 2"):
        Maestro().convert(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)))


def test_batch_norm_is_measured_again_by_plain_averages():
    model, batches = small_resnet.resnet(), [small_resnet.images(8, 12, seed=s) for s in range(3)]
    inputs = []
    hook = model.layer1[0].bn1.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    training = {name: m.training for name, m in model.named_modules()}
    names = reestimate_batch_norm(model, batches)
    hook.remove()
    assert len(names) == 7 and training == {name: m.training for name, m in model.named_modules()}
    norm = model.layer1[0].bn1
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0), rtol=1e-4, atol=1e-6)
    assert norm.momentum == 0.1
    with pytest.raises(ValueError, match="batches is empty"):
        reestimate_batch_norm(model, [])


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"sampler": "uniform"}, "sampler is 'uniform'"), ({"sampler": "fixed:0"}, "sampler is 'fixed:0'"), ({"sampler": "fixed:x"}, "sampler is 'fixed:x'"),
        ({"sampler": "fixed:1.5"}, "sampler is 'fixed:1.5'"), ({"sampler": "fixed:1/0"}, "sampler is 'fixed:1/0'"), ({"group_lasso": -1}, "group_lasso is -1"),
        ({"importance_threshold": 0}, "importance_threshold is 0"), ({"shrink_every": -1}, "shrink_every is -1"),
        ({"ignore_first": -1}, "ignore_first is -1"), ({"init": "zeros"}, "init is 'zeros'"),
    ],
)  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        Maestro(**knobs)


def test_nothing_touches_the_global_random_state():
    state = torch.random.get_rng_state()
    for init in ("svd", "random"):
        model = net(init=init)
        run(Maestro(shrink_every=1), model.train(), torch.optim.SGD(model.parameters(), 0.1), 2, batch())
        export(model)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.skipif(not DATA, reason="ECHELON_DATA names no folder of test collections")
def test_a_trained_resnet_is_cut_to_size_and_its_batch_norm_measured_again():
    photographs, train = small_resnet.photographs(DATA, 200), small_resnet.photographs(DATA, 200, "train")
    model = small_resnet.trained(DATA)

    @torch.no_grad()
    def accuracy(net):
        return float((net.eval()(**photographs).logits.argmax(1) == photographs["labels"]).float().mean())

    with torch.no_grad():
        dense = model(**photographs).logits
    method = Maestro(ignore_first=1, ignore_last=True)
    assert len(method.convert(model)) == 18
    with torch.no_grad():
        torch.testing.assert_close(model(**photographs).logits, dense, rtol=1e-3, atol=1e-3)
    ranks = set_rank_budget(model, params=220_000)
    assert any(rank < model.get_submodule(name).rank for name, rank in ranks.items())
    before = accuracy(model)
    reestimate_batch_norm(model, [train])
    assert accuracy(model) > before + 0.1
    after = model(**photographs).logits
    method.finish(model)
    torch.testing.assert_close(model(**photographs).logits, after, rtol=1e-3, atol=1e-3)
    assert 210_000 < sum(p.numel() for p in model.parameters()) <= 220_000

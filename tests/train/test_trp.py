"""Trained rank pruning: truncation, the nuclear norm's push, and the factored network at the end."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import small_models
import small_resnet
from echelon.models.factored_conv import FactoredConv, kernel, matrices
from echelon.models.modules import LowRankLinear, build
from echelon.train.layers import TRP, decompose
from echelon.train.layers.trp import fill, parts, ranks_by
from echelon.train.optimizers import AdamW
from small_parts import noise as drawn
from small_parts import seeded

SCHEMES = ["nc", "vh", "nd"]
DATA = os.environ.get("ECHELON_DATA")
noise = partial(drawn, dtype=torch.float64)


def convolution(dtype=torch.float64, **options):
    return seeded(lambda: nn.Conv2d(6, 10, options.pop("kernel_size", 3), **options)).to(dtype)


def by_loops(weight, scheme):
    """The matrices of a kernel, entry by entry from their definition."""
    out, channels, height, width = weight.shape
    if scheme == "nd":
        return [np.array([[weight[n, c, h, w] for h in range(height) for w in range(width)] for c in range(channels)]) for n in range(out)]
    if scheme == "nc":
        return [np.array([[weight[n, c, h, w] for c in range(channels) for h in range(height) for w in range(width)] for n in range(out)])]
    return [np.array([[weight[n, c, h, w] for n in range(out) for w in range(width)] for c in range(channels) for h in range(height)])]


def truncated(weight, scheme, rank):
    """The kernel whose matrices are cut to a rank, by numpy."""
    made = []
    for matrix in by_loops(weight.detach().double().numpy(), scheme):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        made.append((left[:, :rank] * values[:rank]) @ right[:rank])
    out, channels, height, width = weight.shape
    low = np.empty(weight.shape)
    for n in range(out):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    if scheme == "nc":
                        low[n, c, h, w] = made[0][n, (c * height + h) * width + w]
                    elif scheme == "vh":
                        low[n, c, h, w] = made[0][c * height + h, n * width + w]
                    else:
                        low[n, c, h, w] = made[n][c, h * width + w]
    return torch.tensor(low)


def factored(conv, scheme, rank):
    made = build({"kind": "factored_conv.convolution", "scheme": scheme, "rank": rank}, conv)
    fill(made, parts(conv.weight.detach(), scheme), conv.bias)
    return made


GEOMETRIES = [
    {}, {"bias": False}, {"stride": 2, "padding": 1}, {"stride": (2, 3), "padding": (1, 2)}, {"dilation": (2, 1), "padding": 2},
    {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": (2, 1), "padding": 1, "padding_mode": "circular", "stride": 2}, {"kernel_size": 1},
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_factors_are_the_dense_convolution_with_the_truncated_kernel(scheme, geometry):
    conv = convolution(**geometry)
    x = noise(2, 6, 11, 13)
    full = min(by_loops(conv.weight.detach().numpy(), scheme)[0].shape)
    for rank in {1, min(2, full), full}:
        expected = copy.deepcopy(conv)
        expected.weight.data = truncated(conv.weight, scheme, rank)
        made = factored(conv, scheme, rank)
        torch.testing.assert_close(made(x), expected(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(made.product(), expected.weight.data, rtol=1e-9, atol=1e-9)
        dense = made.merge()
        assert type(dense) is nn.Conv2d and made.weight.numel() == 0 and made.weight.dtype == torch.float64
        torch.testing.assert_close(dense(x), expected(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made(x), conv(x), rtol=1e-9, atol=1e-9)  # the full rank is the convolution itself


def test_convolutions_of_one_and_three_dimensions():
    for cls, space in ((nn.Conv1d, (9,)), (nn.Conv3d, (5, 6, 7))):
        conv = seeded(lambda cls=cls: cls(6, 10, 3, stride=2, padding=1)).double()
        x = noise(2, 6, *space)
        matrix = conv.weight.detach().flatten(1).numpy()
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        expected = copy.deepcopy(conv)
        expected.weight.data = torch.tensor((left[:, :4] * values[:4]) @ right[:4]).view_as(conv.weight)
        torch.testing.assert_close(factored(conv, "nc", 4)(x), expected(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_matrices_are_those_of_the_definition_and_the_scale_lies_where_the_paper_has_it(scheme):
    conv = convolution()
    expected = torch.tensor(np.array(by_loops(conv.weight.detach().numpy(), scheme)))
    found = matrices(conv.weight.detach(), scheme)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=0)
    torch.testing.assert_close(kernel(found, scheme, conv.weight.shape), conv.weight.detach(), rtol=0, atol=0)
    made = factored(conv, scheme, 3)
    values = torch.linalg.svdvals(expected)[:, :3]
    if scheme == "nc":
        torch.testing.assert_close(made.up.weight.flatten(1).norm(dim=0) ** 2, values[0])
        torch.testing.assert_close(made.down.weight.flatten(1).norm(dim=1) ** 2, values[0])
    elif scheme == "vh":
        torch.testing.assert_close(made.down.weight.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(made.up.weight.transpose(0, 1).flatten(1).norm(dim=1), values[0])
    else:
        torch.testing.assert_close(made.up.weight.flatten(2).norm(dim=2) ** 2, values)
        torch.testing.assert_close(made.down.weight.flatten(1).norm(dim=1) ** 2, values.flatten())


def test_groups_and_other_dimensions_are_refused():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match="0 has groups 2; only convolutions with groups 1"):
        TRP(skip=[]).convert(net)
    with pytest.raises(ValueError, match="0 has groups 2"):
        decompose(net)
    with pytest.raises(ValueError, match="scheme is 'vh'; 0 is a Conv1d, so it must be nc"):
        TRP(skip=[], scheme="vh").convert(nn.Sequential(nn.Conv1d(4, 8, 3)))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.8, 2), (0.9, 2), (0.99, 3), (0.999, 4), (1 - 1e-6, 5)])
def test_the_energy_rule(energy, rank):
    values = torch.tensor([5, 3, 1, 0.5, 0.1])
    assert ranks_by("energy", values, energy) == rank
    assert ranks_by("energy", torch.stack([values, values * 0, values * 1e-3]), energy).tolist() == [rank, 1, rank]


def test_the_other_rules_keep_at_least_one():
    values = torch.tensor([5, 3, 1, 0.5, 0.1])
    assert [int(ranks_by("value_threshold", values, t)) for t in (0, 0.1, 0.11, 1, 5, 6)] == [5, 5, 4, 3, 1, 1]
    assert [int(ranks_by("fraction", values, t)) for t in (0.05, 0.2, 0.5, 0.6, 1)] == [1, 1, 2, 3, 5]


class Net(nn.Module):
    """A convolution and a linear layer on few pixels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(6, 10, 3, padding=1), nn.Linear(10, 7)

    def forward(self, x, y):
        from types import SimpleNamespace

        return SimpleNamespace(loss=(self.head(self.conv(x).relu().mean((2, 3))) - y).square().mean())


def net(dtype=torch.float64):
    return seeded(Net, 3).to(dtype)


def batch():
    return {"x": noise(4, 6, 5, 5), "y": noise(4, 7, seed=2)}


def energies(weight, scheme):
    return [np.linalg.svd(m, compute_uv=False) ** 2 for m in by_loops(weight.detach().numpy(), scheme)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_truncation_keeps_the_energy_at_the_least_rank_and_is_a_projection(scheme):
    model = net()
    before = model.conv.weight.detach().clone()
    method = TRP(scheme=scheme, skip=[], energy=0.8, nuclear_weight=0, period=1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    parameter = model.conv.weight
    method.begin_step(model, sgd, 0)
    assert model.conv.weight is parameter  # in place
    for old, new in zip(energies(before, scheme), energies(parameter, scheme), strict=True):
        rank = int((new > 1e-12 * new[0]).sum())
        assert new.sum() >= 0.8 * old.sum() > old[: rank - 1].sum()
        np.testing.assert_allclose(new[:rank], old[:rank], rtol=1e-9)
    once = parameter.detach().clone()
    fixed = TRP(scheme=scheme, skip=[], energy=1 - 1e-9, nuclear_weight=0, period=1)  # selects the rank that is left
    fixed.begin_step(model, sgd, 0)
    torch.testing.assert_close(parameter.detach(), once, rtol=1e-6, atol=1e-9)
    ranks = method.ranks(model)
    assert ranks.keys() == {"conv", "head"} and ranks["conv"][1] == min(by_loops(before.numpy(), scheme)[0].shape)


def test_energy_near_one_changes_nothing():
    model = net(torch.float32)
    before = copy.deepcopy(model)
    TRP(skip=[], energy=1 - 1e-9, period=1).begin_step(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def run(method, model, optimizer, steps, data=None, start=0):
    for step in range(start, start + steps):
        method.begin_step(model, optimizer, step)
        method.loss(model, data or batch()).backward()
        method.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_direction_added_to_the_gradient_is_the_nuclear_norms(scheme):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    method = TRP(scheme=scheme, skip=[], nuclear_weight=0.5, period=1)
    method.begin_step(model, sgd, 0)
    method.loss(model, batch()).backward()
    plain = model.conv.weight.grad.clone()
    method.before_update(model, sgd, 0)
    added = (model.conv.weight.grad - plain) / 0.5
    for direction, weight in zip(by_loops(added.numpy(), scheme), by_loops(model.conv.weight.detach().numpy(), scheme), strict=True):
        assert abs(np.linalg.norm(direction, 2) - 1) < 1e-9
        nuclear = np.linalg.svd(weight, compute_uv=False).sum()
        assert (direction * weight).sum() == pytest.approx(nuclear, rel=1e-4)
    again = model.conv.weight.grad.clone()
    method.before_update(model, sgd, 0)
    assert torch.equal(model.conv.weight.grad, again)  # used once


def test_sgd_takes_the_papers_step_and_its_momentum_is_left_alone():
    model, rate, weight_decay, nuclear = net(), 0.05, 0.01, 0.3
    sgd = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)
    method = TRP(skip="conv", energy=0.7, nuclear_weight=nuclear, period=2)
    weight, momentum = model.head.weight.detach().clone(), torch.zeros(7, 10, dtype=torch.float64)
    reference = copy.deepcopy(model)
    for step in range(5):
        direction = torch.zeros_like(weight)
        if step % 2 == 0:
            left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
            rank = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), 0.7) + 1)
            weight = torch.tensor((left[:, :rank] * values[:rank]) @ right[:rank])
            direction = torch.tensor(left[:, :rank] @ right[:rank])
        buffer = sgd.state.get(model.head.weight, {}).get("momentum_buffer")
        before = None if buffer is None else buffer.clone()
        method.begin_step(model, sgd, step)
        assert before is None or torch.equal(sgd.state[model.head.weight]["momentum_buffer"], before)
        torch.testing.assert_close(model.head.weight.detach(), weight, rtol=1e-9, atol=1e-9)
        reference.load_state_dict(model.state_dict())
        reference.zero_grad()
        reference(**batch()).loss.backward()
        gradient = reference.head.weight.grad + nuclear * direction + weight_decay * weight
        momentum = gradient if step == 0 else 0.9 * momentum + gradient
        weight = weight - rate * momentum
        method.loss(model, batch()).backward()
        method.before_update(model, sgd, step)
        sgd.step()
        sgd.zero_grad()
        method.end_step(model, sgd, step + 1)
        torch.testing.assert_close(model.head.weight.detach(), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0), lambda p: AdamW(lr=1e-3).optimizer(p)])
def test_behind_adam_the_push_is_not_rescaled(make):
    model = net()
    plain = copy.deepcopy(model)
    optimizer = make(list(model.parameters()))
    run(TRP(skip=[], nuclear_weight=0.2, period=1), model, optimizer, 1)
    run(TRP(skip=[], nuclear_weight=0.0, period=1), plain, make(list(plain.parameters())), 1)
    low = net()
    TRP(skip=[], nuclear_weight=0.0, period=1).begin_step(low, torch.optim.SGD(low.parameters(), 1.0), 0)
    left, values, right = np.linalg.svd(low.head.weight.detach().numpy(), full_matrices=False)
    rank = int((values > 1e-9).sum())
    torch.testing.assert_close(plain.head.weight - model.head.weight, torch.tensor(1e-3 * 0.2 * left[:, :rank] @ right[:rank]), rtol=1e-6, atol=1e-12)
    coupled = net()
    run(TRP(skip=[], nuclear_weight=0.2, period=1, nuclear_decoupled=False), coupled, make(list(coupled.parameters())), 1)
    assert (coupled.head.weight - plain.head.weight).abs().max() > 1e-3  # inside Adam it turns signs


def test_periods_count_optimizer_steps_from_the_start_step():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    method = TRP(skip=[], energy=0.5, period=3, start_step=4, nuclear_weight=0)
    dense = copy.deepcopy(model.state_dict())
    changed = []
    for step in range(12):
        model.load_state_dict(dense)
        method.begin_step(model, sgd, step)
        changed.append(not torch.equal(model.conv.weight, dense["conv.weight"]))
    assert [step for step in range(12) if changed[step]] == [4, 7, 10]


def test_without_truncation_the_nuclear_norm_works_alone():
    model = net()
    before = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    method = TRP(skip=[], period=0, nuclear_weight=0.5, energy=0.6)
    method.begin_step(model, sgd, 7)
    assert torch.equal(model.head.weight, before.head.weight)
    model.head.weight.grad = torch.zeros_like(model.head.weight)
    method.before_update(model, sgd, 7)
    left, values, right = np.linalg.svd(before.head.weight.detach().numpy(), full_matrices=False)
    rank = int(np.searchsorted(np.cumsum(values**2) / (values**2).sum(), 0.6) + 1)
    torch.testing.assert_close(model.head.weight.grad, torch.tensor(0.5 * left[:, :rank] @ right[:rank]), rtol=1e-9, atol=1e-9)


def test_the_nuclear_norm_falls_and_may_be_pushed_more_often_than_ranks_are_cut():
    data = batch()
    made = []
    for weight in (0.0, 0.05):
        model = net()
        method = TRP(skip=[], energy=0.98, period=5, nuclear_weight=weight, nuclear_every=1)
        run(method, model, torch.optim.SGD(model.parameters(), 0.1), 100, data)
        made.append(torch.linalg.svdvals(model.conv.weight.detach().flatten(1)).sum())
    assert made[1] < 0.5 * made[0]


def test_weights_of_zero_and_a_threshold_above_all_values():
    model = net()
    nn.init.zeros_(model.head.weight)
    method = TRP(skip=[], period=1, nuclear_weight=0.5)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    method.begin_step(model, sgd, 0)
    model.head.weight.grad = torch.zeros_like(model.head.weight)
    method.before_update(model, sgd, 0)
    assert not model.head.weight.any() and not model.head.weight.grad.any()
    x = batch()
    report = decompose(model, "value_threshold", 1e9)
    assert {name: r["rank"] for name, r in report.items()} == {"conv": 1, "head": 1}
    assert model.head.rank == 1 and torch.isfinite(model(**x).loss)
    torch.testing.assert_close(model.head(torch.ones(1, 10, dtype=torch.float64))[0], model.head.bias, rtol=0, atol=0)


def test_a_failed_svd_is_told_and_changes_nothing():
    model = net()
    model.head.weight.data[0, 0] = float("nan")
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="no SVD of head"):
        TRP(skip=[], period=1).begin_step(model, sgd, 0)
    assert torch.isnan(model.head.weight).sum() == 1
    with pytest.raises(ValueError, match="head holds NaN or infinity; nothing was changed"):
        decompose(model)
    assert type(model.conv) is nn.Conv2d


def test_the_float32_copy_of_half_precision_weights_is_truncated():
    model = seeded(lambda: nn.ModuleDict({"head": nn.Linear(12, 8)})).to(torch.bfloat16)
    optimizer = AdamW(lr=1e-3, rounding="master").optimizer(model)
    method = TRP(skip=[], energy=0.6, period=1, nuclear_weight=0.0)
    for _ in range(2):
        method.begin_step(model, optimizer, 0)
        model["head"](noise(3, 12, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    method.begin_step(model, optimizer, 0)
    master = optimizer.state[model["head"].weight]["master"]
    values = torch.linalg.svdvals(master)
    assert (values > 1e-5 * values[0]).sum() < 8 and torch.equal(master.bfloat16(), model["head"].weight)


def test_the_first_two_convolutions_and_the_classifier_are_left_out_by_default():
    model = small_resnet.resnet()
    every = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert TRP().convert(model) == every[2:] and TRP(skip=[]).convert(model) == [*every, "linear"]
    assert TRP(skip=r"layer[12]\..*").convert(model) == ["conv1", "layer3.0.conv1", "layer3.0.conv2", "linear"]
    assert TRP(target_modules=["layer1.0.conv1"]).convert(model) == ["layer1.0.conv1"]
    assert TRP(target_modules="all", skip=["conv1", "conv2"]).convert(model) == ["linear"]
    with pytest.raises(ValueError, match="no layer is left"):
        TRP(target_modules=["linear"], skip="linear").convert(model)
    assert all(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules() if hasattr(m, "weight") and not isinstance(m, nn.BatchNorm2d))
    names = TRP().convert(small_models.model("vit"))
    assert len(names) == 12 and not any("classifier" in name or "patch" in name for name in names)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_small_resnet_becomes_low_in_rank_and_factors_for_free(scheme):
    model, data = small_resnet.resnet(), small_resnet.images()
    method = TRP(scheme=scheme, energy=0.6, period=4, nuclear_weight=0.0)
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    first = method.loss(model, data).item()
    run(method, model, sgd, 24, data)
    assert method.loss(model, data).item() < 0.7 * first
    method.begin_step(model, sgd, 24)
    model.eval()
    before, ranks, total = model(**data).logits, method.ranks(model), sum(p.numel() for p in model.parameters())
    report = decompose(model, "value_threshold", 1e-4, scheme=scheme, names=method.targets(model))
    done = {name for name, told in report.items() if told["factored"]}
    assert done and {name for name, m in model.named_modules() if isinstance(m, FactoredConv)} == done
    assert any(told["rank"] < told["full_rank"] for told in report.values()) and ranks.keys() == report.keys()
    assert all(told["energy"] > 1 - 1e-6 for told in report.values())
    assert sum(p.numel() for p in model.parameters()) == total - sum(report[n]["before"] - report[n]["parameters"] for n in done)
    for name, told in report.items():
        assert told["factored"] == (told["parameters"] < told["before"])
        if told["factored"]:
            module = model.get_submodule(name)
            assert told["parameters"] == module.up.weight.numel() + module.down.weight.numel()
    torch.testing.assert_close(model(**data).logits, before, rtol=1e-4, atol=1e-4)
    exported = torch.jit.trace(model.layer3, torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert exported(torch.zeros(1, 16, 8, 8)).shape == (1, 32, 4, 4)


@pytest.mark.parametrize(("rank", "min_gain", "wanted"), [(4, 1.0, LowRankLinear), (4, 1.9, LowRankLinear), (4, 2.0, nn.Linear), (8, 1.0, nn.Linear)])
def test_min_gain_leaves_layers_dense(rank, min_gain, wanted):
    model = nn.ModuleDict({"a": seeded(lambda: nn.Linear(16, 16))})
    report = decompose(model, "fraction", rank / 16, min_gain=min_gain)
    assert type(model["a"]) is wanted
    assert (report["a"]["rank"], report["a"]["parameters"], report["a"]["before"]) == (rank, 32 * rank, 256)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_finish_factored_and_reload(family, tmp_path):
    model = small_models.model(family)
    method = TRP(energy=0.5, period=2, nuclear_weight=0.0, final_rule="value_threshold", final_threshold=1e-3)
    names = method.convert(model)
    assert "lm_head" not in names and len(names) == {"llama": 14, "gpt2": 8}[family]
    ids = torch.tensor(small_models.data(family, rows=2))
    run(method, model.train(), method.optimizer(model), 3, {"input_ids": ids, "labels": ids})
    method.begin_step(model, method.optimizer(model), 4)
    before = small_models.logits(model.eval(), family)
    method.finish(model)
    kinds = {type(model.get_submodule(name)) for name in names}
    assert LowRankLinear in kinds
    torch.testing.assert_close(small_models.logits(model, family), before, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(small_models.logits(again, family), small_models.logits(model, family), rtol=0, atol=0)
    noted = again.config.quantization_config.provenance[-1]
    assert noted["method"] == "trp" and noted["final_threshold"] == 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factored_convolutions_reload(scheme, tmp_path):
    model = small_models.model("vit")
    report = decompose(model, "fraction", 0.5, scheme=scheme, min_gain=0.0)
    conv = [m for m in model.modules() if isinstance(m, FactoredConv)]
    assert len(conv) == 1 and conv[0].scheme == scheme and all(told["factored"] for told in report.values())
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(small_models.logits(again, "vit"), small_models.logits(model, "vit"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"scheme": "hw"}, "scheme is 'hw'; it must be one of nc, vh, nd"), ({"energy": 1.0}, "energy is 1.0"), ({"energy": 0}, "energy is 0"),
        ({"period": -1}, "period is -1"), ({"nuclear_weight": -1e-9}, "nuclear_weight is -1e-09"), ({"nuclear_every": 0}, "nuclear_every is 0"),
        ({"start_step": -1}, "start_step is -1"), ({"final_rule": "rank"}, "final_rule is 'rank'"),
        ({"final_threshold": -1.0}, "final_threshold is -1.0"), ({"scheme": "nd", "final_threshold": 1.5}, "final_threshold is 1.5"),
        ({"min_gain": -1}, "min_gain is -1"),
    ],
)  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, said):
    with pytest.raises(ValueError, match=said):
        TRP(**knobs)


def test_final_defaults_follow_the_scheme():
    assert TRP().final == TRP(scheme="vh").final == ("value_threshold", 0.05) and TRP(scheme="nd").final == ("energy", 0.85)


def test_nothing_touches_the_global_random_state():
    state, model = torch.random.get_rng_state(), net()
    run(TRP(skip=[], period=1), model, torch.optim.SGD(model.parameters(), 0.1), 2)
    decompose(model, "fraction", 0.3)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.skipif(not DATA, reason="ECHELON_DATA names no folder of test collections")
def test_a_trained_resnet_loses_less_by_factoring_after_a_few_steps():
    model, photographs = small_resnet.trained(Path(DATA)), small_resnet.photographs(DATA, 200)
    assert sum(p.numel() for p in model.parameters()) == 269722

    @torch.no_grad()
    def accuracy(net):
        return float((net.eval()(**photographs).logits.argmax(1) == photographs["labels"]).float().mean())

    assert accuracy(model) > 0.75
    full = copy.deepcopy(model)
    assert all(told["factored"] for told in decompose(full, "fraction", 1.0, min_gain=0.0).values())
    torch.testing.assert_close(full(**photographs).logits, model(**photographs).logits, rtol=1e-3, atol=1e-3)

    train = small_resnet.photographs(DATA, 320, "train")
    order = torch.randperm(320, generator=torch.Generator().manual_seed(0)).view(5, 64)
    method = TRP(energy=0.9, period=8)
    bare = copy.deepcopy(model)
    sgd = torch.optim.SGD(model.train().parameters(), 0.01, momentum=0.9)
    for step in range(15):
        run(method, model, sgd, 1, {key: value[order[step % 5]] for key, value in train.items()}, start=step)
    factored = {}
    for name, tried in (("bare", bare), ("trained", model)):
        report = decompose(tried, "fraction", 0.5, names=method.targets(tried))
        factored[name] = accuracy(tried), sum(told["parameters"] for told in report.values())
    assert factored["trained"][0] > factored["bare"][0] + 0.1 and factored["trained"][1] == factored["bare"][1]


def test_processes_share_one_decomposition(tmp_path):
    """Two processes whose weights differ in the last bits, as after an all-reduce in another order, truncate to the same ones."""
    made = [tmp_path / str(rank) for rank in range(2)]
    code = """
import sys, torch
from torch import nn
from echelon.train.layers import TRP
rank, meeting, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
model = nn.ModuleDict({"a": nn.Linear(6, 5)})
with torch.no_grad():
    model["a"].weight.copy_(torch.arange(30.0).view(5, 6).sin() + 1e-6 * rank)
TRP(skip=[], period=1).begin_step(model, torch.optim.SGD(model.parameters(), 0.1), 0)
open(out, "w").write(repr(model["a"].weight.tolist()))
torch.distributed.destroy_process_group()
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path / "meeting"), str(out)]) for rank, out in enumerate(made)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert made[0].read_text() == made[1].read_text() != ""

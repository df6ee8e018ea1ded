"""What Greenformers promises beyond the contract, and the Low-Rank Transformer."""

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import small_models
import tiny
from echelon import linalg
from echelon.compress import Greenformers, LowRankLinear, auto_fact, low_rank_from_config, merge_to_dense, recover
from echelon.compress.greenformers import LowRankConvolution


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def linear(p=20, m=12, bias=True):
    return seeded(lambda: nn.Linear(p, m, bias))


def product(module):
    return (module.up.weight.double() @ module.down.weight.double()).detach().numpy()


def truncated(weight, rank):
    left, values, right = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("rank", [0.1, 0.33, 0.5, 0.99, 1, 3, 7, 12])
def test_the_rank_rule_is_the_papers_and_skipped_layers_stay_bit_for_bit(rank):
    shapes = [(2, 2), (3, 40), (12, 20), (16, 16), (31, 7), (64, 48)]
    net = seeded(lambda: nn.ModuleList(nn.Linear(p, m) for m, p in shapes))
    dense = copy.deepcopy(net)
    auto_fact(net, rank=rank, target_modules="linear", on_skip="ignore")
    factored = 0
    for (m, p), made, old in zip(shapes, net, dense, strict=True):
        limit = (p * m) // (p + m)
        wanted = rank if rank >= 1 else int(limit * rank)
        if wanted == 0 or limit <= wanted:
            assert type(made) is nn.Linear and torch.equal(made.weight, old.weight) and torch.equal(made.bias, old.bias)
        else:
            assert made.rank == wanted
            assert sum(x.numel() for x in made.parameters()) == wanted * (p + m) + m < p * m + m
            factored += 1
    assert factored


@pytest.mark.parametrize("balance", [False, True])
def test_svd_is_the_best_approximation_exact_or_randomised(balance, monkeypatch):
    old = linear(40, 30)
    for limit in (4096, 10):  # the second makes it randomised
        monkeypatch.setattr(linalg.lowrank, "EXACT_LIMIT", limit)
        made = auto_fact(nn.ModuleList([copy.deepcopy(old)]), rank=6, balance=balance)[0]
        np.testing.assert_allclose(product(made), truncated(old.weight, 6), atol=1e-4)
        scale = made.up.weight.detach().norm(dim=0)
        values = np.linalg.svd(old.weight.detach().numpy(), compute_uv=False)[:6]
        np.testing.assert_allclose(scale.numpy(), np.sqrt(values) if balance else np.ones(6), rtol=1e-3)


def test_snmf_has_a_non_negative_factor_and_an_error_that_falls_but_not_below_the_svd():
    old = linear(30, 24)
    errors = []
    for balance, iterations in itertools.product((False, True), (0, 1, 5, 40)):
        made = auto_fact(nn.ModuleList([copy.deepcopy(old)]), rank=6, solver="snmf", num_iter=iterations, balance=balance)[0]
        assert (made.up.weight >= 0).all() and (made.down.weight < 0).any()
        errors.append(np.square(product(made) - old.weight.detach().numpy()).sum())
    assert errors[:4] == sorted(errors[:4], reverse=True) and errors[0] > errors[3] * 1.01
    np.testing.assert_allclose(errors[4:], errors[:4], rtol=1e-4)
    assert errors[3] >= np.square(truncated(old.weight, 6) - old.weight.detach().numpy()).sum()


def test_random_factors_are_those_of_a_new_layer_and_ask_only_the_seed():
    old = linear(400, 300)
    state = torch.random.get_rng_state()
    first, again, other = (auto_fact(nn.ModuleList([copy.deepcopy(old), copy.deepcopy(old)]), rank=50, solver="random", seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0].up.weight, again[0].up.weight) and torch.equal(first[1].down.weight, again[1].down.weight)
    assert not torch.equal(first[0].up.weight, other[0].up.weight) and not torch.equal(first[0].up.weight, first[1].up.weight)
    for weight, inputs in ((first[0].down.weight, 400), (first[0].up.weight, 50)):
        bound = inputs**-0.5  # uniform in +-1 / sqrt(inputs), as nn.Linear has it
        assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("solver", ["svd", "snmf", "random"])
def test_the_bias_is_kept_and_the_factors_are_new_parameters(solver):
    old = linear()
    net = nn.Sequential(copy.deepcopy(old))
    before = {id(p) for p in net.parameters()}
    auto_fact(net, rank=3, solver=solver)
    assert torch.equal(net[0].bias, old.bias)
    assert not before & {id(p) for p in net.parameters()}
    assert auto_fact(nn.Sequential(linear(bias=False)), rank=3, solver=solver)[0].bias is None


@pytest.mark.parametrize("solver", ["svd", "snmf", "random"])
def test_a_conv1d_of_gpt2_is_factored_like_the_linear_layer_it_is(solver):
    old = linear()
    other = Conv1D(12, 20)
    other.weight.data, other.bias.data = old.weight.detach().T.contiguous(), old.bias.detach().clone()
    one, two = (auto_fact(nn.Sequential(module), rank=3, solver=solver)[0] for module in (old, other))
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_inputs_of_any_shape_and_layout():
    made = auto_fact(nn.Sequential(linear()), rank=3)
    x = torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)  # not contiguous
    expected = x.double().detach().numpy() @ product(made[0]).T + made[0].bias.detach().double().numpy()
    np.testing.assert_allclose(made(x).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(made(x[0]).detach().numpy(), expected[0], atol=1e-5)
    np.testing.assert_allclose(made(x[0, 0]).detach().numpy(), expected[0, 0], atol=1e-5)


CONVOLUTIONS = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (2, 8, 11)),
    (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "padding_mode": "circular", "bias": False}, (2, 8, 11)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1), "padding": (2, 1)}, (2, 8, 9, 7)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2}, (2, 8, 6, 6)),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "groups": 2}, (2, 8, 6, 6)),
    (nn.Conv3d, {"kernel_size": 2, "stride": 2, "groups": 2, "bias": False}, (1, 8, 4, 4, 4)),
]


@pytest.mark.parametrize(("cls", "arguments", "shape"), CONVOLUTIONS)
@pytest.mark.parametrize("balance", [False, True])
def test_a_convolution_of_low_rank_is_reproduced_whatever_its_padding_and_groups(cls, arguments, shape, balance):
    old = seeded(lambda: cls(8, 12, **arguments))
    groups = arguments.get("groups", 1)
    with torch.no_grad():  # every group gets rank 1
        for part in old.weight.view(groups, 12 // groups, -1):
            part.copy_(torch.outer(torch.randn(len(part)), torch.randn(part.shape[1])))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    made = auto_fact(nn.Sequential(copy.deepcopy(old)), rank=1, target_modules="all", balance=balance)
    assert isinstance(made[0], LowRankConvolution)
    kernel = old.weight[0, 0].numel()
    assert sum(p.numel() for p in made.parameters()) == 8 * kernel + 12 + 12 * (old.bias is not None)
    torch.testing.assert_close(made(x), old(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[0].merge()(x), old(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_is_truncated_group_by_group(groups):
    old = seeded(lambda: nn.Conv2d(12, 18, (3, 2), groups=groups, padding=1))
    made = auto_fact(nn.Sequential(copy.deepcopy(old)), rank=0.9, target_modules="all")[0]
    rank = int((18 // groups) * (12 // groups) // (30 // groups) * 0.9)
    assert made.rank == rank > 0
    expected = np.concatenate([truncated(part.flatten(1), rank) for part in old.weight.chunk(groups)]).reshape(old.weight.shape)
    nearest = copy.deepcopy(old)
    nearest.weight.data = torch.from_numpy(expected).float()
    x = torch.randn(2, 12, 5, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(made(x), nearest(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.merge().weight, nearest.weight, rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_is_left_alone():
    net = nn.Sequential(nn.ConvTranspose2d(8, 8, 3), linear())
    auto_fact(net, rank=2, target_modules="all", on_skip="ignore")
    assert type(net[0]) is nn.ConvTranspose2d and isinstance(net[1], LowRankLinear)


def test_twice_is_once_and_the_state_dict_goes_round():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 32)))
    fresh = copy.deepcopy(net)
    auto_fact(net, rank=0.5, target_modules="all")
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="cannot compress 2 of its targets.*already"):
        auto_fact(net, rank=0.5, target_modules="all")
    assert net.state_dict().keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    auto_fact(fresh, rank=0.5, target_modules="all", solver="random").load_state_dict(before)
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fresh(x), net(x))


def test_by_default_every_linear_layer_but_the_head_and_what_is_tied():
    bert = Greenformers().compress(small_models.model("bert")).model
    assert isinstance(bert.cls.predictions.transform.dense, LowRankLinear)  # outside the blocks
    assert type(bert.cls.predictions.decoder) is nn.Linear
    assert all(isinstance(m, LowRankLinear) for n, m in bert.named_modules() if n.endswith(("query", "key", "value", "dense")))
    llama = Greenformers().compress(small_models.model("llama")).model
    assert type(llama.lm_head) is nn.Linear and isinstance(llama.model.layers[1].mlp.up_proj, LowRankLinear)
    assert isinstance(Greenformers(target_modules=["lm_head"]).compress(small_models.model("llama")).model.lm_head, LowRankLinear)
    with pytest.warns(UserWarning, match="lm_head: its weight is tied"):
        Greenformers(target_modules=["lm_head", "q_proj"]).compress(small_models.model("qwen2"))
    some = Greenformers(exclude_modules=["q_proj", "down_proj"]).compress(small_models.model("llama")).report
    assert {name.rpartition(".")[2] for name in some.modules} == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    with pytest.raises(ValueError, match="exclude_modules: 'q_prj' matches none of the layers"):
        Greenformers(exclude_modules=["q_prj"]).compress(small_models.model("llama"))


def test_a_vision_model_with_its_convolution_saves_loads_and_merges(tmp_path):
    made = Greenformers(target_modules="all").compress(small_models.model("vit"))
    (name,) = [n for n, m in made.model.named_modules() if isinstance(m, LowRankConvolution)]
    assert made.report.modules[name]["rank"] == 1  # 3 * 32 // 35 = 2, and half of it
    expected = small_models.logits(made.model, "vit")
    made.save(tmp_path / "m")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    assert torch.equal(small_models.logits(again, "vit"), expected)
    merge_to_dense(again)
    torch.testing.assert_close(small_models.logits(again, "vit"), expected, rtol=1e-4, atol=1e-4)


def test_what_is_skipped_is_a_warning_an_error_or_a_line_in_the_report():
    def compress(on_skip):
        model = small_models.model("llama")
        return model, Greenformers(rank=12, on_skip=on_skip).compress(model)

    with pytest.warns(UserWarning, match=r"cannot compress 4 of its targets; .*k_proj: rank 12 of 16 x 32 saves nothing \(it breaks even at 10\)"):
        compress("warn")
    with pytest.raises(ValueError, match="saves nothing"):
        compress("error")
    model, made = compress("ignore")  # a warning is an error in these tests
    assert len(made.report.skipped) == 4 and len(made.report.modules) == 10
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight, small_models.model("llama").model.layers[0].self_attn.k_proj.weight)
    with pytest.warns(UserWarning, match=r"0.05 of its break-even rank is less than 1 \(it breaks even at 16\)"):
        Greenformers(rank=0.05).compress(small_models.model("llama"))


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"rank": 0}, "rank is 0"), ({"rank": 1.0}, "rank is 1.0"), ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": True}, "rank is True"), ({"rank": -0.1}, "rank is -0.1"),
        ({"solver": "nmf"}, "solver is 'nmf'"), ({"on_skip": "maybe"}, "on_skip is 'maybe'"), ({"num_iter": -1}, "num_iter is -1"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        Greenformers(**knobs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_low_rank_transformer_is_factored_by_design_and_can_be_stored(family, tmp_path):
    config = small_models.model(family).config
    auto = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    state = torch.random.get_rng_state()
    model = low_rank_from_config(copy.deepcopy(config), 4, auto, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == 2 * {"llama": 7, "gpt2": 4, "bert": 6}[family] and {m.rank for m in layers} == {4}
    dense = seeded(lambda: auto.from_config(copy.deepcopy(config)))
    saved = sum(m.in_features * m.out_features - 4 * (m.in_features + m.out_features) for m in layers)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) - saved
    same, other = (low_rank_from_config(copy.deepcopy(config), 4, auto, seed=s) for s in (1, 2))
    assert torch.equal(small_models.logits(same.eval(), family), small_models.logits(model.eval(), family))
    assert not torch.equal(small_models.logits(other.eval(), family), small_models.logits(model, family))
    model.save_pretrained(tmp_path)
    assert torch.equal(small_models.logits(auto.from_pretrained(tmp_path), family), small_models.logits(model, family))


def test_a_low_rank_transformer_learns():
    model = low_rank_from_config(small_models.model("llama").config, 4)
    told = recover(model, [[t, t + 1] * 10 for t in range(4, tiny.VOCAB - 1)], steps=60, learning_rate=2e-2)
    assert told["loss_last"] < 3.0 < told["loss_first"]  # the tokens alone have an entropy of ln 36 = 3.6

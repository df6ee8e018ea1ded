"""What LoRD promises beyond the contract."""

import copy

import numpy as np
import pytest
import torch

import small_models
from echelon.calibrate import LayerWalker, Moments, calibration_batches
from echelon.compress import SVD, LoRD

TARGETS = ["fc1", "fc2"]


def layer(m=24, p=16, bias=True, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(p, m, bias=bias).double()


def tokens(n=400, p=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return torch.randn(n, p, generator=generator, dtype=torch.float64) @ mixing + 3 * torch.randn(p, generator=generator, dtype=torch.float64)


def moments(x):
    made = Moments.of(x.shape[1])
    made.update(x)
    return made


def outputs(factors, module, x):
    bias = (0 if module.bias is None else module.bias) + (0 if factors.bias_delta is None else factors.bias_delta)
    return x @ factors.down.T @ factors.up.T + bias


def error(factors, module, x):
    return float((module(x) - outputs(factors, module, x)).square().sum(1).mean())


def factor(module, x, rank, **knobs):
    return LoRD(**knobs).factor(module.weight, module.bias, moments(x), rank)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_error_is_the_sum_of_the_dropped_eigenvalues_of_the_output_covariance(rank, bias):
    module, x = layer(bias=bias), tokens()
    y = module(x).detach().numpy()
    values = np.linalg.eigvalsh(np.cov(y.T, bias=True))[::-1]
    made = factor(module, x, rank)
    assert error(made, module, x) == pytest.approx(values[rank:].sum(), rel=1e-6)
    assert made.report["tail"] == pytest.approx(values[rank:].sum(), rel=1e-6)


def test_input_statistics_give_what_hooks_on_the_outputs_would():
    module, x, rank = layer(), tokens(), 5
    y = module(x).detach()
    mu = y.mean(0)
    vectors = torch.linalg.eigh((y - mu).T @ (y - mu)).eigenvectors[:, -rank:]
    expected = mu + (y - mu) @ vectors @ vectors.T
    torch.testing.assert_close(outputs(factor(module, x, rank), module, x), expected, rtol=1e-8, atol=1e-8)


def test_no_affine_map_of_this_rank_found_by_alternating_least_squares_is_better():
    module, x, rank = layer(), tokens(), 4
    y, ones = module(x).detach(), torch.ones(len(x), 1, dtype=torch.float64)
    generator, best = torch.Generator().manual_seed(7), np.inf
    for _ in range(3):
        down = torch.randn(rank, 16, generator=generator, dtype=torch.float64)
        for _ in range(200):
            up = torch.linalg.lstsq(torch.cat([x @ down.T, ones], 1), y).solution
            codes = torch.linalg.lstsq(up[:-1].T, (y - up[-1]).T).solution.T
            down = torch.linalg.lstsq(torch.cat([x, ones], 1), codes).solution[:-1].T
        best = min(best, float((y - torch.cat([x @ down.T, ones], 1) @ up).square().sum(1).mean()))
    assert error(factor(module, x, rank), module, x) <= best * (1 + 1e-6)


def test_the_mean_output_is_exact_with_and_without_a_bias():
    for bias in (True, False):
        module, x = layer(bias=bias), tokens()
        torch.testing.assert_close(outputs(factor(module, x, 2), module, x).mean(0), module(x).mean(0), rtol=1e-9, atol=1e-9)


def test_full_rank_is_exact_and_so_is_the_rank_of_the_inputs():
    module, x = layer(), tokens()
    x[:, 8:] = x[:, :8] @ torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for rank in (16, 8):
        assert error(factor(module, x, rank), module, x) < 1e-10


@pytest.mark.parametrize("rank", [2, 6])
def test_it_beats_the_plain_svd_and_centring_beats_not_centring(rank):
    module, x = layer(), tokens()
    plain = SVD().factor(module.weight, module.bias, None, rank)
    centred, raw = factor(module, x, rank), factor(module, x, rank, centered=False)
    assert error(centred, module, x) < error(raw, module, x) < error(plain, module, x)
    assert raw.bias_delta is None


def test_the_whole_model_has_the_outputs_that_its_factors_promise():
    """Through collecting, planning, building and filling, on OPT with biases, against plain hooks."""
    dense, shown = small_models.model("opt"), calibration_batches(small_models.data("opt"))
    made = LoRD(rank=0.4, round_rank=1, target_modules=TARGETS).compress(copy.deepcopy(dense), shown)
    for name, told in made.report.modules.items():
        seen = []
        handle = dense.get_submodule(name).register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].detach().reshape(-1, a[0].shape[-1])))
        with torch.no_grad():
            for batch in shown.batches:
                dense(**batch)
        handle.remove()
        x = torch.cat(seen)
        with torch.no_grad():
            loss = (dense.get_submodule(name)(x) - made.model.get_submodule(name)(x)).double().square().sum(1).mean()
        assert float(loss) == pytest.approx(told["lost"], rel=1e-3)


def test_sequential_statistics_come_from_behind_the_compressed_blocks():
    shown = calibration_batches(small_models.data("llama"))
    knobs = {"rank": 0.3, "round_rank": 1, "target_modules": ["up_proj"]}
    dense = LoRD(**knobs).compress(small_models.model("llama"), shown).model
    chained = LoRD(**knobs, sequential=True).compress(small_models.model("llama"), shown).model
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    torch.testing.assert_close(dense.get_submodule(first).up.bias, chained.get_submodule(first).up.bias)
    # The mean output of the second layer must be that of the dense layer on what now really arrives.
    for block in LayerWalker(chained, shown):
        observer = block.observe([second]) if block.index else None
    original = small_models.model("llama").get_submodule(second)
    mean = observer.moments[second].mean.float()
    torch.testing.assert_close(chained.get_submodule(second)(mean), original(mean), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense.get_submodule(second)(mean), original(mean), rtol=1e-3, atol=1e-3)


def test_ranks_are_floored_to_the_multiple_and_energy_takes_the_smallest_that_suffices():
    model, shown = small_models.model("opt"), calibration_batches(small_models.data("opt"))
    made = LoRD(rank=0.55, round_rank=4, target_modules=["fc1"]).compress(model, shown)
    assert {told["rank"] for told in made.report.modules.values()} == {16}  # 17.6 of 32
    loose = LoRD(energy=0.5, round_rank=1, target_modules=["fc1"]).compress(small_models.model("opt"), shown).report
    for told in loose.modules.values():
        assert told["tail_energy"] <= 0.5
    tight = LoRD(energy=0.8, round_rank=1, target_modules=["fc1"], strict=True)
    ranks = [told["rank"] for told in tight.compress(small_models.model("opt"), shown).report.modules.values()]
    assert ranks > [told["rank"] for told in loose.modules.values()]


def test_a_rank_by_type_leaves_what_it_does_not_name_dense():
    shown = calibration_batches(small_models.data("llama"))
    made = LoRD(rank={"mlp": 0.4, "q_proj": 5}, round_rank=1, target_modules="all-linear").compress(small_models.model("llama"), shown)
    ranks = {name.rpartition(".")[2]: told["rank"] for name, told in made.report.modules.items()}
    assert ranks == {"gate_proj": 12, "up_proj": 12, "down_proj": 12, "q_proj": 5}
    assert {entry["name"].rpartition(".")[2] for entry in made.report.skipped} == {"k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="'mpl' is for none of the layers"):
        LoRD(rank={"mpl": 0.4}).compress(small_models.model("llama"), shown)


def test_a_rank_that_saves_nothing_leaves_the_layer_dense_with_a_warning_or_an_error():
    shown = calibration_batches(small_models.data("llama"))
    model, made = small_models.model("llama"), LoRD(rank=0.9, round_rank=1)
    before = small_models.logits(model, "llama")
    with pytest.warns(UserWarning, match=r"cannot compress 6 of its targets; .*rank 28 of 48 x 32 saves nothing \(it breaks even at 19\)"):
        report = made.compress(model, shown).report
    assert torch.equal(small_models.logits(model, "llama"), before)
    assert len(report.skipped) == 6 and not report.modules and report.parameters_after == report.parameters_before
    with pytest.raises(ValueError, match="saves nothing"):
        LoRD(rank=0.9, round_rank=1, strict=True).compress(small_models.model("llama"), shown)


def test_few_tokens_are_a_warning_or_an_error():
    few = calibration_batches(small_models.data("opt", rows=1, length=20))
    with pytest.warns(UserWarning, match="lord saw 20 tokens, fewer than the 48 inputs"):
        LoRD(rank=0.3, round_rank=1).compress(small_models.model("opt"), few)
    with pytest.raises(ValueError, match="fewer than"):
        LoRD(rank=0.3, round_rank=1, strict=True).compress(small_models.model("opt"), few)


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"rank": 0}, "rank is 0"), ({"rank": 1.5}, "rank is 1.5"), ({"rank": {"mlp": 0.0}}, "rank is 0.0"), ({"energy": 0}, "energy is 0"),
        ({"round_rank": 0}, "round_rank is 0"), ({"balance": "yes"}, "balance is 'yes'"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        LoRD(**knobs)

"""What the SVD compressor promises beyond the contract, against numpy and against searches of another kind."""

import numpy as np
import pytest
import torch

import small_models
from echelon.calibrate import Moments, Statistics, calibration_batches, collect
from echelon.compress import SVD, linear_targets

NAME = "model.layers.0.mlp.up_proj"


def rows(n=300, d=32, seed=0):
    """Inputs with a spectrum and a mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.logspace(1, -2, d) + torch.randn(d, generator=generator)


def weight(m=48, p=32, seed=1):
    return torch.randn(m, p, generator=torch.Generator().manual_seed(seed))


def moments(x):
    made = Moments.of(x.shape[1])
    made.update(x)
    return made


@pytest.mark.parametrize("rank", [1, 5, 31])
def test_plain_factors_are_the_truncated_svd(rank):
    w = weight()
    factors = SVD(balance="sqrt").factor(w, None, None, rank)
    u, s, v = np.linalg.svd(w.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(factors.up @ factors.down, u[:, :rank] * s[:rank] @ v[:rank], atol=1e-9)
    np.testing.assert_allclose(factors.up.norm(dim=0), factors.down.norm(dim=1), rtol=1e-9)
    assert factors.report["rel_err"] == pytest.approx(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def test_whitened_factors_are_svd_llms_and_beat_any_found_by_descent():
    x, w, rank = rows().double(), weight().double(), 6
    factors = SVD(whiten=True).factor(w, None, moments(x), rank)
    root = np.linalg.cholesky((x.T @ x / len(x)).numpy())
    u, s, v = np.linalg.svd(w.numpy() @ root, full_matrices=False)
    np.testing.assert_allclose(factors.up @ factors.down, u[:, :rank] * s[:rank] @ v[:rank] @ np.linalg.inv(root), atol=1e-6)

    def error(product):
        return float((x @ (w - product).T).square().sum())

    generator = torch.Generator().manual_seed(3)
    best = np.inf
    for _ in range(3):  # alternating least squares from random starts
        up = torch.randn(48, rank, generator=generator, dtype=torch.float64)
        for _ in range(60):
            down = torch.linalg.lstsq(up, w).solution
            z = x @ down.T
            up = torch.linalg.lstsq(z, x @ w.T).solution.T
        best = min(best, error(up @ down))
    assert error(factors.up @ factors.down) <= best * (1 + 1e-9)
    plain, values, right = torch.linalg.svd(w, full_matrices=False)
    assert error(factors.up @ factors.down) < 0.9 * error(plain[:, :rank] * values[:rank] @ right[:rank])


def test_inputs_that_never_vary_do_no_harm():
    x = rows()
    x[:, 5:20] = 0
    factors = SVD(whiten=True).factor(weight(), None, moments(x), 17)
    torch.testing.assert_close(x.double() @ (factors.up @ factors.down).T, x.double() @ weight().double().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.2])
def test_uniform_ratio_keeps_at_most_that_share_of_every_layer_and_one_rank_more_would_not(ratio):
    result = SVD(ratio=ratio, round_to=1).compress(small_models.model("llama"))
    dense = small_models.model("llama")
    for name, told in result.report.modules.items():
        m, p = dense.get_submodule(name).weight.shape
        assert told["rank"] * (m + p) <= ratio * m * p < (told["rank"] + 1) * (m + p)


def test_global_allocation_has_less_error_than_uniform_at_the_same_size():
    model = small_models.model("llama")
    with torch.no_grad():  # one layer of low rank, the others not
        u, s, v = torch.linalg.svd(model.get_submodule(NAME).weight)
        s[4:] *= 1e-3
        model.get_submodule(NAME).weight.copy_(u[:, : len(s)] * s @ v)
    weights = {name: model.get_submodule(name).weight.double().clone() for name in linear_targets(model)[0]}
    state = model.state_dict()

    @torch.no_grad()
    def error(allocation, ratio):
        again = small_models.model("llama")
        again.load_state_dict(state)
        made = SVD(ratio=ratio, round_to=1, allocation=allocation).compress(again).model
        total = 0.0
        for name, w in weights.items():
            module = made.get_submodule(name)
            product = module.up.weight.double() @ module.down.weight.double() if hasattr(module, "down") else module.weight.double()
            total += float((w - product).square().sum())
        return total, sum(p.numel() for p in made.parameters())

    # Rounding ranks down leaves the uniform one a little below its ratio.
    (uniform, uniform_size), (spread, spread_size) = error("uniform", 0.74), error("global", 0.7)
    assert spread < uniform and spread_size <= uniform_size


def test_one_calibration_serves_several_methods_and_gives_the_same(tmp_path):
    shown = calibration_batches(small_models.data("llama"))
    model = small_models.model("llama")
    collect(model, linear_targets(model)[0], shown).save(tmp_path / "s")
    made = SVD(ratio=0.6, round_to=1, whiten=True)
    direct = made.compress(small_models.model("llama"), shown).model.state_dict()
    for statistics in (tmp_path / "s", Statistics.load(tmp_path / "s")):
        reused = made.compress(small_models.model("llama"), statistics=statistics).model.state_dict()
        assert all(torch.equal(value, reused[key]) for key, value in direct.items())
    with pytest.raises(ValueError, match="they are of another model"):
        broken = Statistics.load(tmp_path / "s")
        broken.moments = {name: moments(rows(d=5)) for name in broken.moments}
        made.compress(small_models.model("llama"), statistics=broken)
    with pytest.raises(ValueError, match="sequential=True .* needs calibration data"):
        SVD(ratio=0.6, whiten=True, sequential=True).compress(small_models.model("llama"), statistics=tmp_path / "s")


def test_the_two_orientations_of_a_matrix_give_the_same_layer():
    from transformers.pytorch_utils import Conv1D

    from echelon.compress.linear import Layer

    linear, conv = torch.nn.Linear(32, 48), Conv1D(48, 32)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x = rows()
    outputs = []
    for module in (linear, conv):
        layer = Layer("x", module, moments(x))
        spec = {"kind": "lowrank", "in": 32, "out": 48, "rank": 4, "bias": True}
        outputs.append(SVD(whiten=True).replace(layer, spec)[0](x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"ratio": 0}, "ratio is 0"), ({"ratio": 1.5}, "ratio is 1.5"), ({"rank": 0}, "rank is 0"), ({"allocation": "fair"}, "allocation is 'fair'"),
        ({"balance": "yes"}, "balance is 'yes'"), ({"round_to": 0}, "round_to is 0"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        SVD(**knobs)

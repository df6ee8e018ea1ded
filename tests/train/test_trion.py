"""Trion against scipy's cosines and the singular values that a polynomial gives."""

import numpy as np
import pytest
import scipy.fft
import torch

import small_models
from echelon.linalg.newton_schulz import newton_schulz
from echelon.train.optimizers import Trion

SHAPES = [(12, 7), (7, 12), (8, 8)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def polynomial(matrix, steps=5):
    """What the iteration does to the singular values, done to them one by one."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    s = values / (np.sqrt((matrix**2).sum()) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left @ np.diag(s) @ right


def plain(weight, gradients, rank, lr, mu, scale, weight_decay=0.0):
    """Weight and momentum after Trion's steps; frequencies are masked, never gathered."""
    w, axis = weight.numpy().copy(), 1 if weight.shape[0] >= weight.shape[1] else 0
    momentum = np.zeros_like(w)
    for gradient in gradients:
        b = momentum + gradient.numpy()
        s = scipy.fft.dct(b, norm="ortho", axis=axis)
        mask = np.isin(np.arange(s.shape[axis]), np.argsort(-np.abs(s).sum(1 - axis))[:rank])
        s = s * (mask[None] if axis else mask[:, None])
        momentum = b - (1 - mu) * scipy.fft.idct(s, norm="ortho", axis=axis)
        # Columns of zeros change neither the other singular vectors nor their values.
        w = (1 - lr * weight_decay) * w - lr * scale * scipy.fft.idct(polynomial(s), norm="ortho", axis=axis)
    return w, momentum


def run(method, weight, gradients, **group):
    p = torch.nn.Parameter(weight.clone())
    optimizer = method.optimizer([{"params": [("w", p)], "rank": method.rank, **group}])
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(p.grad, gradient)
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scaling_type", "scale"), [
    ("kj", lambda m, n: max(1, m / n) ** 0.5), ("dion", lambda m, n: (m / n) ** 0.5), ("kimi", lambda m, n: 0.2 * max(m, n) ** 0.5), ("none", lambda m, n: 1.0),
])  # fmt: skip
def test_it_is_muon_on_masked_frequencies(shape, scaling_type, scale):
    weight, gradients = normal(*shape), [normal(*shape, seed=i) for i in range(6)]
    moved, state = run(Trion(rank=3, lr=0.1, scaling_type=scaling_type, weight_decay=0.2), weight, gradients)
    expected, momentum = plain(weight, gradients, 3, 0.1, 0.95, scale(*shape), 0.2)
    torch.testing.assert_close(moved, torch.from_numpy(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(state["momentum"], torch.from_numpy(momentum), rtol=0, atol=1e-10)
    assert set(state) == {"step", "index", "offset", "momentum"}


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_the_iteration_is_in_bfloat16_and_the_rest_is_not(shape):
    gradients = [normal(*shape, seed=i) for i in range(4)]
    weight = torch.zeros(shape)
    moved, state = run(Trion(rank=3, lr=0.1, scaling_type="none"), weight, [g.float() for g in gradients])
    expected, momentum = plain(weight.double(), gradients, 3, 0.1, 0.95, 1.0)
    torch.testing.assert_close(state["momentum"].double(), torch.from_numpy(momentum), rtol=0, atol=1e-5)
    assert 1e-5 < (moved - torch.from_numpy(expected)).norm() / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_applied_decays_in_the_momentum_and_the_rest_is_untouched(shape):
    gradients, mu = [normal(*shape, seed=30 + i) for i in range(3)], 0.8
    method = Trion(rank=2, momentum=mu)
    _, before = run(method, torch.zeros(shape, dtype=torch.float64), gradients[:2])
    _, after = run(method, torch.zeros(shape, dtype=torch.float64), gradients)
    axis = 1 if shape[0] >= shape[1] else 0
    b = scipy.fft.dct((before["momentum"] + gradients[2]).numpy(), norm="ortho", axis=axis)
    m = scipy.fft.dct(after["momentum"].numpy(), norm="ortho", axis=axis)
    chosen = np.isin(np.arange(min(shape)), np.argsort(-np.abs(b).sum(1 - axis))[:2])
    np.testing.assert_allclose(m.compress(chosen, axis), mu * b.compress(chosen, axis), atol=1e-12)
    np.testing.assert_allclose(m.compress(~chosen, axis), b.compress(~chosen, axis), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 32), (32, 128), (256, 64)])
def test_newton_schulz_brings_singular_values_near_1(shape, dtype):
    for seed in range(4):
        found = newton_schulz(normal(*shape, seed=seed).to(dtype))
        values = torch.linalg.svdvals(found.double())
        assert found.dtype == dtype and values.min() >= 0.6 and values.max() <= 1.2


def test_newton_schulz_never_overshoots_and_leaves_tiny_singular_values_small():
    left, right = (torch.linalg.qr(normal(20, 6, seed=i)).Q for i in (1, 2))
    values = torch.tensor([1.0, 0.5, 0.1, 1e-2, 1e-4, 1e-6], dtype=torch.float64)
    found = torch.linalg.svdvals(newton_schulz(left @ torch.diag(values) @ right.T))
    assert found.max() <= 1.2 and (found[:3] > 0.6).all() and found[5] < 0.6 and found[5] > 100 * 1e-6


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape, steps):
    matrix = normal(*shape)
    torch.testing.assert_close(newton_schulz(matrix, steps), torch.from_numpy(polynomial(matrix.numpy(), steps)), rtol=0, atol=1e-11)
    assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape))


def test_all_other_parameters_get_adam_with_a_learning_rate_of_their_own():
    target, p, q = (torch.nn.Parameter(normal(*shape)) for shape in ((4, 4), (6,), (6,)))
    q.data.copy_(p.data)
    optimizer = Trion(rank=2).optimizer([{"params": [("t", target)], "rank": 2}, {"params": [("p", p)]}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 3e-4]
    reference = torch.optim.Adam([q], lr=3e-4, betas=(0.9, 0.95), eps=1e-10)
    for step in range(5):
        p.grad, q.grad = normal(6, seed=step), normal(6, seed=step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
    own = Trion(rank=2, adam_lr=0.5).optimizer([{"params": [("t", target)], "rank": 2}, {"params": [("p", p)], "lr": 0.25}])
    assert [group["lr"] for group in own.param_groups] == [0.02, 0.25]
    rates = {bool("rank" in group): group["lr"] for group in Trion(rank=2, lr=0.1, adam_lr=0.5).optimizer(small_models.model("llama")).param_groups}
    assert rates == {True: 0.1, False: 0.5}


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_a_weight_stored_transposed_moves_like_the_layer_stored_straight(shape):
    """Apart from the side that is described, which is the shorter one both times."""
    gradients = [normal(*shape, seed=i) for i in range(3)]
    straight, _ = run(Trion(rank=3, scaling_type="dion"), torch.zeros(shape, dtype=torch.float64), gradients)
    turned, _ = run(Trion(rank=3, scaling_type="dion"), torch.zeros(shape[::-1], dtype=torch.float64), [g.T for g in gradients], transposed=True)
    torch.testing.assert_close(turned.T, straight, rtol=0, atol=1e-10)


def test_gpt2_stores_transposed_and_llama_does_not():
    for family, transposed in (("gpt2", True), ("llama", False)):
        groups = Trion(rank=4).optimizer(small_models.model(family)).param_groups
        assert [group.get("transposed", False) for group in groups if "rank" in group] == [transposed]


def test_a_rank_above_the_smaller_side_is_refused_by_name():
    with pytest.raises(ValueError, match=r"rank is 128; it must be at most 32, the smaller side of model\.layers\.0\.self_attn\.q_proj\.weight"):
        Trion().optimizer(small_models.model("llama"))


@pytest.mark.parametrize(("knobs", "told"), [
    ({"momentum": 1.0}, "momentum is 1.0"), ({"ns_steps": 0}, "ns_steps is 0"), ({"scaling_type": "muon"}, "scaling_type is 'muon'"),
    ({"adam_lr": -1.0}, "adam_lr is -1.0"), ({"rank": 0}, "rank is 0"),
])  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, told):
    with pytest.raises(ValueError, match=told):
        Trion(**knobs)


def test_state_is_the_momentum_alone():
    method = Trion(rank=4)
    _, state = run(method, torch.zeros(16, 8), [normal(16, 8, dtype=torch.float32)] * 2)
    assert method.state_numbers((16, 8), 4) == 16 * 8 == state["momentum"].numel() and method.state_numbers((16,)) == 32

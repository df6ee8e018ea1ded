"""Seeded bases: the same numbers in every chunk, on every device, and against a generator written out in Python's integers."""

import pytest
import torch

from echelon.linalg.bases import Basis, seed_of, uniform

RNGS = pytest.mark.parametrize("rng", ["torch_cpu", "counter"])


def whole(basis):
    return torch.cat([part for _, part in basis.chunks()])


def splitmix(seed, place):
    """The published splitmix64, on integers of any size."""
    mask = 2**64 - 1
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_torch_cpu_is_one_draw_of_the_whole_in_c_order_over_the_root_of_the_count():
    basis = Basis(7, 10, 3, 5)
    expected = torch.empty(10, 3, 5).uniform_(-1, 1, generator=torch.Generator().manual_seed(7)) / 10**0.5
    torch.testing.assert_close(whole(basis), expected, rtol=1e-6, atol=0)
    torch.manual_seed(7)  # what the released code does, from the global generator
    torch.testing.assert_close(whole(basis), torch.zeros(10, 3, 5).uniform_(-1, 1) / 10**0.5, rtol=1e-6, atol=0)


def test_counter_is_splitmix64_of_the_seed_and_the_place():
    found = whole(Basis(2**62 + 11, 3, 2, 4, rng="counter")).reshape(-1) * 3**0.5
    expected = [(splitmix(2**62 + 11, n) >> 40) / 2**23 - 1 for n in range(24)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@RNGS
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (4, 16)])
def test_chunks_do_not_change_it(rng, shape):
    expected = whole(Basis(3, 9, *shape, rng=rng, chunk=9))
    for chunk in (1, 2, 4, 64):
        basis = Basis(3, 9, *shape, rng=rng, chunk=chunk)
        assert torch.equal(whole(basis), expected)
        assert [(s.start, s.stop) for s, _ in basis.chunks()] == [(i, min(i + chunk, 9)) for i in range(0, 9, chunk)]
    assert Basis(3, 9, *shape, rng=rng).first() == expected.reshape(-1)[:8].tolist()[:8]


@RNGS
def test_entries_are_uniform_and_seeds_unrelated(rng):
    a, b = (whole(Basis(seed, 64, 16, 16, rng=rng)) * 8 for seed in (1, 2))
    assert -1 <= a.min() < -0.99 and 0.99 < a.max() < 1
    assert abs(a.mean()) < 0.02 and abs(a.square().mean() - 1 / 3) < 0.01
    assert abs(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(a.reshape(64, -1)[:2])[0, 1]) < 0.25


@RNGS
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_combining_and_its_gradient_are_those_of_the_explicit_tensor(rng, chunk):
    basis = Basis(5, 7, 3, 4, rng=rng, chunk=chunk)
    state = torch.get_rng_state()
    coefficients = torch.linspace(-1, 2, 7).requires_grad_()
    goal = torch.arange(12.0).view(3, 4)
    found = basis.combine(coefficients)
    (found * goal).sum().backward()
    explicit = coefficients.detach().clone().requires_grad_()
    expected = torch.einsum("k,krc->rc", explicit, whole(basis))
    (expected * goal).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coefficients.grad, explicit.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"coefficients have shape \(6,\); the basis has 7 matrices"):
        basis.combine(torch.zeros(6))


def test_seeds_are_stable_and_forget_wrappers():
    assert seed_of(0, "a.b", "A") == 6529545622317490812  # sha256 of "0\\0a.b\\0A": its first eight bytes without the lowest bit
    plain = seed_of(3, "model.layers.0.q_proj", "A")
    for name in ("base_model.model.model.layers.0.q_proj", "_orig_mod.model.layers.0.q_proj", "model._fsdp_wrapped_module.layers.0._orig_mod.q_proj"):
        assert seed_of(3, name, "A") == plain
    others = {seed_of(s, name, part) for s in (3, 4) for name in ("model.layers.0.q_proj", "model.layers.1.q_proj") for part in ("A", "B")}
    assert len(others) == 8 and all(0 <= seed < 2**63 for seed in others)
    assert seed_of(1, "2", "3") != seed_of(12, "3") and seed_of(1, 2) == seed_of(1, "2")
    values = [uniform(seed_of(0, n)) for n in range(2000)]
    assert 0 <= min(values) < 0.01 and 0.99 < max(values) < 1 and abs(sum(values) / 2000 - 0.5) < 0.03


@pytest.mark.parametrize(("change", "said"), [
    ({"seed": -1}, "seed is -1"), ({"seed": 1.5}, "seed is 1.5"), ({"count": 0}, "count is 0"), ({"rows": 0}, "rows is 0"), ({"chunk": 0}, "chunk is 0"),
    ({"rng": "cuda"}, "rng is 'cuda'; it must be one of torch_cpu, counter"),
])  # fmt: skip
def test_bad_arguments(change, said):
    with pytest.raises(ValueError, match=said):
        Basis(**({"seed": 0, "count": 2, "rows": 2, "columns": 2} | change))

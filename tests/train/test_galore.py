"""GaLore against the paper's steps written out, and what its subspace promises."""

import math

import pytest
import torch

import small_models
from echelon.train.optimizers import AdamW, GaLore


def gradients(shape, steps, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps)]


def run(method, shape, steps, seed=0, start=0.5):
    """The weight after every step, in float64."""
    weight = torch.nn.Parameter(torch.full(shape, start, dtype=torch.float64))
    optimizer = method.optimizer([{"params": [("w", weight)], "rank": method.rank}])
    made = []
    for gradient in gradients(shape, steps, seed):
        weight.grad = gradient.clone()
        optimizer.step()
        made.append(weight.detach().clone())
    return made, optimizer


def by_hand(shape, steps, rank, gap, scale, lr, wd, proj_type="std", betas=(0.9, 0.999), eps=1e-8):
    """Steps 1 to 7 of the method, no code shared."""
    m, n = shape
    weight, made = torch.full(shape, 0.5, dtype=torch.float64), []
    right_side = (m >= n) if proj_type == "std" else (m < n) if proj_type == "reverse_std" else proj_type == "right"
    for t, gradient in enumerate(gradients(shape, steps)):
        if t % gap == 0:
            u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
            left, right = u[:, :rank], vt[:rank].T
        one, two = proj_type == "full" or not right_side, proj_type == "full" or right_side  # which sides are projected
        low = left.T @ gradient if one else gradient
        low = low @ right if two else low
        if t == 0:
            mean, square = torch.zeros_like(low), torch.zeros_like(low)
        mean = betas[0] * mean + (1 - betas[0]) * low
        square = betas[1] * square + (1 - betas[1]) * low**2
        size = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        back = mean / (square.sqrt() + eps)
        back = left @ back if one else back
        back = back @ right.T if two else back
        weight = weight - size * scale * back
        weight = weight - lr * wd * weight
        made.append(weight)
    return made


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_it_is_the_papers_steps(shape, proj_type):
    method = GaLore(lr=0.05, rank=3, update_proj_gap=2, scale=0.25, weight_decay=0.1, proj_type=proj_type)
    made, _ = run(method, shape, 5)
    for mine, expected in zip(made, by_hand(shape, 5, 3, 2, 0.25, 0.05, 0.1, proj_type), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_all_of_a_windows_update_lies_in_its_subspace(shape):
    method = GaLore(lr=0.05, rank=2, update_proj_gap=4)
    made, optimizer = run(method, shape, 4)
    moved = made[-1] - 0.5
    state = next(iter(optimizer.state.values()))
    basis = state["right"] if shape[0] > shape[1] else state["left"]
    rest = moved - (moved @ basis @ basis.T if shape[0] > shape[1] else basis @ (basis.T @ moved))
    assert rest.norm() <= 1e-10 * moved.norm()
    assert torch.linalg.matrix_rank(moved, atol=1e-12) <= 2


def test_a_full_basis_keeps_norms_and_plain_descent():
    from echelon.linalg.projection import Projector

    gradient = gradients((5, 8), 1)[0]
    for proj_type in ("left", "full"):
        projector, state = Projector(5, proj_type), {}
        projector.fit(gradient, state)
        low = projector.down(gradient, state)
        assert low.norm() == pytest.approx(gradient.norm())
        torch.testing.assert_close(projector.up(low, state), gradient)  # with scale 1 gradient descent would be plain


def test_signs_of_the_basis_do_not_matter_within_a_window_and_do_behind_it():
    def path(flip_at, gap):
        method = GaLore(lr=0.05, rank=3, update_proj_gap=gap)
        weight = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
        optimizer = method.optimizer([{"params": [weight], "rank": 3}])
        for step, gradient in enumerate(gradients((6, 9), 6)):
            weight.grad = gradient.clone()
            optimizer.step()
            if step == flip_at:  # as if the SVD had returned the other signs: basis and moments turn
                state = optimizer.state[weight]
                turn = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
                state["left"], state["exp_avg"] = state["left"] * turn, state["exp_avg"] * turn[:, None]
        return weight.detach()

    torch.testing.assert_close(path(0, 100), path(None, 100))
    assert (path(0, 3) - path(None, 3)).abs().max() > 1e-4


def test_with_fixed_signs_every_direction_points_to_its_largest_entry():
    _, optimizer = run(GaLore(rank=4, deterministic=True), (9, 6), 1)
    basis = next(iter(optimizer.state.values()))["right"]
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_moments_are_not_touched_when_directions_change():
    method = GaLore(rank=2, update_proj_gap=2)
    weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    optimizer = method.optimizer([{"params": [weight], "rank": 2}])
    low = []
    for gradient in gradients((4, 8), 3):
        weight.grad = gradient.clone()
        optimizer.step()
        low.append(optimizer.state[weight]["left"].T @ gradient)
    expected = sum(0.1 * 0.9 ** (2 - i) * value for i, value in enumerate(low))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], expected)


def test_the_rank_is_clipped_with_a_warning_and_steps_go_on():
    model = small_models.model("llama")
    with pytest.warns(UserWarning, match=r"rank 40 is above the smaller side of 14 matrices, the first is model.layers.0.self_attn.q_proj"):
        optimizer = GaLore(rank=40).optimizer(model)
    model(input_ids=torch.arange(4, 9)[None], labels=torch.arange(4, 9)[None]).loss.backward()
    optimizer.step()
    assert optimizer.state[model.model.layers[0].self_attn.k_proj.weight]["left"].shape == (16, 16)


def test_zero_gradients_keep_the_old_basis_and_begin_with_unit_vectors():
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    optimizer = GaLore(rank=2, update_proj_gap=1).optimizer([{"params": [weight], "rank": 2}])
    weight.grad = torch.zeros(4, 8)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["left"], torch.eye(4, 2))
    weight.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    chosen = optimizer.state[weight]["left"].clone()
    weight.grad = torch.zeros(4, 8)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["left"], chosen) and not torch.equal(chosen, torch.eye(4, 2))


@pytest.mark.parametrize("projection", ["exact", "randomized", "random", "dct"])
def test_on_the_longer_side_too_there_are_at_most_as_many_directions_as_the_shorter_one_has(projection):
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    method = GaLore(rank=6, proj_type="reverse_std", projection=projection)
    for gradient in (torch.zeros(4, 8), gradients((4, 8), 1, dtype=torch.float32)[0]):
        optimizer = method.optimizer([{"params": [weight], "rank": 6}])
        weight.grad = gradient
        optimizer.step()
        assert optimizer.state[weight]["right"].shape[-1] == 4 and optimizer.state[weight]["exp_avg"].shape == (4, 4)


def test_a_step_that_a_scaler_skips_chooses_no_directions():
    weight = torch.nn.Parameter(torch.ones(4, 8))
    optimizer = GaLore(rank=2, update_proj_gap=1).optimizer([{"params": [weight], "rank": 2}])
    scaler, chosen = torch.amp.GradScaler("cpu", init_scale=4.0), None
    for gradient in (gradients((4, 8), 1, dtype=torch.float32)[0], torch.full((4, 8), math.inf)):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if chosen is None:
            chosen, moved = optimizer.state[weight]["left"].clone(), weight.detach().clone()
    assert int(optimizer.state[weight]["step"]) == 1 and scaler.get_scale() == 2
    assert torch.equal(optimizer.state[weight]["left"], chosen) and torch.equal(weight, moved)
    assert not torch.equal(moved, torch.ones(4, 8))


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_its_state_has_the_size_of_the_formula(bits):
    m, n, rank = 64, 256, 16
    weight = torch.nn.Parameter(torch.zeros(m, n))
    method = GaLore(rank=rank, state_bits=bits)
    optimizer = method.optimizer([{"params": [weight], "rank": rank}])
    weight.grad = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    state = optimizer.state[weight]
    moments = 2 * rank * n
    stored = sum(t.numel() * t.element_size() for key, t in state.items() if key.startswith("exp_avg"))
    assert stored == moments * bits // 8 + (moments // 256 * 4 if bits == 8 else 0)
    assert state["left"].numel() == m * rank and state["left"].element_size() == (4 if bits == 32 else 2)


def test_staggered_matrices_change_their_directions_at_different_steps():
    model = small_models.model("llama")
    optimizer = GaLore(rank=2, update_proj_gap=14, refresh_offset="stagger").optimizer(model)
    targets = optimizer.param_groups[0]["params"]
    changed = []
    bases = {}
    for step in range(15):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + p.numel()))
        optimizer.step()
        now = {i: next(optimizer.state[p][k] for k in ("left", "right") if k in optimizer.state[p]).clone() for i, p in enumerate(targets)}
        if step:
            changed.append([i for i in now if not torch.equal(now[i], bases[i])])
        bases = now
    assert len(targets) == 14
    assert changed == [[i] for i in range(1, 14)] + [[0]]


@pytest.mark.parametrize("projection", ["randomized", "random"])
def test_other_projections_are_orthonormal_and_the_randomised_one_finds_the_leading_space(projection):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(60, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    gradient = low + 0.01 * torch.randn(60, 40, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(60, 40))
    optimizer = GaLore(rank=4, projection=projection).optimizer([{"params": [weight], "rank": 4}])
    weight.grad = gradient.clone()
    optimizer.step()
    basis = optimizer.state[weight]["right"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)
    kept = (gradient @ basis).norm() / gradient.norm()
    best = torch.linalg.svdvals(gradient)[:4].norm() / gradient.norm()
    assert kept > 0.9999 * best if projection == "randomized" else kept < 0.8 * best


def test_the_adafactor_form_is_adafactor_on_the_projected_gradient():
    from transformers.optimization import Adafactor as Theirs

    shape, rank, lr = (6, 10), 3, 0.02
    weight = torch.nn.Parameter(torch.full(shape, 0.5))
    optimizer = GaLore(lr=lr, rank=rank, scale=0.5, base="adafactor", betas=(0.9, 0.999), weight_decay=0.1).optimizer([{"params": [weight], "rank": rank}])
    low = torch.nn.Parameter(torch.zeros(rank, shape[1]))
    theirs = Theirs([low], lr=lr, eps=(1e-30, 1e-3), beta1=0.9, scale_parameter=False, relative_step=False, warmup_init=False)
    expected = weight.detach().clone()
    basis = None
    for gradient in gradients(shape, 4, dtype=torch.float32):
        weight.grad = gradient.clone()
        optimizer.step()
        if basis is None:
            basis = torch.linalg.svd(gradient, full_matrices=False).U[:, :rank]
        before = low.detach().clone()
        low.grad = basis.T @ gradient
        theirs.step()
        expected = expected * (1 - 0.1 * lr) + 0.5 * basis @ (low.detach() - before)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)


def test_other_parameters_take_plain_adamw_steps_with_decay_behind():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    target = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = GaLore(lr=0.1, weight_decay=0.2, eps=1e-12).optimizer([{"params": [target], "rank": 1}, {"params": [parameter]}])
    parameter.grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
    optimizer.step()
    moved = torch.tensor([1.0 - 0.1, -2.0 + 0.1], dtype=torch.float64)  # Adam's first step has length lr
    torch.testing.assert_close(parameter.detach(), moved * (1 - 0.1 * 0.2))


def test_the_adamw_baseline_is_torchs():
    for knobs in ({}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}):
        mine = torch.nn.Parameter(torch.full((5, 4), 0.5, dtype=torch.float64))
        theirs = torch.nn.Parameter(mine.detach().clone())
        a, b = AdamW(lr=0.02, **knobs).optimizer([mine]), torch.optim.AdamW([theirs], lr=0.02, **({"weight_decay": 0.0} | knobs))
        for gradient in gradients((5, 4), 6):
            mine.grad, theirs.grad = gradient.clone(), gradient.clone()
            a.step()
            b.step()
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)

"""What Fira and its limiter promise beyond the optimizer contract."""

import io
import itertools
import math

import peft
import pytest
import torch
from torch.testing import assert_close

import small_models
from echelon.train.optimizers import Fira, GaLore, NormGrowthLimiter, Stepper

WIDE, TALL, SQUARE = (6, 10), (10, 6), (7, 7)


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def train(method, shape, given, rank):
    """Weights behind each step from zero, with these gradients, and the optimizer."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Stepper(method, [{"params": [("weight", weight)], "rank": rank}])
    seen = []
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen, optimizer


def by_hand(given, rank, lr, scale=1.0, gamma=1.01, scaling="column", residual="orthogonal", gap=200, decay=0.0, left=None, eps=1e-8):
    """Fira written from the paper for one matrix, column by column; weights behind each step."""
    m, n = given[0].shape
    left = m < n if left is None else left
    weight, last, seen = torch.zeros(m, n, dtype=torch.float64), None, []
    for t, gradient in enumerate(given):
        work = gradient if left else gradient.T  # always on the left: the columns of `work` stay whole
        if t % gap == 0:
            basis = torch.linalg.svd(work, full_matrices=False)[0][:, :rank]
            for j in range(rank):  # the moments are carried over, so signs matter from the second basis on
                basis[:, j] *= basis[basis[:, j].abs().argmax(), j].sign()
        low = basis.T @ work
        if t == 0:
            mean, square = torch.zeros_like(low), torch.zeros_like(low)
        mean, square = 0.9 * mean + 0.1 * low, 0.999 * square + 0.001 * low**2
        answer = mean / (square.sqrt() + eps)
        outside = work - (scale if residual == "scaled" else 1.0) * basis @ low
        if scaling == "column":
            outside = torch.stack([outside[:, j] * answer[:, j].norm() / (low[:, j].norm() + 1e-8) for j in range(work.shape[1])], 1)
        else:
            outside = outside * answer.norm() / (low.norm() + 1e-8)
        norm = float(outside.norm())
        if last is not None and math.isfinite(gamma):
            excess = max(norm / (last + 1e-8), gamma) / gamma
            outside, norm = outside / excess, norm / excess
        last = norm
        rate = lr * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        change = scale * basis @ answer + outside
        weight = (weight - rate * (change if left else change.T)) * (1 - lr * decay)
        seen.append(weight)
    return seen


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("knobs", [
    {}, {"scale": 0.25}, {"scale": 0.25, "residual": "scaled"}, {"scaling": "matrix"}, {"gamma": math.inf}, {"gamma": 1.5}, {"gap": 3}, {"decay": 0.1},
    {"eps": 1e-6},
])  # fmt: skip
def test_it_follows_the_equations_of_the_paper(shape, knobs):
    given = gradients(shape, 8)
    given[4] *= 30
    names = {"gap": "update_proj_gap", "decay": "weight_decay"}
    made, _ = train(Fira(**{"lr": 0.02, "scale": 1.0, "deterministic": True} | {names.get(key, key): value for key, value in knobs.items()}), shape, given, 2)
    for ours, theirs in zip(made, by_hand(given, 2, 0.02, **{"scale": 1.0} | knobs), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("proj_type", "left"), [("left", True), ("right", False), ("reverse_std", True)])
def test_the_side_is_the_one_asked_for_also_of_a_square_matrix(proj_type, left):
    given = gradients(SQUARE, 5)
    made, _ = train(Fira(lr=0.02, proj_type=proj_type), SQUARE, given, 3)
    assert_close(made[-1], by_hand(given, 3, 0.02, scale=0.25, left=left)[-1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_inside_the_basis_it_is_galore_and_outside_a_scaled_gradient(shape):
    (given,) = gradients(shape, 1)
    fira, optimizer = train(Fira(lr=1.0, scale=1.0), shape, [given], 2)
    galore, _ = train(GaLore(lr=1.0, scale=1.0), shape, [given], 2)
    (state,) = optimizer.state.values()
    basis = state["left"] if shape == WIDE else state["right"]
    inside = basis @ basis.T
    outside = (galore[0] - fira[0]) if shape == WIDE else (galore[0] - fira[0]).T
    assert float((basis.T @ outside).norm()) <= 1e-5 * float(given.norm())
    rest = (given - inside @ given) if shape == WIDE else (given - given @ inside).T
    # Each column of the residual has got the direction of the gradient's, so their cosines are one.
    assert_close(torch.cosine_similarity(outside, rest, dim=0), torch.ones(outside.shape[1], dtype=torch.float64))
    assert float(outside.norm()) > 0.1


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_with_all_directions_it_is_galore(shape):
    given = gradients(shape, 6)
    fira, _ = train(Fira(lr=0.01, scale=1.0, update_proj_gap=2), shape, given, min(shape))
    galore, _ = train(GaLore(lr=0.01, scale=1.0, update_proj_gap=2), shape, given, min(shape))
    assert_close(fira, galore, rtol=1e-5, atol=1e-7)


def test_both_residuals_agree_at_a_scale_of_1_and_only_there():
    given = gradients(WIDE, 4)

    def end(residual, scale):
        return train(Fira(residual=residual, scale=scale), WIDE, given, 2)[0][-1]

    assert_close(end("orthogonal", 1.0), end("scaled", 1.0), rtol=1e-12, atol=0)
    assert float((end("orthogonal", 0.25) - end("scaled", 0.25)).norm()) > 1e-3


def test_signs_and_order_of_the_directions_do_not_matter():
    given = gradients(WIDE, 5)

    def end(change):
        weight = torch.nn.Parameter(torch.zeros(WIDE, dtype=torch.float64))
        optimizer = Stepper(Fira(), [{"params": [("weight", weight)], "rank": 3}])
        weight.grad = torch.zeros(WIDE, dtype=torch.float64)
        optimizer.step()  # no directions yet, so that we may put in ours
        state = optimizer.state[weight]
        del state["blank"]
        state["left"] = change(torch.linalg.svd(given[0], full_matrices=False)[0][:, :3])
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach()

    first = end(lambda basis: basis)
    assert_close(end(lambda basis: basis * torch.tensor([-1.0, 1.0, -1.0])), first, rtol=1e-10, atol=0)
    assert_close(end(lambda basis: basis[:, [2, 0, 1]]), first, rtol=1e-10, atol=0)


def test_one_direction_runs_and_none_is_refused():
    assert train(Fira(), WIDE, gradients(WIDE, 3), 1)[0][-1].isfinite().all()
    with pytest.raises(ValueError, match="rank is 0"):
        Fira(rank=0)


@pytest.mark.parametrize(("knobs", "named"), [
    ({"scale": 0.0}, "scale is 0"), ({"gamma": 1.0}, "gamma is 1"), ({"gamma": math.nan}, "gamma is nan"), ({"scaling": "row"}, "scaling is 'row'"),
    ({"residual": "none"}, "residual is 'none'"), ({"proj_type": "full"}, "scaling must be 'matrix'"),
])  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, named):
    with pytest.raises(ValueError, match=named):
        Fira(**knobs)


def test_projected_on_both_sides_the_residual_is_what_is_left():
    (given,) = gradients(WIDE, 1)
    made, _ = train(Fira(lr=1.0, scale=1.0, scaling="matrix", proj_type="full"), WIDE, [given], 2)
    inside, _ = train(GaLore(lr=1.0, scale=1.0, proj_type="full"), WIDE, [given], 2)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    rest = left[:, 2:] @ values[2:].diag() @ right[2:]
    low = values[:2].diag()
    answer = 0.1 * low / ((0.001 * low**2).sqrt() + 1e-8)
    expected = rest * answer.norm() / low.norm() * math.sqrt(0.001) / 0.1
    assert_close(inside[0] - made[0], expected, rtol=1e-5, atol=1e-6)


def test_a_zero_gradient_leaves_no_residual_and_the_next_one_acts_in_full():
    given = [torch.zeros(WIDE, dtype=torch.float64), *gradients(WIDE, 3)]
    made, _ = train(Fira(lr=0.1), WIDE, given, 2)
    assert not made[0].any() and made[1].isfinite().all()
    late, _ = train(Fira(lr=0.1, gamma=math.inf), WIDE, given, 2)
    assert_close(made[1], late[1], rtol=1e-12, atol=0)  # unlimited
    cut, optimizer = train(Fira(lr=0.1, reference=True), WIDE, given, 2)
    (state,) = optimizer.state.values()
    assert float(state["limited_norm"]) < 1e-7 and not torch.allclose(cut[1], made[1], atol=1e-3)


def test_the_limiter_by_hand():
    """The paper's numbers: 14.069 and a spike thirty times as large, then another large one, then a fall that is free."""
    unit, limiter, state = torch.ones(3, 3) / 3, NormGrowthLimiter(), {}
    seen = [float(limiter(norm * unit, state).norm()) for norm in (14.069, 422.0, 100.0, 13.568)]
    assert seen == pytest.approx([14.069, 14.210, 14.352, 13.568], abs=1e-3)
    assert float(state["limited_norm"]) == pytest.approx(13.568, abs=1e-3)
    assert float(limiter(13.70 * unit, state).norm()) == pytest.approx(13.70, rel=1e-6)  # less than one percent more
    assert float(limiter(13.90 * unit, state).norm()) == pytest.approx(13.70 * 1.01, rel=1e-6)


def test_the_limiter_only_ever_shrinks_and_in_place():
    generator, limiter, state, last = torch.Generator().manual_seed(0), NormGrowthLimiter(gamma=1.3), {}, None
    for _ in range(30):
        update = torch.randn(4, 5, generator=generator, dtype=torch.float64) * 10 ** float(torch.randn((), generator=generator))
        before = update.clone()
        limited = limiter(update, state)
        assert limited is update
        share = float(limited.norm() / before.norm())
        assert share <= 1 and torch.allclose(limited, share * before)
        if last is not None:
            assert float(limited.norm()) == pytest.approx(min(float(before.norm()), 1.3 * (last + 1e-8)), rel=1e-12)
        last = float(limited.norm())


def test_the_limiter_behind_zero_with_a_floor_and_off():
    def after_zero(limiter):
        state = {}
        return [float(limiter(norm * torch.ones(1), state)) for norm in (0.0, 5.0, 5.0)]

    assert after_zero(NormGrowthLimiter()) == [0.0, 5.0, 5.0]
    assert after_zero(NormGrowthLimiter(reference=True)) == pytest.approx([0.0, 1.01e-8, 2.0301e-8], rel=1e-4)
    assert after_zero(NormGrowthLimiter(reference=True, floor=2.0)) == pytest.approx([0.0, 2.0, 2.02], rel=1e-6)
    assert NormGrowthLimiter(floor=1e-3)(torch.tensor([9e-4]), {"limited_norm": torch.tensor(1e-6)}) == 9e-4
    state = {}
    assert float(NormGrowthLimiter(gamma=math.inf)(torch.full((1,), 7.0), state)) == 7 and not state
    for knobs in ({"gamma": 0.9}, {"floor": -1.0}, {"floor": math.nan}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            NormGrowthLimiter(**knobs)


def test_a_spike_of_thirty_times_raises_the_norm_by_one_percent():
    given = gradients(WIDE, 4)
    norms = []
    for count in range(1, 5):
        spiked = [*given[:2], 30 * given[2], given[3]][:count]
        _, optimizer = train(Fira(), WIDE, spiked, 2)
        (state,) = optimizer.state.values()
        norms.append(float(state["limited_norm"]))
    assert norms[2] == pytest.approx(1.01 * (norms[1] + 1e-8), rel=1e-9)  # without the limit it would be several times as large
    assert all(b <= 1.01 * (a + 1e-8) * (1 + 1e-12) for a, b in itertools.pairwise(norms))


def test_the_limits_survive_a_checkpoint_and_new_directions():
    given = gradients(TALL, 7)
    unbroken, _ = train(Fira(update_proj_gap=2), TALL, given, 2)
    _, first = train(Fira(update_proj_gap=2), TALL, given[:3], 2)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    weight = first.param_groups[0]["params"][0]
    second = Stepper(Fira(update_proj_gap=2), [{"params": [("weight", weight)], "rank": 2}])
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for gradient in given[3:]:
        weight.grad = gradient.clone()
        second.step()
    assert torch.equal(weight, unbroken[-1])


def test_it_keeps_one_number_more_than_galore():
    given = gradients(WIDE, 2)
    _, fira = train(Fira(), WIDE, given, 2)
    _, galore = train(GaLore(), WIDE, given, 2)
    assert fira.state_bytes() - galore.state_bytes() == 8  # of a float64
    assert Fira().state_numbers(WIDE, 2) - GaLore().state_numbers(WIDE, 2) == 1 and Fira().state_numbers(WIDE) == GaLore().state_numbers(WIDE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_a_peft_model_the_lora_factors_are_projected(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "mlp.c_proj"]
        model = peft.get_peft_model(small_models.model(family), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=family == "gpt2"))
    optimizer = Fira(rank=2, scale=1.0, lr=0.01).optimizer(model)
    factors = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert len(optimizer.param_groups) == 1 and {id(p) for p in optimizer.param_groups[0]["params"]} == factors and len(factors) == 8
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(4, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 1:  # lora_A's gradient was zero at the first step, while lora_B was: only now has it directions
            slope = {p: p.grad.clone() for name, p in model.named_parameters() if "lora_A" in name}
        optimizer.step()
        if step == 1:
            for p, gradient in slope.items():
                known = torch.linalg.svd(gradient, full_matrices=False)[0][:, :2]
                assert_close(optimizer.state[p]["left"] @ optimizer.state[p]["left"].T, known @ known.T, rtol=1e-3, atol=1e-4)
                assert "blank" not in optimizer.state[p]
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (id(p) in factors), name
    assert all(float(optimizer.state[p]["limited_norm"]) > 1e-4 for p in optimizer.param_groups[0]["params"])

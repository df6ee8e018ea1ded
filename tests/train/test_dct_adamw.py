"""DCT-AdamW against a plain form of it that masks frequencies with scipy, and against torch's AdamW in coordinates of cosines."""

import io
import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
import torch

import small_models
from echelon.linalg import cosine
from echelon.train.optimizers import DCTAdamW, GaLore

SHAPES = [(12, 7), (7, 12), (8, 8)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def axis_of(shape):
    return 1 if shape[0] >= shape[1] else 0


def spectrum(matrix):
    return scipy.fft.dct(matrix, norm="ortho", axis=axis_of(matrix.shape))


def kept(matrix, indices):
    """A matrix without the frequencies that are not among these."""
    axis = axis_of(matrix.shape)
    mask = np.isin(np.arange(matrix.shape[axis]), indices)
    return scipy.fft.idct(np.where(mask if axis else mask[:, None], spectrum(matrix), 0), norm="ortho", axis=axis)


def run(method, weight, gradients):
    """The weight, its optimizer and the gradients' leaf after a step for each gradient."""
    p = torch.nn.Parameter(weight.clone())
    optimizer = method.optimizer([{"params": [("w", p)], "rank": method.rank}])
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(p.grad, gradient)  # whoever logs it afterwards sees it unchanged
    return p, optimizer


def masked(weight, gradients, rank, gap, norm, lr, weight_decay, use_ef):
    """The same in full size: moments of every frequency, zero where it is not chosen."""
    w, axis = weight.numpy().copy(), axis_of(weight.shape)
    m, v, error = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        w *= 1 - lr * weight_decay
        a = gradient.numpy() + error
        s = spectrum(a)
        if t == 1 or t % gap == 0:
            score = (np.abs(s) ** norm).sum(1 - axis)
            mask = np.isin(np.arange(len(score)), np.argsort(-score, kind="stable")[:rank])
            mask = mask[None] if axis else mask[:, None]
        if use_ef:
            error = a - scipy.fft.idct(s * mask, norm="ortho", axis=axis)
        m, v = (0.9 * m + 0.1 * s) * mask, (0.999 * v + 0.001 * s * s) * mask
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w -= lr * scipy.fft.idct(u, norm="ortho", axis=axis)
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gap", "norm", "use_ef", "transform"), [
    (1, 1, False, "auto"), (1, 2, True, "makhoul"), (3, 1, True, "matmul"), (3, 2, False, "auto"),
])  # fmt: skip
def test_it_is_adam_on_masked_frequencies(shape, gap, norm, use_ef, transform):
    weight, gradients = normal(*shape), [normal(*shape, seed=10 + i) for i in range(8)]
    method = DCTAdamW(rank=3, update_proj_gap=gap, ell_norm=norm, use_ef=use_ef, transform=transform, lr=0.05, weight_decay=0.1)
    p, _ = run(method, weight, gradients)
    expected = masked(weight, gradients, 3, gap, norm, 0.05, 0.1, use_ef)
    torch.testing.assert_close(p.detach(), torch.from_numpy(expected), rtol=0, atol=1e-10)


def test_without_rotation_moments_keep_their_places():
    shape, gap, rank = (9, 6), 2, 2
    gradients = [normal(*shape, seed=i) for i in range(5)]
    p, optimizer = run(DCTAdamW(rank=rank, update_proj_gap=gap, rotate_subspace=False, lr=0.1), torch.zeros(shape, dtype=torch.float64), gradients)
    m = np.zeros((9, rank))
    for t, gradient in enumerate(gradients, 1):
        s = spectrum(gradient.numpy())
        if t == 1 or t % gap == 0:
            chosen = sorted(np.argsort(-np.abs(s).sum(0))[:rank])
        m = 0.9 * m + 0.1 * s[:, chosen]
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.from_numpy(m), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_directions_it_is_torchs_adamw_in_coordinates_of_cosines(shape):
    weight, gradients = normal(*shape), [normal(*shape, seed=20 + i) for i in range(5)]
    p, _ = run(DCTAdamW(rank=min(shape), lr=0.02, weight_decay=0.3, eps=1e-3), weight, gradients)
    turned = torch.nn.Parameter(torch.from_numpy(spectrum(weight.numpy())))
    reference = torch.optim.AdamW([turned], lr=0.02, weight_decay=0.3, eps=1e-3)
    for gradient in gradients:
        turned.grad = torch.from_numpy(spectrum(gradient.numpy()))
        reference.step()
    torch.testing.assert_close(torch.from_numpy(spectrum(p.detach().numpy())), turned.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("proj", ["random_qr", "hadamard", "dct3"])
def test_other_bases_move_weights_within_the_chosen_directions(proj):
    gradient = normal(12, 8)
    p, optimizer = run(DCTAdamW(rank=3, proj=proj, lr=0.1, seed=4), torch.zeros(12, 8, dtype=torch.float64), [gradient])
    directions = cosine.basis(8, proj, torch.float64, seed=4)
    inside = p.detach() @ directions
    chosen = sorted((gradient @ directions).abs().sum(0).topk(3).indices.tolist())
    assert optimizer.state[p]["indices"].tolist() == chosen
    # Adam's first step is the sign, times the learning rate.
    torch.testing.assert_close(inside[:, chosen], -0.1 * (gradient @ directions)[:, chosen].sign(), rtol=0, atol=1e-5)
    assert inside[:, [i for i in range(8) if i not in chosen]].abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_error_feedback_loses_nothing(shape):
    gradients = [normal(*shape, seed=i) for i in range(6)]
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = DCTAdamW(rank=2, use_ef=True).optimizer([{"params": [("w", p)], "rank": 2}])
    before = np.zeros(shape)
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
        whole, error = gradient.numpy() + before, optimizer.state[p]["error"].numpy()
        np.testing.assert_allclose(error + kept(whole, optimizer.state[p]["indices"].numpy()), whole, atol=1e-12)
        before = error.copy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_error_is_off_by_at_most_half_a_step_of_its_row(shape, bits):
    gradient = normal(*shape)
    gradient[-1] = 0
    p, optimizer = run(DCTAdamW(rank=2, use_ef=True, q_ef=bits), torch.zeros(shape, dtype=torch.float64), [gradient])
    missed = torch.from_numpy(gradient.numpy() - kept(gradient.numpy(), optimizer.state[p]["indices"].numpy()))
    half = (missed.amax(1) - missed.amin(1)) / (2**bits - 1) / 2
    # What the second step sees beside a zero gradient, with all directions, is the stored error.
    p.grad = torch.zeros_like(gradient)
    stored = optimizer.method._error(p.grad, optimizer.state[p], optimizer.param_groups[0])
    assert ((stored - missed).abs().amax(1) <= half * (1 + 1e-9) + 1e-15).all()
    if shape[0] > shape[1]:
        assert (stored[-1] == 0).all()  # the zero row of a matrix whose rows are described alone
    assert optimizer.state[p]["error"].numel() == shape[0] * -(-shape[1] * bits // 8)


def moved(method, shape, before, gradient):
    """Moments before and after new directions are chosen, without an update in between."""
    low = (shape[0], method.rank) if shape[0] >= shape[1] else (method.rank, shape[1])
    state = {"step": torch.tensor(9), "index": torch.tensor(0), "indices": before, "exp_avg": normal(*low, seed=5), "exp_avg_sq": normal(*low, seed=6).square()}
    old = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    knobs = {name: getattr(method, name) for name in ("rank", "proj", "transform", "ell_norm", "seed", "rotate_subspace", "new_square", "state_bits")}
    method._choose_anew(gradient, state, knobs)
    return old, state


def of_frequencies(shape, sizes):
    """A matrix with these magnitudes at these frequencies."""
    s = np.zeros(shape)
    for frequency, size in sizes.items():
        s[(slice(None), frequency) if axis_of(shape) else (frequency,)] = size
    return torch.from_numpy(scipy.fft.idct(s, norm="ortho", axis=axis_of(shape)))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize("new_square", ["zero", "mean"])
def test_moments_of_directions_that_stay_are_the_same_bits_and_new_ones_start_afresh(shape, new_square):
    gradient = of_frequencies(shape, {1: 3.0, 2: 4.0, 5: 5.0})
    old, state = moved(DCTAdamW(rank=3, new_square=new_square), shape, torch.tensor([0, 2, 4]), gradient)
    assert state["indices"].tolist() == [1, 2, 5]
    dim = axis_of(shape)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name].select(dim, 1), old[name].select(dim, 1))
        for place in (0, 2):
            fresh = old[name].mean(dim) if (name, new_square) == ("exp_avg_sq", "mean") else torch.zeros(max(shape), dtype=torch.float64)
            torch.testing.assert_close(state[name].select(dim, place), fresh, rtol=1e-12, atol=0)
    assert (state["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("gradient", [of_frequencies((9, 6), {0: 2.0, 2: 9.0, 4: 1.0}), torch.zeros(9, 6, dtype=torch.float64)])
def test_the_same_directions_and_a_zero_gradient_change_no_moments(gradient):
    old, state = moved(DCTAdamW(rank=3), (9, 6), torch.tensor([0, 2, 4]), gradient)
    assert state["indices"].tolist() == [0, 2, 4] and all(torch.equal(state[name], old[name]) for name in old)


def test_a_first_gradient_of_zero_does_not_choose():
    gradient = of_frequencies((9, 6), {3: 1.0, 5: 2.0})
    p, optimizer = run(DCTAdamW(rank=2, update_proj_gap=50), torch.zeros(9, 6, dtype=torch.float64), [torch.zeros_like(gradient), gradient, -gradient])
    assert optimizer.state[p]["indices"].tolist() == [3, 5]


def test_both_transforms_train_alike():
    gradients = [normal(24, 17, seed=i, dtype=torch.float32) for i in range(4)]
    a, b = (run(DCTAdamW(rank=5, transform=how, use_ef=True), torch.zeros(24, 17), gradients)[0] for how in ("matmul", "makhoul"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (5,)])
def test_vectors_and_matrices_with_a_long_side_get_torchs_adamw(shape):
    target = torch.nn.Parameter(torch.zeros(4, 4))
    p, q = torch.nn.Parameter(normal(*shape)), torch.nn.Parameter(normal(*shape))
    group = {"params": [("w", p)], **({"rank": 20} if len(shape) == 2 else {})}
    knobs = {"lr": 0.03, "weight_decay": 0.2, "eps": 1e-4}
    optimizer = DCTAdamW(rank=2, max_shape=40, **knobs).optimizer([group, {"params": [("t", target)], "rank": 2}])
    reference = torch.optim.AdamW([q], **knobs)
    for step in range(4):
        p.grad, q.grad = normal(*shape, seed=step), normal(*shape, seed=step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_rank_above_the_smaller_side_is_refused_by_name(recwarn):
    with pytest.raises(ValueError, match=r"rank is 17; it must be at most 16, the smaller side of model\.layers\.0\.self_attn\.k_proj\.weight \(16, 32\)"):
        DCTAdamW(rank=17).optimizer(small_models.model("llama"))
    with pytest.raises(ValueError, match=r"smaller side of w \(6, 9\) must be a power of two"):
        DCTAdamW(proj="hadamard").optimizer([{"params": [("w", torch.nn.Parameter(torch.zeros(6, 9)))], "rank": 2}])
    assert not recwarn.list
    DCTAdamW(rank=17, max_shape=8).optimizer(small_models.model("llama"))  # nothing is projected there


@pytest.mark.parametrize(("knobs", "told"), [
    ({"proj": "svd"}, "proj is 'svd'"), ({"transform": "fft"}, "transform is 'fft'"), ({"ell_norm": 3}, "ell_norm is 3"),
    ({"q_ef": 5, "use_ef": True}, "q_ef is 5"), ({"q_ef": 8}, "q_ef is 8"), ({"update_proj_gap": 0}, "update_proj_gap is 0"),
    ({"rotate_subspace": False}, "rotate_subspace is False"), ({"max_shape": 0}, "max_shape is 0"), ({"new_square": "one"}, "new_square is 'one'"),
    ({"proj": "hadamard", "transform": "makhoul"}, "transform is 'makhoul'"),
])  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, told):
    with pytest.raises(ValueError, match=told):
        DCTAdamW(**knobs)


@pytest.mark.parametrize(("knobs", "bytes_of_error"), [({}, 0), ({"use_ef": True}, 4), ({"use_ef": True, "q_ef": 8}, 1), ({"use_ef": True, "q_ef": 4}, 0.5)])
def test_state_is_two_moments_of_the_coefficients_indices_and_the_error(knobs, bytes_of_error):
    m, n, r = 64, 32, 4
    _, optimizer = run(DCTAdamW(rank=r, **knobs), torch.zeros(m, n), [normal(m, n, dtype=torch.float32)] * 2)
    rows = 8 * m if knobs.get("q_ef") else 0  # least number and step of every row
    counters = 3 * 8
    assert optimizer.state_bytes() == 4 * 2 * m * r + 8 * r + bytes_of_error * m * n + rows + counters
    formula = optimizer.method.state_numbers((m, n), r)
    assert formula == 2 * m * r + r + {0: 0, 4: m * n, 1: m * n // 2, 0.5: m * n // 4}[bytes_of_error]


@pytest.mark.parametrize("knobs", [{}, {"use_ef": True, "q_ef": 8, "update_proj_gap": 3}, {"use_ef": True, "q_ef": 4, "state_bits": 8}])
def test_error_and_indices_survive_a_checkpoint_bit_for_bit(knobs):
    method, gradients = DCTAdamW(rank=3, **knobs), [normal(70, 64, seed=i, dtype=torch.float32) for i in range(7)]
    unbroken, _ = run(method, torch.zeros(70, 64), gradients)
    p, optimizer = run(method, torch.zeros(70, 64), gradients[:4])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second = method.optimizer([{"params": [("w", p)], "rank": 3}])
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for gradient in gradients[4:]:
        p.grad = gradient
        second.step()
    assert torch.equal(p, unbroken)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_takes_the_cosine_projection_and_keeps_indices(shape):
    """Its first step is ``scale lr`` times the sign of the chosen coefficients."""
    gradient = normal(*shape)
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = GaLore(lr=0.5, scale=0.1, rank=2, projection="dct", eps=1e-12).optimizer([{"params": [("w", p)], "rank": 2}])
    p.grad = gradient
    optimizer.step()
    axis, s = axis_of(shape), spectrum(gradient.numpy())
    chosen = np.sort(np.argsort(-np.abs(s).sum(1 - axis))[:2])
    mask = np.isin(np.arange(s.shape[axis]), chosen)
    expected = -0.05 * scipy.fft.idct(np.where(mask if axis else mask[:, None], np.sign(s), 0), norm="ortho", axis=axis)
    torch.testing.assert_close(p.detach(), torch.from_numpy(expected), rtol=0, atol=1e-8)
    held = optimizer.state[p]["right" if axis else "left"]
    assert held.dtype == torch.int64 and held.tolist() == chosen.tolist()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = torch.nn.Parameter(p.detach().clone())
    other = GaLore(lr=0.5, scale=0.1, rank=2, projection="dct", eps=1e-12).optimizer([{"params": [("w", again)], "rank": 2}])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    p.grad = again.grad = normal(*shape, seed=1)
    optimizer.step()
    other.step()
    assert torch.equal(p, again)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from echelon.train.optimizers import DCTAdamW, Trion
rank = int(sys.argv[1])
place = (2 * torch.arange(6) + 1) * torch.pi / 12
waves = torch.cos(torch.arange(6)[:, None] * place)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for method in (DCTAdamW(rank=1), Trion(rank=1)):
    pair = [torch.nn.Parameter(torch.zeros(9, 6)) for _ in range(2)]
    optimizer = method.optimizer([{"params": pair, "rank": 1}])
    for p in pair:  # each process by itself would choose another frequency
        p.grad = (waves[2 + rank] + 0.5 * waves[3 - rank]).repeat(9, 1)
    optimizer.step()
    print([((waves @ p.detach()[0]).abs() > 1e-4).nonzero().flatten().tolist() for p in pair])
dist.destroy_process_group()
"""


def test_processes_agree_on_the_directions_and_take_turns_in_choosing(tmp_path):
    commands = [[sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path / "meeting")] for rank in (0, 1)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    told = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), told
    assert [out for out, _ in told] == [2 * "[[2], [3]]\n"] * 2  # process 0 sees most of frequency 2, process 1 of 3

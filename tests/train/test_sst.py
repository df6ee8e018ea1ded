"""What SST promises beyond the layer contract."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import echelon  # noqa: F401 (lets from_pretrained know our layers)
import small_models
from echelon.models.modules import LowRankLinear, build
from echelon.train.layers import SST, LorentzLinear, SpectralLinear, truncate
from echelon.train.layers.base import LearningRate
from echelon.train.layers.sst import draw, probabilities
from echelon.train.optimizers import AdamW


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inner, outer, bias=True, dtype=torch.float32):
    made = nn.utils.skip_init(nn.Linear, inner, outer, bias=bias, dtype=dtype)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=seeded()) * inner**-0.5)
    return made


def layer(old, active=None, **knobs):
    method = SST(**knobs)
    new = build(method.spec("layer", old), old)
    with torch.no_grad():
        method.fill(new, old, seeded(1))
    if active is not None:
        new.activate(torch.tensor(active))
    return new


def holder(old):
    """A model of one layer."""
    return nn.ModuleDict({"inner": old})


def dense_of(made):
    """U diag(sigma) V^T by the numbers of its columns, in float64."""
    left = torch.cat([made.left, made.left_frozen], 1).detach().double()
    right = torch.cat([made.right, made.right_frozen], 1).detach().double()
    return sum(made.sigma[number].double() * torch.outer(left[:, place], right[:, place]) for place, number in enumerate(made.order.tolist()))


def steps(method, model, optimizer, first, last, batches):
    losses = []
    for step in range(first, last):
        method.begin_step(model, optimizer, step)
        loss = method.loss(model, batches[step % len(batches)])
        loss.backward()
        method.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
        losses.append(float(loss.detach()))
    return losses


def batches(family, dtype=torch.float32):
    if family == "vit":
        return [{**small_models.batch(family, dtype), "labels": torch.tensor([1, 2])}]
    rows = torch.tensor(small_models.data(family, 4, 10))
    return [{"input_ids": part, "labels": part} for part in rows.chunk(2)]


def orthonormal(vectors, atol=1e-5):
    assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=vectors.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (10, 10)])
def test_it_starts_as_the_layer_it_replaces_with_orthonormal_vectors_and_sorted_values(shape):
    old = linear(*shape)
    made = layer(old, r=4)
    x = torch.randn(2, 5, shape[0], generator=seeded())
    assert_close(made(x), old(x), rtol=1e-5, atol=1e-5)
    assert_close(made.merge().weight, old.weight, rtol=1e-5, atol=1e-5)
    assert_close(made.sigma.detach(), torch.linalg.svdvals(old.weight.detach()), rtol=1e-5, atol=1e-5)
    for vectors in made.vectors():
        orthonormal(vectors)
    made.activate(torch.tensor([7, 1, 5, 2]))
    assert made.active.tolist() == [1, 2, 5, 7] and sorted(made.order.tolist()) == list(range(min(shape)))
    assert_close(made(x), old(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("train_sigma", ["all", "active"])
@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
def test_gradients_are_the_true_ones_save_for_the_singular_values_left_out(shape, train_sigma, enhanced):
    made = layer(linear(*shape), active=[6, 0, 3], r=3, enhanced_grad=enhanced, train_sigma=train_sigma)
    x = torch.randn(2, 6, shape[0], generator=seeded(), requires_grad=True)
    target = torch.randn(2, 6, shape[1], generator=seeded(1))
    (made(x).tanh() * target).sum().backward()
    left, right, sigma = made.left.detach().double(), made.right.detach().double(), made.sigma.detach().double()
    weight = dense_of(made).detach().requires_grad_()
    wide, bias = x.detach().double().requires_grad_(), made.bias.detach().double().requires_grad_()
    (nn.functional.linear(wide, weight, bias).tanh() * target).sum().backward()
    assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    assert_close(made.bias.grad.double(), bias.grad, rtol=1e-5, atol=1e-5)
    chosen = torch.tensor([0, 3, 6])
    factor = sigma[chosen]
    true = {"left": weight.grad @ right * factor, "right": weight.grad.T @ left * factor}
    for name, wanted in true.items():
        grad = getattr(made, name).grad.double()
        assert_close(grad * factor if enhanced else grad, wanted, rtol=1e-5, atol=1e-5)
    all_left, all_right = (vectors.double() for vectors in made.vectors())
    wanted = torch.stack([all_left[:, i] @ weight.grad @ all_right[:, i] for i in range(9)])
    if train_sigma == "active":
        wanted[[i for i in range(9) if i not in (0, 3, 6)]] = 0
    assert_close(made.sigma.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_probabilities_are_half_uniform_half_spectral():
    sigma = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert probabilities(sigma).tolist() == [0.125 + 0.375, 0.125 + 0.125, 0.125, 0.125]
    assert probabilities(sigma, "sigma").tolist() == [0.75, 0.25, 0, 0]
    assert probabilities(sigma, "uniform").tolist() == [0.25] * 4
    spread = torch.rand(50, generator=seeded())
    assert_close(float(probabilities(spread).sum()), 1.0, rtol=1e-12, atol=0)
    assert float(probabilities(spread).min()) >= 1 / 100


@pytest.mark.parametrize("sampling", ["mixed", "sigma", "uniform"])
def test_draws_are_distinct_and_follow_the_probabilities_of_drawing_without_replacement(sampling):
    sigma, count = torch.tensor([4.0, 2.0, 1.0, 0.5]), 4000
    p = probabilities(sigma, sampling).tolist()
    seen = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for seed in range(count):
        seen[tuple(sorted(draw(sigma, 2, sampling, 0, seed).tolist()))] += 1  # a repeated one would be no key
    for (i, j), times in seen.items():
        wanted = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert abs(times / count - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / count)


def test_other_ways_to_sample():
    sigma = torch.tensor([1.0, 5.0, 0.0, 3.0, 2.0])
    assert sorted(draw(sigma, 2, "topk", 7, 0).tolist()) == [1, 3]
    covered = [draw(sigma, 2, "sequential", iteration, 0).tolist() for iteration in range(3)]
    assert covered == [[0, 1], [2, 3], [4, 0]]
    assert sorted(draw(torch.tensor([1.0, 0.0, 0.0, 0.0]), 3, "sigma", 0, 0).tolist())[0] == 0  # runs out of values above zero
    counts = torch.zeros(5)
    for seed in range(1000):
        counts[draw(torch.zeros(5), 2, "sigma", 0, seed)] += 1
    assert float((counts - 400).abs().max()) < 5 * math.sqrt(1000 * 0.4 * 0.6)


def test_within_an_iteration_frozen_columns_stay_and_everything_else_learns():
    model = small_models.model("llama")
    method = SST(r=6, steps_per_iteration=4, lr=1e-3)
    names = method.convert(model)
    optimizer = method.optimizer(model)
    layers = [model.get_submodule(name) for name in names]
    steps(method, model, optimizer, 0, 5, batches("llama"))  # the second iteration has begun
    frozen = [(made.left_frozen.clone(), made.right_frozen.clone(), made.order.clone()) for made in layers]
    for step in range(5, 8):
        before = [(made.sigma.detach().clone(), made.left.detach().clone()) for made in layers]
        steps(method, model, optimizer, step, step + 1, batches("llama"))
        for made, kept, (sigma, left) in zip(layers, frozen, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip((made.left_frozen, made.right_frozen, made.order), kept, strict=True))
            stopped = (made.sigma == 0) & (sigma == 0)
            assert bool(((made.sigma != sigma) | stopped).all()) and float(made.sigma.detach().min()) >= 0
            assert int(stopped.sum()) <= 1
            assert not torch.equal(made.left, left)
            for vectors in (made.left, made.right):
                assert_close(vectors.norm(dim=0), torch.ones(made.rank), rtol=0, atol=1e-6)


def test_singular_values_stop_at_zero():
    model = holder(linear(8, 8))
    method = SST(r=2, target_modules=["inner"], steps_per_iteration=100)
    method.convert(model)
    made = model["inner"]
    optimizer = AdamW(lr=10.0).optimizer(model)
    made(torch.randn(9, 8, generator=seeded())).square().sum().backward()
    optimizer.step()
    assert float(made.sigma.detach().min()) < 0
    method.end_step(model, optimizer, 1)
    assert float(made.sigma.detach().min()) == 0


def test_moments_of_the_layers_are_forgotten_at_every_draw_and_others_are_kept():
    model = small_models.model("llama")
    method = SST(r=6, steps_per_iteration=3, iterations_per_round=100)
    names = method.convert(model)
    optimizer = method.optimizer(model)
    steps(method, model, optimizer, 0, 3, batches("llama"))
    layers = [model.get_submodule(name) for name in names]
    assert all(int(optimizer.state[p]["step"]) == 3 for p in model.parameters())
    held = sum(optimizer.state[p]["exp_avg"].numel() for made in layers for p in made.parameters())
    shapes = [(made.out_features, made.in_features) for made in layers]
    assert held == sum(min(6, *s) * sum(s) + min(s) for s in shapes)
    method.begin_step(model, optimizer, 3)
    forgotten = {id(p) for made in layers for p in (made.left, made.right, made.sigma)}
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()} - forgotten


def test_at_the_end_of_a_round_the_vectors_are_orthonormal_again_and_the_function_stays():
    model = small_models.model("llama")
    method = SST(r=8, steps_per_iteration=2, lr=0.02)  # ceil(32 / 8) iterations of 2 steps
    names = method.convert(model)
    optimizer = method.optimizer(model)
    steps(method, model, optimizer, 0, 7, batches("llama"))
    layers = [model.get_submodule(name) for name in names]
    astray = [float((made.vectors()[0].T @ made.vectors()[0] - torch.eye(len(made.sigma))).abs().max()) for made in layers]
    assert min(astray) > 1e-4
    before = {name: dense_of(made) for name, made in zip(names, layers, strict=True)}
    for made in layers:
        twin = copy.deepcopy(made)
        twin.refresh()
        x = torch.randn(4, made.in_features, generator=seeded())
        assert_close(twin(x), made(x), rtol=1e-5, atol=2e-5)
        assert_close(dense_of(twin), before[names[layers.index(made)]], rtol=1e-5, atol=1e-5)
    method.end_step(model, optimizer, 8)
    for made in layers:
        for vectors in made.vectors():
            orthonormal(vectors)
        assert torch.equal(made.sigma, made.sigma.sort(descending=True).values) and float(made.sigma.detach().min()) >= 0


def test_with_every_direction_active_each_iteration_is_a_round():
    model = holder(linear(8, 8))
    method = SST(r=8, target_modules=["inner"], steps_per_iteration=5)
    method.convert(model)
    method.begin_step(model, method.optimizer(model), 0)
    assert model["inner"].active.tolist() == list(range(8)) and model["inner"].left_frozen.shape == (8, 0)
    assert method.round_steps(model) == 5
    assert SST(r=3, steps_per_iteration=5).round_steps(model) == 15
    assert SST(r=3, steps_per_iteration=5, iterations_per_round=7).round_steps(model) == 35


def test_a_small_step_along_all_directions_goes_down_the_gradient_of_the_weight():
    made = layer(linear(8, 8), r=8, enhanced_grad=False)
    x = torch.randn(20, 8, generator=seeded())
    target = torch.randn(20, 8, generator=seeded(1))
    before = dense_of(made).detach()
    weight = before.clone().requires_grad_()
    ((nn.functional.linear(x.double(), weight, made.bias.double()) - target) ** 2).mean().backward()
    optimizer = torch.optim.SGD([made.left, made.right, made.sigma], lr=1e-3)
    ((made(x) - target) ** 2).mean().backward()
    optimizer.step()
    assert float(((dense_of(made).detach() - before) * weight.grad).sum()) < 0


def test_the_sign_of_a_pair_of_vectors_does_not_matter():
    made, x = layer(linear(12, 8), active=[1, 4, 6], r=3), torch.randn(20, 12, generator=seeded())
    flipped = copy.deepcopy(made)
    left, right = flipped.vectors()
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    flipped.set_vectors(left * signs, right * signs)
    assert_close(flipped(x), made(x), rtol=1e-6, atol=1e-6)
    changes = []
    for twin in (made, flipped):
        before, optimizer = dense_of(twin).detach(), AdamW(lr=0.05).optimizer(twin)
        for _ in range(3):
            twin(x).tanh().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            twin.constrain(optimizer)
        changes.append((dense_of(twin) - before).detach())
    assert float(changes[0].norm()) > 0.1
    assert_close(changes[0], changes[1], rtol=1e-5, atol=1e-5)


def test_resuming_in_the_middle_of_an_iteration_is_exact(tmp_path):
    method = SST(r=6, steps_per_iteration=3, iterations_per_round=2, lr=0.01, seed=5)
    whole = small_models.model("llama")
    names = method.convert(whole)
    optimizer = method.optimizer(whole)
    steps(method, whole, optimizer, 0, 4, batches("llama"))
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    losses = steps(method, whole, optimizer, 4, 14, batches("llama"))
    active = {tuple(whole.get_submodule(name).active.tolist()) for name in names}
    with torch.random.fork_rng():
        torch.manual_seed(99)  # another process has another global state
        resumed = type(whole).from_pretrained(tmp_path).eval()
        optimizer = method.optimizer(resumed)
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        assert steps(method, resumed, optimizer, 4, 14, batches("llama")) == losses
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert len(active) > 10  # layers draw apart


def test_seeds_decide_the_draws():
    drawn = []
    for seed in (0, 0, 1):
        model = small_models.model("llama")
        method = SST(r=6, seed=seed)
        names = method.convert(model)
        method.begin_step(model, method.optimizer(model), 0)
        drawn.append([model.get_submodule(name).active.tolist() for name in names])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("knobs", "message"), [
    ({"r": 0}, "r is 0"), ({"steps_per_iteration": 0}, "steps_per_iteration is 0"), ({"iterations_per_round": 0}, "iterations_per_round is 0"),
    ({"warmup_per_iteration": -1}, "warmup_per_iteration is -1"), ({"sampling": "best"}, "sampling is 'best'"),
    ({"train_sigma": "none"}, "train_sigma is 'none'"),
    ({"init": "zero"}, "init is 'zero'"), ({"final_rank": -1}, "final_rank is -1"), ({"lr": -1.0}, "lr is -1.0"),
])  # fmt: skip
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        SST(**knobs)


def test_a_rank_above_every_layer_is_an_error_and_above_some_a_warning():
    model = small_models.model("llama")  # 32 wide; keys and values have 16 outputs
    with pytest.raises(ValueError, match="r is 33; it must be at most 32"):
        SST(r=33).convert(model)
    assert not any(isinstance(module, SpectralLinear) for module in model.modules())
    with pytest.warns(UserWarning, match=r"layers.0.self_attn.k_proj, .*v_proj.* have fewer singular values \(down to 16\)"):
        SST(r=20).convert(model)
    assert model.model.layers[1].self_attn.k_proj.rank == 16 and model.model.layers[1].self_attn.q_proj.rank == 20


def test_a_zero_layer_draws_uniformly_and_learns():
    old = linear(10, 10, bias=False)
    old.weight.data.zero_()
    model = holder(old)
    method = SST(r=3, target_modules=["inner"], lr=0.02, steps_per_iteration=10, warmup_per_iteration=0)
    method.convert(model)
    made = model["inner"]
    x, wanted = torch.randn(50, 10, generator=seeded()), torch.randn(10, 10, generator=seeded(1))
    optimizer = method.optimizer(model)
    vectors, losses = made.left.detach().clone(), []
    for step in range(40):
        method.begin_step(model, optimizer, step)
        loss = (made(x) - x @ wanted.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
        losses.append(float(loss.detach()))
        if step == 0:
            assert not torch.equal(made.left, vectors)
    assert losses[-1] < 0.9 * losses[0]


def test_the_learning_rate_rises_behind_every_draw():
    method, base = SST(steps_per_iteration=10, warmup_per_iteration=4), LearningRate(40, 5, 0.1)
    for step in range(40):
        ramp = {0: 0.25, 1: 0.5, 2: 0.75}.get(step % 10, 1.0)
        plain = step / 5 if step < 5 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 5) / 35))
        assert_close(method.lr_scale(step, base), ramp * plain, rtol=1e-12, atol=0)
    assert SST(warmup_per_iteration=0).lr_scale(0, lambda step: 0.7) == 0.7


def test_a_random_start_has_unit_vectors_and_the_size_of_the_weight():
    old = linear(60, 50)
    made = layer(old, r=4, init="random")
    for vectors in made.vectors():
        assert_close(vectors.norm(dim=0), torch.ones(50), rtol=1e-5, atol=1e-5)
    assert float((made.sigma - made.sigma[0]).abs().max()) == 0
    assert 0.8 < float(dense_of(made).norm() / old.weight.norm()) < 1.25
    assert float((dense_of(made) - old.weight).norm()) > 0.5 * float(old.weight.norm())


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_every_family_trains_saves_and_becomes_dense(family, tmp_path):
    model = small_models.model(family)
    plain = {name: type(module) for name, module in model.named_modules()}
    method = SST(r=6, steps_per_iteration=4, iterations_per_round=2, warmup_per_iteration=2, lr=0.01)
    before = small_models.logits(model, family)
    method.convert(model)
    assert_close(small_models.logits(model, family), before, rtol=1e-3, atol=1e-3)
    losses = steps(method, model, method.optimizer(model), 0, 10, batches(family))
    assert losses[-1] < losses[0]
    before = small_models.logits(model.eval(), family)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(small_models.logits(again, family), before)
    method.finish(again)
    assert {name: type(module) for name, module in again.named_modules()} == plain
    assert_close(small_models.logits(again, family), before, rtol=1e-3, atol=1e-3)
    again.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_the_singular_values_stay_in_float32(family, tmp_path):
    model = small_models.model(family, torch.bfloat16)
    method = SST(r=6, steps_per_iteration=3, iterations_per_round=2, warmup_per_iteration=0, lr=0.01)
    names = method.convert(model)
    optimizer = AdamW(lr=0.01, rounding="master").optimizer(model)
    losses = steps(method, model, optimizer, 0, 8, batches(family, torch.bfloat16))
    assert losses[-1] < losses[0]
    for name in names:
        made = model.get_submodule(name)
        assert made.sigma.dtype == torch.float32 and made.left.dtype == made.left_frozen.dtype == torch.bfloat16
        master = optimizer.state[made.left]["master"]
        assert_close(master.norm(dim=0), torch.ones(made.rank), rtol=0, atol=1e-6)
        assert torch.equal(made.left, master.bfloat16())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype, name
    values = again.get_submodule(names[0]).sigma.detach().clone()
    again.to(torch.float16).to(torch.bfloat16)
    assert torch.equal(again.get_submodule(names[0]).sigma, values)


def test_a_draw_reaches_the_float32_copies_that_an_optimizer_keeps():
    model = small_models.model("llama", torch.bfloat16)
    method = SST(r=6, steps_per_iteration=2, iterations_per_round=100, lr=0.01)
    names = method.convert(model)
    optimizer = AdamW(lr=0.01, rounding="master").optimizer(model)
    steps(method, model, optimizer, 0, 2, batches("llama", torch.bfloat16))
    before = [model.get_submodule(name).active.tolist() for name in names]
    method.begin_step(model, optimizer, 2)
    assert any(model.get_submodule(name).active.tolist() != active for name, active in zip(names, before, strict=True))
    for made in (model.get_submodule(name) for name in names):
        for vectors in (made.left, made.right):
            assert optimizer.state[vectors].keys() == {"master"} and torch.equal(optimizer.state[vectors]["master"], vectors.float())


def test_processes_take_the_decomposition_of_the_first(monkeypatch):
    made = layer(linear(9, 7), r=3)
    first = [value + 1 for value in (made.sigma, made.left, made.right, made.left_frozen, made.right_frozen)]
    given = [value.detach().clone() for value in first]
    monkeypatch.setattr("echelon.train.layers.base.processes", lambda: 2)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, source: tensor.copy_(given.pop(0)))
    made.refresh()
    found = (made.sigma, made.left, made.right, made.left_frozen, made.right_frozen)
    assert not given and all(torch.equal(mine, theirs) for mine, theirs in zip(found, first, strict=True))


def test_float64_models_work_in_float64():
    old = linear(9, 12, dtype=torch.float64)
    made = layer(old, r=3)
    x = torch.randn(5, 9, dtype=torch.float64, generator=seeded())
    assert made.sigma.dtype == torch.float64
    assert_close(made(x), old(x), rtol=1e-12, atol=1e-12)


def test_autocast_multiplies_in_bfloat16_and_gives_gradients_in_the_parameters_dtype():
    made = layer(linear(16, 12), r=4)
    x = torch.randn(9, 16, generator=seeded(), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), nn.functional.linear(x, dense_of(made).float(), made.bias), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in (*made.parameters(), x))


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = small_models.model("llama").train()
        SST(r=6).convert(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batches("llama")[0]).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_dense_cache_answers_as_the_factors_do_also_behind_a_step():
    made = layer(linear(9, 12), r=3, dense_cache=True)
    x = torch.randn(5, 9, generator=seeded())
    optimizer = AdamW(lr=0.1).optimizer(made)
    for _ in range(3):
        factors = made(x)
        with torch.no_grad():
            assert_close(made(x), factors, rtol=1e-4, atol=1e-5)
            kept = made._cached[1]
            made(x)
            assert made._cached[1] is kept
        factors.square().sum().backward()
        optimizer.step()
        made.constrain(optimizer)
        made.activate(torch.tensor([2, 5, 7]))
        made.refresh()
    assert not any("cache" in name for name in made.state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_truncation_keeps_the_leading_directions_where_that_is_smaller(family, tmp_path):
    model = small_models.model(family)
    dense = copy.deepcopy(model)
    names = SST(r=6).convert(model)
    steps(SST(r=6), model, SST(r=6).optimizer(model), 0, 2, batches(family))
    products = {name: dense_of(model.get_submodule(name)) for name in names}
    kept = truncate(model, rank=16)
    assert kept and any(name not in kept for name in names)  # 16 (32 + 32) = 32 x 32
    for name, product in products.items():
        module = model.get_submodule(name)
        rows, columns = product.shape
        assert isinstance(module, LowRankLinear) == (16 * (rows + columns) < rows * columns) == (name in kept)
        left, values, right = torch.linalg.svd(product)
        if name in kept:
            assert_close(module.product().double(), (left[:, :16] * values[:16]) @ right[:16], rtol=1e-3, atol=1e-4)
        else:
            assert type(module) is type(dense.get_submodule(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(small_models.logits(again, family), small_models.logits(model.eval(), family))


def test_truncation_by_energy_keeps_the_fewest_directions_that_hold_it():
    old = linear(40, 40)
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=seeded(s), dtype=torch.float64)).Q for s in (1, 2))
    values = torch.zeros(40, dtype=torch.float64)
    values[:4] = torch.tensor([4.0, 2.0, 1.0, 1.0])  # squares 16, 4, 1, 1 of 22
    old.weight.data.copy_((left * values) @ right)
    for energy, rank in ((0.7, 1), (0.9, 2), (20.5 / 22, 3), (21.5 / 22, 4)):
        model = holder(copy.deepcopy(old))
        SST(r=3, target_modules=["inner"]).convert(model)
        assert truncate(model, energy=energy) == {"inner": rank}
    for bad in ({}, {"rank": 3, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match="rank is|energy is"):
            truncate(model, **bad)


def test_finish_truncates_where_a_final_rank_is_given():
    model = small_models.model("llama")
    method = SST(r=6, final_rank=5)
    names = method.convert(model)
    method.finish(model)
    assert all(isinstance(model.get_submodule(name), LowRankLinear) and model.get_submodule(name).rank == 5 for name in names)


def test_a_lorentz_layer_stays_on_its_hyperboloid_and_is_trained_inside():
    with pytest.raises(ValueError, match="curvature is 0.5"):
        LorentzLinear(4, 4, curvature=0.5)
    before = torch.get_rng_state()
    model = nn.Sequential(LorentzLinear(6, 9, -0.5), LorentzLinear(9, 5, -0.5, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    space = torch.randn(40, 5, generator=seeded())
    x = torch.cat([(space.square().sum(1, keepdim=True) + 2).sqrt(), space], 1)
    method = SST(r=2, target_modules=["inner"], lr=0.02, steps_per_iteration=5, warmup_per_iteration=0)
    plain = model(x)
    assert method.convert(model) == ["0.inner", "1.inner"]
    assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    target, optimizer, losses = torch.randn(40, 4, generator=seeded(2)).sign() * 0.3, method.optimizer(model), []
    for step in range(60):
        method.begin_step(model, optimizer, step)
        loss = (model(x)[:, 1:] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    out = model(x)
    assert_close(-out[:, 0].square() + out[:, 1:].square().sum(1), torch.full((40,), -2.0), rtol=1e-4, atol=1e-4)

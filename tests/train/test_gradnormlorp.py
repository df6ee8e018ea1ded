"""What GradNormLoRP promises beyond the optimizer contract."""

import math

import peft
import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.testing import assert_close

import small_models
from echelon.models.targets import linear_targets
from echelon.train.optimizers import GradNormLoRP, Stepper

NO_DROPOUT = {"r": 4, "lora_dropout": 0.0}


def batch():
    ids = torch.randint(4, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def adapted(family="llama", dtype=torch.float32, steps=0, lr=0.02, base=None, **knobs):
    """A model with adapters, after a few steps of training."""
    method = GradNormLoRP(**NO_DROPOUT | {"lr": lr, "update_proj_gap": 3} | knobs)
    model = method.adapt(base or small_models.model(family, dtype))
    train(model, method.optimizer(model), steps)
    return method, model


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def layers(model):
    """The adapted layers: name, dense ``W0`` (out, in), ``s B A``, magnitude."""
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.layer.Linear):
            weight = module.get_base_layer().weight.detach()
            delta = module.scaling["default"] * module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
            yield name, weight.T if module.fan_in_fan_out else weight, delta, module.lora_magnitude_vector["default"].weight.detach()


def part(layer, base_weight, r=3, alpha=6.0, dropout=0.0, detach_norm=False):
    """One adapted linear layer in float64 with all parts random, in a module of its own."""
    net = nn.Sequential(nn.Linear(*reversed(base_weight.shape), bias=True, dtype=torch.float64))
    net[0].weight.data.copy_(base_weight)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"], use_dora=True)
    with torch.random.fork_rng():
        torch.manual_seed(layer)
        model = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
        for p in model.parameters():
            if p.requires_grad and p.ndim == 2:
                p.data = torch.randn(p.shape, dtype=torch.float64)
    return GradNormLoRP(detach_norm=detach_norm).adapt(model), model.base_model.model[0]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the adapter -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_at_first_it_computes_what_the_model_did_and_then_learns(family):
    before = small_models.logits(small_models.model(family), family)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    method, model = adapted(family)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_close(small_models.logits(model, family), before, rtol=0, atol=1e-5)
    losses = train(model, method.optimizer(model), 15)
    assert losses[-1] < 0.9 * losses[0]


def test_in_half_precision_magnitudes_are_norms_in_float32():
    _, model = adapted(dtype=torch.bfloat16)
    for _, weight, _, magnitude in layers(model):
        assert magnitude.dtype == torch.float32
        assert_close(magnitude, weight.double().norm(dim=1).float(), rtol=1e-6, atol=0)  # PEFT's own are rounded to bfloat16
    assert_close(small_models.logits(model, "llama"), small_models.logits(small_models.model("llama", torch.bfloat16), "llama"), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_rows_of_the_merged_weight_have_the_magnitudes_as_norms_and_unmerging_restores_every_bit(family):
    _, model = adapted(family, steps=6)
    expected = {name: magnitude[:, None] * (w + d) / (w + d).double().norm(dim=1, keepdim=True).float() for name, w, d, magnitude in layers(model)}
    base = {name: w.clone() for name, w, _, _ in layers(model)}
    moved = [float((magnitude - w.norm(dim=1)).abs().max()) for _, w, _, magnitude in layers(model)]
    assert min(moved) > 1e-3
    out = small_models.logits(model, family)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        for name, merged, _, magnitude in layers(model):
            assert_close(merged, expected[name], rtol=1e-4, atol=1e-5)
            assert_close(merged.norm(dim=1), magnitude.abs(), rtol=1e-5, atol=1e-6)
        assert_close(small_models.logits(model, family), out, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert all(torch.equal(w, base[name]) for name, w, _, _ in layers(model))
        assert torch.equal(small_models.logits(model, family), out)
    merged = model.merge_and_unload()
    assert type(merged) is type(small_models.model(family)) and not any("lora" in name for name, _ in merged.named_modules())
    assert_close(small_models.logits(merged, family), out, rtol=1e-4, atol=1e-4)


def test_unmerging_restores_every_bit_under_a_second_adapter():
    _, model = adapted(steps=4)
    base = {name: w.clone() for name, w, _, _ in layers(model)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        names = sorted({name.rpartition(".")[2] for name in base})
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=True))
    model = GradNormLoRP().adapt(model)
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    assert not any(torch.equal(w, base[name]) for name, w, _, _ in layers(model))
    model.unmerge_adapter()
    assert all(torch.equal(w, base[name]) for name, w, _, _ in layers(model))


@pytest.mark.parametrize("detach_norm", [True, False])
def test_what_it_saves_is_a_dora_adapter_of_plain_peft(tmp_path, detach_norm):
    _, model = adapted(steps=4, detach_norm=detach_norm)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_models.model("llama"), tmp_path)
    assert loaded.peft_config["default"].use_dora and all(type(m) is DoraLinearLayer for m in loaded.modules() if isinstance(m, DoraLinearLayer))
    assert_close(small_models.logits(loaded, "llama"), small_models.logits(model, "llama"), rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_trains_on_with_its_values(tmp_path):
    method, model = adapted(steps=4, detach_norm=False)
    model.save_pretrained(tmp_path)
    again = method.adapt(peft.PeftModel.from_pretrained(small_models.model("llama"), tmp_path, is_trainable=True))
    assert torch.equal(small_models.logits(again, "llama"), small_models.logits(model, "llama"))
    losses = train(again, method.optimizer(again), 4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_the_formula(detach_norm, dropout):
    weight, x, slope = random(5, 7), random(4, 7, seed=1), random(4, 5, seed=2)
    model, layer = part(0, weight, dropout=dropout, detach_norm=detach_norm)
    a, b, magnitude = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        out = model(x)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        dropped = nn.functional.dropout(x, dropout)  # what the adapter sees; the norm and the frozen part do not
    out.backward(slope)
    a2, b2, m2 = (p.detach().clone().requires_grad_() for p in (a, b, magnitude))
    whole = weight + 2.0 * b2 @ a2
    norm = whole.pow(2).sum(1).sqrt()
    made = m2[:, None] * whole / (norm.detach() if detach_norm else norm)[:, None]
    expected = x @ weight.T + dropped @ (made - weight).T + layer.get_base_layer().bias
    assert_close(out, expected)
    expected.backward(slope)
    for ours, theirs in ((a, a2), (b, b2), (magnitude, m2)):
        assert_close(ours.grad, theirs.grad)


def test_the_exact_gradient_of_a_row_is_at_right_angles_to_it():
    for detach_norm in (False, True):
        model, layer = part(0, random(5, 7), detach_norm=detach_norm)
        base = layer.get_base_layer().weight.requires_grad_()
        model(random(4, 7, seed=1)).square().sum().backward()
        whole = (base + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        cosine = torch.cosine_similarity(base.grad, whole, dim=1).abs()
        assert float(cosine.max()) < 1e-5 if not detach_norm else float(cosine.max()) > 0.1


def test_a_row_that_is_scaled_gives_the_same_weight():
    model, layer = part(0, random(5, 7))
    x = random(4, 7, seed=1)
    before = model(x)
    share = torch.tensor([3.0, 0.1, 1.0, 20.0, 0.5], dtype=torch.float64)[:, None]
    layer.get_base_layer().weight.data.mul_(share)
    layer.lora_B["default"].weight.data.mul_(share)
    assert_close(model(x), before)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_rows_of_zeros_give_zeros_and_finite_gradients(detach_norm):
    base = small_models.model("llama")
    pruned = base.model.layers[0].mlp.up_proj.weight
    pruned.data[3] = 0
    before = small_models.logits(base, "llama")
    method, model = adapted(base=base, detach_norm=detach_norm)
    assert_close(small_models.logits(model, "llama"), before, rtol=0, atol=1e-5)
    model(**batch()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    losses = train(model, method.optimizer(model), 6)
    assert losses[-1] < losses[0]
    model.merge_adapter(safe_merge=True)  # looks for NaN
    model.unmerge_adapter()


def test_factors_are_projected_and_magnitudes_are_not_decayed():
    method, model = adapted(weight_decay=0.1, bias="all", family="gpt2", base=small_models.model("gpt2"), r=6)
    named = dict(model.named_parameters())
    factors, magnitudes, rest = method.optimizer(model).param_groups
    assert {id(p) for p in factors["params"]} == {id(p) for n, p in named.items() if "lora_A" in n or "lora_B" in n}
    assert {id(p) for p in magnitudes["params"]} == {id(p) for n, p in named.items() if "lora_magnitude_vector" in n}
    assert {id(p) for p in rest["params"]} == {id(p) for n, p in named.items() if p.requires_grad and "bias" in n}
    assert (factors["rank"], factors["weight_decay"], magnitudes["weight_decay"], rest["weight_decay"]) == (3, 0.1, 0.0, 0.1)
    assert "rank" not in magnitudes and "rank" not in rest
    factors = GradNormLoRP(r=6, proj_rank=5).optimizer(model).param_groups[0]
    assert factors["rank"] == 5


def test_moments_have_the_width_of_the_projection_and_the_side_of_the_adapter_is_the_one_that_shrinks():
    method, model = adapted(steps=2, r=4, proj_rank=2)
    optimizer = method.optimizer(model)
    train(model, optimizer, 2)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert optimizer.state[p]["left"].shape == (4, 2) and optimizer.state[p]["exp_avg"].shape == (2, p.shape[1])
        if "lora_B" in name:
            assert optimizer.state[p]["right"].shape == (4, 2) and optimizer.state[p]["exp_avg"].shape == (p.shape[0], 2)


def test_lora_a_gets_its_directions_when_its_gradient_is_no_longer_zero():
    method = GradNormLoRP(**NO_DROPOUT, lr=0.02, proj_rank=2)
    model = method.adapt(small_models.model("llama"))
    optimizer = method.optimizer(model)
    train(model, optimizer, 1)
    model(**batch()).loss.backward()
    slopes = {p: p.grad.clone() for name, p in model.named_parameters() if "lora_A" in name}
    optimizer.step()
    for p, gradient in slopes.items():
        known = torch.linalg.svd(gradient, full_matrices=False)[0][:, :2]
        basis = optimizer.state[p]["left"]
        assert_close(basis @ basis.T, known @ known.T, rtol=1e-3, atol=1e-4)


def one_step(gradient, knobs, rank):
    weight = nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    Stepper(GradNormLoRP(**knobs), [{"params": [("lora_A", weight)], "rank": rank}]).step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_with_all_directions_a_step_of_sgd_is_the_same(shape):
    gradient = random(*shape)
    knobs = {"betas": (0.0, 0.0), "eps": 1e8, "lr": 0.1 * 1e8, "scale": 1.0}  # an eps so large leaves Adam no say
    assert_close(one_step(gradient, knobs, 4), -0.1 * gradient, rtol=1e-5, atol=1e-7)


def test_with_all_directions_a_step_is_adam_in_turned_coordinates():
    gradient = random(4, 9)
    left, _, _ = torch.linalg.svd(gradient, full_matrices=False)
    turned = nn.Parameter(torch.zeros(4, 9, dtype=torch.float64))
    turned.grad = left.T @ gradient
    torch.optim.AdamW([turned], lr=0.1, eps=1e-12, weight_decay=0).step()
    ours = one_step(gradient, {"lr": 0.1, "eps": 1e-12, "scale": 1.0}, 4)
    assert_close(ours, left @ turned.detach(), rtol=1e-7, atol=1e-9)
    assert float((ours + 0.1 * gradient.sign()).abs().max()) > 0.01  # which is not Adam's own


def test_projected_on_both_sides_it_is_the_form_that_the_paper_prints():
    gradient = random(4, 9)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    left, right = left[:, :2], right[:2]
    inner = left.T @ gradient @ right.T
    answer = 0.1 * inner / ((0.001 * inner**2).sqrt() + 1e-6) * math.sqrt(0.001) / 0.1
    ours = one_step(gradient, {"lr": 0.1, "scale": 0.5, "proj_type": "full"}, 2)
    assert_close(ours, -0.1 * 0.5 * left @ answer @ right, rtol=1e-6, atol=1e-9)


# --- without adapter -------------------------------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """``torch``'s own weight normalisation, with a loss on top."""

    def __init__(self, weight, normed):
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.float64)
        self.layer.weight.data.copy_(weight)
        if normed:
            nn.utils.parametrizations.weight_norm(self.layer, dim=0)

    def forward(self, step):
        return torch.tanh(self.layer(random(6, 7, seed=step))).sub(random(6, 5, seed=100 + step)).square().sum()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_projection_it_is_weight_norm_of_torch_under_adamw(weight_decay):
    theirs, ours = (Normed(random(5, 7), normed) for normed in (True, False))
    known = torch.optim.AdamW(theirs.parameters(), lr=0.02, eps=1e-6, weight_decay=weight_decay)
    method = GradNormLoRP(mode="reparam_optim", rank=None, lr=0.02, weight_decay=weight_decay)
    made = Stepper(method, [{"params": [("weight", ours.layer.weight)], "rank": None}])
    start = ours.layer.weight.detach().clone()
    for step in range(10):
        for net, optimizer in ((theirs, known), (ours, made)):
            optimizer.zero_grad()
            net(step).backward()
            optimizer.step()
        assert_close(ours.layer.weight, theirs.layer.weight, rtol=0, atol=1e-6)
    assert float((ours.layer.weight.detach() - start).norm()) > 0.3


def reference_by_hand(weight, gradients, lr, rank, scale, gap, decay=0.0, eps=1e-6):
    """The authors' optimizer from its description: magnitudes derived anew at every step, and the bare gradient for the direction."""
    v, m, s, seen = weight.clone(), None, None, []
    for t, gradient in enumerate(gradients):
        norm = v.norm(dim=-1, keepdim=True)
        slope_g = (gradient * v / norm).sum(-1, keepdim=True)
        low = gradient
        if rank:
            if t % gap == 0:
                tall = weight.shape[0] >= weight.shape[1]
                left, _, right = torch.linalg.svd(gradient, full_matrices=False)
                basis = right[:rank].T if tall else left[:, :rank]
            low = gradient @ basis if tall else basis.T @ gradient
        if m is None:
            m, s = [torch.zeros_like(low), torch.zeros_like(norm)], [torch.zeros_like(low), torch.zeros_like(norm)]
        answers = []
        for i, slope in enumerate((low, slope_g)):
            m[i], s[i] = 0.9 * m[i] + 0.1 * slope, 0.999 * s[i] + 0.001 * slope**2
            answers.append(m[i] / (s[i].sqrt() + eps))
        back = answers[0] if not rank else scale * (answers[0] @ basis.T if tall else basis @ answers[0])
        rate = lr * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        v = (v - rate * back) * (1 - lr * decay)
        g = (norm - rate * answers[1]) * (1 - lr * decay)
        seen.append(g * v / v.norm(dim=-1, keepdim=True))
    return seen


@pytest.mark.parametrize(("shape", "rank", "knobs"), [
    ((5, 8), 2, {}), ((8, 5), 2, {}), ((5, 8), None, {}), ((6,), None, {}), ((5, 8), 2, {"decay": 0.1}), ((8, 5), 3, {"scale": 1.0}),
])  # fmt: skip
def test_the_reference_derives_magnitudes_anew_at_every_step(shape, rank, knobs):
    start, given = random(*shape), [random(*shape, seed=1 + i) for i in range(6)]
    knobs = {"lr": 0.05, "scale": 0.25, "gap": 10, "decay": 0.0} | knobs
    method = GradNormLoRP(mode="reference", rank=rank, lr=knobs["lr"], scale=knobs["scale"], update_proj_gap=knobs["gap"], weight_decay=knobs["decay"])
    weight = nn.Parameter(start.clone())
    other = nn.Parameter(torch.zeros(2, 2))  # a method that projects wants a group of targets, and a vector is none
    ours = {"params": [("weight", weight)]} | ({"rank": rank} if len(shape) == 2 else {})
    optimizer = Stepper(method, [ours, {"params": [("other", other)], "rank": 1}])
    for gradient, expected in zip(given, reference_by_hand(start, given, rank=rank, **knobs), strict=True):
        weight.grad = gradient.clone()
        optimizer.step()
        assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_magnitudes_persist_in_ours_and_not_in_the_reference():
    """A gradient along the rows moves magnitudes alone; taken away, ours keeps what it has learnt."""
    ends = {}
    for mode in ("reparam_optim", "reference"):
        weight = nn.Parameter(random(3, 4))
        before = weight.detach().norm(dim=1)
        optimizer = Stepper(GradNormLoRP(mode=mode, rank=None, lr=0.1, betas=(0.0, 0.999)), [{"params": [("weight", weight)], "rank": None}])
        for gradient in (weight.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)):
            weight.grad = gradient
            optimizer.step()
        ends[mode] = weight.detach().norm(dim=1) - before
    assert_close(ends["reparam_optim"], torch.full((3,), -0.1, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert float((ends["reference"] - ends["reparam_optim"]).abs().max()) > 1e-3


@pytest.mark.parametrize("mode", ["reparam_optim", "reference"])
def test_rows_and_vectors_of_zeros_stay_finite(mode):
    matrix, vector = nn.Parameter(random(4, 6)), nn.Parameter(torch.zeros(4, dtype=torch.float64))
    matrix.data[2] = 0
    optimizer = Stepper(GradNormLoRP(mode=mode, lr=0.05), [{"params": [("matrix", matrix)], "rank": 2}, {"params": [("vector", vector)]}])
    for step in range(4):
        matrix.grad, vector.grad = random(4, 6, seed=step), random(4, seed=step)
        optimizer.step()
    assert matrix.isfinite().all() and vector.isfinite().all()
    if mode == "reparam_optim":
        assert not matrix[2].any() and vector.all()  # a direction that is zero has none; what is no target follows AdamW


def test_the_reference_refuses_cubes():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    with pytest.raises(ValueError, match=r"1\.weight has shape \(4, 4, 3\)"):
        GradNormLoRP(mode="reference", rank=2, optim_target_modules=["0"]).optimizer(net)


@pytest.mark.parametrize("mode", ["reparam_optim", "reference"])
def test_it_trains_a_model_as_it_is(mode):
    model = small_models.model("llama")
    losses = train(model, GradNormLoRP(mode=mode, rank=4, lr=0.01, scale=1.0, update_proj_gap=5).optimizer(model), 10)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("mode", ["reparam_optim", "reference", "adapter"])
def test_it_counts_the_numbers_that_it_keeps(mode):
    method = GradNormLoRP(mode=mode, rank=2)
    matrix, vector = nn.Parameter(random(4, 6)), nn.Parameter(random(5))
    optimizer = Stepper(method, [{"params": [("matrix", matrix)], "rank": 2}, {"params": [("vector", vector)]}])
    matrix.grad, vector.grad = random(4, 6), random(5)
    optimizer.step()
    for p, rank in ((matrix, 2), (vector, None)):
        kept = sum(t.numel() for key, t in optimizer.state[p].items() if key not in ("step", "index", "offset"))
        assert kept == method.state_numbers(tuple(p.shape), rank), key_shapes(optimizer.state[p])


def key_shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("knobs", "named"), [
    ({"mode": "dense"}, "mode is 'dense'"), ({"r": 0}, "r is 0"), ({"lora_alpha": 0.0}, "lora_alpha is 0"), ({"lora_dropout": 1.0}, "lora_dropout is 1"),
    ({"rank": 0}, "rank is 0"), ({"proj_rank": 9}, r"proj_rank is 9.*in 1\.\.8"), ({"proj_rank": 0}, "proj_rank is 0"), ({"scale": 0.0}, "scale is 0"),
    ({"bias": "some"}, "bias is 'some'"),
    ({"rank": None, "lr": -1.0}, "lr is -1"), ({"rank": None, "proj_rank": 9}, "proj_rank is 9"),
])  # fmt: skip
def test_knobs_out_of_range_are_named(knobs, named):
    with pytest.raises(ValueError, match=named):
        GradNormLoRP(**knobs)


def test_without_an_adapter_it_says_what_to_do():
    with pytest.raises(ValueError, match=r"call adapt\(model\) first"):
        GradNormLoRP().optimizer(small_models.model("llama"))
    with pytest.raises(ValueError, match="mode is 'reference'"):
        GradNormLoRP(mode="reference").adapt(small_models.model("llama"))
    with pytest.raises(ValueError, match="use_dora=True"):
        GradNormLoRP().adapt(peft.get_peft_model(small_models.model("llama"), peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="nothing_like_it"):
        GradNormLoRP(target_modules=["nothing_like_it"]).adapt(small_models.model("llama"))


def test_only_the_layers_that_are_meant_are_adapted():
    model = GradNormLoRP(target_modules="mlp").adapt(small_models.model("llama"))
    names = {name.removeprefix("base_model.model.") for name, *_ in layers(model)}
    assert names == set(linear_targets(small_models.model("llama"), "mlp")[0]) and len(names) == 6

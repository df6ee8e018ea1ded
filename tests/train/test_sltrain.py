"""What SLTrain promises beyond the layer contract."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import echelon  # noqa: F401 (lets from_pretrained know our layers)
import small_models
from echelon.models.modules import build
from echelon.train.layers import SLTrain, SparseLowRankLinear, merge, sltrain
from echelon.train.optimizers import AdamW


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inner, outer, bias=True, dtype=torch.float32, seed=0):
    made = nn.utils.skip_init(nn.Linear, inner, outer, bias=bias, dtype=dtype)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=seeded(seed)) * inner**-0.5)
    return made


def layer(old, seed=1, random=True, **knobs):
    """One converted layer; with random factors, since B starts at zero."""
    method = SLTrain(**knobs)
    new = build(method.spec("layer", old), old)
    with torch.no_grad():
        method.fill(new, old, seeded(seed))
        if random:
            for p in new.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=seeded(seed + 1), dtype=torch.float64).to(p.dtype))
    return new


def written_out(made, scale):
    """The dense matrix, entry by entry."""
    rows, columns = made.out_features, made.in_features
    up, down = made.up.tolist(), made.down.tolist()
    weight = [[scale * sum(up[i][k] * down[k][j] for k in range(made.rank)) for j in range(columns)] for i in range(rows)]
    for place, value in zip(made.index.tolist(), made.value.tolist(), strict=True):
        weight[place // columns][place % columns] += value
    return torch.tensor(weight, dtype=torch.float64)


def train(method, model, family, steps=6):
    optimizer = method.optimizer(model)
    losses = []
    batch = small_models.batch(family, model.dtype) if family == "vit" else {"input_ids": torch.tensor(small_models.data(family, 2, 12))}
    labels = {"labels": torch.tensor([1, 2]) if family == "vit" else batch["input_ids"]}
    for step in range(steps):
        method.begin_step(model, optimizer, step)
        loss = method.loss(model, batch | labels)
        loss.backward()
        method.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
        losses.append(float(loss))
    return losses


def test_the_matrix_is_the_scaled_product_plus_the_values_on_the_support():
    made = layer(linear(11, 7), r=3, sp_ratio=0.2, lora_alpha=6)
    merged = made.merge()
    assert_close(merged.weight.double(), written_out(made, 2.0), rtol=1e-5, atol=1e-6)
    sparse = merged.weight.double() - 2.0 * made.up.double() @ made.down.double()
    on = torch.zeros(77, dtype=torch.bool)
    on[made.index.long()] = True
    assert float(sparse.detach().view(-1)[~on].abs().max()) < 1e-6
    assert_close(sparse.view(-1)[on].float(), made.value.detach(), rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 5, 11, generator=seeded())
    assert_close(made(x), nn.functional.linear(x, merged.weight, made.bias), rtol=1e-5, atol=1e-5)


CASES = {
    "few tokens": dict(tokens=3), "many tokens": dict(tokens=40), "no bias": dict(tokens=40, bias=False), "in row blocks": dict(tokens=40, block=25),
    "few in row blocks": dict(tokens=2, block=25), "no product": dict(tokens=40, r=0), "no values": dict(tokens=40, sp_ratio=0.0),
    "learnt scale": dict(tokens=40, trainable_scaling=True), "wide": dict(tokens=40, shape=(9, 12)), "above the full rank": dict(tokens=40, r=20),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_dense_construction(case, monkeypatch):
    given = {"tokens": 40, "bias": True, "r": 3, "sp_ratio": 0.15, "shape": (12, 9), "trainable_scaling": False, "block": 1 << 24} | CASES[case]
    monkeypatch.setattr(sltrain, "BLOCK", given["block"])
    made = layer(
        linear(*given["shape"], bias=given["bias"]), r=given["r"], sp_ratio=given["sp_ratio"], lora_alpha=5, trainable_scaling=given["trainable_scaling"]
    )
    x = torch.randn(given["tokens"], made.in_features, generator=seeded(), requires_grad=True)
    target = torch.randn(given["tokens"], made.out_features, generator=seeded(1))
    wanted = {name: p.detach().double().requires_grad_() for name, p in made.named_parameters()}
    scale = wanted["scaling"].tanh() if given["trainable_scaling"] else 5 / given["r"] if given["r"] else 1.0
    flat = (scale * wanted["up"] @ wanted["down"]).view(-1)
    dense = flat.scatter_add(0, made.index.long(), wanted["value"]).view(made.out_features, made.in_features)
    wide = x.detach().double().requires_grad_()
    out = wide @ dense.T + wanted.get("bias", 0)
    (out.tanh() * target).sum().backward()
    (made(x).tanh() * target).sum().backward()
    assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    for name, p in made.named_parameters():
        assert p.grad.shape == p.shape
        assert_close(p.grad.double(), wanted[name].grad, rtol=1e-5, atol=2e-5, msg=name)


def test_only_what_requires_a_gradient_gets_one():
    x = torch.randn(40, 9, generator=seeded())
    whole = layer(linear(9, 12), r=3, sp_ratio=0.15)
    whole(x).square().sum().backward()
    for frozen in ("value", "up", "down"):
        made = layer(linear(9, 12), r=3, sp_ratio=0.15)
        getattr(made, frozen).requires_grad_(False)
        made(x).square().sum().backward()
        for name, p in made.named_parameters():
            assert p.grad is None if name == frozen else torch.allclose(p.grad, dict(whole.named_parameters())[name].grad, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_matrix_size_is_kept_for_the_backward_pass():
    made = layer(linear(40, 30), r=2, sp_ratio=0.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        made(torch.randn(7, 40, generator=seeded(), requires_grad=True)).sum().backward()
    assert kept and max(kept) < 30 * 40
    assert made.value.grad.shape == (120,)


def test_a_new_layer_is_sparse_with_values_and_a_uniform_within_one_over_the_root_of_the_inputs():
    made = layer(linear(400, 100), random=False, r=8, sp_ratio=0.1)
    weight = made.merge().weight
    assert int((weight != 0).sum()) == 4000
    assert not made.up.any()
    for part in (made.down, made.value):
        assert float(part.detach().abs().max()) <= 0.05
        assert_close(float(part.detach().std()), 0.05 / 3**0.5, rtol=0.05, atol=0)
    assert float(made.bias.detach().abs().max()) <= 0.1 and float(made.bias.detach().std()) > 0.04
    assert_close(float(weight.square().mean().sqrt()), (0.1 / 3 / 400) ** 0.5, rtol=0.05, atol=0)
    product = layer(linear(8, 6), random=False, r=2, sp_ratio=0.0)
    assert torch.equal(product(torch.ones(3, 8)), product.bias.expand(3, 6))


def test_the_support_is_uniform_sorted_unique_and_follows_from_the_seed_alone():
    counts = torch.zeros(30)
    for seed in range(600):
        index = layer(linear(6, 5), seed=seed, random=False, r=1, sp_ratio=0.21).index
        assert index.dtype == torch.int32 and index.tolist() == sorted(set(index.tolist())) and len(index) == int(0.21 * 30)
        counts[index.long()] += 1
    # each position holds a value with probability 6 / 30: 120 of 600, standard deviation 9.8
    assert float((counts - 120).abs().max()) < 5 * 9.8
    models = []
    for noise in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(noise)  # as processes with other global states would have
            models.append(small_models.model("llama"))
            before = torch.get_rng_state()
            names = SLTrain(r=4, sp_ratio=0.1, seed=3).convert(models[-1])
            assert torch.equal(before, torch.get_rng_state())
    indices = [[model.get_submodule(name).index for name in names] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*indices, strict=True))
    assert not torch.equal(models[0].model.layers[0].self_attn.q_proj.index, models[0].model.layers[1].self_attn.q_proj.index)
    other = small_models.model("llama")
    SLTrain(r=4, sp_ratio=0.1, seed=4).convert(other)
    assert not torch.equal(other.model.layers[0].self_attn.q_proj.index, models[0].model.layers[0].self_attn.q_proj.index)


def test_positions_take_64_bits_only_where_32_are_too_few():
    assert SparseLowRankLinear(1 << 16, (1 << 15) - 1, 1, 4, False, 1.0, device="meta").index.dtype == torch.int32
    assert SparseLowRankLinear(1 << 16, 1 << 15, 1, 4, False, 1.0, device="meta").index.dtype == torch.int64


@pytest.mark.parametrize(("knobs", "message"), [
    ({"sp_ratio": 1.0}, r"sp_ratio is 1.0; it must be a number in \[0, 1\)"), ({"sp_ratio": -0.1}, "sp_ratio is -0.1"), ({"r": -1}, "r is -1"),
    ({"r": 0, "sp_ratio": 0.0}, "one of them must be above 0"), ({"lora_alpha": 0.0}, "lora_alpha is 0.0"), ({"init": "zero"}, "init is 'zero'"),
    ({"support": "first"}, "support is 'first'"), ({"lr": -1.0}, "lr is -1.0"),
])  # fmt: skip
def test_bad_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        SLTrain(**knobs)


def test_a_checkpoint_with_another_number_of_values_is_an_error(tmp_path):
    few, many = layer(linear(9, 12), r=2, sp_ratio=0.1), layer(linear(9, 12), r=2, sp_ratio=0.2)
    with pytest.raises(RuntimeError, match="size mismatch for value"):
        few.load_state_dict(many.state_dict())
    model = small_models.model("llama")
    SLTrain(r=4, sp_ratio=0.1).convert(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for spec in config["quantization_config"]["modules"].values():
        spec["nnz"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("rank", [7, 10])
def test_with_full_rank_it_holds_any_matrix(rank):
    old = linear(11, 7)
    made = layer(old, random=False, r=rank, sp_ratio=0.1, init="svd")
    assert_close(made.merge().weight, old.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.bias, old.bias)


@pytest.mark.parametrize("support", ["random", "topk", "channel"])
def test_started_from_a_weight_it_is_its_best_factors_and_what_they_miss_on_the_support(support):
    old = linear(20, 16)
    made = layer(old, random=False, r=3, sp_ratio=0.13, lora_alpha=12, init="svd", support=support)
    left, values, right = torch.linalg.svd(old.weight.detach().double())
    rest = old.weight.detach().double() - (left[:, :3] * values[:3]) @ right[:3]
    chosen = made.index.long()
    assert len(chosen) == int(0.13 * 320) == 41
    expected = rest.clone()
    expected.view(-1)[chosen] = 0
    assert_close(old.weight.double() - made.merge().weight.double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(4 * made.up.double() @ made.down.double(), old.weight.double() - rest, rtol=1e-4, atol=1e-6)
    if support == "topk":
        threshold = rest.abs().view(-1).sort(descending=True).values[40]
        assert set(chosen.tolist()) == set((rest.abs().view(-1) >= threshold).nonzero()[:, 0].tolist())
    if support == "channel":  # two whole columns of sixteen, and nine rows of the third
        order = sorted(range(20), key=lambda column: -float(rest[:, column].norm()))
        assert set(chosen.tolist()) == {row * 20 + column for column in order[:2] for row in range(16)} | {row * 20 + order[2] for row in range(9)}


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_every_family_trains_saves_and_becomes_dense(family, tmp_path):
    model = small_models.model(family)
    plain = {name: type(module) for name, module in model.named_modules()}
    method = SLTrain(r=4, sp_ratio=0.1, lr=0.01, refactor_every=4, reset_every=4)
    names = method.convert(model)
    losses = train(method, model, family, 8)
    assert losses[-1] < losses[0]
    model.eval()
    before = small_models.logits(model, family)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(small_models.logits(again, family), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype
    assert merge(again) == names
    assert {name: type(module) for name, module in again.named_modules()} == plain
    assert_close(small_models.logits(again, family), before, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_it_holds_as_many_parameters_as_stated():
    model = small_models.model("llama")
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    dense = sum(p.numel() for p in model.parameters())
    names = SLTrain(r=4, sp_ratio=0.1).convert(model)
    expected = sum(4 * (m + n) + int(0.1 * m * n) - m * n for m, n in (shapes[name] for name in names))
    assert len(names) == 14 and sum(p.numel() for p in model.parameters()) == dense + expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_gradients_are_right_to_its_precision(family, tmp_path):
    model = small_models.model(family, torch.bfloat16)
    method = SLTrain(r=4, sp_ratio=0.1, init="svd", lr=0.01)
    names = method.convert(model)
    made = model.get_submodule(names[0])
    assert made.value.dtype == torch.bfloat16
    exact = copy.deepcopy(made).double()
    x = torch.randn(100, made.in_features, generator=seeded()).bfloat16()
    weight = torch.randn(100, made.out_features, generator=seeded(1)).bfloat16()
    (made(x) * weight).sum().backward()
    (exact(x.double()) * weight.double()).sum().backward()
    for name, p in made.named_parameters():
        wanted = dict(exact.named_parameters())[name].grad
        assert float((p.grad.double() - wanted).norm() / wanted.norm()) < 0.02, name
        assert p.grad.dtype == torch.bfloat16
    made.zero_grad()
    losses = train(method, model, family)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto").to(torch.bfloat16).eval()  # the cast is for the rotary frequencies, which are not stored
    assert torch.equal(small_models.logits(again, family), small_models.logits(model.eval(), family))


def test_autocast_multiplies_in_bfloat16_and_gives_float32_gradients():
    made = layer(linear(16, 12), r=4, sp_ratio=0.1)
    x = torch.randn(9, 16, generator=seeded(), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
        dense = nn.functional.linear(x, made.product(), made.bias)
    assert out.dtype == dense.dtype == torch.bfloat16
    assert_close(out, dense, rtol=0.02, atol=0.02)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in (*made.parameters(), x))


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = small_models.model("llama").train()
        SLTrain(r=4, sp_ratio=0.1, init="svd").convert(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = torch.tensor(small_models.data("llama", 2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_split_gives_the_product_and_the_sparse_part_in_csr():
    made = layer(linear(11, 7), r=3, sp_ratio=0.2, lora_alpha=6)
    factors, csr = made.split()
    assert csr.layout == torch.sparse_csr and factors.rank == 3
    assert_close(factors.dense().double() + csr.to_dense().double(), written_out(made, 2.0), rtol=1e-5, atol=1e-6)


def test_a_learnt_scale_starts_at_tanh_of_one():
    made = layer(linear(11, 7), random=False, r=3, sp_ratio=0.2, trainable_scaling=True, init="svd")
    assert_close(float(made.scale), 0.7615942, rtol=1e-6, atol=0)
    left, values, right = torch.linalg.svd(linear(11, 7).weight.double())
    assert_close(0.76159416 * made.up.double() @ made.down.double(), (left[:, :3] * values[:3]) @ right[:3], rtol=1e-4, atol=1e-5)


def test_a_restart_keeps_the_function_balances_the_factors_and_forgets_the_moments():
    model = small_models.model("llama")
    method = SLTrain(r=4, sp_ratio=0.1, lr=0.01, refactor_every=3, reset_every=3)
    names = method.convert(model)
    train(method, model, "llama", 2)
    optimizer = AdamW(lr=0.01).optimizer(model)
    ids = torch.tensor(small_models.data("llama", 2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    layers = [model.get_submodule(name) for name in names]
    products, values = [made.product() for made in layers], [made.value.clone() for made in layers]
    assert len(optimizer.state) == len(list(model.parameters()))
    method.end_step(model, optimizer, 3)
    assert len(optimizer.state) == 0
    for made, product, value in zip(layers, products, values, strict=True):
        assert_close(made.product(), product, rtol=1e-4, atol=1e-6)
        assert torch.equal(made.value, value)
        gram = made.up.T @ made.up
        assert_close(gram, made.down @ made.down.T, rtol=1e-4, atol=1e-5)
        assert_close(gram, gram.diagonal().sort(descending=True).values.diag(), rtol=1e-4, atol=1e-5)


def test_a_refactorisation_reaches_the_float32_copies_that_an_optimizer_keeps():
    model = small_models.model("llama", torch.bfloat16)
    method = SLTrain(r=4, sp_ratio=0.1, lr=0.01, refactor_every=3)
    names = method.convert(model)
    optimizer = AdamW(lr=0.01, rounding="master").optimizer(model)
    ids = torch.tensor(small_models.data("llama", 2, 8))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    method.end_step(model, optimizer, 3)
    for made in (model.get_submodule(name) for name in names):
        up, down = (optimizer.state[p]["master"] for p in (made.up, made.down))
        assert_close(up.T @ up, down @ down.T, rtol=1e-4, atol=1e-5)
        assert torch.equal(made.up, up.bfloat16()) and torch.equal(made.down, down.bfloat16())

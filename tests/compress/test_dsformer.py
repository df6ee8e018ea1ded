"""What DSFormer promises beyond the contract; the factorizer itself is tested with the rest of linalg."""

import copy
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import linear

import small_models
from echelon.compress import SVD, DSFormer, LowRankLinear, STFCallback, linear_targets, lora_config, merge_to_dense
from echelon.compress.dense_sparse import DenseSparseLinear, StraightThroughLinear, learning
from echelon.linalg import sparse_code

KNOBS = {"block_size": 16, "nnz": 2, "compression": 1.6, "init_iters": 3}
SPEC = {"in": 20, "out": 24, "bias": True, "basis": 6, "nnz": 2, "block": 8, "index_bits": 8}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(spec=SPEC, cls=DenseSparseLinear, **factory):
    made = cls(spec, **factory)
    weight = drawn(spec["out"], spec["in"])
    made.fill(sparse_code(weight, spec["basis"], spec["nnz"], spec["block"], iterations=3), drawn(spec["out"], seed=2))
    return made, weight


def by_hand(module):
    """The matrix, coefficient by coefficient."""
    made = torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    values, indices = (t.detach().view(module.out_features, -1, module.nnz) for t in (module.values, module.indices))
    for i in range(module.out_features):
        for b in range(values.shape[1]):
            columns = slice(b * module.block, min((b + 1) * module.block, module.in_features))
            for j in range(module.nnz):
                made[i, columns] += values[i, b, j].double() * module.basis[int(indices[i, b, j]), columns].detach().double()
    return made


def latent(**knobs):
    spec = SPEC | {"solver": "omp", "iterations": 1, "hysteresis": 0.0} | knobs
    made, weight = layer(spec, StraightThroughLinear)
    with torch.no_grad():
        made.latent.copy_(weight)
    return made


@pytest.mark.parametrize("tokens", [1, 200])  # one path each
def test_the_layer_multiplies_by_its_code_and_so_do_its_gradients(tokens):
    module, _ = layer(dtype=torch.float64)
    x = drawn(2, tokens, 20, seed=3).double().requires_grad_()
    expected = linear(x, by_hand(module), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.dense().double(), by_hand(module), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-10, atol=1e-10)
    parameters = (module.basis, module.values)
    small = x[:, :1].detach()
    assert torch.autograd.gradcheck(lambda *_: module(small), parameters)
    assert torch.autograd.gradcheck(lambda *_: module.dense(), parameters)


def test_few_and_many_tokens_take_two_ways_to_the_same_result(monkeypatch):
    module, _ = layer()
    seen, whole = [], DenseSparseLinear.dense
    monkeypatch.setattr(DenseSparseLinear, "dense", lambda self: seen.append(1) or whole(self))
    x = drawn(400, 20)
    few = torch.cat([module(row[None]) for row in x])
    assert not seen
    torch.testing.assert_close(module(x), few, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compression", [1.3, 2.0, 2.8])
def test_bytes_are_those_of_the_formula_and_of_the_file(dtype, compression, tmp_path):
    model = small_models.model("opt", dtype)
    dense = {name: model.get_submodule(name) for name in linear_targets(model)[0]}
    result = DSFormer(block_size=16, nnz=1, compression=compression, init_iters=1).compress(model)
    result.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(result.report.modules) == set(dense)
    for name, told in result.report.modules.items():
        m, p, size = dense[name].out_features, dense[name].in_features, dtype.itemsize
        blocks, r, s = math.ceil(p / 16), told["basis"], told["nnz"]
        formula = r * p * size + m * blocks * s * (size + 1)
        assert formula == sum(t.numel() * t.element_size() for key, t in stored.items() if key.startswith(name + ".") and not key.endswith("bias"))
        assert formula <= m * p * size / compression < formula + p * size  # one more atom would be too many
        indices = stored[f"{name}.indices"]
        assert indices.dtype == torch.uint8 and int(indices.max()) < r
        assert stored[f"{name}.values"].shape == indices.shape == (m, blocks * s)
        assert torch.equal(model.get_submodule(name).bias, dense[name].bias)


def test_more_than_256_atoms_take_two_bytes_an_index():
    with torch.random.fork_rng():
        config = transformers.OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=1200, word_embed_proj_dim=16)
        model = transformers.OPTForCausalLM(config)
    knobs = {"block_size": 16, "nnz": 1, "init_iters": 0, "target_modules": ["fc1"]}
    for compression, bits, basis in (
        (2.0, torch.int16, int((1200 * 16 / 2 - 1200 * 1.5) / 16)), (3.35, torch.uint8, 256), (6.0, torch.uint8, int((1200 * 16 / 6 - 1200 * 1.25) / 16)),
    ):  # fmt: skip
        made = DSFormer(compression=compression, **knobs).compress(copy.deepcopy(model)).model.model.decoder.layers[0].fc1
        assert made.indices.dtype == bits and len(made.basis) == basis
    wide = DSFormer(compression=6.0, index_bits=16, **knobs).compress(copy.deepcopy(model)).model.model.decoder.layers[0].fc1
    assert wide.indices.dtype == torch.int16 and len(wide.basis) == int((1200 * 16 / 6 - 1200 * 1.5) / 16)


def test_what_the_report_says_was_lost_was_and_conv1d_is_turned_round():
    for family, name in (("gpt2", "transformer.h.1.mlp.c_fc"), ("llama", "model.layers.1.mlp.up_proj")):
        before, model = small_models.model(family), small_models.model(family)
        report = DSFormer(**KNOBS).compress(model).report
        weight = before.get_submodule(name).weight.double()
        gap = (weight.T if family == "gpt2" else weight).detach() - by_hand(model.get_submodule(name))
        assert report.modules[name]["lost"] == pytest.approx(float(gap.square().sum()), rel=1e-4)
        assert report.modules[name]["rel_err"] == pytest.approx(float(gap.norm() / weight.detach().norm()), rel=1e-4)


def test_the_number_of_coefficients_is_that_which_loses_least():
    rng = torch.Generator().manual_seed(0)
    model = small_models.model("opt")
    fc1 = model.model.decoder.layers[0].fc1  # 48 x 32
    with torch.no_grad():
        atoms = torch.randn(12, 32, generator=rng)
        pairs = torch.stack([torch.randperm(12, generator=rng)[:2] for _ in range(48)])
        fc1.weight.copy_((torch.randn(48, 2, 1, generator=rng) * atoms[pairs]).sum(1))
    knobs = {"block_size": 32, "compression": 1.8, "target_modules": [r"layers.0.fc1"], "init_iters": 5}
    told = DSFormer(**knobs).compress(copy.deepcopy(model)).report.modules["model.decoder.layers.0.fc1"]
    errors = {s: DSFormer(nnz=s, **knobs).compress(copy.deepcopy(model)).report.modules["model.decoder.layers.0.fc1"]["lost"] for s in (2, 4, 8)}
    assert errors[told["nnz"]] == min(errors.values()) and told["lost"] == min(errors.values())


def test_at_equal_bytes_it_beats_the_svd_on_clusters_of_rows_and_loses_on_low_rank():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    clusters = torch.cat([draw(64, 2) @ draw(2, 32) for _ in range(8)])
    low = draw(512, 8) @ draw(8, 32)
    errors = []
    for weight in (clusters, low):
        with torch.random.fork_rng():
            config = transformers.OPTConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=512, word_embed_proj_dim=32)
            model = transformers.OPTForCausalLM(config)
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight.copy_(weight)
        other = copy.deepcopy(model)
        sparse = DSFormer(block_size=32, nnz=2, compression=4, target_modules=["fc1"]).compress(model).report
        lowrank = SVD(target_modules=["fc1"]).compress(other, bytes=sparse.bytes_after).report
        assert sparse.bytes_after <= 1.005 * lowrank.bytes_after
        errors.append([next(iter(report.modules.values()))["lost"] for report in (sparse, lowrank)])
    assert errors[0][0] < errors[0][1] and errors[1][1] < errors[1][0]


def test_the_gradient_passes_straight_through_the_factorizer():
    module = latent()
    x, target = drawn(7, 20, seed=4), drawn(7, 24, seed=5)
    seen = module.latent.detach() + (module.dense() - module.latent).detach()
    torch.testing.assert_close(seen, by_hand(module).float(), rtol=1e-5, atol=1e-5)
    dense = seen.clone().requires_grad_()
    expected = torch.autograd.grad((linear(x, dense, module.bias) - target).square().sum(), dense)[0]
    (module(x) - target).square().sum().backward()
    assert torch.equal(module.latent.grad, expected)
    assert not module.basis.requires_grad and not module.values.requires_grad


def test_refactoring_fits_the_latent_weight_as_it_is_now():
    module = latent(iterations=3)
    with torch.no_grad():
        module.latent.add_(0.5 * drawn(24, 20, seed=6))
    stale = float((module.latent - module.dense()).norm())
    module.refactor()
    assert float((module.latent - module.dense()).norm()) < stale
    old = latent(hysteresis=0.9999)
    supports = old.indices.clone()
    with torch.no_grad():
        old.latent.add_(0.05 * drawn(24, 20, seed=6))
    old.refactor()
    assert (old.indices == supports).float().mean() > 0.9
    small = module.settled()
    assert type(small) is DenseSparseLinear and torch.equal(small.dense(), module.dense()) and torch.equal(small.bias, module.bias)


def loss_of(model, data):
    ids = torch.tensor(data)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_through_the_factorizer_beats_none_and_is_reproducible(family):
    data, state, seen = small_models.data(family), torch.random.get_rng_state(), []
    knobs = KNOBS | {"steps": 15, "learning_rate": 5e-3, "batch_size": 12}
    made = {}
    for mode in ("stf", "direct", "none"):
        model = small_models.model(family)
        result = DSFormer(**knobs, train_mode=mode).compress(model, data, on_progress=lambda e: seen.append(e["step"]))
        made[mode] = loss_of(model, data)
        assert not list(learning(model)) and not model.training and all(p.requires_grad for p in model.parameters())
        assert result.report.parameters_after < result.report.parameters_before
    assert max(made["stf"], made["direct"]) < 0.9 * made["none"] and seen.count("training") == 30
    again = small_models.model(family)
    DSFormer(**knobs).compress(again, data)
    assert loss_of(again, data) == made["stf"] and torch.equal(state, torch.random.get_rng_state())
    later = small_models.model(family)
    DSFormer(**knobs, finetune_factors_steps=15).compress(later, data)
    assert loss_of(later, data) < made["stf"]


def test_factors_are_made_anew_every_so_many_steps(monkeypatch):
    import echelon.compress.dsformer as module

    calls = []
    monkeypatch.setattr(module, "refactor", lambda model, real=module.refactor: calls.append(1) or real(model))
    for every, expected in ((1, 6), (2, 3), (4, 2), (50, 1)):
        calls.clear()
        DSFormer(**KNOBS, steps=6, refactor_every=every).compress(small_models.model("opt"), small_models.data("opt"))
        assert len(calls) == expected  # once at the end in any case


def test_labels_train_an_encoder_and_their_lack_is_an_error():
    shown = [batch | {"labels": torch.arange(4)} for batch in small_models.data("vit")]
    DSFormer(**KNOBS, steps=2).compress(small_models.model("vit"), shown)
    with pytest.raises(ValueError, match="gives no loss; training it needs batches with labels"):
        DSFormer(**KNOBS, steps=2).compress(small_models.model("bert"), small_models.data("bert"))
    with pytest.raises(ValueError, match="needs calibration data"):
        DSFormer(**KNOBS, steps=2).compress(small_models.model("vit"))


def train(folder, model, data, **settings):
    rows = [{"input_ids": ids, "labels": ids} for ids in data]
    arguments = transformers.TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, learning_rate=3e-3, **{"save_strategy": "no"} | settings
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[STFCallback(2)])


def test_the_trainer_trains_it_a_checkpoint_holds_all_of_it_and_training_goes_on_from_there(tmp_path):
    data = small_models.data("opt")
    model = small_models.model("opt")
    method = DSFormer(**KNOBS)
    names = method.begin(model)
    assert names == linear_targets(small_models.model("opt"))[0] == [name for name, _ in learning(model)]
    started = copy.deepcopy(model)
    train(tmp_path / "run", model, data, max_steps=5, save_strategy="steps", save_steps=3).train()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert all(isinstance(again.get_submodule(name), StraightThroughLinear) for name in names)
    for name in names:
        assert [key for key, _ in again.get_submodule(name).named_parameters()] == ["bias", "latent"]
    resumed = train(tmp_path / "run", started, data, max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (key, a), b in zip(model.state_dict().items(), started.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=key)
    result = DSFormer.finish(model)
    assert result.report.parameters_after < result.report.parameters_before and set(result.report.modules) == set(names)
    expected = small_models.logits(model.eval(), "opt")
    result.save(tmp_path / "small")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert all(type(small.get_submodule(name)) is DenseSparseLinear for name in names)
    torch.testing.assert_close(small_models.logits(small, "opt"), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no layers that learn"):
        DSFormer.finish(small)


def test_accumulated_batches_refactor_once_a_step(monkeypatch, tmp_path):
    import echelon.compress.dsformer as module

    calls = []
    monkeypatch.setattr(module, "refactor", lambda model: calls.append(1))
    model = small_models.model("opt")
    DSFormer(**KNOBS, target_modules=["fc1"]).begin(model)
    for steps, expected in ((4, 2), (5, 3)):  # at the end too, where that is none of every second
        calls.clear()
        train(tmp_path, model, small_models.data("opt"), max_steps=steps, gradient_accumulation_steps=3).train()
        assert len(calls) == expected
    with pytest.raises(ValueError, match="refactor_every is 0"):
        STFCallback(0)


def test_half_a_latent_matrix_is_refused():
    module = latent()
    module.latent = torch.nn.Parameter(module.latent.detach()[:12])
    with pytest.raises(ValueError, match="sharded"):
        module.refactor()


def test_an_adapter_is_merged_exactly_and_taken_out_again():
    from peft import get_peft_model

    model = small_models.model("llama")
    DSFormer(**KNOBS).compress(model)
    name = "model.layers.0.mlp.up_proj"
    before, plain = model.get_submodule(name).dense().detach(), small_models.logits(model, "llama")
    tuned = get_peft_model(model, lora_config(model, r=3, target_modules=["up_proj"]))
    wrapped = tuned.base_model.model.get_submodule(name)
    with torch.no_grad():
        wrapped.lora_B["default"].weight.copy_(drawn(48, 3, seed=7))
    delta = wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight * wrapped.scaling["default"]
    wrapped.merge()
    assert wrapped.base_layer.nnz == 5
    torch.testing.assert_close(by_hand(wrapped.base_layer), (before + delta).double(), rtol=1e-5, atol=1e-5)
    wrapped.unmerge()
    assert torch.equal(wrapped.base_layer.dense(), before)
    wrapped.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(small_models.logits(tuned.base_model.model, "llama"), plain)


def test_dense_again_it_needs_no_echelon_and_tied_tables_stay_tied():
    model = small_models.model("qwen2")
    DSFormer(**KNOBS).compress(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = small_models.logits(model, "qwen2")
    merge_to_dense(model)
    assert not any(isinstance(module, (DenseSparseLinear, LowRankLinear)) for module in model.modules())
    torch.testing.assert_close(small_models.logits(model, "qwen2"), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_without_room_stays_dense_with_a_warning_or_an_error_and_if_all_do_it_is_refused():
    knobs = {"block_size": 8, "nnz": 4, "basis": 6}  # 48 bytes for each 8 x 4 that a row of keys or values takes, and the basis
    with pytest.warns(UserWarning, match=r"cannot compress .* of its targets"):
        report = DSFormer(**knobs | {"basis": 12, "nnz": 3}, init_iters=0).compress(small_models.model("llama")).report
    assert {entry["name"].rpartition(".")[2] for entry in report.skipped} == {"k_proj", "v_proj"} and report.modules
    with pytest.raises(ValueError, match="no room for a basis"):
        DSFormer(**knobs | {"basis": 12, "nnz": 3}, strict=True).compress(small_models.model("llama"))
    with pytest.raises(ValueError, match="leaves no room for a basis in any layer"):
        DSFormer(block_size=16, compression=15).compress(small_models.model("llama"))
    with pytest.raises(ValueError, match="block_size is 33; it must be at most 32, the inputs of"):
        DSFormer(block_size=33).compress(small_models.model("llama"))


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"compression": 1}, "compression is 1; it must be above 1"), ({"compression": math.nan}, "compression is nan"), ({"block_size": 0}, "block_size is 0"),
        ({"nnz": 0}, "nnz is 0"), ({"nnz": 5, "basis": 4}, "basis is 4; it must be from nnz, 5"), ({"basis": 0}, "basis is 0"),
        ({"init_iters": -1}, "init_iters is -1"), ({"stf_iters": -1}, "stf_iters is -1"), ({"refactor_every": 0}, "refactor_every is 0"),
        ({"solver": "lars"}, "solver is 'lars'"), ({"hysteresis": 1}, "hysteresis is 1"), ({"train_mode": "ste"}, "train_mode is 'ste'"),
        ({"index_bits": 4}, "index_bits is 4"), ({"steps": -1}, "steps is -1"), ({"finetune_factors_steps": -1}, "finetune_factors_steps is -1"),
        ({"learning_rate": 0}, "learning_rate is 0"), ({"weight_decay": -1}, "weight_decay is -1"), ({"batch_size": 0}, "batch_size is 0"),
    ],
)  # fmt: skip
def test_bad_knobs_are_named(knobs, error):
    with pytest.raises(ValueError, match=error):
        DSFormer(**knobs)

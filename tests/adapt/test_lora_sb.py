"""What LoRA-SB and LoRA-XS promise beyond the adapter contract: where they start, that only the core trains, and that factors can be made again."""

import copy
import json
import math

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import small_models
from echelon.adapt import LoraSbConfig, prepare
from echelon.adapt.lora_sb import decompose, first_learning_rate
from echelon.calibrate import Gradients

TARGETS = ["q_proj", "k_proj", "down_proj"]
NAMES = [f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def data(rows=6, size=3, seed=0):
    ids = torch.tensor(small_models.data("llama", rows=rows, length=10, seed=seed))
    return [{"input_ids": part, "labels": part} for part in ids.split(size)]


def config(**knobs):
    return LoraSbConfig(**({"r": 4, "init_lr": 0.003, "init_num_samples": 6, "target_modules": TARGETS} | knobs))


def made(rows=None, model=None, **knobs):
    model, ready = model or small_models.model("llama"), config(**knobs)
    if str(ready.init_weights).startswith("update"):
        prepare(model, ready, data() if rows is None else rows)
    return get_peft_model(model, ready).eval()


def parts(model):
    """(scale, B, R, A) by layer."""
    return {
        name: (layer.alphas["default"] / layer.ranks["default"], *(layer.part(part, "default") for part in ("B", "R", "A")))
        for name, layer in model.base_model.layers()
    }  # fmt: skip


def first_update(rows, eta, signed=True):
    """Minus the learning rate times the (sign of the) gradient of the mean loss over all rows, by autograd."""
    model, found = small_models.model("llama"), {}
    ids = torch.cat([batch["input_ids"] for batch in rows])
    model(input_ids=ids, labels=ids).loss.backward()
    for name in NAMES:
        gradient = model.get_submodule(name).weight.grad
        found[name] = -eta * (gradient.sign() if signed else gradient)
    return found


@torch.no_grad()
def logits(model):
    return model(**small_models.batch("llama")).logits


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()


@pytest.mark.parametrize(("svd", "tolerance"), [("exact", 1e-4), ("auto", 1e-4), ("randomized", 1e-2)])
def test_it_starts_at_the_best_approximation_of_the_first_step(svd, tolerance):
    updates = first_update(data(), 0.003)
    for name, (scale, B, R, A) in parts(made(svd=svd, lora_alpha=2.0)).items():
        assert scale == 0.5
        expected = truncated(updates[name], 4)
        assert (scale * B @ R @ A - expected).norm().item() / expected.norm() < tolerance
        eye = torch.eye(4)
        torch.testing.assert_close(B.T @ B, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(A @ A.T, eye, rtol=0, atol=1e-5)
        diagonal = R.detach().diagonal()
        assert torch.equal(R.detach(), diagonal.diag()) and bool((diagonal >= 0).all()) and bool((diagonal.diff() <= 0).all())


def test_randomised_decompositions_are_close_to_the_best():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(120, 90, generator=generator).sign()
    best, found = truncated(matrix, 10), decompose(matrix, 10, "randomized", seed=3)
    left = float((matrix - found.B @ found.R @ found.A).norm())
    assert left < 1.005 * float((matrix - best).norm())  # signs have a flat spectrum
    torch.testing.assert_close(found.B.T @ found.B, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.A @ found.A.T, torch.eye(10), rtol=0, atol=1e-5)
    decaying = torch.linalg.qr(torch.randn(120, 90, generator=generator))[0] * 0.5 ** torch.arange(90)
    found = decompose(decaying, 10, "randomized")
    torch.testing.assert_close(found.B @ found.R @ found.A, truncated(decaying, 10), rtol=1e-3, atol=1e-3)


def test_the_raw_update_leaves_the_size_of_gradients():
    rows = data()
    updates = first_update(rows, 0.003, signed=False)
    counted = 6 * 9  # prepare sums over tokens, autograd averages
    for name, (scale, B, R, A) in parts(made(init_weights="update_raw")).items():
        expected = truncated(updates[name] * counted, 4)
        assert (scale * B @ R @ A - expected).norm().item() / expected.norm() < 1e-3


def test_at_full_rank_the_model_starts_right_after_the_first_step():
    model = made(r=16, target_modules=["k_proj"])
    updates, base = first_update(data(), 0.003), small_models.model("llama")
    merged = model.merge_and_unload()
    for name in NAMES:
        moved = base.get_submodule(name).weight + (updates[name] if "k_proj" in name else 0)
        torch.testing.assert_close(merged.get_submodule(name).weight, moved, rtol=1e-4, atol=1e-5)


def test_a_small_first_step_lowers_the_loss_on_its_own_data():
    ids = torch.cat([batch["input_ids"] for batch in data()])
    with torch.no_grad():
        before = small_models.model("llama")(input_ids=ids, labels=ids).loss
        losses = [made(init_lr=eta)(input_ids=ids, labels=ids).loss for eta in (1e-5, 1e-4)]
    gained = [float(before - loss) for loss in losses]
    assert 0 < gained[0] < gained[1] and gained[1] == pytest.approx(10 * gained[0], rel=0.2)  # first order in the step


def test_only_the_core_trains_and_its_gradient_is_that_of_fixed_factors():
    model = made(lora_alpha=6.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(".echelon_lora_sb_R." in n for n, p in model.named_parameters() if p.requires_grad)
    layer = dict(model.base_model.layers())[NAMES[0]]
    seen = {}
    layer.register_forward_hook(lambda module, args, y: (seen.update(x=args[0].detach()), y.register_hook(lambda g: seen.update(g=g)))[0] and None)
    loss = model(**data()[0]).loss
    loss.backward()
    scale, B, R, A = parts(model)[NAMES[0]]
    outer = torch.einsum("bto,bti->oi", seen["g"], seen["x"])
    torch.testing.assert_close(R.grad, scale * B.T @ outer @ A.T, rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for _ in range(3):
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".echelon_lora_sb_R." in name}
    assert model.base_model.param_summary() == {"layers": 6, "trained": 6 * 16, "frozen": 2 * 4 * (2 * 32 + 32 + 16 + 48 + 32)}
    model.add_adapter("second", config(init_weights="svd_weight"))
    for act in (lambda: model.set_adapter("second"), lambda: model.set_adapter("default"), model.base_model.disable_adapter_layers,
                model.base_model.enable_adapter_layers):  # fmt: skip
        act()
        assert all(".echelon_lora_sb_R." in n for n, p in model.named_parameters() if p.requires_grad)
        assert not any(buffer.requires_grad for buffer in model.buffers())


def test_a_layer_without_gradients_gets_orthonormal_factors_a_zero_core_and_a_warning():
    ready, model = config(), small_models.model("llama")
    found = prepare(model, ready, data())
    found.sums[NAMES[1]].zero_()
    found.sums[NAMES[2]] = torch.outer(torch.arange(1.0, 33), torch.arange(-24.0, 24) + 0.5)  # its sign has rank 1
    with pytest.warns(UserWarning, match=f"the gradient of {NAMES[1]} is zero on this data"):
        prepare(model, ready, found)
    kept = parts(get_peft_model(model, ready))
    for name, rank in ((NAMES[1], 0), (NAMES[2], 1)):
        _, B, R, A = kept[name]
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)
        assert int((R != 0).sum()) == rank


def test_preparing_leaves_the_model_alone_and_does_not_depend_on_micro_batches():
    model = small_models.model("llama").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = prepare(model, config(), data(size=6))
    other = prepare(model, config(), data(size=1))
    assert model.training and all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in first.sums.items():
        clear = value.abs() > 1e-4 * value.abs().max()
        assert torch.equal(value.sign()[clear], other.sums[name].sign()[clear]) and clear.float().mean() > 0.99


def test_init_num_samples_rows_are_taken_and_a_thousandth_by_default():
    model = small_models.model("llama")
    for knobs, rows in (({"init_num_samples": 4}, 4), ({"init_num_samples": None}, 1), ({"init_num_samples": 100}, 6)):
        found = prepare(model, config(**knobs), data())
        expected = prepare(model, config(init_num_samples=None if rows == 1 else rows), [{k: v[:rows] for k, v in data(size=6)[0].items()}])
        for name, value in expected.sums.items():
            torch.testing.assert_close(found.sums[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in torch.randint(4, 40, (2500, 5))], batch_size=1)
    seen = []
    prepare(model, config(init_num_samples=None), loader, loss=lambda m, b: (seen.append(1), m(**b).loss)[1])
    assert len(seen) == 2


def test_the_first_learning_rate_is_that_of_the_schedule(tmp_path):
    def arguments(**more):
        return transformers.TrainingArguments(str(tmp_path), learning_rate=1e-4, report_to=[], use_cpu=True, **more)

    assert first_learning_rate(arguments(warmup_steps=20, lr_scheduler_type="cosine"), 1000) == pytest.approx(1e-4 / 20)
    assert first_learning_rate(arguments(lr_scheduler_type="linear"), 100) == pytest.approx(1e-4 * 99 / 100)
    assert first_learning_rate(arguments(lr_scheduler_type="cosine"), 50) == pytest.approx(1e-4 * (1 + math.cos(math.pi / 50)) / 2)
    ready = config(init_lr=None)
    prepare(small_models.model("llama"), ready, data(), arguments=arguments(warmup_steps=10), total_steps=100)
    assert ready.init_lr == pytest.approx(1e-5)
    with pytest.raises(ValueError, match="init_lr is null; give it, or the arguments of the training to come"):
        prepare(small_models.model("llama"), config(init_lr=None), data())
    with pytest.raises(ValueError, match="the arguments have no max_steps; give total_steps"):
        prepare(small_models.model("llama"), config(init_lr=None), data(), arguments=arguments())


def test_lora_xs_starts_near_the_model_between_factors_of_its_weight():
    model, base = made(init_weights="svd_weight"), small_models.model("llama")
    for name, (_, B, R, A) in parts(model).items():
        u, s, v = torch.linalg.svd(base.get_submodule(name).weight.detach(), full_matrices=False)
        torch.testing.assert_close(B @ A, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(A.norm(dim=1), s[:4], rtol=1e-4, atol=1e-4)
        assert 0 < R.abs().max() < 6e-5 and 2e-6 < R.std() < 3e-5
    difference = (logits(model) - logits(base)).norm() / logits(base).norm()
    assert 0 < difference < 1e-3
    orthogonal = made(init_weights="random_orthogonal")
    assert torch.equal(logits(orthogonal), logits(base))
    for _, B, _, A in parts(orthogonal).values():
        torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["svd_weight", "random_orthogonal", "update_approx"])
@pytest.mark.parametrize("low", [False, True])
def test_factors_that_are_not_saved_are_made_again(init, low, tmp_path):
    model = made(init_weights=init, save_factors=False)
    for _, _, R, _ in parts(model).values():
        R.data.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 6 and all(value.shape == (4, 4) for value in tensors.values())

    def load(base, rows):
        ready = LoraSbConfig.from_pretrained(tmp_path)
        if init == "update_approx":
            prepare(base, ready, rows)
        return PeftModel.from_pretrained(base, tmp_path, config=ready, low_cpu_mem_usage=low)

    assert torch.equal(logits(load(small_models.model("llama"), data())), logits(model))
    other, rows = small_models.model("llama"), data()
    if init == "svd_weight":
        other.get_submodule(NAMES[0]).weight.data.copy_(other.get_submodule(NAMES[0]).weight.flip(0))
    elif init == "update_approx":
        rows = data(seed=5)
        with pytest.raises(ValueError, match="call echelon.adapt.prepare"):
            PeftModel.from_pretrained(small_models.model("llama"), tmp_path)
    else:  # what is drawn follows the layers' names
        file = tmp_path / "adapter_config.json"
        written = json.loads(file.read_text())
        file.write_text(json.dumps(written | {"factor_signature": {"x" + name: noted for name, noted in written["factor_signature"].items()}}))
    with pytest.raises(ValueError, match="are not those that the adapter was trained with; are base model and data the same"):
        load(other, rows)


def test_factors_in_bfloat16_take_half_the_file_and_load_bit_for_bit(tmp_path):
    wide, narrow = made(), made(store_dtype="bfloat16")
    for _, B, _, A in parts(narrow).values():
        assert torch.equal(A, A.bfloat16().float()) and torch.equal(B, B.bfloat16().float())
    assert float((logits(narrow) - logits(wide)).norm()) > 0
    narrow.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.rpartition("_")[2]: v.dtype for n, v in saved.items()} == {"A": torch.bfloat16, "B": torch.bfloat16, "R": torch.float32}
    for low in (False, True):
        again = PeftModel.from_pretrained(small_models.model("llama"), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again), logits(narrow))


def test_exported_and_merged_it_is_the_same_and_disabled_it_is_the_base(tmp_path):
    model = made(lora_alpha=7.0, rank_pattern={"k_proj": 2})
    for n, (_, _, R, _) in enumerate(parts(model).values()):
        R.data.copy_(torch.randn(R.shape, generator=torch.Generator().manual_seed(n)))
    whole = logits(model)
    lora, tensors = model.base_model.to_lora()
    assert lora.r == 4 and set(lora.rank_pattern.values()) == {2}
    for name, (scale, B, R, A) in parts(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == R.shape[0] == (2 if "k_proj" in name else 4) and scale == 7 / len(R)
        torch.testing.assert_close(b @ a, B @ R @ A)
    model.save_lora(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(small_models.model("llama"), tmp_path)), whole, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(small_models.model("llama")))
    torch.testing.assert_close(logits(model.merge_and_unload()), whole, rtol=1e-4, atol=1e-4)
    assert {scale for scale, *_ in parts(made(rank_pattern={"k_proj": 2})).values()} == {1.0}  # alpha is the layer's own rank by default


def test_gradients_of_a_layer_whose_weight_has_none_come_from_what_goes_through_it():
    """A layer that keeps its matrix as a buffer of integers, as quantised layers do."""

    class Codes(nn.Linear):
        def __init__(self, old):
            super().__init__(old.in_features, old.out_features, bias=False)
            self.weight = nn.Parameter(old.weight.data.mul(8).round().to(torch.int8), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.weight.float() / 8)

    rounded, coded = small_models.model("llama"), small_models.model("llama")
    for name in NAMES:
        parent, _, child = name.rpartition(".")
        rounded.get_submodule(name).weight.data.mul_(8).round_().div_(8)
        setattr(coded.get_submodule(parent), child, Codes(coded.get_submodule(name)))
    expected, found = (prepare(model, config(), data()).sums for model in (rounded, coded))
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_that_were_collected_serve_again_and_are_cached(tmp_path):
    model, file = small_models.model("llama"), str(tmp_path / "gradients.safetensors")
    found = prepare(model, config(), data(), cache=file)
    assert Gradients.load(file).sums.keys() == set(NAMES)
    again = config()
    prepare(model, again, found)
    assert torch.equal(logits(get_peft_model(model, again)), logits(made()))


@pytest.mark.parametrize(("knobs", "said"), [
    ({"init_weights": "svd"}, "init_weights is 'svd'; it must be one of update_approx, update_raw, svd_weight"), ({"svd": "fast"}, "svd is 'fast'"),
    ({"init_lr": 0.0}, "init_lr is 0.0"), ({"init_num_samples": 0}, "init_num_samples is 0"), ({"store_dtype": "float16"}, "one of float32, bfloat16"),
    ({"lora_alpha": 0.0}, "lora_alpha is 0"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        config(**knobs)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="nothing is known of model.layers.0.self_attn.q_proj; call echelon.adapt.prepare"):
        get_peft_model(small_models.model("llama"), config())
    with pytest.raises(ValueError, match=r"r of model.layers.0.self_attn.k_proj \(16 x 32\) is 17; it must be a whole number in 1..16"):
        get_peft_model(small_models.model("llama"), config(r=17, init_weights="svd_weight"))
    with pytest.raises(ValueError, match=r"k_proj \(16 x 32\) is 17"):
        prepare(small_models.model("llama"), config(r=17), data())
    with pytest.raises(ValueError, match="init_weights is 'svd_weight'; only update_approx and update_raw start from gradients"):
        prepare(small_models.model("llama"), config(init_weights="svd_weight"), data())
    with pytest.raises(ValueError, match="the gradients hold nothing of model.layers.0.self_attn.q_proj"):
        prepare(small_models.model("llama"), config(), Gradients())
    broken = data()
    model = small_models.model("llama")
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        prepare(model, config(), broken)
    used = config()
    model = small_models.model("llama")
    prepare(model, used, data())
    get_peft_model(model, used)
    with pytest.raises(ValueError, match="call echelon.adapt.prepare"):  # factors belong to one model
        get_peft_model(small_models.model("llama"), used)

"""What RandLoRA promises beyond the adapter contract: the paper's sum at full rank, PEFT's function where asked for, and random matrices that exist once."""

import dataclasses
import json
import math

import peft
import pytest
import torch
import transformers
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import small_models
from echelon.adapt import RandLoraConfig, convert_randlora, load_adapter
from echelon.errors import UserError
from small_parts import Toy, noise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TARGETS = {"llama": ["q_proj", "k_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def toy(rows=6, columns=11, shaken=True, **knobs):
    """A wrapped toy, its layer, and its scalings."""
    model = get_peft_model(Toy(rows, columns), RandLoraConfig(**({"r": 2, "target_modules": ["layer"]} | knobs)))
    layer = model.base_model.model.layer
    scalings, gamma = layer.echelon_randlora_lambda["default"], layer.echelon_randlora_gamma["default"]
    if shaken:
        scalings.data.copy_(noise(*scalings.shape, seed=2))
        gamma.data.copy_(noise(*gamma.shape, seed=3))
    return model, layer, scalings, gamma


def paper(A, B, scalings, gamma, rows, columns):
    """The printed sum, one random matrix after the other, in float64."""
    (rank, count), small, large = scalings.shape, min(rows, columns), max(rows, columns)
    A, B = A.double()[:rank, :small], B.double()[:large]
    total = sum(B[:, b * rank : (b + 1) * rank] @ scalings[:, b].double().diag() @ A @ gamma[b].double().diag() for b in range(count))
    return total if columns <= rows else total.T


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (7, 7)])
@pytest.mark.parametrize("rank", [2, 3, 6])
def test_it_is_the_sum_of_the_paper(shape, rank):
    model, layer, scalings, gamma = toy(*shape, r=rank)
    A, B = model.peft_config["default"].projections.on("cpu")
    small = min(shape)
    assert scalings.shape == (rank, math.ceil(small / rank)) and gamma.shape == (math.ceil(small / rank), small)
    delta = 20 * paper(A, B, scalings, gamma, *shape)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=1e-4, atol=1e-4)
    x = noise(9, shape[1])
    torch.testing.assert_close(model(x).double(), Toy(*shape)(x).double() + x.double() @ delta.T, rtol=1e-4, atol=1e-3)
    mine = [t.detach().clone().requires_grad_() for t in (scalings, gamma)]
    model(x).square().sum().backward()
    (Toy(*shape)(x).double() + 20 * x.double() @ paper(A, B, *mine, *shape).T).square().sum().backward()
    for found, expected in ((scalings, mine[0]), (gamma, mine[1])):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-3 * float(expected.grad.abs().max()))


def test_it_starts_at_the_base_and_has_full_rank_once_gamma_has_moved():
    model, layer, scalings, gamma = toy(12, 20, shaken=False, r=5)
    x = noise(9, 20)
    assert torch.equal(model(x), Toy(12, 20)(x))
    assert not scalings.any() and torch.equal(gamma, torch.full((3, 12), 1 / 12))

    def rank():
        return int(torch.linalg.matrix_rank(layer.get_delta_weight("default").double(), rtol=1e-6))

    scalings.data.copy_(noise(5, 3))
    assert rank() == 5
    gamma.data.copy_(noise(3, 12))
    assert rank() == 12
    random, *_ = toy(12, 20, shaken=False, r=5, init_weights=False)
    assert not torch.equal(random(x), Toy(12, 20)(x))


def test_the_names_that_peft_has_count():
    model, layer, *_ = toy(randlora_alpha=9.0, randlora_dropout=0.25, projection_prng_key=4)
    config = model.peft_config["default"]
    assert (config.lora_alpha, config.lora_dropout, config.seed, layer.scales["default"]) == (9.0, 0.25, 4, 4.5)
    assert config.randlora_alpha is None and dataclasses.replace(config, lora_alpha=3.0).lora_alpha == 3.0
    assert torch.equal(config.projections.on("cpu")[0], toy(seed=4)[0].peft_config["default"].projections.on("cpu")[0])
    with pytest.raises(ValueError, match="lora_dropout is 1.5"):
        RandLoraConfig(target_modules=["q"], randlora_dropout=1.5)


def test_scales():
    kept = {}
    for scaling, alpha in (("peft", None), ("authors", None), ("peft", 7.0), ("authors", 7.0)):
        _, layer, *_ = toy(scaling=scaling, lora_alpha=alpha)  # r = 2, so three random matrices
        kept[scaling, alpha] = layer.get_delta_weight("default") / (20 if alpha is None and scaling == "peft" else 2 / 3**0.5 if alpha is None else 3.5)
    for found in (kept["authors", None], kept["peft", 7.0], kept["authors", 7.0] * 3**0.5):
        torch.testing.assert_close(found, kept["peft", None], rtol=1e-5, atol=1e-5)


def shaken(model):
    """Other values for all that trains."""
    for place, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data.copy_(0.1 * noise(*p.shape, seed=place))
    return model


def of_peft(family, **knobs):
    config = peft.RandLoraConfig(**({"r": 5, "randlora_alpha": 60, "target_modules": TARGETS[family]} | knobs))
    return shaken(get_peft_model(small_models.model(family), config).eval())


def loss(model, family):
    batch = small_models.batch(family)
    return model(**batch, labels=batch["input_ids"]).loss


@pytest.mark.parametrize("family", list(TARGETS))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_what_peft_saved_is_converted_with_its_random_matrices_once(family, tmp_path):
    old = of_peft(family)
    old.save_pretrained(tmp_path / "old")
    config = convert_randlora(tmp_path / "old", tmp_path / "new")
    assert (config.pairing, config.scaling, config.lora_alpha, config.r) == ("peft", "peft", 60, 5)
    new = load_adapter(small_models.model(family), tmp_path / "new", is_trainable=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(new(**small_models.batch(family)).logits, old(**small_models.batch(family)).logits, rtol=1e-4, atol=1e-5)
    theirs = {n: m for n, m in old.base_model.model.named_modules() if hasattr(m, "randlora_lambda")}
    assert theirs and set(theirs) == {n for n, _ in new.base_model.layers()}
    for n, layer in new.base_model.layers():
        torch.testing.assert_close(layer.get_delta_weight("default"), theirs[n].get_delta_weight("default"), rtol=1e-5, atol=1e-5)
    loss(old, family).backward()
    loss(new, family).backward()
    for n, layer in new.base_model.layers():
        for part in ("lambda", "gamma"):
            mine, their = layer.part(part, "default").grad, getattr(theirs[n], f"randlora_{part}")["default"].grad
            torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4 * float(their.abs().max()))
    sizes = [sum(v.nbytes for v in load_file(tmp_path / which / "adapter_model.safetensors").values()) for which in ("old", "new")]
    one_pair = sum(m.nbytes for m in next(iter(theirs.values())).randlora_A.values()) + sum(m.nbytes for m in next(iter(theirs.values())).randlora_B.values())
    assert sizes[1] == 4 * sum(p.numel() for p in new.parameters() if p.requires_grad) + one_pair < sizes[0]
    new.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("new", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_order_of_the_paper_is_another_than_that_of_peft():
    _, layer, *_ = toy(r=3)
    _, other, *_ = toy(r=3, pairing="peft")
    assert not torch.allclose(layer.get_delta_weight("default"), other.get_delta_weight("default"), atol=0.1)
    _, layer, *_ = toy(r=6)
    _, other, *_ = toy(r=6, pairing="peft")  # one matrix has only one order
    assert torch.equal(layer.get_delta_weight("default"), other.get_delta_weight("default"))


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(UserError, match="cannot read a PEFT adapter"):
        convert_randlora(tmp_path, tmp_path / "out")
    get_peft_model(small_models.model("llama"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="is a LoraConfig; it must be a RandLoRA of PEFT"):
        convert_randlora(tmp_path / "lora", tmp_path / "out")
    with pytest.warns(UserWarning, match="not save basis_A"):
        of_peft("llama", save_projection=False).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no random matrices, and PEFT's differ between machines"):
        convert_randlora(tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trained_llama(**knobs):
    config = RandLoraConfig(**({"r": 5, "lora_alpha": 60.0, "target_modules": TARGETS["llama"]} | knobs))
    return shaken(get_peft_model(small_models.model("llama"), config).eval())


@torch.no_grad()
def logits(model):
    return model(**small_models.batch("llama")).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_has_one_pair_of_random_matrices_or_none(dtype, tmp_path):
    numbers = 2 * sum(-(-m // 5) * (5 + m) for m in (32, 16, 32, 32))
    # The widest smaller side is 32 (up and down are 48 x 32 and 32 x 48), the widest larger one 48, and 7 matrices of rank 5 reach 32.
    pair = (5 * 32 + 48 * 7 * 5) * (4 if dtype == "float32" else 2)
    for saved in (False, True):
        model = trained_llama(save_projection=saved, basis_dtype=dtype)
        A, B = model.peft_config["default"].projections.on("cpu")
        assert A.shape == (5, 32) and B.shape == (48, 35)
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        assert file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") == 4 * numbers + saved * pair
        again = load_adapter(small_models.model("llama"), tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert all(torch.equal(a, b) for a, b in zip(again.peft_config["default"].projections.on("cpu"), (A, B), strict=True))
        assert model.base_model.param_summary() == {"layers": 8, "trained": numbers, "frozen": 0}
    assert len({id(layer.projections["default"]) for _, layer in model.base_model.layers()}) == 1


def test_other_random_matrices_are_noticed(tmp_path):
    model = trained_llama()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"seed": 1}))
    with pytest.raises(ValueError, match="the random matrices are not those that the adapter was trained with"):
        load_adapter(small_models.model("llama"), tmp_path)
    file.write_text(json.dumps(written | {"seed": 1, "save_projection": True}))
    model.peft_config["default"].save_projection = True
    state = peft.get_peft_model_state_dict(model)
    save_file(state, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(load_adapter(small_models.model("llama"), tmp_path)), logits(model))  # the seed does not matter then
    native = small_models.model("llama")
    native.load_adapter(str(tmp_path))  # does not give saved matrices to the tuner
    with pytest.raises(ValueError, match="the random matrices are not those"):
        logits(native)
    small = state["base_model.echelon_randlora_A"][:, :31].contiguous()
    save_file(state | {"base_model.echelon_randlora_A": small}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the saved random matrix A has shape .5, 31.; the layers of this model need .5, 32. at least"):
        load_adapter(small_models.model("llama"), tmp_path)


@pytest.mark.parametrize("knobs", [{}, {"sparse": True}, {"very_sparse": True}])
def test_random_matrices_have_unit_deviation_and_the_right_share_of_zeros(knobs):
    model, *_ = toy(90, 100, r=30, **knobs)
    for matrix in model.peft_config["default"].projections.on("cpu"):
        assert abs(float(matrix.double().std()) - 1) < 1e-5 and abs(float(matrix.mean())) < 0.1
        levels = matrix.unique()
        if not knobs:
            assert len(levels) > 2000 and float(matrix.abs().max()) == pytest.approx(3**0.5, rel=0.05)  # uniform
            continue
        assert len(levels) == 3 and levels[1] == 0 and levels[0] == -levels[2]
        share = 1 / 6 if knobs.get("sparse") else 0.5 / 90**0.5
        for level in (levels[0], levels[2]):
            deviation = (share * (1 - share) / matrix.numel()) ** 0.5
            assert abs(float((matrix == level).double().mean()) - share) < 4 * deviation
    other = toy(90, 100, r=30, seed=1, **knobs)[0].peft_config["default"].projections.on("cpu")
    assert not torch.equal(other[0], model.peft_config["default"].projections.on("cpu")[0])


def test_layers_and_adapters_of_other_ranks():
    model = trained_llama(rank_pattern={"k_proj": 3, "down_proj": 11})
    A, B = model.peft_config["default"].projections.on("cpu")
    own = {"q_proj": 5, "k_proj": 3, "up_proj": 5, "down_proj": 11}
    model.add_adapter("second", RandLoraConfig(r=2, seed=3, target_modules=["q_proj"]))
    for n, layer in model.base_model.layers("default"):
        scalings, gamma = layer.part("lambda", "default"), layer.part("gamma", "default")
        assert len(scalings) == own[n.rpartition(".")[2]]
        expected = 60 / len(scalings) * paper(A, B, scalings, gamma, layer.out_features, layer.in_features)
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-4, atol=1e-4)
    assert {layer.part("lambda", "second").shape for _, layer in model.base_model.layers("second")} == {(2, 16)}
    before = logits(model)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(small_models.model("llama")))
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_a_rank_above_the_smaller_side_takes_one_matrix():
    with pytest.warns(UserWarning, match="r is 8; layer is 6 x 11, so more than 6 adds nothing"):
        model, layer, scalings, gamma = toy(r=8)
    assert scalings.shape == (8, 1) and gamma.shape == (1, 6)
    A, B = model.peft_config["default"].projections.on("cpu")
    torch.testing.assert_close(layer.get_delta_weight("default").double(), 20 * paper(A, B, scalings, gamma, 6, 11), rtol=1e-4, atol=1e-4)


def test_a_decomposition_of_full_rank_loses_nothing(tmp_path):
    model = trained_llama(target_modules=["q_proj", "up_proj", "down_proj"])
    lora, tensors = convert_to_lora(model, rank=32)
    lora.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = logits(PeftModel.from_pretrained(small_models.model("llama"), tmp_path))
    assert float((found - logits(model)).norm() / logits(model).norm()) < 1e-4


@pytest.mark.parametrize(("knobs", "said"), [
    ({"r": 0}, "r is 0; it must be a whole number of at least 1"), ({"r": -3}, "r is -3"), ({"lora_alpha": 0.0}, "lora_alpha is 0"),
    ({"sparse": True, "very_sparse": True}, "very_sparse is True; it must be False where sparse is True"), ({"pairing": "both"}, "must be one of paper, peft"),
    ({"scaling": "none"}, "must be one of peft, authors"), ({"basis_dtype": "float16"}, "must be one of float32, bfloat16"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        RandLoraConfig(target_modules=["q"], **knobs)


def test_layers_that_the_kernels_of_mamba_pass_by_are_refused():
    sizes = {"vocab_size": 20, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    with torch.random.fork_rng():
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba"):
        get_peft_model(model, RandLoraConfig(r=2, target_modules=["x_proj", "out_proj"]))
    assert all(type(module) is nn.Linear for n, module in model.named_modules() if n.endswith("proj"))


def test_a_matrix_without_any_entry_is_refused():
    with pytest.raises(ValueError, match="all entries of the sparse matrix A .1, 1. are zero; take another"):
        for seed in range(100):
            toy(1, 30, r=1, seed=seed, sparse=True)

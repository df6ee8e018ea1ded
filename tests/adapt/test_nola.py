"""What NOLA promises beyond the adapter contract: factors mixed from bases that are never stored, whatever the cache, the chunks and the process."""

import copy
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import small_models
from echelon.adapt import NolaConfig, load_adapter
from echelon.adapt.nola import BasisCache, restored, rounded
from echelon.linalg.bases import Basis, seed_of
from small_parts import Toy, noise

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
COUNTS = 10, 7


X = noise(11, 7)


def toy(shaken=True, base=None, **knobs):
    """A wrapped toy, its layer, and its coefficients."""
    usual = {"r": 3, "lora_alpha": 12.0, "num_basis_A": COUNTS[0], "num_basis_B": COUNTS[1], "target_modules": ["layer"]}
    model = get_peft_model(base or Toy(5, 7), NolaConfig(**(usual | knobs)))
    layer = model.base_model.model.layer
    a, b = layer.echelon_nola_coef_A["default"], layer.echelon_nola_coef_B["default"]
    if shaken:
        a.data.copy_(noise(*a.shape, seed=2))
        b.data.copy_(noise(*b.shape, seed=3))
    return model, layer, a, b


def drawn(seed, count, rows, columns):
    """A whole basis in one draw."""
    return torch.empty(count, rows, columns).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)) / count**0.5


def explicit(a, b, rank=3, seed=0):
    """Factors from bases that are there as a whole, differentiable by autograd."""
    offset = drawn(seed_of(seed, "layer", "A0"), 1, rank, 7)[0] / 7**0.5
    return (
        offset + (a[:, None, None] * drawn(seed_of(seed, "layer", "A"), len(a), rank, 7)).sum(0),
        (b[:, None, None] * drawn(seed_of(seed, "layer", "B"), len(b), 5, rank)).sum(0),
    )


@pytest.mark.parametrize("cache", ["none", "auto", "all"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_output_and_gradients_are_those_of_the_bases_as_a_whole(chunk, cache):
    model, _, a, b = toy(chunk_basis=chunk, basis_cache=cache, basis_cache_bytes=1000)
    mine = [t.detach().clone().requires_grad_() for t in (a, b)]
    A, B = explicit(*mine)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected = Toy(5, 7)(y) + 12 / 3 * y @ A.T @ B.T
    for _ in range(2):  # the second time from the cache
        a.grad = b.grad = x.grad = None
        found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in ((a, mine[0]), (b, mine[1]), (x, y)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rng", ["torch_cpu", "counter"])
def test_the_cache_changes_not_a_bit(rng):
    seen = []
    for cache in ("none", "all"):
        model, _, a, b = toy(basis_rng=rng, basis_cache=cache, chunk_basis=4)
        for _ in range(2):
            a.grad = b.grad = None
            y = model(X)
            y.square().sum().backward()
            seen.append((y.detach(), a.grad, b.grad))
        held = model.peft_config["default"].cache
        assert len(held.held) == (0 if cache == "none" else 2)
        assert held.bytes == (0 if cache == "none" else 4 * (COUNTS[0] * 3 * 7 + COUNTS[1] * 5 * 3))
        assert not copy.deepcopy(model).peft_config["default"].cache.held
    assert all(torch.equal(one, other) for later in seen[1:] for one, other in zip(seen[0], later, strict=True))


def test_the_two_generators_give_other_numbers_and_so_does_another_seed():
    outputs = [toy(**knobs)[0](X) for knobs in ({}, {"basis_rng": "counter"}, {"seed": 1}, {"share_basis": True})]
    assert all(not torch.allclose(one, other, atol=1e-2) for i, one in enumerate(outputs) for other in outputs[:i])


def test_a_cache_keeps_the_first_that_fit_and_one_copy_of_each():
    bases = [Basis(seed, 4, 5, 5) for seed in range(3)]
    cache = BasisCache(2 * 4 * 25 * 4)
    for _ in range(2):
        for basis in bases:
            found = torch.cat([part for _, part in cache.chunks(basis, "cpu", torch.float32)])
            assert torch.equal(found, drawn(basis.seed, 4, 5, 5))
        assert list(cache.held) == bases[:2] and cache.bytes == cache.limit
    list(cache.chunks(bases[0], "cpu", torch.bfloat16))
    assert cache.bytes == cache.limit * 3 // 4 and {dtype for _, dtype, _ in cache.held.values()} == {torch.float32, torch.bfloat16}


def test_a_fresh_adapter_adds_nothing_and_only_beta_has_a_gradient():
    model, _, a, b = toy(shaken=False)
    assert torch.equal(model(X), Toy(5, 7)(X))
    model(X).square().sum().backward()
    assert not a.grad.any() and b.grad.abs().min() > 0


def test_factors_are_kept_while_nothing_trains_and_mixed_again_when_coefficients_change():
    model, layer, a, b = toy()
    with torch.inference_mode():
        first = model(X)
    kept = layer.mixtures["default"]
    with torch.no_grad():
        assert torch.equal(model(X), first) and layer.mixtures["default"] is kept
        b.data *= 2
        twice = model(X)
    torch.testing.assert_close(twice - Toy(5, 7)(X), 2 * (first - Toy(5, 7)(X)), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        b /= 2
        assert torch.equal(model(X), first)
    model(X).sum().backward()  # what was made in inference mode is not in the way
    assert not layer.mixtures and a.grad.any()
    a.requires_grad_(False)
    b.requires_grad_(False)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    A, B = explicit(a, b)
    torch.testing.assert_close(x.grad, (Toy(5, 7).layer.weight + 4 * B @ A).sum(0).expand(11, 7), rtol=1e-4, atol=1e-4)


def test_autocast_does_not_round_the_mixtures():
    model, layer, *_ = toy()
    exact = layer.factors("default")
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.factors("default")
        assert model(X).dtype == torch.bfloat16
    assert torch.equal(found.A, exact.A) and torch.equal(found.B, exact.B) and found.A.requires_grad


def test_the_rank_is_free_of_the_number_of_coefficients():
    for rank in (1, 2, 4):
        for rows, columns in ((5, 7), (40, 30)):
            model, layer, *_ = toy(base=Toy(rows, columns), r=rank)
            assert torch.linalg.matrix_rank(layer.get_delta_weight("default").double(), rtol=1e-5) == rank
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(COUNTS)
            assert model.base_model.param_summary() == {"layers": 1, "trained": sum(COUNTS), "frozen": 0}


def test_enough_matrices_reach_every_lora():
    _, layer, a, b = toy(num_basis_A=40, num_basis_B=30)
    goal = noise(3, 7, seed=8), noise(5, 3, seed=9)
    offset, _ = explicit(torch.zeros(1), torch.zeros(1))
    for coefficients, part, target in ((a, "A", goal[0] - offset), (b, "B", goal[1])):
        basis = drawn(seed_of(0, "layer", part), len(coefficients), *target.shape).flatten(1).double()
        coefficients.data.copy_(torch.linalg.lstsq(basis.T, target.flatten().double()[:, None], driver="gelsd").solution[:, 0])
    torch.testing.assert_close(layer.get_delta_weight("default"), 12 / 3 * goal[1] @ goal[0], rtol=1e-5, atol=1e-5)


def trained_llama(**knobs):
    usual = {"r": 3, "num_basis": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    model = get_peft_model(small_models.model("llama"), NolaConfig(**(usual | knobs))).eval()
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model):
    return model(**small_models.batch("llama")).logits


def contents(folder):
    """Bytes of tensors in a checkpoint, without its header."""
    file = folder / "adapter_model.safetensors"
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


def test_a_checkpoint_holds_the_coefficients_alone(tmp_path):
    for knobs, count in (({}, 16), ({"num_basis_B": 5, "share_basis": True}, 13), ({"r": 16, "basis_rng": "counter"}, 16)):
        model = trained_llama(**knobs)
        model.save_pretrained(tmp_path)
        assert contents(tmp_path) == 4 * 6 * count
        assert torch.equal(logits(load_adapter(small_models.model("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_coefficients(bits, tmp_path):
    model = trained_llama(coef_bits=bits, num_basis=33)
    model.save_pretrained(tmp_path)
    assert contents(tmp_path) == 6 * 2 * (8 + -(-33 * bits // 8))
    again = PeftModel.from_pretrained(small_models.model("llama"), tmp_path)
    exact = {n: p for n, p in model.named_parameters() if "nola_coef" in n}
    for n, p in again.named_parameters():
        if "nola_coef" in n:
            low, high = exact[n].aminmax()
            step = (high - low) / (2**bits - 1)
            torch.testing.assert_close(p, low + step * ((exact[n] - low) / step).round(), rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    same = torch.full((5,), 0.3)
    assert torch.equal(restored(rounded(same, bits), bits, 5), same)
    with pytest.raises(ValueError, match="beta holds NaN"):
        rounded(same / 0 * 0, bits, "beta")


def test_other_bases_are_noticed_on_loading(tmp_path):
    model = trained_llama()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    for change in ({"seed": 1}, {"basis_rng": "counter"}, {"share_basis": True}):
        file.write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match="the random bases of model.layers.0.self_attn.q_proj are not those"):
            load_adapter(small_models.model("llama"), tmp_path)
    renamed = {"x" + name: noted for name, noted in written["basis_signature"].items()}
    file.write_text(json.dumps(written | {"basis_signature": renamed}))
    with pytest.raises(ValueError, match=r"not those that the adapter was trained with: .*the layer's name"):
        load_adapter(small_models.model("llama"), tmp_path)
    file.write_text(json.dumps(written | {"basis_cache": "all", "chunk_basis": 3}))
    torch.testing.assert_close(logits(load_adapter(small_models.model("llama"), tmp_path)), logits(model), rtol=1e-4, atol=1e-4)


def test_a_shared_basis_is_in_memory_once_for_all_layers_of_a_shape():
    model = trained_llama(share_basis=True, basis_cache="all")
    kept = logits(model)
    # q (32, 32), k (16, 32) and down (32, 48) in two layers: A of 3 x 32 and 3 x 48, B of 32 x 3 and 16 x 3, and no more
    assert model.peft_config["default"].cache.bytes == 4 * 8 * 3 * (32 + 48 + 32 + 16)
    offsets = {layer.bases["default"].offset.seed for _, layer in model.base_model.layers()}
    assert len(offsets) == 6
    assert torch.equal(logits(trained_llama(share_basis=True, basis_cache="none")), kept)


PARALLEL = """
import sys, torch
import torch.distributed as dist
from safetensors.torch import save_file
from peft import get_peft_model
from torch import nn
from echelon.adapt import NolaConfig
rank, x, out = int(sys.argv[1]), torch.linspace(-1, 1, 28).view(4, 7), sys.argv[2]
base = nn.Sequential(nn.Linear(7, 5))
with torch.no_grad():
    for p in base.parameters():
        p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
torch.manual_seed(rank)
model = get_peft_model(base, NolaConfig(r=2, num_basis=6, target_modules=["0"]))
for p in model.parameters():
    if p.requires_grad:
        p.data += torch.linspace(0, 1, p.numel())
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
model(x).square().mean().backward()
found = {f"{n} alone": p.grad.clone() for n, p in trained.items()}
model.zero_grad()
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=2)
parallel = nn.parallel.DistributedDataParallel(model)
parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
save_file(found | {n: p.grad for n, p in trained.items()}, out)
"""


def test_two_processes_with_other_global_seeds_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    calls = [("0", tmp_path / "first", place), ("1", tmp_path / "second", place)]
    command = [sys.executable, "-W", "ignore", "-c", PARALLEL]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, *map(str, call)], stderr=subprocess.PIPE, text=True, env=one_thread) for call in calls]
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    first, second = (load_file(call[1]) for call in calls)
    together = [n for n in first if not n.endswith(" alone")]
    assert len(together) == 2 and all(first[n].any() and torch.equal(first[n], second[n]) for n in together)
    for n in together:
        for process in (first, second):  # MKL's last bits depend on where in memory a vector begins
            torch.testing.assert_close(process[f"{n} alone"], first[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("knobs", "said"), [
    ({"num_basis": 0}, "num_basis is 0; it must be a whole number of at least 1"), ({"num_basis": None}, "num_basis is None"),
    ({"num_basis_A": 0}, "num_basis_A is 0"), ({"num_basis_B": 2.5}, "num_basis_B is 2.5"), ({"chunk_basis": 0}, "chunk_basis is 0"),
    ({"basis_rng": "cuda"}, "basis_rng is 'cuda'; it must be one of torch_cpu, counter"), ({"basis_cache": "some"}, "it must be one of none, auto, all"),
    ({"basis_cache_bytes": -1}, "basis_cache_bytes is -1"), ({"coef_bits": 3}, "coef_bits is 3; it must be 4, 8 or null"), ({"seed": 0.5}, "seed is 0.5"),
    ({"r": 0}, "r is 0"), ({"lora_alpha": 0.0}, "lora_alpha is 0"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        NolaConfig(target_modules=["q"], **knobs)


def test_alpha_is_the_rank_by_default_and_a_rank_that_adds_nothing_is_warned_of():
    model = trained_llama(rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 5.0})
    assert {layer.factors("default").scale for name, layer in model.base_model.layers() if "down" not in name} == {1.0}
    assert {layer.factors("default").scale for name, layer in model.base_model.layers() if "down" in name} == {5 / 3}
    with pytest.warns(UserWarning, match="r is 6; layer is 5 x 7, so more than 5 adds nothing"):
        toy(r=6)

"""Streamed gradients are those of autograd, whatever the layer, the batches, and what broke off in between."""

import copy
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import small_models
import tiny
from echelon.calibrate import GradientCollector, Gradients, collect_gradients
from echelon.calibrate.gradients import summed_loss
from echelon.errors import UserError

NAMES = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], "bert": ["bert.encoder.layer.1.output.dense"],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def build(family):
    return copy.deepcopy(tiny.model("t5")) if family == "t5" else small_models.model(family)


def batches(rows=6, size=2, seed=0):
    """Rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, tiny.VOCAB, (rows, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(5, 10, (rows, 1), generator=generator)
    whole = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return [{name: value[start : start + size] for name, value in whole.items()} for start in range(0, rows, size)]


def dense(module):
    return module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad


def by_autograd(family, data, squares=False, loss=summed_loss):
    """From ``weight.grad``, batch by batch."""
    model, found = build(family), {}
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        for name in NAMES[family]:
            grad = dense(model.get_submodule(name)).clone()
            found[name] = found.get(name, 0) + (grad.square() if squares else grad)
    return found


def same(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("family", NAMES)
def test_sums_and_squares_are_those_of_autograd(family):
    data = batches()
    model = build(family)
    found = collect_gradients(model, NAMES[family], data, squares=True)
    same(found.sums, by_autograd(family, data))
    same(found.squares, by_autograd(family, data, squares=True))
    assert found.batches == 3
    torch.testing.assert_close(found.fisher(NAMES[family][0]), found.squares[NAMES[family][0]] / 3)
    for name, value in found.sums.items():
        module = model.get_submodule(name)
        assert value.dtype == torch.float32 and value.shape == (module.weight.T.shape if family == "gpt2" else module.weight.shape)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_sum_does_not_depend_on_the_batches(family):
    one, whole = (collect_gradients(build(family), NAMES[family], batches(size=size)).sums for size in (1, 6))
    same(one, whole)


def test_per_sample_squares_are_those_of_single_rows():
    data = batches(size=3)
    found = collect_gradients(build("llama"), NAMES["llama"], data, sums=False, squares=True, per_sample=True)
    same(found.squares, by_autograd("llama", batches(size=1), squares=True))
    assert not found.sums and found.batches == 6
    whole = collect_gradients(build("llama"), NAMES["llama"], data, squares=True)
    assert not torch.allclose(whole.squares["lm_head"], found.squares["lm_head"], rtol=0.1)


def test_a_loss_of_ones_own():
    def loss(model, batch):
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits.square().mean()

    found = collect_gradients(small_models.model("llama"), NAMES["llama"], batches(), loss=loss)
    same(found.sums, by_autograd("llama", batches(), loss=loss))
    with pytest.raises(ValueError, match="a batch holds input_ids; it needs labels, or give a loss"):
        collect_gradients(small_models.model("llama"), NAMES["llama"], [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_a_function_that_runs_everything_itself():
    model, data = small_models.model("llama"), batches()

    def run():
        for batch in data:
            summed_loss(model, batch).backward()

    same(collect_gradients(model, NAMES["llama"], run).sums, by_autograd("llama", data))
    with pytest.raises(ValueError, match="a cache is kept for batches"):
        collect_gradients(model, NAMES["llama"], run, cache="somewhere")


def test_the_model_is_left_as_it_was():
    model = small_models.model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, 3.0)
    before = copy.deepcopy(model.state_dict())
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    state = torch.get_rng_state()

    def drawing():  # as a DataLoader does for the seeds of its workers
        for batch in batches():
            torch.rand(1)
            yield batch

    collect_gradients(model, NAMES["llama"], drawing())
    with pytest.raises(ValueError):
        collect_gradients(model, NAMES["llama"], batches(), loss=lambda m, b: m(**b).loss * torch.nan * torch.rand(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == [p.requires_grad for p in model.parameters()] and modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"] and bool((model.model.norm.weight.grad == 3).all())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            for p in self.parameters():
                p.data = torch.randn(p.shape, generator=generator) * 0.5

        def forward(self, x, replay):
            for layer in self.layers:
                x = checkpoint(lambda y, layer=layer: layer(y).tanh(), x, use_reentrant=reentrant) if replay else layer(x).tanh()
            return x

    def loss(model, batch):
        x = batch["x"].requires_grad_() if reentrant else batch["x"]
        return model(x, batch["replay"]).square().sum()

    data = [{"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(n)), "replay": torch.tensor(False)} for n in range(2)]
    names = [f"layers.{n}" for n in range(3)]
    expected = collect_gradients(Blocks(), names, data, squares=True, loss=loss)
    found = collect_gradients(Blocks(), names, [batch | {"replay": torch.tensor(True)} for batch in data], squares=True, loss=loss)
    same(found.sums, expected.sums)
    same(found.squares, expected.squares)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        for p in self.parameters():
            p.data = torch.linspace(-1, 1, p.numel()).view(p.shape)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


def test_a_layer_that_runs_twice_counts_with_the_sum():
    model, x = Twice(), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    expected = model.layer.weight.grad.clone()
    found = collect_gradients(Twice(), ["layer"], [{"x": x}], squares=True, loss=lambda m, b: m(b["x"]).square().sum())
    same(found.sums, {"layer": expected})
    same(found.squares, {"layer": expected.square()})
    with pytest.raises(ValueError, match="layer runs several times in a forward"):
        collect_gradients(Twice(), ["layer"], [{"x": x}], per_sample=True, loss=lambda m, b: m(b["x"]).square().sum())
    with pytest.raises(ValueError, match="unused got no gradient; the loss does not depend on it"):
        collect_gradients(Twice(), ["layer", "unused"], [{"x": x}], loss=lambda m, b: m(b["x"]).square().sum())


def test_one_gradient_at_a_time_is_alive():
    """Counted inside backward, by tensors of the weights' shape that are neither parameters nor sums."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(67, 67, bias=False) for _ in range(6)))

        def forward(self, x):
            return self.layers(x)

    model, most = Chain(), []
    known = {id(p) for p in model.parameters()}

    class Counting(GradientCollector):
        def _add(self, name, gradient):
            sums = {id(value) for value in self.found.sums.values()}
            alive = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == (67, 67) and id(t) not in known | sums]
            most.append(len(alive))
            super()._add(name, gradient)

    with Counting({f"layers.{n}": layer for n, layer in enumerate(model.layers)}) as collector:
        for p in model.parameters():
            p.requires_grad_(False)
        model(torch.randn(3, 67, generator=torch.Generator().manual_seed(0))).sum().backward()
        collector.step()
    assert most == [1] * 6


def test_a_half_precision_model_is_summed_in_float32():
    data = batches(rows=20, size=1)
    found = collect_gradients(small_models.model("llama", torch.bfloat16), NAMES["llama"], data).sums
    exact = collect_gradients(small_models.model("llama"), NAMES["llama"], data).sums
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert float((value - exact[name]).norm() / exact[name].norm()) < 0.05


def test_what_is_stored_is_not_computed_again_and_a_run_that_broke_off_goes_on(tmp_path):
    data, file = batches(), tmp_path / "deep" / "gradients.safetensors"
    whole = collect_gradients(small_models.model("llama"), NAMES["llama"], data, squares=True)
    seen = []

    def loss(model, batch, stop=None):
        seen.append(batch["input_ids"])
        if len(seen) == stop:
            raise InterruptedError
        return summed_loss(model, batch)

    with pytest.raises(InterruptedError):
        collect_gradients(small_models.model("llama"), NAMES["llama"], data, squares=True, loss=lambda m, b: loss(m, b, 3), cache=file, save_every=1)
    seen.clear()
    again = collect_gradients(small_models.model("llama"), NAMES["llama"], data, squares=True, loss=loss, cache=file)
    assert len(seen) == 1 and torch.equal(seen[0], data[2]["input_ids"])
    assert again.batches == 3 and all(torch.equal(getattr(again, kind)[n], v) for kind in ("sums", "squares") for n, v in getattr(whole, kind).items())
    seen.clear()
    stored = collect_gradients(small_models.model("llama"), NAMES["llama"], data, squares=True, loss=loss, cache=file)
    assert not seen and torch.equal(stored.sums["lm_head"], whole.sums["lm_head"])
    loaded = Gradients.load(file)
    assert loaded.batches == 3 and torch.equal(loaded.squares["lm_head"], whole.squares["lm_head"])
    other = small_models.model("llama")
    other.lm_head.weight.data += 1
    for model, names, rows in ((other, NAMES["llama"], data), (None, NAMES["llama"][:2], data), (None, NAMES["llama"], batches(seed=1))):
        seen.clear()
        made = collect_gradients(model or small_models.model("llama"), names, rows, squares=True, loss=loss, cache=file)
        assert len(seen) == 3 and made.sums.keys() == set(names)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_sum_is_that_of_all_processes(tmp_path):
    code = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_gradients import NAMES, batches, build
from echelon.calibrate import collect_gradients
rank = int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
collect_gradients(build("llama"), NAMES["llama"], batches(rows=8)[rank::2], squares=True).save(f"{sys.argv[2]}/{rank}")
torch.distributed.destroy_process_group()
"""
    here, tests = Path(__file__).parent, Path(__file__).parents[1]
    both = [
        subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tests)!r})\n" + code, str(here), str(tmp_path), str(rank)])
        for rank in (0, 1)
    ]  # fmt: skip
    assert [process.wait(120) for process in both] == [0, 0]
    whole = collect_gradients(build("llama"), NAMES["llama"], batches(rows=8), squares=True)
    for found in (Gradients.load(tmp_path / str(rank)) for rank in (0, 1)):
        same(found.sums, whole.sums)
        same(found.squares, whole.squares)
        assert found.batches == 4


def test_what_goes_wrong_is_named(tmp_path):
    model, data = small_models.model("llama"), batches()
    with pytest.raises(ValueError, match="the model has no module model.layers.7"):
        collect_gradients(model, ["model.layers.7"], data)
    with pytest.raises(ValueError, match="there are no batches"):
        collect_gradients(model, NAMES["llama"], [])
    with pytest.raises(ValueError, match="the gradient of lm_head holds NaN or infinity"):
        collect_gradients(model, NAMES["llama"], data, squares=True, loss=lambda m, b: summed_loss(m, b) * torch.nan)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="cannot read gradients from .*text"):
        collect_gradients(model, NAMES["llama"], data, cache=tmp_path / "text")
    found = collect_gradients(model, NAMES["llama"], data)
    with pytest.raises(ValueError, match="there are no squared gradients of lm_head; collect them with squares=True"):
        found.fisher("lm_head")

"""What DyLoRA promises beyond the adapter contract: one set of factors for every rank, and training that touches only what was drawn."""

import dataclasses
import itertools

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from torch import nn

import small_models
from echelon.adapt import AdapterCallback, DyLoraConfig, rank_report

R = 6
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Toy(nn.Module):
    """One linear layer from 7 to 5."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(7, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x):
        return self.layer(x)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = noise(11, 7)


def toy(shaken=True, **knobs):
    """A wrapped toy, its layer, and its factors A (r, in), B (out, r)."""
    model = get_peft_model(Toy(), DyLoraConfig(**({"r": 5, "lora_alpha": 12.0, "target_modules": ["layer"]} | knobs)))
    layer = model.base_model.model.layer
    A, B = layer.echelon_dylora_A["default"], layer.echelon_dylora_B["default"]
    if shaken:
        A.data.copy_(noise(*A.shape, seed=2))
        B.data.copy_(noise(*B.shape, seed=3))
    return model, layer, A, B


def expected(A, B, rank, alpha=12.0):
    return (Toy()(X) + alpha / rank * X @ A[:rank].T @ B[:, :rank].T).detach()


def test_every_rank_uses_its_first_components_over_that_rank_in_training_and_evaluation():
    model, _, A, B = toy()
    for rank in (3, 1, 5, 2, 4):
        model.set_rank(rank)
        found = [model.train()(X), model.eval()(X)]
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], expected(A, B, rank), rtol=1e-5, atol=1e-5)
    model.set_rank(5)
    lora = get_peft_model(Toy(), LoraConfig(r=5, lora_alpha=12, target_modules=["layer"]))
    stock = lora.base_model.model.layer
    stock.lora_A["default"].weight.data, stock.lora_B["default"].weight.data = A.data, B.data
    torch.testing.assert_close(model(X), lora(X), rtol=1e-6, atol=1e-6)


def test_a_fresh_adapter_adds_nothing_at_any_rank_and_begins_as_lora_does():
    model, _, A, _ = toy(shaken=False)
    for rank in range(1, 6):
        model.set_rank(rank)
        assert torch.equal(model(X), Toy()(X))
    assert 0.7 * 7**-0.5 < A.abs().max().item() <= 7**-0.5 and abs(A.mean().item()) < 0.1  # Kaiming with a = sqrt(5)
    random, *_ = toy(shaken=False, init_weights=False)
    assert not torch.equal(random(X), Toy()(X))


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_only_the_last_component_gets_a_gradient_or_all_up_to_it(rank):
    for update, trained in (("last", {rank - 1}), ("all", set(range(rank)))):
        model, _, A, B = toy(update=update)
        model.set_rank(rank)
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        assert {i for i in range(5) if A.grad[i].any()} == {i for i in range(5) if B.grad[:, i].any()} == trained
        # Against autograd on the formula, with what is constant taken out of the graph.
        a, b, y = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_(), X.clone().requires_grad_()
        (nn.functional.linear(y, Toy().layer.weight, Toy().layer.bias) + 12 / rank * y @ a[:rank].T @ b[:, :rank].T).square().sum().backward()
        index = sorted(trained)
        torch.testing.assert_close(A.grad[index], a.grad[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(B.grad[:, index], b.grad[:, index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)  # through all components


def test_a_merged_layer_keeps_to_the_rank_that_it_was_merged_at():
    model, layer, A, B = toy()
    whole = layer.base_layer.weight.clone()
    model.set_rank(2)
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, whole + 12 / 2 * B[:, :2] @ A[:2])
    torch.testing.assert_close(model(X), expected(A, B, 2), rtol=1e-5, atol=1e-5)
    model.set_rank(4)  # which unmerges
    torch.testing.assert_close(layer.base_layer.weight, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(X), expected(A, B, 4), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    A.data += 1  # trained on since
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, whole, rtol=1e-6, atol=1e-6)
    model.set_rank(3)
    kept = expected(A, B, 3)
    torch.testing.assert_close(model.merge_and_unload()(X), kept, rtol=1e-5, atol=1e-5)


def trained_llama(**knobs):
    model = get_peft_model(small_models.model("llama"), DyLoraConfig(**({"r": R, "target_modules": ["q_proj", "k_proj", "down_proj"]} | knobs))).eval()
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(**small_models.batch("llama")).logits


@pytest.mark.parametrize("knobs", [{}, {"rank_pattern": {"k_proj": 3, "down_proj": 9}, "alpha_pattern": {"q_proj": 5.0}}])
def test_an_export_is_a_plain_lora_of_that_rank(knobs, tmp_path):
    model = trained_llama(**knobs)
    whole = logits(model)
    for rank in (1, 4, R):
        model.base_model.export_lora(rank, tmp_path / str(rank))
        assert torch.equal(logits(model), whole)
        lora = PeftModel.from_pretrained(small_models.model("llama"), tmp_path / str(rank))
        assert lora.peft_config["default"].peft_type.value == "LORA"
        model.set_rank(rank)
        torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(lora), logits(model))
        model.set_rank(R)
    sizes = {n.split(".")[-3]: m.weight.shape[0] for n, m in lora.named_modules() if n.endswith("lora_A.default")}
    assert set(sizes.values()) == ({6, 3, 9} if knobs else {6})
    with pytest.raises(ValueError, match="rank is 7; it must be a whole number in 1..6"):
        model.base_model.export_lora(7, tmp_path / "7")


def test_other_ranks_of_a_layer_are_scaled_up_and_every_component_is_trained_by_some_rank():
    model = trained_llama(rank_pattern={"k_proj": 3, "down_proj": 9})
    layers = dict(model.base_model.layers())
    own = {"q_proj": R, "k_proj": 3, "down_proj": 9}
    trained = {name: [] for name in layers}
    for rank in range(1, R + 1):
        model.set_rank(rank)
        for name, layer in layers.items():
            assert layer.spans["default"][1] == -(-rank * own[name.split(".")[-1]] // R)
            trained[name] += range(*layer.spans["default"])
    assert all(found == list(range(own[name.split(".")[-1]])) for name, found in trained.items())


def test_the_rank_in_use_is_saved(tmp_path):
    model = trained_llama(rank_pattern={"k_proj": 3})
    model.set_rank(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(small_models.model("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize("make", [
    lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5), lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, weight_decay=0.1),
])  # fmt: skip
def test_the_optimizer_moves_only_what_was_drawn(make):
    for masked in (True, False):
        model, layer, A, B = toy(mask_optimizer=masked)
        tuner = model.base_model
        optimizer = make([A, B])
        tuner.begin_training(optimizer)
        for step in range(12):
            tuner.begin_step(step)
            low, high = layer.spans["default"]
            assert high == low + 1
            before = [p.detach().clone() for p in (A, B)]
            optimizer.zero_grad()
            (model(X) - 1).square().mean().backward()
            optimizer.step()
            others = [i for i in range(5) if i != low]
            still = torch.equal(A[others], before[0][others]) and torch.equal(B[:, others], before[1][:, others])
            assert still == masked
            assert not torch.equal(A[low], before[0][low]) and not torch.equal(B[:, low], before[1][:, low])
            tuner.end_step(step + 1)
            assert layer.spans["default"] == (4, 5)
        tuner.end_training()
        before = A.detach().clone()
        model.set_rank(1)
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        assert not torch.equal(A[4], before[4])  # no longer masked


def test_moments_of_what_was_not_drawn_stay():
    """A component that is drawn again goes on as if the steps between had not been, but for the count of steps."""
    model, _, A, B = toy(r=2)
    optimizer = torch.optim.SGD([A, B], lr=0.01, momentum=0.9)
    expected_momentum = torch.zeros_like(A)
    model.base_model.begin_training(optimizer)
    for rank in (1, 2, 2, 2, 1):
        model.set_rank(rank)
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        expected_momentum[rank - 1] = 0.9 * expected_momentum[rank - 1] + A.grad[rank - 1]
        torch.testing.assert_close(optimizer.state[A]["momentum_buffer"], expected_momentum)


def test_one_rank_a_step_that_depends_on_the_seed_and_the_step_alone():
    first, again = (DyLoraConfig(r=8, target_modules=["q"]) for _ in range(2))
    drawn = [first.draw(step) for step in range(200)]
    assert drawn == [again.draw(step) for step in range(200)] and again.draw(150) == drawn[150]
    assert drawn != [dataclasses.replace(first, seed=1).draw(step) for step in range(200)]
    model = trained_llama()
    torch.manual_seed(0)
    rank = model.base_model.sample_rank(3)
    assert {layer.spans["default"][1] for _, layer in model.base_model.layers()} == {rank} == {DyLoraConfig(r=R, target_modules=["q"]).draw(3)}
    assert model.peft_config["default"].active_rank == R


@pytest.mark.parametrize(("knobs", "legal", "weights"), [
    ({"r": 8}, range(1, 9), [1] * 8), ({"r": 6, "r_min": 3, "rank_distribution": [1, 0, 2, 5]}, [3, 4, 5, 6], [1, 0, 2, 5]),
    ({"r": 8, "rank_step": 2, "r_min": 3}, [4, 6, 8], [1, 1, 1]),
])  # fmt: skip
def test_ranks_are_drawn_as_often_as_they_should_be(knobs, legal, weights):
    config = DyLoraConfig(target_modules=["q"], **knobs)
    drawn = [config.draw(step) for step in range(10_000)]
    counts = [drawn.count(rank) for rank in legal]
    assert sum(counts) == 10_000
    share = [(count, weight) for count, weight in zip(counts, weights, strict=True) if weight or count]
    assert chisquare([c for c, _ in share], [10_000 * w / sum(weights) for _, w in share]).pvalue > 1e-3


def test_a_step_of_several_ranks_trains_as_many_components():
    model, layer, *_ = toy(r=4, rank_step=2)
    for rank, span in ((4, (2, 4)), (2, (0, 2)), (3, (2, 3)), (1, (0, 1))):
        model.set_rank(rank)
        assert layer.spans["default"] == span
    model, layer, *_ = toy(r_min=3)
    model.set_rank(3)
    assert layer.spans["default"] == (0, 3)  # else the first two would never be trained


@pytest.mark.parametrize(("knobs", "said"), [
    ({"r_min": 0}, "r_min is 0; it must be a whole number in 1..8"), ({"r_min": 9}, "r_min is 9; it must be a whole number in 1..8"),
    ({"active_rank": 0}, "active_rank is 0"), ({"active_rank": 9}, "active_rank is 9; it must be a whole number in 1..8"), ({"update": "first"}, "last, all"),
    ({"rank_step": 3}, "rank_step is 3; it must divide r, which is 8"), ({"rank_distribution": "normal"}, "it must be one of uniform"),
    ({"rank_distribution": [1, 2]}, "has 2 weights; it must have 8"), ({"rank_distribution": [1] * 7 + [-1]}, "rank_distribution is -1"),
    ({"rank_distribution": [0] * 8}, "one weight at least must be above 0"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        DyLoraConfig(target_modules=["q"], **knobs)


def test_bad_ranks_name_the_legal_ones():
    model, *_ = toy()
    for rank in (0, 6, -1, 2.0, True):
        with pytest.raises(ValueError, match="adapter default can be used at every rank in 1..5"):
            model.set_rank(rank)
    with pytest.warns(UserWarning, match="r is 6; layer is 5 x 7, so more than 5 adds nothing"):
        toy(r=6)


def test_a_report_gives_the_metric_at_every_rank_and_changes_nothing():
    model, _, A, B = toy()
    model.set_rank(4)

    def metric(made):
        return made(X).sum().item()

    found = rank_report(model, metric)
    assert list(found) == [1, 2, 3, 4, 5]
    for rank, value in found.items():
        assert value == pytest.approx(float(expected(A, B, rank).sum()), rel=1e-4)
    assert model.peft_config["default"].active_rank == 4 and metric(model) == found[4]
    assert rank_report(model, metric, [2, 5]) == {2: found[2], 5: found[5]}
    with pytest.raises(ZeroDivisionError):
        rank_report(model, lambda _: 1 / 0)
    assert metric(model) == found[4]
    with pytest.raises(ValueError, match="without DyLoRA adapters"):
        rank_report(Toy(), metric)


def test_trainer_draws_once_for_all_batches_of_a_step_and_evaluates_at_the_active_rank(tmp_path):
    model = get_peft_model(small_models.model("llama"), DyLoraConfig(r=R, target_modules=["q_proj", "down_proj"]))
    layer = next(layer for _, layer in model.base_model.layers())
    seen = {True: [], False: []}
    layer.register_forward_hook(lambda module, *_: seen[module.training].append(module.spans["default"][1]))
    rows = [{"input_ids": row, "labels": row} for row in torch.tensor(small_models.data("llama", rows=8, length=10))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, weight_decay=0.1, gradient_checkpointing=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[AdapterCallback()]).train()
    config = model.peft_config["default"]
    forwards = len(seen[True]) // 6  # two batches, and their recomputation
    assert forwards in (2, 4) and seen[True] == [config.draw(step) for step in range(6) for _ in range(forwards)]
    assert set(seen[False]) == {R}


def test_small_ranks_are_good_where_a_truncated_lora_is_not():
    """A regression on a map of rank five: the loss falls with the rank, and rank one beats the first component of a LoRA of the same training."""
    target = noise(5, 5, seed=7) @ noise(5, 7, seed=8) * 0.4
    x = noise(200, 7, seed=9)
    base = Toy()(x).detach()
    goal = base + x @ target.T

    def losses(draws):
        model, _, A, B = toy(shaken=False, update="all", lora_alpha=1.0)
        tuner, optimizer = model.base_model, torch.optim.Adam([A, B], lr=0.02)
        tuner.begin_training(optimizer)
        for step in range(1500):
            if draws:
                tuner.begin_step(step)
            optimizer.zero_grad()
            (model(x) - goal).square().mean().backward()
            optimizer.step()
        return list(rank_report(model, lambda made: (made(x) - goal).square().mean().item()).values())

    nested, lora = losses(True), losses(False)
    assert all(after <= before * 1.05 for before, after in itertools.pairwise(nested))
    assert nested[0] < 0.8 * lora[0] and nested[0] < 0.9 * (base - goal).square().mean()

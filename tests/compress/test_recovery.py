"""The recovery loop against one written out, and what it must leave alone."""

import math

import pytest
import torch

import small_models
import tiny
from echelon.compress import LoRD, low_rank_parameters, recover, select_trainable
from echelon.compress.recovery import next_token_loss
from echelon.errors import UserError


def rate(step, steps, warm):
    """Linear up to 1 at step ``warm - 1``, then a half cosine from 1 towards 0.1."""
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def test_it_takes_the_steps_of_adamw_under_the_schedule():
    data, steps, warm = small_models.data("llama", rows=3), 8, 3
    model, wanted = small_models.model("llama"), small_models.model("llama")
    ids = torch.tensor(data)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1.0, weight_decay=0.1)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * rate(step, steps, warm)
        logits = wanted(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seen = []
    told = recover(model, data, steps=steps, learning_rate=1e-3, warmup=warm, weight_decay=0.1, batch_size=3, on_progress=seen.append)
    assert [entry["loss"] for entry in seen] == pytest.approx(losses, rel=1e-4)
    assert [(entry["step"], entry["done"], entry["of"]) for entry in seen] == [("recovery", i + 1, steps) for i in range(steps)]
    for (name, found), expected in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4, msg=name)
    assert told["tokens"] == steps * ids.numel()
    assert recover(model, [{"input_ids": ids}], steps=2, batch_size=3)["tokens"] == 2 * ids.numel()
    assert told["loss_first"] == pytest.approx(losses[0], rel=1e-4)
    assert told["loss_last"] == pytest.approx(losses[-1], rel=1e-4)
    assert told["trained_parameters"] == sum(p.numel() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_small_steps_are_not_lost_in_bfloat16():
    """The gradient is constant, so AdamW moves by the learning rate at each step; one alone is far below the spacing of bfloat16 at 3."""
    model, steps = small_models.model("llama", torch.bfloat16), 60
    weight = model.model.norm.weight
    with torch.no_grad():
        weight.fill_(3.0)
    recover(
        model, small_models.data("llama"), steps=steps, learning_rate=1e-3, warmup=1, trainable=lambda name: name == "model.norm.weight",
        loss=lambda model, batch: model.model.norm.weight.float().sum(),
    )  # fmt: skip
    expected = 3.0 - 1e-3 * sum(rate(step, steps, 1) for step in range(steps))
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight, torch.full_like(weight, expected))
    assert float(weight[0]) < 2.98


def test_pads_do_not_count():
    model, batch = small_models.model("gpt2"), small_models.batch("gpt2")
    with torch.no_grad():
        logits = model(**batch).logits.log_softmax(-1)
        found = float(next_token_loss(model, batch))
    picked = [-float(logits[row, t - 1, batch["input_ids"][row, t]]) for row, length in ((0, 10), (1, 7)) for t in range(1, length)]
    assert found == pytest.approx(sum(picked) / len(picked), rel=1e-5)


def test_rows_of_unequal_length_are_padded_and_each_epoch_shows_each_once():
    data, shown = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]], []

    def loss(model, batch):
        shown.extend((tuple(ids.tolist()), int(mask.sum())) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True))
        return next_token_loss(model, batch)

    recover(small_models.model("llama"), data, steps=4, batch_size=2, loss=loss)
    rows = [ids[:length] for ids, length in shown]
    assert sorted(rows[:4]) == sorted(rows[4:]) == sorted(map(tuple, data))
    assert all(not any(ids[length:]) for ids, length in shown)


def test_the_seed_rules_order_and_dropout_and_the_global_state_is_left_alone():
    def run(seed):
        model = small_models.model("gpt2")
        assert model.config.resid_pdrop > 0
        recover(model, small_models.data("gpt2"), steps=3, learning_rate=1e-2, seed=seed)
        return model.state_dict()

    state = torch.random.get_rng_state()
    first = run(0)
    torch.randn(1)
    second, other = run(0), run(1)
    torch.random.set_rng_state(state)
    run(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_only_what_is_chosen_changes_and_the_loss_falls():
    made = LoRD(rank=0.4, round_rank=1).compress(small_models.model("llama"), small_models.data("llama"))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    chosen = low_rank_parameters(made.model, norms=False)
    assert chosen == {name for name in before if ".up." in name or ".down." in name}
    # Rows that repeat one token can be learned by the MLPs alone.
    told = recover(made.model, [[t] * 20 for t in range(4, 20)], steps=40, learning_rate=1e-2, trainable=chosen.__contains__)
    assert {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])} == chosen
    assert told["loss_last"] < 0.7 * told["loss_first"]
    assert told["trained_parameters"] == sum(before[name].numel() for name in chosen)


def test_text_needs_a_tokenizer_and_is_cut_to_the_context():
    model = small_models.model("llama")  # its context is 128
    with pytest.raises(ValueError, match="need a tokenizer"):
        recover(model, ["w1 w2"], steps=1)
    lengths = []
    recover(
        model, [" ".join(f"w{i % 30}" for i in range(400))], tiny.tokenizer(), steps=1,
        loss=lambda model, batch: lengths.append(batch["input_ids"].shape[1]) or next_token_loss(model, batch),
    )  # fmt: skip
    assert lengths == [128]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"steps": 0}, "steps is 0"), ({"learning_rate": 0}, "learning_rate is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"seqlen": 1}, "seqlen is 1"),
        ({"weight_decay": -1}, "weight_decay is -1"), ({"warmup": 9}, "warmup is 9"), ({"trainable": lambda name: False}, "no parameter is trainable"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, error):
    with pytest.raises(ValueError, match=error):
        recover(small_models.model("llama"), small_models.data("llama"), **({"steps": 2} | arguments))


def test_a_loss_that_is_not_finite_stops_it():
    model = small_models.model("llama")
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        recover(model, small_models.data("llama"), steps=2, loss=lambda model, batch: next_token_loss(model, batch) * float("nan"))
    assert not model.training


def test_select_trainable_switches_on_as_well_as_off():
    model = small_models.model("llama").requires_grad_(False)
    assert select_trainable(model, lambda name: name.endswith("q_proj.weight")) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert sum(p.requires_grad for p in model.parameters()) == 2

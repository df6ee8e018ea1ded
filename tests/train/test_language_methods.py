"""Every registered optimizer and parameterisation trains by :func:`fit`, and broken off it goes on to the very same weights."""

import dataclasses
import json

import pytest
import torch
import transformers

import small_models
import tiny
from echelon.registry import build, cards, get
from echelon.train.language import Training, fit

# Settings under which something happens within a few steps on tiny models; a method gets those that it has a field for.
SMALL = {
    "rank": 4, "r": 4, "update_proj_gap": 3, "refactor_every": 3, "reset_every": 3, "recovery_steps": 2, "period": 2, "steps_per_iteration": 3,
    "warmup_per_iteration": 1, "mode": "reparam_optim",
}  # fmt: skip
METHODS = [(card.name, card.kind) for kind in ("optimizer", "layer") for card in cards(kind)]


class Broken(Exception):
    """Stands in for a crash."""


def breaks(entry):
    if entry["step"] == 5:
        raise Broken


def texts():
    return [" ".join(tiny.WORDS[n] for n in row) for row in small_models.data("gpt2", rows=12)]


@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_it_learns_goes_on_after_a_crash_and_leaves_a_folder_that_loads(tmp_path, name, kind):
    fields = {field.name for field in dataclasses.fields(get(name, kind))}

    def run(folder, **more):
        method = build(name, kind, {key: value for key, value in SMALL.items() if key in fields})
        model = small_models.model("gpt2")  # with dropout, and with matrices that are stored transposed
        return model, fit(model, tiny.tokenizer(), texts(), tmp_path / folder, method, Training(steps=8, batch_size=4, seqlen=12, save_every=4), **more)

    unbroken, told = run("a", held_out=texts())
    with pytest.raises(Broken):
        run("b", held_out=texts(), on_step=breaks)
    model, again = run("b", held_out=texts())
    expected, found = unbroken.state_dict(), model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert again["held_out"] == told["held_out"]
    losses = [[json.loads(line)["loss"] for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()] for folder in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.allclose(small_models.logits(made, "gpt2"), small_models.logits(model, "gpt2"), atol=1e-6)

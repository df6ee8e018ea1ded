"""What every editor owes, whatever it edits: the model as it was outside of what it returns, files that are read again, and the caller's randomness."""

import pytest
import torch
from peft import PeftModel

import small_models
from echelon import registry

EDITORS = {"loku": {"r": 2, "epochs": 1, "batch_size": 3, "micro_batch_size": 3, "learning_rate": 1e-2}}  # small enough for tiny models
CASES = [(card.name, family) for card in registry.cards("editor") for family in ("llama", "gpt2", "qwen2", "gpt_neox")]


def editor(name, **knobs):
    return registry.build(name, "editor", EDITORS[name] | knobs)


def rows(seed):
    return [{"input_ids": row} for row in small_models.data("llama", 3, 8, seed)]


def logits(model, family):
    with torch.no_grad():
        return small_models.logits(model, family).float()


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_it_returns_is_changed_is_read_again_and_leaves_the_base_bit_for_bit(name, family, tmp_path):
    model, noise = small_models.model(family), torch.random.get_rng_state()
    made = editor(name).edit(model, rows(1), rows(2))
    assert torch.equal(torch.random.get_rng_state(), noise)
    after, before = logits(made.model, family), logits(small_models.model(family), family)
    assert after.isfinite().all() and not torch.allclose(after, before, atol=1e-3)
    made.save(tmp_path / "out")
    again = PeftModel.from_pretrained(small_models.model(family), tmp_path / "out")
    torch.testing.assert_close(logits(again, family), after, rtol=1e-5, atol=1e-5)
    plain, original = made.model.unload(), small_models.model(family)
    assert plain.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in original.state_dict().items())


@pytest.mark.parametrize("name", EDITORS)
def test_half_precision_comes_out_near_what_was_trained(name):
    seen = []
    made = editor(name).edit(small_models.model("llama", torch.bfloat16), rows(1), rows(2), on_epoch=lambda m, _: seen.append(logits(m, "llama")))
    moved = (seen[-1] - logits(small_models.model("llama", torch.bfloat16), "llama")).norm()
    assert (logits(made.model, "llama") - seen[-1]).norm() < 0.5 * moved
    assert {p.dtype for p in made.model.unload().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", EDITORS)
def test_the_same_seed_gives_the_same_and_another_one_another(name):
    made = [logits(editor(name).edit(small_models.model("llama"), rows(1), rows(2) + rows(3), seed=seed).model, "llama") for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", EDITORS)
def test_bad_requests_are_one_clear_error_and_the_model_stays_plain(name):
    model = small_models.model("llama")
    for forget, retain in (([], rows(2)), (rows(1), []), ([{"nothing": 1}], rows(2))):
        with pytest.raises(ValueError, match="forget|retain"):
            editor(name).edit(model, forget, retain)
    with pytest.raises(ValueError, match="target_modules"):
        editor(name, target_modules=["q_prj"]).edit(model, rows(1), rows(2))
    assert model.state_dict().keys() == small_models.model("llama").state_dict().keys()

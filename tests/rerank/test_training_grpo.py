"""GRPO: advantages, loss and log-probabilities against plain computations, and a tiny model that earns more and more."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import tiny
from echelon.errors import UserError
from echelon.rerank.training import GRPO, group_advantages, grpo_loss, token_log_probs
from echelon.rerank.training.policy import Completion, sample

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def model(family="llama"):
    with torch.random.fork_rng():
        made = tiny.FAMILIES[family]().eval()
    made.load_state_dict(tiny.model(family).state_dict())
    return made


def lora(family="llama", **others):
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}
    return LoraConfig(r=8, lora_alpha=16, target_modules=targets[family], task_type="CAUSAL_LM", **others)


def adapted(family="llama"):
    """With an adapter that says something."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model(family), lora(family, init_lora_weights=False)).eval()


def test_advantages_are_deviations_from_the_groups_mean_and_exactly_zero_where_all_are_equal():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [0, 3, 1, 2], [0, 0, 0, 0]], dtype=torch.float64)
    found = group_advantages(rewards).numpy()
    for row in (0, 2):
        values = rewards[row].numpy()
        np.testing.assert_allclose(found[row], (values - values.mean()) / (values.std(ddof=1) + 1e-4))
    assert (found[[1, 3]] == 0).all()


def test_the_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    new, old, reference = (-3 * torch.rand(3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    advantages, mask = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    losses, told = grpo_loss(new, old, reference, advantages, mask, epsilon=0.2, beta=0.3)
    for row in range(3):
        tokens, apart, clipped, count = 0.0, 0.0, 0, int(mask[row].sum())
        for place in range(count):
            ratio = math.exp(new[row, place] - old[row, place])
            bounded, gain = min(max(ratio, 0.8), 1.2), advantages[row].item()
            kl = math.exp(reference[row, place] - new[row, place]) - (reference[row, place] - new[row, place]).item() - 1
            tokens += -min(ratio * gain, bounded * gain) + 0.3 * kl
            clipped += ratio * gain > bounded * gain
            apart += kl
        assert losses[row].item() == pytest.approx(tokens / count)
        assert told["kl"][row].item() == pytest.approx(apart / count) and told["clipped"][row].item() == pytest.approx(clipped / count)


def test_without_a_spread_of_rewards_only_the_distance_from_the_reference_pulls():
    made = adapted()
    rows = [([2, 5, 6], [7, 8, 1]), ([2, 9], [10, 1])]

    def gradient(beta):
        made.zero_grad()
        new, mask = token_log_probs(made, rows)
        with torch.no_grad(), made.disable_adapter():
            reference, _ = token_log_probs(made, rows)
        grpo_loss(new, new.detach(), reference if beta else None, torch.zeros(2), mask, beta=beta)[0].sum().backward()
        return sum(p.grad.abs().sum().item() for p in made.parameters() if p.requires_grad)

    assert gradient(0.0) == 0 and gradient(0.04) > 0


def test_on_its_own_completions_the_gradient_is_the_policys():
    made = adapted()
    rows, advantages = [([2, 5, 6], [7, 8, 1]), ([2, 9], [10, 1])], torch.tensor([1.0, -2.0])
    new, mask = token_log_probs(made, rows)
    grpo_loss(new, new.detach(), None, advantages, mask)[0].sum().backward()
    found = [p.grad.clone() for p in made.parameters() if p.requires_grad]
    made.zero_grad()
    new, mask = token_log_probs(made, rows)
    (-(advantages * (new * mask).sum(1) / mask.sum(1))).sum().backward()
    for a, b in zip(found, (p.grad for p in made.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_log_probabilities_are_those_of_each_row_read_alone(family):
    made = adapted(family)
    rows = [([2, 5, 6], [7, 8, 1]), ([2, 9], [10, 1]), ([4, 11, 12, 13, 14], [3, 3, 3, 3])]
    found, mask = token_log_probs(made, rows, temperature=0.7)
    assert found.shape == (3, 4) and mask.tolist() == [[True] * n + [False] * (4 - n) for n in (3, 2, 4)] and (found[~mask] == 0).all()
    for row, (prompt, written) in enumerate(rows):
        with torch.no_grad():
            logits = made(input_ids=torch.tensor([prompt + written])).logits[0].float() / 0.7
        for place, token in enumerate(written):
            expected = logits[len(prompt) + place - 1].log_softmax(-1)[token]
            torch.testing.assert_close(found[row, place], expected, atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_model_without_its_adapter():
    made, rows = adapted(), [([2, 5, 6], [7, 8, 1]), ([2, 9], [10, 1])]
    with torch.no_grad():
        base = token_log_probs(model(), rows)[0]
        with made.disable_adapter():
            torch.testing.assert_close(token_log_probs(made, rows)[0], base, rtol=0, atol=0)
        assert (token_log_probs(made, rows)[0] - base).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_is_drawn_from_the_model_and_ends_with_the_end(family):
    made, generator = tiny.model(family), torch.Generator().manual_seed(0)
    found = sample(made, [2, 5, 6], 400, 3, 1.0, [1], generator)
    assert all(done.finished == (done.ids[-1] == 1) and 1 not in done.ids[:-1] and (done.finished or len(done.ids) == 3) for done in found)
    with torch.no_grad():
        logits = made(input_ids=torch.tensor([[2, 5, 6]])).logits[0, -1]
        first = logits.softmax(-1)
        likely = int(first.argmax())
        second = made(input_ids=torch.tensor([[2, 5, 6, likely]])).logits[0, -1].softmax(-1)
    assert abs(sum(done.ids[0] == likely for done in found) / 400 - first[likely]) < 0.08
    behind = [done.ids[1] for done in found if done.ids[0] == likely and len(done.ids) > 1]
    assert abs(sum(token == int(second.argmax()) for token in behind) / len(behind) - second.max()) < 0.15
    cold = sample(made, [2, 5, 6], 2, 3, 1e-4, [1], generator)
    with torch.random.fork_rng():
        greedy = made.generate(torch.tensor([[2, 5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert cold[0].ids == cold[1].ids == greedy


PROMPTS = [{"prompt": f"w{i} w{2 * i} w{3 * i}", "wanted": f"w{i}"} for i in range(6)]


def policy():
    """A model that knows nothing: all tokens are about as likely."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny.FAMILIES["qwen2"]().eval()


def whole_lora():
    return LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "lm_head"])


def learn(out, rewards, made=None, adapter="new", data=PROMPTS, seed=0, on_step=None, **others):
    told = {"num_generations": 8, "max_completion_length": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    run = GRPO(**{**told, "max_steps": 4, "beta": 0.01, **others})
    adapter = whole_lora() if adapter == "new" else adapter
    return run.train(made or policy(), tiny.tokenizer(), data, rewards, out, adapter=adapter, seed=seed, on_step=on_step)


def always(completions, **others):
    return [1.0] * len(completions)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "adapter_model.safetensors")


def test_a_tiny_model_learns_what_is_rewarded_and_its_adapter_is_read_by_peft(tmp_path):
    state, seen, made = torch.random.get_rng_state(), [], policy()
    done = learn(tmp_path / "out", always, made, max_steps=18, on_step=seen.append)  # whatever ends in time earns 1
    assert done["first_reward"] < 0.3 and done["last_reward"] > 0.9 and done["steps"] == len(seen) == 18
    assert seen[0]["kl"] == 0 and seen[-1]["kl"] > 0.1 and seen[-1]["truncated"] < 0.1 < seen[0]["truncated"]
    assert [{**line, "of": 18} for line in lines(tmp_path / "out")] == seen
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator must be left alone"
    names = ["adapter_config.json", "adapter_model.safetensors", "log.jsonl", "result.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    again, ids = PeftModel.from_pretrained(policy(), tmp_path / "out").eval(), torch.tensor([[4, 8, 12]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, made(input_ids=ids).logits)
        with again.disable_adapter():
            torch.testing.assert_close(again(input_ids=ids).logits, policy()(input_ids=ids).logits)


def test_rewards_are_added_and_get_the_columns_and_what_is_truncated_earns_nothing(tmp_path, monkeypatch):
    calls = []

    def length(prompts, completions, wanted):
        calls.append((prompts, completions, wanted))
        return [2.0 * len(text) for text in completions]

    written = [Completion([5, 6, 1], True), Completion([7, 8, 9], False), Completion([1], True), Completion([10, 1], True)] * 2
    monkeypatch.setattr("echelon.rerank.training.grpo.sample", lambda *others: written)
    learn(tmp_path / "out", [always, length], max_steps=1)
    [(prompts, completions, wanted)] = calls
    assert completions == ["w1w2", "w3w4w5", "", "w6"] * 4
    assert len(prompts) == 16 and all(prompt.split()[0] == word for prompt, word in zip(prompts, wanted, strict=True))
    assert prompts[:8] == [prompts[0]] * 8 and prompts[8:] == [prompts[8]] * 8 and prompts[0] != prompts[8]
    [line] = lines(tmp_path / "out")
    assert line["truncated"] == 0.25 and line["length"] == 9 / 4 and line["zero_variance"] == 0
    assert line["reward"] == pytest.approx((9 + 0 + 1 + 5) / 4)


def test_groups_of_equal_rewards_are_counted_and_teach_nothing(tmp_path):
    for beta, moves in ((0.0, False), (0.5, True)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            made = get_peft_model(policy(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        before = {name: p.detach().clone() for name, p in made.named_parameters()}
        learn(tmp_path / str(beta), lambda completions, **_: [0.0] * len(completions), made, None, beta=beta, max_steps=2)
        assert [line["zero_variance"] for line in lines(tmp_path / str(beta))] == [1.0, 1.0]
        assert any(not torch.equal(p, before[name]) for name, p in made.named_parameters()) == moves


def test_truncated_completions_may_be_left_out_of_the_loss(tmp_path):
    generous = {"rewards": lambda completions, **_: [float(len(text)) for text in completions], "max_steps": 1, "beta": 0.0}
    learn(tmp_path / "with", **generous)
    learn(tmp_path / "without", **generous, mask_truncated_completions=True)
    with_them, without = lines(tmp_path / "with")[0], lines(tmp_path / "without")[0]
    assert with_them["reward"] == without["reward"] and 0 < without["gradient_norm"] != with_them["gradient_norm"]


def test_later_iterations_count_the_ratio_to_what_was_written(tmp_path):
    learn(tmp_path / "once", always, max_steps=3, epsilon=0.01)
    learn(tmp_path / "often", always, max_steps=3, num_iterations=3, epsilon=0.01)
    assert all(line["clipped"] == 0 for line in lines(tmp_path / "once"))
    assert any(line["clipped"] > 0 for line in lines(tmp_path / "often"))


def test_a_killed_training_goes_on_as_it_would_have_gone(tmp_path):
    learn(tmp_path / "whole", always, max_steps=5)

    def kill(entry):
        if entry["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "killed", always, max_steps=5, save_every=2, on_step=kill)
    with pytest.raises(UserError, match="holds a training with other knobs or data"):
        learn(tmp_path / "killed", always, max_steps=5, save_every=2, seed=1)
    steps = []
    learn(tmp_path / "killed", always, max_steps=5, save_every=2, on_step=lambda entry: steps.append(entry["step"]))
    assert steps == [3, 4, 5] and [line["step"] for line in lines(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        learn(tmp_path / "killed", always, max_steps=5)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    for checkpointing in (False, True):
        learn(tmp_path / str(checkpointing), always, max_steps=2, gradient_checkpointing=checkpointing)
    one, other = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_all_data_are_read_once_an_epoch(tmp_path):
    seen = []

    def watch(prompts, completions, wanted):
        seen.extend(wanted[::8])
        return [0.0] * len(completions)

    learn(tmp_path / "out", watch, max_steps=-1, beta=0.0)
    assert sorted(seen) == sorted(row["wanted"] for row in PROMPTS) and seen != sorted(seen)


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    for others, said in (
        ({"num_generations": 1}, "num_generations is 1"), ({"beta": -1}, "beta is -1"), ({"temperature": 0}, "temperature is 0"),
        ({"epsilon": 1.0}, "epsilon is 1.0"),
        ({"num_generations": 6}, "a step has 64 completions .* must be a multiple of num_generations, which is 6"), ({"max_steps": 0}, "max_steps is 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            GRPO(**others)
    with pytest.raises(UserError, match="there are no prompts to learn from"):
        learn(tmp_path, always, data=[])
    with pytest.raises(UserError, match="the data have rows without a prompt"):
        learn(tmp_path, always, data=[{"text": "w1"}])
    with pytest.raises(UserError, match="the longest prompt has 3 tokens and a completion up to 126; the model takes 128"):
        learn(tmp_path, always, max_completion_length=126)
    with pytest.raises(UserError, match="give either a model that has an adapter, or the config of one"):
        learn(tmp_path, always, adapter=None)
    for bad in (lambda completions, **_: [1.0], lambda completions, **_: [math.nan] * len(completions)):
        with pytest.raises(UserError, match="it must give a finite number for each"):
            learn(tmp_path / "bad", bad)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        far = get_peft_model(policy(), LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    with pytest.raises(UserError, match="the gradient is (nan|inf) at step 1"):
        learn(tmp_path / "far", always, far, None, beta=1e38)
    broken = policy()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="the model's logits are not finite"):
        learn(tmp_path / "nan", always, broken)

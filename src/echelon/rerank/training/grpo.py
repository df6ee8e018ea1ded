"""GRPO: a language model learns from rewards for what it wrote itself, each compared with others for the same prompt. Plain torch and PEFT.

Source: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv 2402.03300; knobs are called as in TRL.
The loss is the paper's: a mean over a completion's tokens, then over completions. The reference is the model without its adapter, so that there is no copy.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.data.files import append_line, read_text, write_whole
from echelon.errors import UserError
from echelon.linalg.bases import seed_of
from echelon.linalg.checks import number, whole
from echelon.models.randomness import own_randomness
from echelon.rerank.training.answers import keep, refuse_full
from echelon.rerank.training.policy import Completion, group_advantages, grpo_loss, sample, token_log_probs

Reward = Callable[..., Sequence[float]]
"""As in TRL: called with ``prompts`` and ``completions`` (texts) and the other columns of the data, each a list; one number for each completion."""


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation of an adapter.

    Attributes:
        num_generations: completions of each prompt, which are compared with each other.
        beta: weight of the distance from the reference; 0 leaves it out.
        temperature: of what is written.
        learning_rate: falls linearly to 0.
        epsilon: how far a token's probability may move before it counts no more.
        num_iterations: steps with the same completions.
        max_completion_length: tokens; a completion that does not end within them gets no reward.
        mask_truncated_completions: whether such a completion is left out of the loss too.
        per_device_train_batch_size: completions of one forward pass.
        gradient_accumulation_steps: forward passes of a step; both together hold whole groups.
        max_steps: how often completions are written; -1 reads the data once.
        max_grad_norm: gradients are scaled down to it.
        gradient_checkpointing: compute activations twice to save memory.
        save_every: steps between checkpoints; 0 for none.
    """

    num_generations: int = 8
    beta: float = 0.04
    temperature: float = 1.0
    learning_rate: float = 1e-5
    epsilon: float = 0.2
    num_iterations: int = 1
    max_completion_length: int = 2048
    mask_truncated_completions: bool = False
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 4
    max_steps: int = -1
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    save_every: int = 50

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        whole("num_generations", self.num_generations, 2)
        number("beta", self.beta, 0, math.inf, open_high=True)
        number("epsilon", self.epsilon, 0, 1, open_low=True, open_high=True)
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            number(name, getattr(self, name), 0, math.inf, open_low=True, open_high=True)
        for name in ("num_iterations", "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
            whole(name, getattr(self, name), 1)
        whole("save_every", self.save_every, 0)
        if self.max_steps != -1:
            whole("max_steps", self.max_steps, 1)
        if self.completions % self.num_generations:
            raise ValueError(f"a step has {self.completions} completions (batch times accumulation); it must be a multiple of num_generations, which is "
                             f"{self.num_generations}")  # fmt: skip

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def train(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Sequence[Mapping[str, Any]], rewards: Reward | Sequence[Reward],
        out: str | os.PathLike[str], *, adapter: PeftConfig | None = None, seed: int = 0, on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train an adapter; run again after a crash, it goes on from the last checkpoint.

        ``out`` becomes a folder of PEFT, with ``result.json`` and a line for each step in ``log.jsonl``: mean ``reward``, shares of groups with
        ``zero_variance`` (all rewards equal, nothing to learn), of ``truncated`` completions and of ``clipped`` tokens, ``kl``, ``loss``, mean ``length``,
        ``gradient_norm`` and ``seconds``.

        Args:
            model: gets the adapter; or has one already, which is trained on, its base being the reference.
            tokenizer: of the model.
            data: rows with a ``prompt``, a text with all of its special tokens, and what the rewards need.
            rewards: a function, or several, whose rewards are added.
            out: folder for the result.
            adapter: PEFT's config, for a model without an adapter.
            seed: of the order of the data, of what is written, and of dropout.
            on_step: called with each line of the log and the number of steps as ``of``.

        Returns:
            What ``result.json`` holds: the knobs, ``steps``, and the ``reward`` of the first and the last tenth of them.

        Raises:
            UserError: if there are no data, a prompt and a completion exceed the context, the tokenizer has no token for the end, a reward function does not
                give a number for each completion, a gradient is not finite, or ``out`` holds another training or anything else.
        """
        run = _Run(self, model, tokenizer, data, [rewards] if callable(rewards) else list(rewards), Path(out), adapter, seed)
        return run.go(on_step or (lambda entry: None))


class _Row(NamedTuple):
    """A completion to learn from."""

    prompt: list[int]
    written: Completion
    advantage: float


class _Run:
    """One training: everything of a step follows from the seed and its number, so that a run that was killed goes on as it would have gone."""

    def __init__(
        self, knobs: GRPO, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Sequence[Mapping[str, Any]], rewards: list[Reward], out: Path,
        adapter: PeftConfig | None, seed: int,
    ):  # fmt: skip
        self.knobs, self.tokenizer, self.rewards, self.out, self.seed = knobs, tokenizer, rewards, out, seed
        self.data = [dict(row) for row in data]
        refuse_full(out, ("log.jsonl", "checkpoint.safetensors"))
        if not self.data or not all("prompt" in row for row in self.data):
            raise UserError("there are no prompts to learn from; give at least one" if not self.data else "the data have rows without a prompt")
        known = getattr(model.generation_config, "eos_token_id", None)
        self.ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        if not self.ends:
            raise UserError("the tokenizer has no token for the end, so that no completion is ever finished; set eos_token")
        self.prompts = [list(tokenizer(row["prompt"], add_special_tokens=False, verbose=False).input_ids) for row in self.data]
        longest, limit = max(map(len, self.prompts)), getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and longest + knobs.max_completion_length > limit:
            told = f"the longest prompt has {longest} tokens and a completion up to {knobs.max_completion_length}; the model takes {limit}"
            raise UserError(f"{told}: cut the passages shorter, or lower max_completion_length")
        if hasattr(model, "disable_adapter") == (adapter is not None):
            raise UserError("give either a model that has an adapter, or the config of one")
        with own_randomness(seed):
            self.policy: Any = model if adapter is None else get_peft_model(model, adapter)
        self.trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        if not self.trained:
            raise UserError("the model's adapter is not trainable; load it with is_trainable=True")
        self.groups = knobs.completions // knobs.num_generations
        self.steps = knobs.max_steps if knobs.max_steps > 0 else math.ceil(len(self.data) / self.groups)
        self.optimizer = torch.optim.AdamW(list(self.trained.values()), lr=knobs.learning_rate, weight_decay=0.0)
        order = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        self.told = json.dumps({**asdict(knobs), "save_every": None, "seed": seed, "data": order, "trained": sorted(self.trained)})

    def go(self, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        was_training, file = self.policy.training, self.out / "checkpoint.safetensors"
        done = self._resume(file)
        lines = read_text(self.out / "log.jsonl").splitlines()[:done] if done else []
        write_whole(self.out / "log.jsonl", "".join(line + "\n" for line in lines))
        if self.knobs.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable()
            self.policy.enable_input_require_grads()
        for step in range(done, self.steps):
            begun = time.monotonic()
            with own_randomness(seed_of(self.seed, "learn", step)):
                rows, entry = self._write(step)
                entry |= self._learn(step, rows)
            lines.append(json.dumps({"step": step + 1, **entry, "seconds": round(time.monotonic() - begun, 3)}))
            append_line(self.out / "log.jsonl", lines[-1])
            tell(json.loads(lines[-1]) | {"of": self.steps})
            if self.knobs.save_every and (step + 1) % self.knobs.save_every == 0:
                self._save(file, step + 1)
        if self.knobs.gradient_checkpointing:
            self.policy.gradient_checkpointing_disable()
            self.policy.disable_input_require_grads()
        self.policy.train(was_training)
        rewards = [json.loads(line)["reward"] for line in lines]
        few = max(1, len(rewards) // 10)
        ends = {"first_reward": sum(rewards[:few]) / few, "last_reward": sum(rewards[-few:]) / few}
        result = {**asdict(self.knobs), "seed": self.seed, "steps": self.steps, **ends}
        keep(self.policy, self.tokenizer, self.out, result, {"log.jsonl": "".join(line + "\n" for line in lines)})
        return result

    def _write(self, step: int) -> tuple[list[_Row], dict[str, float]]:
        """Completions for the step's prompts, with their advantages."""
        knobs, count = self.knobs, self.knobs.num_generations
        places = [self._place(step * self.groups + group) for group in range(self.groups)]
        generator = torch.Generator().manual_seed(seed_of(self.seed, "write", step))
        self.policy.eval()
        written: list[Completion] = []
        for place in places:
            written += sample(self.policy, self.prompts[place], count, knobs.max_completion_length, knobs.temperature, self.ends, generator)
        rewards = self._rewards([self.data[place] for place in places for _ in range(count)], written).view(self.groups, count)
        advantages = group_advantages(rewards).flatten().tolist()
        asked = [self.prompts[place] for place in places for _ in range(count)]
        rows = [_Row(*row) for row in zip(asked, written, advantages, strict=True)]
        return rows, {
            "reward": rewards.mean().item(), "zero_variance": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
            "truncated": sum(not completion.finished for completion in written) / len(written),
            "length": sum(len(completion.ids) for completion in written) / len(written),
        }  # fmt: skip

    def _rewards(self, rows: Sequence[Mapping[str, Any]], written: Sequence[Completion]) -> Float[Tensor, " completions"]:
        """The sum of all functions' rewards; nothing for what came to no end."""
        texts = self.tokenizer.batch_decode([completion.ids for completion in written], skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        total = torch.zeros(len(written), dtype=torch.float64)
        for function in self.rewards:
            found = torch.as_tensor(function(prompts=[row["prompt"] for row in rows], completions=texts, **columns), dtype=torch.float64)
            if found.shape != total.shape or not found.isfinite().all():
                name = getattr(function, "__name__", type(function).__name__)
                raise UserError(f"the reward {name} gave {found.tolist()[:3]}... for {len(written)} completions; it must give a finite number for each")
            total += found
        return total.masked_fill(torch.tensor([not completion.finished for completion in written]), 0.0)

    def _learn(self, step: int, rows: Sequence[_Row]) -> dict[str, float]:
        """Every iteration's update on a step's completions; what is told is of the last."""
        knobs, size = self.knobs, self.knobs.per_device_train_batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        known: list[tuple[Tensor, Tensor | None]] = []
        told = {}
        for iteration in range(knobs.num_iterations):
            told = dict.fromkeys(("loss", "kl", "clipped"), 0.0)
            for which, part in enumerate(parts):
                pairs = [(row.prompt, row.written.ids) for row in part]
                if not iteration:
                    reference = self._reference(pairs)
                self.policy.train()
                new, mask = token_log_probs(self.policy, pairs, knobs.temperature)
                if not iteration:
                    known.append((new.detach(), reference))
                advantages = torch.tensor([row.advantage for row in part], device=new.device)
                losses, shares = grpo_loss(new, *known[which], advantages, mask, epsilon=knobs.epsilon, beta=knobs.beta)
                if knobs.mask_truncated_completions:
                    losses = losses * torch.tensor([float(row.written.finished) for row in part], device=new.device)
                loss = losses.sum() / len(rows)
                loss.backward()
                told["loss"] += loss.item()
                for name, share in shares.items():
                    told[name] += share.sum().item() / len(rows)
            norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), knobs.max_grad_norm).item()
            if not math.isfinite(norm):
                raise UserError(f"the gradient is {norm} at step {step + 1}; lower learning_rate (the last checkpoint is intact)")
            for group in self.optimizer.param_groups:
                group["lr"] = knobs.learning_rate * (1 - (step * knobs.num_iterations + iteration) / (self.steps * knobs.num_iterations))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {**told, "gradient_norm": norm}

    @torch.no_grad()
    def _reference(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Float[Tensor, "rows tokens"] | None:
        if not self.knobs.beta:
            return None
        self.policy.eval()
        with self.policy.disable_adapter():
            return token_log_probs(self.policy, pairs, self.knobs.temperature)[0]

    def _place(self, number: int) -> int:
        """The number-th row that is read, over epochs each in an order of its own."""
        epoch, place = divmod(number, len(self.data))
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
        return int(torch.randperm(len(self.data), generator=generator)[place])

    def _save(self, file: Path, step: int) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in self.optimizer.state[p].items()}
        plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_whole(file, save(plain, metadata={"step": str(step), "run": self.told}))

    def _resume(self, file: Path) -> int:
        """Put weights and the optimizer's state back; the step they are of, 0 without a checkpoint."""
        if not file.is_file():
            return 0
        with safe_open(file, "pt") as kept:
            if kept.metadata()["run"] != self.told:
                raise UserError(f"{self.out} holds a training with other knobs or data; choose another folder, or remove it")
            for name, p in self.trained.items():
                with torch.no_grad():
                    p.copy_(kept.get_tensor(f"model.{name}"))
                self.optimizer.state[p] = {key: kept.get_tensor(f"{key}.{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p]["step"] = kept.get_tensor(f"step.{name}")
            return int(kept.metadata()["step"])

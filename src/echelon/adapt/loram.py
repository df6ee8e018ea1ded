"""LoRAM: train a LoRA on a pruned copy of the model, give it back the size of the whole one, and use it there.

Source: "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models", arXiv 2502.13533.
Differs from its code: plans hold numbers of heads and hidden units instead of positions in matrices, so any head size, any grouping of queries and several
families work, without modelling files of our own; semi-structured masks come from a score of single weights, not from SparseGPT, which would change the
weights that stay; what a LoRA adds to masked weights is not masked in training (the paper does not say); the adapter's rank is free. Four bits
beside pruning are left to whatever quantises a model in memory, behind :func:`~echelon.adapt.prune_plan.prune`.
"""

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from echelon.adapt.fitting import fit
from echelon.adapt.prune_plan import PrunePlan, fingerprint, mask_weights, prune, refuse_compressed
from echelon.adapt.recovered import evaluate_gap, recover
from echelon.calibrate import calibration_batches
from echelon.calibrate.importance import weight_importance
from echelon.calibrate.rows import row_length, training_rows
from echelon.data.files import append_line, folder_whole, read_text, write_whole
from echelon.errors import UserError
from echelon.linalg.bases import seed_of
from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.selection import select_columns
from echelon.models import load
from echelon.models.families import adapter, attention_shape, family_roles, roles
from echelon.models.narrowing import Kept, head_columns, head_rows
from echelon.models.targets import Targets, in_attention
from echelon.registry import method

STRUCTURED = ("structured", "random")
Tell = Callable[[dict[str, Any]], None]


@method(
    kind="trainer", name="loram", title="Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models", arxiv="2502.13533", year=2025,
    summary="Train a LoRA on a pruned copy of the model and use it on the whole one.", needs="text, and once a backward of the whole model",
    published="Llama-3.1-70B and Llama-2-70B: base of 15.81 and 16.95 times fewer bytes in training, pruned and in four bits; better than LoRA on 8B and 13B",
)  # fmt: skip
@dataclass(frozen=True)
class LoRAM:
    """Plan, prune, align, train a plain LoRA, and recover it; or take these steps one by one.

    ::

        plan = LoRAM(mlp_ratio=0.65, kv_ratio=0.5).plan(model, texts, tokenizer)
        small = prune(model, plan)                     # in place; may be saved, loaded, aligned, quantised
        small = get_peft_model(small, LoraConfig(...))  # and any trainer
        small.save_pretrained("small")
        recover("small", plan, "adapter")              # a plain LoRA of the whole model

    Not for small models, of which too little is left, nor where the whole model cannot be kept for inference.

    Attributes:
        strategy: `structured` drops the key-value heads (each with its queries) and hidden units of least importance, `random` any; `2:4`, `4:8` and
            `unstructured` set single weights to zero, which saves memory only with sparse kernels.
        mlp_ratio: share of each MLP to prune, in [0, 1); for `2:4` and `4:8` half goes wherever this is not 0.
        kv_ratio: share of each attention to prune, in [0, 1): of its key-value heads, or of its weights.
        skip_first: blocks at the beginning that stay whole.
        skip_last: blocks at the end that stay whole.
        importance: of a weight: `taylor`, its product with the loss's gradient, `magnitude`, or `wanda`, its product with the norm of its input; heads and
            hidden units get the sum of all of theirs.
        align_to: hidden units that stay are a multiple of this, rounded up; kernels like 64 or 128.
        nsamples: rows of text that importance is measured on.
        align_steps: updates of all weights of the pruned model except the head before LoRA is trained; 0 for none. Needs align_data.
        align_lr: learning rate of that.
        align_data: general text for it: a .jsonl, a .txt, or a folder of these.
        r: rank of the LoRA.
        lora_alpha: numerator of its scale.
        lora_dropout: share of its inputs that are zero while training, in [0, 1).
        target_modules: layers it adapts, as in PEFT; by default all linear layers of the blocks, and the head where it is not tied to the embeddings.
        steps: updates of the LoRA; 0 for one pass over the data.
        learning_rate: of the LoRA, after the warm-up.
        batch_size: rows an update, in training and alignment.
        micro_batch_size: rows a forward.
        warmup: steps of it, at most a tenth of all.
        seqlen: tokens a row.
        recover_fill: what the LoRA gets for inputs that were pruned: `zero`, or `normal`, random numbers of variance 1 / r^2 (an option of the
            authors' code, which adds noise).
        held_out: text on which the pruned and the whole model are measured with the LoRA; none by default.
    """

    strategy: Literal["structured", "random", "2:4", "4:8", "unstructured"] = "structured"
    mlp_ratio: float = 0.65
    kv_ratio: float = 0.65
    skip_first: int = 4
    skip_last: int = 2
    importance: Literal["taylor", "magnitude", "wanda"] = "taylor"
    align_to: int = 64
    nsamples: int = 10
    align_steps: int = 0
    align_lr: float = 5e-5
    align_data: str = ""
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: Targets = None
    steps: int = 0
    learning_rate: float = 1e-5
    batch_size: int = 128
    micro_batch_size: int = 4
    warmup: int = 100
    seqlen: int = 512
    recover_fill: Literal["zero", "normal"] = "zero"
    held_out: str = ""

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        one_of("strategy", self.strategy, (*STRUCTURED, "2:4", "4:8", "unstructured"))
        one_of("importance", self.importance, ("taylor", "magnitude", "wanda"))
        one_of("recover_fill", self.recover_fill, ("zero", "normal"))
        for name in ("mlp_ratio", "kv_ratio", "lora_dropout"):
            number(name, getattr(self, name), 0, 1, open_high=True)
        least = {"skip_first": 0, "skip_last": 0, "align_to": 1, "nsamples": 1, "align_steps": 0, "r": 1, "steps": 0, "batch_size": 1, "micro_batch_size": 1}
        for name, low in (least | {"warmup": 0, "seqlen": 2}).items():
            whole(name, getattr(self, name), low)
        for name in ("align_lr", "lora_alpha", "learning_rate"):
            number(name, getattr(self, name), 0, math.inf, open_low=True, open_high=True)
        if self.align_steps and not self.align_data:
            raise ValueError(f"align_steps is {self.align_steps} without align_data; name general text to align on, or leave it at 0")

    def plan(self, model: PreTrainedModel, data: Any = None, tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0) -> PrunePlan:
        """Choose what stays; the model is not changed. For publishers: it needs the whole model and, for `taylor`, a backward through it.

        Args:
            model: the base model.
            data: anything that :func:`echelon.calibrate.calibration_batches` takes; for `taylor` and `wanda`.
            tokenizer: for texts.
            seed: of random choices, and of the rows that are looked at.

        Raises:
            ValueError: if a ratio leaves nothing of a block, no block is left to prune, the pattern does not fit a layer, or there is no data.
            UnsupportedFamily: if the family is not supported, or the model is compressed already.
        """
        hidden, heads, blocks = refuse_compressed(model), attention_shape(model.config).kv_heads, model.config.num_hidden_layers
        structured = self.strategy in STRUCTURED
        counts = self._counts(heads, hidden) if structured else (0, 0)
        nothing = counts == (heads, hidden) or not (self.mlp_ratio or self.kv_ratio)
        pruned = range(0) if nothing else range(self.skip_first, blocks - self.skip_last)
        if not pruned and not nothing:
            raise ValueError(f"skip_first is {self.skip_first} and skip_last {self.skip_last}; of {blocks} blocks at least one must be left to prune")
        scores = {} if self.strategy == "random" else self._scores(model, pruned, data, tokenizer, seed)
        whole_block = Kept(torch.arange(heads), torch.arange(hidden))
        masks = {} if structured else {name: self._mask(name, score) for name, score in scores.items()}
        kept: tuple[Kept, ...] = ()
        if not masks:
            kept = tuple(self._choose(model.config, index, scores, counts, hidden, seed) if index in pruned else whole_block for index in range(blocks))
        return PrunePlan(
            base=str(getattr(model, "name_or_path", "") or ""), revision=getattr(model.config, "_commit_hash", None),
            weights=fingerprint(model.named_parameters()), config=json.loads(model.config.to_json_string(use_diff=False)), hidden=hidden,
            strategy=self.strategy, ratios={"mlp_ratio": self.mlp_ratio, "kv_ratio": self.kv_ratio}, kept=kept, masks=masks,
        )  # fmt: skip

    def adapter_config(self, model: PreTrainedModel) -> LoraConfig:
        """The plain LoRA that is trained on the pruned model."""
        targets = self.target_modules
        if targets is None:
            family, head = adapter(model), ""
            parts = family.roles
            if any(table.weight is family.head.weight for table in family.embeddings):
                warnings.warn("the head is tied to the embeddings, so it gets no LoRA: merging one would untie them", stacklevel=2)
            else:
                head = next(name for name, module in model.named_modules() if module is family.head)
            targets = sorted({*parts.attention, parts.attention_out, *parts.mlp_in, parts.mlp_out, *([head] if head else [])})
        return LoraConfig(
            r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout, bias="none", task_type="CAUSAL_LM",  # type: ignore[arg-type]
            target_modules=targets if isinstance(targets, str) else list(targets),
        )  # fmt: skip

    def align(self, small: PreTrainedModel, plan: PrunePlan, data: Any, tokenizer: Any = None, *, seed: int = 0, on_step: Tell | None = None) -> list[float]:
        """Train all weights of a pruned model but the head (and what is tied to it) on general text, in place; weights that are masked stay zero.

        Raises:
            UserError: if there is no data, or the loss is not finite.
        """
        head = adapter(small).head.weight
        flags = {p: p.requires_grad for p in small.parameters()}
        for p in flags:
            p.requires_grad_(p is not head)
        try:
            return self._fit(small, data, tokenizer, self.align_steps, self.align_lr, seed, on_step, lambda: mask_weights(small, plan))
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)

    def train(self, model: str, data: str | Path, out: str | Path, seed: int = 0, on_step: Tell | None = None) -> dict[str, Any]:
        """All stages: ``out/adapter`` is the LoRA of the whole model, beside ``plan``, ``pruned`` and ``pruned_adapter``.

        Run again after a crash, it goes on behind the last stage that was finished (plan, pruned and aligned model, LoRA).

        Args:
            model: the base model: a folder, a hub id, or ``embedded``.
            data: a .jsonl with a ``text`` in each line, a .txt, or a folder of these.
            out: folder for the result.
            seed: of everything drawn.
            on_step: called with ``{"stage", "step", "of", "loss"}``.

        Returns:
            The loss over the last tenth of the steps, numbers of steps and parameters, seconds, and with ``held_out`` what `evaluate_gap` finds.

        Raises:
            UserError: if model or data cannot be read, or ``out`` holds a run with other knobs.
        """
        out, started = Path(out), time.perf_counter()
        told = {"model": model, "data": str(data), "seed": seed, **dataclasses.asdict(self)}
        told = json.loads(json.dumps(told))
        if (out / "run.json").is_file() and json.loads(read_text(out / "run.json")) != told:
            raise UserError(f"{out} holds a run with other knobs or data; choose another --out, or remove it")
        if (out / "result.json").is_file():
            return json.loads(read_text(out / "result.json"))

        def tell(stage: str) -> Tell:
            def told_step(entry: dict[str, Any]) -> None:
                append_line(out / "log.jsonl", json.dumps({"stage": stage, **entry}))
                if on_step is not None:
                    on_step({"stage": stage, **entry})

            return told_step

        base, tokenizer = load(model)
        size = sum(p.numel() for p in base.parameters())
        plan = PrunePlan.load(out / "plan") if (out / "plan").is_dir() else dataclasses.replace(self.plan(base, data, tokenizer, seed=seed), base=model)
        write_whole(out / "run.json", json.dumps(told, indent=2) + "\n")
        plan.save(out / "plan")
        if (out / "pruned").is_dir():
            small = load(out / "pruned", base.dtype).model
        else:
            small = prune(base, plan)
            if self.align_steps:
                self.align(small, plan, self.align_data, tokenizer, seed=seed, on_step=tell("align"))
            with folder_whole(out / "pruned") as aside:
                small.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
        del base
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            done = (out / "pruned_adapter").is_dir()
            tuned: Any = PeftModel.from_pretrained(small, os.fspath(out / "pruned_adapter")) if done else get_peft_model(small, self.adapter_config(small))
        if not done:
            losses = self._fit(tuned, data, tokenizer, self.steps, self.learning_rate, seed, tell("train"))
            with folder_whole(out / "pruned_adapter") as aside:
                tuned.save_pretrained(os.fspath(aside), save_embedding_layers=False)
                write_whole(aside / "losses.json", json.dumps(losses))
        recover(out / "pruned_adapter", plan, out / "adapter", fill=self.recover_fill, seed=seed)
        losses = json.loads(read_text(out / "pruned_adapter" / "losses.json"))
        late = losses[-max(1, len(losses) // 10) :]
        counts = {"trained_parameters": sum(p.numel() for name, p in tuned.named_parameters() if ".lora_" in name)}
        counts |= {"pruned_parameters": sum(p.numel() for name, p in tuned.named_parameters() if ".lora_" not in name), "base_parameters": size}
        result = {"loss": round(sum(late) / len(late), 5), "steps": len(losses)} | counts
        if self.held_out:
            gap = evaluate_gap(load(model).model, tuned, out / "adapter", self.held_out, tokenizer, seqlen=self.seqlen)
            result |= {f"loss_{name}": round(value, 5) for name, value in gap.items()}
        result["seconds"] = round(time.perf_counter() - started, 1)
        write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
        return result

    def _fit(
        self, model: Any, data: Any, tokenizer: Any, steps: int, rate: float, seed: int, on_step: Tell | None, after_update: Callable[[], None] | None = None
    ) -> list[float]:
        rows = training_rows(data, tokenizer, row_length(model, self.seqlen))
        steps = steps or -(-len(rows) // self.batch_size)
        return fit(
            model, rows, steps=steps, learning_rate=rate, batch_size=self.batch_size, micro_batch_size=self.micro_batch_size,
            warmup=min(self.warmup, steps // 10), seed=seed, on_step=on_step, after_update=after_update,
        )  # fmt: skip

    def _counts(self, heads: int, hidden: int) -> tuple[int, int]:
        """How many key-value heads and hidden units stay."""
        if heads == 1 and self.kv_ratio:
            raise ValueError(f"kv_ratio is {self.kv_ratio!r}; it must be 0 for this model, whose queries all share one key-value head")
        if (kept := round((1 - self.kv_ratio) * heads)) < 1:
            raise ValueError(f"kv_ratio is {self.kv_ratio!r}; of {heads} key-value heads at least 1 must be left, so it must be below {1 - 0.5 / heads:g}")
        units = max(1, round((1 - self.mlp_ratio) * hidden))
        return kept, min(hidden, -(-units // self.align_to) * self.align_to)

    def _scores(self, model: PreTrainedModel, blocks: range, data: Any, tokenizer: Any, seed: int) -> dict[str, Float[Tensor, "out in"]]:
        """Importance of every weight in these blocks, by module name; for single weights only where some go."""
        family, every = roles(model), self.strategy in STRUCTURED
        parts = [*family.attention, family.attention_out] if every or self.kv_ratio else []
        parts += [*family.mlp_in, family.mlp_out] if every or self.mlp_ratio else []
        shown = None
        if data is not None and self.importance != "magnitude" and blocks:
            shown = calibration_batches(data, tokenizer, nsamples=self.nsamples, seqlen=row_length(model, self.seqlen), batch_size=1, seed=seed)
        names = [f"{family.layers}.{index}.{part}" for index in blocks for part in parts]
        return weight_importance(model, names, self.importance, shown.batches if shown else ())

    def _choose(
        self, config: PreTrainedConfig, index: int, scores: Mapping[str, Float[Tensor, "out in"]], counts: tuple[int, int], hidden: int, seed: int
    ) -> Kept:
        """What stays of one block."""
        family, columns = family_roles(config), head_columns(config)
        where = f"{family.layers}.{index}."
        if self.strategy == "random":
            generator = torch.Generator().manual_seed(seed_of(seed, where, "kept"))
            heads, units = (torch.randperm(of, generator=generator)[:count].sort().values for of, count in zip((len(columns), hidden), counts, strict=True))
            return Kept(heads, units)
        of_heads = scores[where + family.attention_out].double().sum(0)[columns].sum(1)
        for name, rows in head_rows(config).items():
            of_heads += scores[where + name].double().sum(1)[rows].sum(1)
        of_units = scores[where + family.mlp_out].double().sum(0)
        for name in family.mlp_in:
            of_units += scores[where + name].double().sum(1)
        return Kept(select_columns(of_heads, counts[0]), select_columns(of_units, counts[1]))

    def _mask(self, name: str, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The weights that stay: in every row, or in every few neighbours of one, those of the highest score, and of equal ones the first."""
        rows, columns = score.shape
        if self.strategy == "unstructured":
            ratio = self.kv_ratio if in_attention(name) else self.mlp_ratio
            groups, count = score, max(1, round((1 - ratio) * columns))
        else:
            count, of = map(int, self.strategy.split(":"))
            if columns % of:
                raise ValueError(f"strategy is {self.strategy!r}; {name} has rows of {columns}, which are not made of groups of {of}")
            groups = score.reshape(rows, -1, of)
        places = groups.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True).reshape(rows, columns)

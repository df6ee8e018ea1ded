"""Training RankGen on any corpus: which text really followed this prefix, among others of its document and what a model made up.

Source: "RankGen: Improving Text Generation with Large Ranking Models", arXiv 2205.09726; its authors published no training code.
Differs from it: any Hugging Face encoder, optionally through LoRA; gradient caching in place of 128 accelerators; continuations that
overlap the right one are no negatives. Documents are not halved unless you do it: the generator is taken as it is.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from echelon.data.files import append_line, read_text, write_whole
from echelon.data.rankgen_pairs import Pair, batches, cut_generated, pairs_of, read_documents
from echelon.errors import UserError
from echelon.generate import Nucleus
from echelon.models import load
from echelon.registry import method
from echelon.score.rankgen import RankGenEncoder

Negatives = Literal["both", "inbook", "generative"]


def contrastive_loss(
    prefixes: Float[Tensor, "rows width"],
    continuations: Float[Tensor, "rows width"],
    generated: Float[Tensor, "rows width"] | None = None,
    *,
    negatives: Negatives = "both",
    ignore: Bool[Tensor, "rows columns"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "rows columns"]]:
    """Mean cross-entropy of each prefix's own continuation among all continuations and all generated texts of the batch.

    Args:
        prefixes: their vectors.
        continuations: vectors of what followed, row by row.
        generated: vectors of what a model wrote instead; not needed for ``inbook``.
        negatives: ``inbook`` leaves the generated texts out; ``generative`` keeps only them and the right continuation.
        ignore: candidates that are left out of a row's sum, in the order of the returned logits; never the right one.

    Returns:
        The loss, and the logits (rows, 2 * rows), or (rows, rows) for ``inbook``, with minus infinity where a candidate is left out.
    """
    logits = prefixes @ continuations.T
    if negatives == "generative":
        logits = logits.masked_fill(~torch.eye(len(logits), dtype=torch.bool, device=logits.device), -math.inf)
    if negatives != "inbook":
        if generated is None:
            raise ValueError(f"negatives is {negatives!r}, but there are no generated texts")
        logits = torch.cat([logits, prefixes @ generated.T], dim=1)
    if ignore is not None:
        logits = logits.masked_fill(ignore, -math.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device)), logits


def not_negatives(rows: Sequence[Pair], *, overlap: bool = True) -> Bool[Tensor, "rows rows"]:
    """Which continuations are no negatives of a row: equal texts, and (``overlap``) those that share a sentence of its document."""
    masked = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            shared = overlap and a.doc_id == b.doc_id and a.start < b.stop and b.start < a.stop
            masked[i, j] = i != j and (shared or a.continuation == b.continuation)
    return masked


@method(
    kind="trainer", name="rankgen", title="RankGen: Improving Text Generation with Large Ranking Models", arxiv="2205.09726", year=2022,
    summary="Train an encoder to tell what really followed a prefix.",
    needs="documents, an encoder and, for generated negatives, a language model",
)  # fmt: skip
@dataclass(frozen=True)
class RankGenTrainer:
    """Contrastive training with in-book and generated negatives.

    Attributes:
        negatives: `both`, `inbook`, or `generative`.
        generator: language model that writes the generated negatives.
        top_p: its nucleus.
        prefix_words: whole sentences up to this many words go before a continuation.
        suffix_words: continuations aim at a length drawn between these two numbers of words.
        cut: continuations end with a `sentence` (the paper), or after a `word`: a row's true and generated text then both stop at the same number
            of words, so that neither length nor ending tells them apart; texts that a search scores are unfinished too.
        rows_per_document: use this many rows of each document, drawn at random; 0 uses all.
        mask_overlap: continuations that share a sentence with the right one are no negatives.
        batch_size: rows a step, from one document as far as it reaches; large ones help identification most.
        cache_chunk: texts forwarded at a time (gradient caching); memory grows with it and not with the batch.
        steps: optimizer steps.
        optimizer: `auto` (Adafactor at a constant rate for T5, else AdamW with warm-up and linear decay), `adafactor` or `adamw`.
        learning_rate: 0 takes 2e-3 for Adafactor, 5e-4 for AdamW on LoRA and 1e-4 for AdamW on everything.
        lora_rank: train a LoRA of this rank and the projection; 0 trains everything.
        projection_scale: the projection begins as this multiple of the identity; backbones whose vectors are short begin faster with more.
        pooling: `first` token, `last` or `mean`.
        prefix_max_length: encoder tokens kept of a prefix.
        suffix_max_length: encoder tokens kept of a continuation.
        bf16: forward in bfloat16 (the weights stay float32).
        save_every: seconds between checkpoints.
    """

    negatives: Negatives = "both"
    generator: str = "embedded"
    top_p: float = 0.9
    prefix_words: int = 256
    suffix_words: tuple[int, int] = (10, 128)
    cut: Literal["sentence", "word"] = "sentence"
    rows_per_document: int = 0
    mask_overlap: bool = True
    batch_size: int = 64
    cache_chunk: int = 32
    steps: int = 1000
    optimizer: Literal["auto", "adafactor", "adamw"] = "auto"
    learning_rate: float = 0.0
    lora_rank: int = 0
    projection_scale: float = 1.0
    pooling: Literal["first", "last", "mean"] = "first"
    prefix_max_length: int = 512
    suffix_max_length: int = 128
    bf16: bool = False
    save_every: float = 60.0

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name, legal in (("negatives", ("both", "inbook", "generative")), ("cut", ("sentence", "word")), ("optimizer", ("auto", "adafactor", "adamw"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")
        least = {"prefix_words": 1, "rows_per_document": 0, "batch_size": 1, "cache_chunk": 1, "steps": 1, "learning_rate": 0, "lora_rank": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least {low}")
        if not self.projection_scale > 0:
            raise ValueError(f"projection_scale is {self.projection_scale!r}; it must be above 0")
        if not 1 <= self.suffix_words[0] <= self.suffix_words[1]:
            raise ValueError(f"suffix_words is {self.suffix_words!r}; it must be two numbers, 1 <= first <= second")

    def train(
        self, model: str, data: str | Path, out: str | Path, seed: int = 0, on_step: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Train and write a RankGen folder; run again after a crash, it goes on.

        Args:
            model: the encoder: a folder, a hub id, or ``embedded`` for MiniLM.
            data: documents (see :func:`echelon.data.rankgen_pairs.read_documents`).
            out: folder for rows, log, checkpoint and result.
            seed: of rows, negatives and batches.
            on_step: called with each line of the log, and while negatives are written with ``{"rows": done, "of": all}``.

        Returns:
            The last lines of the log on average, and the time taken.

        Raises:
            UserError: if the data or a model cannot be read, or ``out`` holds a run with other knobs.
        """
        out, tell = Path(out), on_step or (lambda _: None)
        told = json.dumps({"model": model, "data": str(data), "seed": seed, **dataclasses.asdict(self), "save_every": None}, sort_keys=True)
        begun = any((out / name).is_file() for name in ("rows.jsonl", "log.jsonl", "result.json"))  # a typing error leaves none of them
        if begun and (out / "run.json").is_file() and json.loads(read_text(out / "run.json")) != json.loads(told):
            raise UserError(f"{out} holds a run with other knobs or data; choose another --out, or remove it")
        write_whole(out / "run.json", told)
        if (out / "result.json").is_file():
            return json.loads(read_text(out / "result.json"))
        rows = self.rows(data, out, seed, tell)
        encoder = RankGenEncoder.from_backbone(
            model, pooling=self.pooling, prefix_max_length=self.prefix_max_length, suffix_max_length=self.suffix_max_length
        ).eval()  # no dropout: gradient caching runs each text twice
        with torch.no_grad():
            encoder.projection.weight.mul_(self.projection_scale)
        if self.lora_rank:
            from peft import LoraConfig, get_peft_model

            with torch.random.fork_rng():
                torch.manual_seed(seed)
                config = LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear", bias="none")
                encoder.backbone = get_peft_model(encoder.backbone, config)  # type: ignore[assignment]
            encoder.adapted = True
        self._run(encoder, rows, out, seed, tell)
        encoder.save_pretrained(out)
        log = [json.loads(line) for line in read_text(out / "log.jsonl").splitlines()]
        late = log[-max(1, len(log) // 10) :]
        result = {"rows": len(rows), "steps": self.steps, "seconds": round(sum(entry["seconds"] for entry in log), 1)}
        result |= {name: round(float(np.mean([entry[name] for entry in late])), 4) for name in ("loss", "inbook_accuracy", "generated_accuracy")}
        write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    def rows(self, data: str | Path, out: Path, seed: int, tell: Callable[[dict[str, Any]], None]) -> list[Pair]:
        """The training rows, generated negatives included; those already in ``out/rows.jsonl`` are not made again."""
        made: list[Pair] = []
        for number, (doc_id, text) in enumerate(read_documents(data).items()):
            generator = np.random.default_rng([seed, number])
            pairs = list(pairs_of(doc_id, text, generator, self.prefix_words, self.suffix_words))
            if self.rows_per_document and len(pairs) > self.rows_per_document:
                pairs = [pairs[i] for i in sorted(generator.choice(len(pairs), self.rows_per_document, replace=False))]
            made += pairs
        if len(made) < 2:
            raise UserError(f"{data} gives {len(made)} training rows; it needs documents of several sentences")
        if self.negatives == "inbook":
            return self._cut(made, seed)
        kept = out / "rows.jsonl"
        lines = read_text(kept).split("\n")[:-1] if kept.is_file() else []
        done = [json.loads(line)["generated"] for line in lines if line.endswith("}")]
        loaded = load(self.generator) if len(done) < len(made) else None
        chunk = 256
        done = done[: len(done) // chunk * chunk] if len(done) < len(made) else done
        if len(done) < len(lines):
            write_whole(kept, "".join(line + "\n" for line in lines[: len(done)]))
        while loaded is not None and len(done) < len(made):
            here = made[len(done) : len(done) + chunk]
            prompts = [loaded.tokenizer(row.prefix).input_ids[-128:] for row in here]
            limits = np.random.default_rng([seed, 7, len(done)]).integers(self.suffix_words[0], self.suffix_words[1], len(here), endpoint=True)
            written = Nucleus(top_p=self.top_p).generate(
                loaded, prompts, max_new_tokens=round(1.6 * self.suffix_words[1]), seed=seed + len(done)
            ).texts  # fmt: skip
            cut = [cut_generated(text, int(limit)) for text, limit in zip(written, limits, strict=True)]
            append_line(kept, "\n".join(json.dumps({"generated": text}) for text in cut))
            done += cut
            tell({"rows": len(done), "of": len(made)})
        # A model that has nothing to say leaves no negative behind.
        return self._cut([dataclasses.replace(row, generated=text) for row, text in zip(made, done, strict=True) if text], seed)

    def _cut(self, rows: list[Pair], seed: int) -> list[Pair]:
        if self.cut == "sentence":
            return rows
        limits = np.random.default_rng([seed, 13]).integers(self.suffix_words[0], self.suffix_words[1], len(rows), endpoint=True)
        made = []
        for row, limit in zip(rows, limits.tolist(), strict=True):
            true, written = row.continuation.split(), row.generated.split()
            count = min(limit, len(true), len(written) or len(true))
            made.append(dataclasses.replace(row, continuation=" ".join(true[:count]), generated=" ".join(written[:count])))
        return made

    def _run(self, encoder: RankGenEncoder, rows: list[Pair], out: Path, seed: int, tell: Callable[[dict[str, Any]], None]) -> None:
        named = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        optimizer, rate = self._optimizer(encoder, list(named.values()))
        step = load_checkpoint(out / "checkpoint.safetensors", named, optimizer)
        log = out / "log.jsonl"
        if log.is_file():  # lines after the checkpoint are made again
            write_whole(log, "".join(line + "\n" for line in read_text(log).splitlines()[:step]))
        saved = time.monotonic()
        for number, batch in enumerate(self._batches(rows, seed)):
            if number < step:
                continue
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = rate(number)
            entry = {"step": number + 1, **self._step(encoder, batch)}
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(entry["loss"]):
                raise UserError(f"the loss is {entry['loss']} at step {number + 1}; lower learning_rate (earlier checkpoints are intact)")
            entry["seconds"] = round(time.monotonic() - started, 3)
            append_line(log, json.dumps(entry))
            tell(entry | {"of": self.steps})
            if time.monotonic() - saved > self.save_every:
                save_checkpoint(out / "checkpoint.safetensors", number + 1, named, optimizer)
                saved = time.monotonic()

    def _batches(self, rows: list[Pair], seed: int) -> Iterator[list[Pair]]:
        given, epoch = 0, 0
        while True:
            for batch in batches(rows, self.batch_size, np.random.default_rng([seed, 11, epoch])):
                if given == self.steps:
                    return
                yield batch
                given += 1
            epoch += 1

    def _optimizer(self, encoder: RankGenEncoder, parameters: list[Tensor]) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
        kind = self.optimizer if self.optimizer != "auto" else "adafactor" if encoder.backbone.config.model_type == "t5" else "adamw"
        if kind == "adafactor":
            from transformers.optimization import Adafactor

            peak = self.learning_rate or 2e-3
            return Adafactor(parameters, lr=peak, relative_step=False, warmup_init=False, scale_parameter=True), lambda _: peak
        peak = self.learning_rate or (5e-4 if self.lora_rank else 1e-4)
        warm = max(1, self.steps // 20)
        made = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01)
        return made, lambda step: peak * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))

    def _step(self, encoder: RankGenEncoder, rows: list[Pair]) -> dict[str, float]:
        """Gradients of one batch, in pieces of texts of similar length: vectors first, their gradients next, then each piece again."""
        sides = [encoder.tokens([row.prefix for row in rows], "prefix"), encoder.tokens([row.continuation for row in rows], "suffix")]
        if self.negatives != "inbook":
            sides.append(encoder.tokens([row.generated for row in rows], "suffix"))
        texts = [ids for side in sides for ids in side]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        pieces = [order[i : i + self.cache_chunk] for i in range(0, len(order), self.cache_chunk)]
        once = len(rows) <= self.cache_chunk  # a small batch keeps its activations and need not run twice

        def vectors(piece: list[int]) -> Tensor:
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.bf16):
                return encoder([texts[i] for i in piece]).float()

        with torch.set_grad_enabled(once):
            flat = torch.cat([vectors(piece) for piece in pieces])
        places = torch.tensor(order, device=flat.device).argsort()
        leaf = flat if once else flat.detach().requires_grad_()
        sorted_back = leaf[places].split(len(rows))
        ignore = not_negatives(rows, overlap=self.mask_overlap).to(flat.device)
        if self.negatives != "inbook":
            ignore = torch.cat([ignore, torch.zeros_like(ignore)], dim=1)
        loss, logits = contrastive_loss(*sorted_back, negatives=self.negatives, ignore=ignore)
        loss.backward()
        if not once:
            assert leaf.grad is not None
            for piece, gradient in zip(pieces, leaf.grad.split([len(piece) for piece in pieces]), strict=True):
                (vectors(piece) * gradient).sum().backward()
        return {"loss": loss.item(), **_accuracies(logits.detach(), rows)}


def _accuracies(logits: Tensor, rows: list[Pair]) -> dict[str, float]:
    """How often the right continuation is above one of its document, and above its own generated one; and how many share a document."""
    count = len(rows)
    gold = logits.diagonal()[:, None]
    same = torch.tensor([[a.doc_id == b.doc_id for b in rows] for a in rows], device=logits.device) & ~torch.eye(
        count, dtype=torch.bool, device=logits.device
    )
    judged = same & logits[:, :count].isfinite()
    inbook = (gold > logits[:, :count])[judged].float().mean().item() if judged.any() else math.nan
    against = (gold[:, 0] > logits[:, count:].diagonal()).float().mean().item() if logits.shape[1] > count else math.nan
    share = same.float().sum().item() / max(1, count * (count - 1))
    return {"inbook_accuracy": inbook, "generated_accuracy": against, "same_document": share}


def save_checkpoint(path: Path, step: int, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    for name, p in named.items():
        tensors |= {f"optim.{name}|{key}": torch.as_tensor(value) for key, value in optimizer.state[p].items() if value is not None}
    write_whole(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"step": str(step)}))


def load_checkpoint(path: Path, named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put weights and optimizer state back; returns the step they were saved at, 0 when there is no checkpoint."""
    if not os.path.exists(path):
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            place, _, rest = key.partition(".")
            name, _, state = rest.partition("|")
            if place == "model":
                with torch.no_grad():
                    named[name].copy_(file.get_tensor(key))
            else:
                value = file.get_tensor(key)
                plain = state == "RMS" or (state == "step" and not isinstance(optimizer, torch.optim.AdamW))
                optimizer.state[named[name]][state] = value.item() if plain else value
    return step

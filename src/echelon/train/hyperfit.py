"""Hyperfitting: fine-tune on a few thousand texts until they are all but memorised; greedy decoding then stops repeating itself.

Source: "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation", arXiv 2412.04318. Differs from its code: Adam without
weight decay at 1e-6 as in the paper (the code: 0.01, 5e-6); dropout is switched off wherever it hides; weights are float32 whatever the file holds, since a
step of 1e-6 is lost in bfloat16; validation counts tokens, not batches; what fills up a text that ends early is none of it; the result is saved. Samples that
fill no batch are left out once, not anew in every epoch.
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from echelon.data.files import append_line, read_text
from echelon.data.rankgen_pairs import read_documents
from echelon.data.text import tail_ttr
from echelon.errors import UserError
from echelon.generate import Greedy
from echelon.linalg.checks import number, one_of, whole
from echelon.models import LoadedModel, load
from echelon.models.randomness import own_randomness
from echelon.registry import method, suggest
from echelon.train.language import fit
from echelon.train.optimizers.adamw import AdamW
from echelon.train.optimizers.base import processes
from echelon.train.training import Training


class Sequences(NamedTuple):
    """What is fitted and what is validated on.

    Attributes:
        texts: those that are fitted.
        train: their first tokens.
        validation: those of further texts.
    """

    texts: list[str]
    train: Int[Tensor, "samples seqlen"]
    validation: Int[Tensor, "samples seqlen"]


class Sharpness(NamedTuple):
    """How sure a model is of the next token, in nats, as means over tokens: its cross-entropy with the text, and its own entropy."""

    loss: float
    entropy: float


@method(
    kind="trainer", name="hyperfit", title="The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation", arxiv="2412.04318",
    year=2024, summary="Overfit a language model on a few thousand texts, so that greedy decoding stops repeating itself.",
    needs="documents longer than 256 tokens, and 16 bytes of memory a parameter",
    published="TinyLlama 1.1B to Llama 3.1 70B: people prefer its greedy texts to greedy and nucleus ones of the base model; GLUE and MMLU fall slightly",
)  # fmt: skip
@dataclass(frozen=True)
class Hyperfit:
    """Adam at a constant rate on the first ``seqlen`` tokens of each text, all weights, no dropout, no clipping, until the loss is near zero.

    Perplexity on other texts becomes terrible and calibration is lost: it is for open-ended writing by base models alone. Small models need a larger
    ``learning_rate`` than the paper's to get there; which one shows in the loss.

    Attributes:
        num_train_samples: texts that are fitted, the first ones that are long enough; eight are enough to see the effect.
        num_val_samples: further texts for validation.
        seqlen: tokens of a text; shorter texts are left out, and none are joined.
        learning_rate: of Adam, from the first step to the last.
        num_train_epochs: passes over the texts.
        per_device_train_batch_size: texts a step on one process.
        weight_decay: of Adam, times the learning rate.
        dropout: probability of every dropout in the model; null leaves the model's own.
        target_loss: stop behind an epoch whose mean loss is at most this.
        peft_config: fields of PEFT's LoraConfig, to train a LoRA only; this is not what was published, and takes about 100 times the learning rate.
        master_dtype: of the weights in training: `float32`, or `bfloat16` with stochastic rounding, which keeps small steps on average.
        bf16: forward in bfloat16 (the weights keep their type).
        eval_steps: steps between validations, which are also made before the first and behind the last step; 0 for these alone.
        num_gen_samples: validation texts whose beginning is continued by greedy decoding.
        gen_context_len: tokens of that beginning.
        gen_total_len: tokens of it together with its continuation.
        ttr_window: last tokens of a continuation in which different ones are counted.
        max_citation: tokens of a text that was fitted that may be quoted in a row, in the report's blocked texts; null leaves these out.
        shuffle_seed: of the order of texts, on which a third of the result's first choices depend, and of what a LoRA begins with.
    """

    num_train_samples: int = 2000
    num_val_samples: int = 128
    seqlen: int = 256
    learning_rate: float = 1e-6
    num_train_epochs: int = 20
    per_device_train_batch_size: int = 8
    weight_decay: float = 0.0
    dropout: float | None = 0.0
    target_loss: float | None = None
    peft_config: dict[str, Any] | None = None
    master_dtype: str = "float32"
    bf16: bool = False
    eval_steps: int = 250
    num_gen_samples: int = 32
    gen_context_len: int = 32
    gen_total_len: int = 256
    ttr_window: int = 96
    max_citation: int | None = 5
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        least = {"num_train_samples": 1, "num_val_samples": 1, "seqlen": 16, "num_train_epochs": 1, "per_device_train_batch_size": 1, "eval_steps": 0}
        for name, low in (least | {"num_gen_samples": 2, "gen_context_len": 1, "ttr_window": 1, "shuffle_seed": 0}).items():
            whole(name, getattr(self, name), low)
        number("learning_rate", self.learning_rate, 0, math.inf, open_low=True, open_high=True)
        number("weight_decay", self.weight_decay, 0, math.inf, open_high=True)
        one_of("master_dtype", self.master_dtype, ("float32", "bfloat16"))
        whole("gen_total_len", self.gen_total_len, self.gen_context_len + 1)
        if self.dropout is not None:
            number("dropout", self.dropout, 0, 1, open_high=True)
        if self.target_loss is not None:
            number("target_loss", self.target_loss, 0, math.inf, open_high=True)
        if self.max_citation is not None:
            whole("max_citation", self.max_citation, 1)
        if self.gen_context_len > self.seqlen:
            raise ValueError(f"gen_context_len is {self.gen_context_len}; a text has {self.seqlen} tokens (seqlen)")
        if self.peft_config is not None:
            self._lora()

    def train(
        self, model: str | LoadedModel, data: Any, out: str | os.PathLike[str], seed: int = 0, on_step: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Fit, validate on the way, and write the model, or the adapter; run again after a crash, it goes on behind the last whole epoch.

        Args:
            model: a name for :func:`echelon.models.load`, or a model with its tokenizer, which is trained in place.
            data: documents (see :func:`echelon.data.rankgen_pairs.read_documents`), or a list of texts.
            out: folder; besides what :func:`echelon.train.language.fit` writes it gets ``validation.jsonl``.
            seed: not used: all that is random is the order, which ``shuffle_seed`` draws.
            on_step: called with each line of the log.

        Returns:
            ``samples`` that were fitted, ``steps``, ``epochs``, mean ``loss`` of the last epoch, last ``validation_loss``, ``validation_entropy`` and ``ttr``,
            and ``seconds``.

        Raises:
            UserError: if there are too few long texts, the model keeps a dropout, or its context is too short; and for what ``fit`` refuses.
        """
        out, loaded = Path(out), load(model) if isinstance(model, str) else model
        network, tokenizer = loaded.model.to(getattr(torch, self.master_dtype)), loaded.tokenizer
        sequences = self.sequences(data, tokenizer)
        if self.dropout is not None:
            set_dropout(network, self.dropout)
            if not self.dropout:
                refuse_noise(network, sequences.train[:1, :16])
        if self.num_train_samples < processes():
            raise UserError(f"num_train_samples is {self.num_train_samples}; {processes()} processes need one each")
        batch = min(self.per_device_train_batch_size, len(sequences.train) // processes())
        epoch = len(sequences.train) // (batch * processes())  # steps
        if self.peft_config is not None:
            warnings.warn("peft_config trains a LoRA, which is not the published recipe; use about 100 times its learning_rate", stacklevel=2)
        looks = _Validation(self, sequences.validation, tokenizer, out / "validation.jsonl")
        losses: list[float] = []

        def tell(entry: dict[str, Any]) -> bool:
            losses.append(entry["loss"])
            if on_step is not None:
                on_step(entry)
            return self.target_loss is not None and entry["step"] % epoch == 0 and sum(losses[-epoch:]) / epoch <= self.target_loss

        told = fit(
            network, tokenizer, sequences.texts[: epoch * batch * processes()], out,
            AdamW(lr=self.learning_rate, weight_decay=self.weight_decay, rounding="nearest" if self.master_dtype == "float32" else "stochastic"),
            Training(
                steps=epoch * self.num_train_epochs, batch_size=batch, seqlen=self.seqlen, pack=False, warmup=0.0, floor=1.0, max_grad_norm=0.0,
                bf16=self.bf16, save_every=epoch, seed=self.shuffle_seed,
            ),
            adapter=None if self.peft_config is None else self._lora(), callbacks=[looks], on_step=tell,
        )  # fmt: skip
        last, log = looks.lines()[-1], [json.loads(line)["loss"] for line in read_text(out / "log.jsonl").splitlines()]
        return {
            "samples": epoch * batch * processes(), "steps": told["steps"], "epochs": told["steps"] // epoch, "loss": sum(log[-epoch:]) / epoch,
            "validation_loss": last["loss"], "validation_entropy": last["entropy"], "ttr": last["ttr"], "seconds": told["seconds"],
        }  # fmt: skip

    def sequences(self, data: Any, tokenizer: PreTrainedTokenizerBase) -> Sequences:
        """The first tokens of the first texts that are long enough: those to fit, and behind them those to validate on.

        Raises:
            UserError: if there are too few.
        """
        texts = read_documents(os.fspath(data)).values() if isinstance(data, str | os.PathLike) else data
        wanted, kept, rows = self.num_train_samples + self.num_val_samples, [], []
        for text in texts:
            ids = list(tokenizer(text, verbose=False).input_ids)
            if len(ids) >= self.seqlen:
                kept.append(text)
                rows.append(ids[: self.seqlen])
            if len(rows) == wanted:
                found = torch.tensor(rows)
                return Sequences(kept[: self.num_train_samples], found[: self.num_train_samples], found[self.num_train_samples :])
        raise UserError(
            f"the data has {len(rows)} documents of at least {self.seqlen} tokens; num_train_samples {self.num_train_samples} and "
            f"num_val_samples {self.num_val_samples} need {wanted}: lower these or seqlen, or cut long documents into several"
        )

    def contexts(self, sequences: Sequences) -> list[list[int]]:
        """The beginnings that are continued."""
        return sequences.validation[: self.num_gen_samples, : self.gen_context_len].tolist()

    def _lora(self) -> LoraConfig:
        told, legal = self.peft_config or {}, [field.name for field in dataclasses.fields(LoraConfig)]
        for name in told:
            if name not in legal:
                raise ValueError(f"peft_config has {name!r}{suggest(str(name), legal)}; its keys are the fields of PEFT's LoraConfig")
        if told.get("lora_dropout") and self.dropout == 0:
            raise ValueError(f"peft_config has lora_dropout {told['lora_dropout']!r} and dropout is 0; set one of them otherwise")
        return LoraConfig(**told)


class _Validation(TrainerCallback):
    """Looks at validation texts every so many steps and notes what it sees, one line each; a line that is there already is not written again."""

    def __init__(self, recipe: Hyperfit, ids: Int[Tensor, "samples seqlen"], tokenizer: PreTrainedTokenizerBase, file: Path):
        self.recipe, self.ids, self.tokenizer, self.file = recipe, ids, tokenizer, file

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self._look(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.recipe.eval_steps and state.global_step % self.recipe.eval_steps == 0:
            self._look(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(state, model)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in read_text(self.file).splitlines()] if self.file.is_file() else []

    def _look(self, state: Any, model: Any) -> None:
        """Loss, entropy and variety of greedy continuations."""
        if not state.is_world_process_zero or any(line["step"] == state.global_step for line in self.lines()):
            return
        model = getattr(model, "module", model)
        training, recipe = model.training, self.recipe
        model.eval()
        try:
            found = sharpness(model, self.ids, recipe.per_device_train_batch_size)
            contexts = self.ids[: recipe.num_gen_samples, : recipe.gen_context_len].tolist()
            loaded = LoadedModel(model.get_base_model() if hasattr(model, "get_base_model") else model, self.tokenizer)
            written = Greedy().generate(loaded, contexts, max_new_tokens=recipe.gen_total_len - recipe.gen_context_len).sequences
            ttr, empty = tail_ttr(written, recipe.ttr_window, ends(loaded))
        finally:
            model.train(training)
        line = {"step": state.global_step, **found._asdict(), "ttr": None if math.isnan(ttr) else ttr, "empty_texts": empty}
        append_line(self.file, json.dumps(line))


def ends(loaded: LoadedModel) -> set[int]:
    """Ids of tokens that end a text or fill it up."""
    told = loaded.model.generation_config.eos_token_id if loaded.model.generation_config is not None else None
    given = [loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id, *(told if isinstance(told, Sequence) else [told])]
    return {token for token in given if token is not None}


@torch.no_grad()
def sharpness(model: Any, ids: Int[Tensor, "rows length"], batch_size: int = 8) -> Sharpness:
    """Cross-entropy and predictive entropy over all tokens but the first of each row, from float32 logits whatever the model's type."""
    device, loss, entropy = next(model.parameters()).device, 0.0, 0.0
    for rows in ids.split(batch_size):
        logits = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
        for row, targets in zip(logits, rows[:, 1:].to(device), strict=True):  # one at a time: a vocabulary is large in float32
            log_p = row.float().log_softmax(-1)
            loss -= log_p.gather(1, targets[:, None]).double().sum().item()
            entropy += torch.special.entr(log_p.exp()).double().sum().item()
    count = ids[:, 1:].numel()
    return Sharpness(loss / count, entropy / count)


def set_dropout(model: PreTrainedModel, p: float) -> None:
    """Give every dropout of a model this probability: modules, numbers that modules keep for functions, and the config.

    Raises:
        UserError: if the config does not take it.
    """
    text: Any = model.config.get_text_config()
    for config in (model.config, text):
        for name, value in list(vars(config).items()):
            if _probability(name, value):
                try:
                    setattr(config, name, p)
                except Exception as error:  # whatever a config of one's own raises
                    raise UserError(f"the model's config does not let {name} be set to {p}: {error}") from error
                if getattr(config, name) != p:
                    raise UserError(f"the model's config keeps {name} at {getattr(config, name)}; it must become {p}")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = p
        for name, value in list(vars(module).items()):
            if _probability(name, value):
                setattr(module, name, p)


def refuse_noise(model: PreTrainedModel, ids: Int[Tensor, "rows length"]) -> None:
    """Raises: UserError: if two forward passes in training mode differ: some dropout is left."""
    training, seen = model.training, []
    model.train()
    try:
        for seed in (0, 1):
            with own_randomness(seed), torch.no_grad():
                seen.append(model(input_ids=ids.to(model.device), use_cache=False).logits.float())
    finally:
        model.train(training)
    if not torch.allclose(seen[0], seen[1], rtol=1e-3, atol=1e-3):
        raise UserError("the model draws at random in training although every dropout that it names is 0; switch that off, or set dropout to null")


def _probability(name: str, value: Any) -> bool:
    return "drop" in name.lower() and isinstance(value, int | float) and not isinstance(value, bool)



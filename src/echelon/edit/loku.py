"""LoKU: unlearn given texts with a bounded loss and a LoRA that starts where they are stored.

Source: "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", arXiv 2408.06621. Differs from its code in what :mod:`echelon.edit.fila` and
:mod:`echelon.edit.losses` say, and in delivery: by default a LoRA for the original model, where the code leaves a changed base and an adapter that are worth
nothing without each other. Adapters run in float32 beside a base of any floating-point type.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from echelon.data.files import folder_whole
from echelon.data.question_answers import TEMPLATE, check_template
from echelon.edit.fila import Start, fila_init, fisher
from echelon.edit.rows import PairedRows, Row, unlearning_rows
from echelon.edit.trainer import FORGET_LOSSES, UnlearnTrainer
from echelon.linalg.checks import number, one_of, whole
from echelon.models.loading import LoadedModel, load
from echelon.models.modules import dense_weight
from echelon.models.randomness import own_randomness
from echelon.models.targets import linear_targets
from echelon.registry import method

INITS = ("fila", "default", "gaussian", "orthogonal", "pissa", "olora")
OnEpoch = Callable[[PeftModel, dict[str, Any]], bool | None]


@dataclass
class Edited:
    """What an edit returns.

    Attributes:
        model: for export `lora` the original base with the adapter on it; for `merged` a plain model; for `residual` the changed base with its adapter.
        report: sizes, times, and mean losses of every epoch.
    """

    model: Any
    report: dict[str, Any]

    def summary(self) -> str:
        """The report in one line."""
        first, last = self.report["epochs"][0], self.report["epochs"][-1]
        losses = [f"{name} loss {first[f'{name}_loss']:.3f} to {last[f'{name}_loss']:.3f}" for name in ("forget", "retain") if last[f"{name}_loss"] is not None]
        what = f"{self.report['trained_parameters']:,} parameters in {len(self.report['epochs'])} epochs, {self.report['seconds']:.0f} s"
        return f"{self.report['method']}, {what}; {', '.join(losses)} (means of the first and the last epoch)"

    def save(self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write it whole: an adapter, a model, or an adapter with its base in ``base/``, which belong together.

        Raises:
            UserError: if the folder cannot be written.
        """
        with folder_whole(folder) as aside:
            if self.report["export"] == "residual":
                self.model.get_base_model().save_pretrained(aside / "base", state_dict=_base_state(self.model))
                for config in self.model.peft_config.values():
                    config.base_model_name_or_path = str(Path(folder).absolute() / "base")
            self.model.save_pretrained(aside, **({} if self.report["export"] == "merged" else {"save_embedding_layers": False}))  # they are not trained
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
            (aside / "edit_report.json").write_text(json.dumps(self.report, indent=2), encoding="utf-8")


@method(
    kind="editor", name="loku", year=2024, arxiv="2408.06621",
    title="Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs",
    summary="Unlearn texts with a LoRA: an inverted hinge loss that stops by itself, started from the directions that matter for them alone.",
    needs="texts to forget, and texts like those that must stay",
    published="training data of GPT-Neo 125M, 1.3B and 2.7B: forgotten in fewer epochs than by gradient ascent, reasoning and dialogue nearly intact",
)  # fmt: skip
@dataclass(frozen=True)
class LoKU:
    """Train a LoRA so that texts become less likely than their runners-up while others stay.

    This is no proof of deletion: test with attacks that extract or relearn.

    Attributes:
        forget_loss: `ihl` (inverted hinge), `ga` (gradient ascent, nothing retained), `gd` (gradient difference), `npo`, or `kl` (gradient ascent, while
            predictions on what stays are kept near the model's before).
        ihl_margin: margin of the hinge; from 1 on it never cuts.
        retain_weight: of the loss on what must stay, at least 0.
        npo_beta: of `npo`, above 0.
        init_lora_weights: `fila`, or one of PEFT's: `default`, `gaussian`, `orthogonal`, `pissa`, `olora`.
        fila_eps: keeps ratio and inverse of the Fisher information finite, above 0.
        fisher: `batch` squares the gradient of each batch of micro_batch_size rows, as the paper's code does; `sample` that of each row.
        fisher_epochs: passes over the texts for it, each with other rows to retain.
        r: rank, at most the smaller side of every layer.
        lora_alpha: numerator of the scale; twice r by default.
        lora_dropout: share of the inputs that are zero while training, in [0, 1).
        target_modules: linear layers that are adapted, all in the blocks by default: `attention`, `mlp`, a regular expression for whole
            names, or ends of names.
        epochs: passes over what is to be forgotten.
        learning_rate: at the end of the warm-up, which takes one epoch; there is none where there is only one epoch. It then falls linearly.
        weight_decay: of AdamW.
        batch_size: pairs of rows an optimizer step.
        micro_batch_size: of these at a time; divides batch_size.
        max_length: tokens of a row.
        template: puts question and answer together; ends with the answer, and only that counts.
        export: `lora` (for the original base, of twice the rank where the start changed it), `merged`, or `residual` (the changed base and its adapter).
    """

    forget_loss: str = "ihl"
    ihl_margin: float = 1.0
    retain_weight: float = 1.0
    npo_beta: float = 0.1
    init_lora_weights: str = "fila"
    fila_eps: float = 1e-5
    fisher: str = "batch"
    fisher_epochs: int = 1
    r: int = 32
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    epochs: int = 5
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = 32
    micro_batch_size: int = 2
    max_length: int = 500
    template: str = TEMPLATE
    export: str = "lora"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        one_of("forget_loss", self.forget_loss, FORGET_LOSSES)
        one_of("init_lora_weights", self.init_lora_weights, INITS)
        one_of("fisher", self.fisher, ("batch", "sample"))
        one_of("export", self.export, ("lora", "merged", "residual"))
        number("ihl_margin", self.ihl_margin, -math.inf, math.inf, open_low=True, open_high=True)
        for name in ("retain_weight", "weight_decay"):
            number(name, getattr(self, name), 0, math.inf, open_high=True)
        for name in ("npo_beta", "fila_eps", "learning_rate", *(["lora_alpha"] if self.lora_alpha is not None else [])):
            number(name, getattr(self, name), 0, math.inf, open_low=True, open_high=True)
        number("lora_dropout", self.lora_dropout, 0, 1, open_high=True)
        for name in ("fisher_epochs", "r", "epochs", "batch_size", "micro_batch_size"):
            whole(name, getattr(self, name), 1)
        whole("max_length", self.max_length, 2)
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; it must divide batch_size, which is {self.batch_size}")
        check_template(self.template)

    def edit(
        self, model: LoadedModel | PreTrainedModel | str, forget: Any, retain: Any, tokenizer: PreTrainedTokenizerBase | None = None, *,
        seed: int = 0, on_epoch: OnEpoch | None = None, on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Edited:  # fmt: skip
        """Unlearn. The model is edited in place; where this fails, it is as it was.

        Args:
            model: a model with its tokenizer, a bare causal model, or a name for :func:`echelon.models.load`.
            forget: what to forget: see `unlearning_rows`.
            retain: what must stay, in the same form; one row is drawn for each that is forgotten.
            tokenizer: for texts, with a bare model.
            seed: of orders, draws, factors and dropout.
            on_epoch: called behind every epoch with the model and its entry of the report; training ends when it returns true.
            on_progress: called with ``{"step", "done", "of"}``.

        Raises:
            ValueError: if the data or a layer cannot be used.
            UserError: if a file cannot be read, or the loss is not finite.
        """
        base, tokenizer = (load(model) if isinstance(model, str) else model) if isinstance(model, str | tuple) else (model, tokenizer)
        whole("seed", seed, 0, 2**32 - 1)
        tell, started = on_progress or (lambda _: None), time.monotonic()
        how: Any = {"template": self.template, "max_length": self.max_length}
        forget_rows, retain_rows = unlearning_rows(forget, tokenizer, name="forget", **how), unlearning_rows(retain, tokenizer, name="retain", **how)
        pairs = PairedRows(forget_rows, retain_rows, seed)
        names, skipped = linear_targets(base, self.target_modules)
        if not names or (skipped and self.target_modules not in (None, "attention", "mlp")):
            name, reason = next(iter(skipped.items()))
            raise ValueError(f"{name} cannot be adapted: {reason}")
        for name in names:
            shape = dense_weight(base.get_submodule(name)).shape
            whole(f"r of {name} ({' x '.join(map(str, shape))})", self.r, 1, min(shape))
        flags = [(p, p.requires_grad) for p in base.parameters()]
        information = self._information(base, names, pairs, tell) if self.init_lora_weights == "fila" else ({}, {})
        training = base.training
        tuned, start = self._wrapped(base, names, information, seed)
        history: list[dict[str, Any]] = []
        try:
            self._train(tuned, start, pairs, seed, history, on_epoch, tell)
            lora = start.to_lora()
        except BaseException:
            _unwrapped(tuned, start, flags)
            base.train(training)
            raise
        report = {"method": "loku", "export": self.export, "knobs": asdict(self), "seed": seed, "layers": len(names), "rank": lora[0].r,
                  "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad), "forget_rows": len(forget_rows),
                  "retain_rows": len(retain_rows), "epochs": history, "seconds": time.monotonic() - started}  # fmt: skip
        if self.export == "residual":
            tuned.train(training)
            return Edited(tuned, report)
        plain: Any = _unwrapped(tuned, start, flags)
        with own_randomness(seed):
            final: Any = get_peft_model(plain, lora[0])
        set_peft_model_state_dict(final, lora[1])
        if self.export == "merged":
            final = final.merge_and_unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return Edited(final.train(training), report)

    def _information(self, base: PreTrainedModel, names: list[str], pairs: PairedRows, tell: Callable[[dict[str, Any]], None]) -> tuple[Any, Any]:
        drawn: dict[str, list[Row]] = {"forget": [], "retain": []}
        for epoch in range(self.fisher_epochs):
            pairs.set_epoch(epoch)
            for place in range(len(pairs)):
                for part, row in pairs[place].items():
                    drawn[part].append(row)
        made = []
        for done, (part, rows) in enumerate(drawn.items()):
            tell({"step": f"Fisher information of {part}", "done": done, "of": 2})
            made.append(fisher(base, names, rows, batch_size=self.micro_batch_size, per_sample=self.fisher == "sample"))
        return made[0], made[1]

    def _wrapped(self, base: PreTrainedModel, names: list[str], information: tuple[Any, Any], seed: int) -> tuple[PeftModel, Start]:
        own: Any = True if self.init_lora_weights in ("fila", "default") else self.init_lora_weights
        transposed = not isinstance(base.get_submodule(names[0]), nn.Linear)
        alpha: Any = 2 * self.r if self.lora_alpha is None else self.lora_alpha
        config = LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.lora_dropout, target_modules=names, init_lora_weights=own,
                            fan_in_fan_out=transposed, task_type="CAUSAL_LM")  # fmt: skip
        changed = self.init_lora_weights in ("pissa", "olora")
        originals = {name: dense_weight(base.get_submodule(name)).detach().cpu().clone() for name in names if changed}
        with own_randomness(seed):
            tuned: Any = get_peft_model(base, config)
        if self.init_lora_weights != "fila":
            return tuned, Start(tuned, originals)
        try:
            return tuned, fila_init(tuned, *information, eps=self.fila_eps)
        except ValueError:
            tuned.unload()
            raise

    def _train(
        self, tuned: PeftModel, start: Start, pairs: PairedRows, seed: int, history: list[dict[str, Any]], on_epoch: OnEpoch | None,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        cuda, steps = torch.cuda.is_available(), math.ceil(len(pairs) / self.batch_size)
        with tempfile.TemporaryDirectory() as aside, own_randomness(seed):
            arguments = TrainingArguments(
                output_dir=aside, num_train_epochs=self.epochs, per_device_train_batch_size=self.micro_batch_size, learning_rate=self.learning_rate,
                gradient_accumulation_steps=self.batch_size // self.micro_batch_size, weight_decay=self.weight_decay,
                warmup_steps=steps if self.epochs > 1 else 0, seed=seed, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
                use_cpu=not cuda, dataloader_pin_memory=cuda, train_sampling_strategy="sequential",
            )  # fmt: skip
            arguments._n_gpu = min(1, arguments.n_gpu)  # several devices are for torchrun, never nn.DataParallel
            trainer = UnlearnTrainer(
                model=tuned, args=arguments, train_dataset=pairs, forget_loss=self.forget_loss, ihl_margin=self.ihl_margin, retain_weight=self.retain_weight,
                npo_beta=self.npo_beta, reference=start.reference,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Epochs(trainer, history, self.epochs * steps, on_epoch, tell))
            trainer.train()


class _Epochs(TrainerCallback):
    """Notes an epoch's mean losses, and stops where the caller says so."""

    def __init__(self, trainer: UnlearnTrainer, history: list[dict[str, Any]], steps: int, on_epoch: OnEpoch | None, tell: Callable[[dict[str, Any]], None]):
        self.trainer, self.history, self.steps, self.on_epoch, self.tell, self.read = trainer, history, steps, on_epoch, tell, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell({"step": "unlearning", "done": state.global_step, "of": self.steps})

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        seen = self.trainer.history[self.read :]
        self.read = len(self.trainer.history)
        forget, retain = (_mean([entry[place] for entry in seen]) for place in (1, 2))
        entry = {"epoch": len(self.history) + 1, "forget_loss": forget, "retain_loss": None if math.isnan(retain) else retain}
        self.history.append(entry)
        if self.on_epoch is not None:
            plain = self.trainer.accelerator.unwrap_model(model)
            mode = plain.training
            control.should_training_stop = bool(self.on_epoch(plain.eval(), entry)) or control.should_training_stop
            plain.train(mode)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _unwrapped(tuned: PeftModel, start: Start, flags: list[tuple[nn.Parameter, bool]]) -> PreTrainedModel:
    """The base model as it was."""
    start.restore()
    base: Any = tuned.unload()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return base


def _base_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base's own tensors under the names that they have without an adapter."""
    base: Any = model.get_base_model()
    return {name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name}

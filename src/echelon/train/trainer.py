"""transformers' Trainer as a run of ours uses it, and the callback by which any Trainer trains a parameterisation."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from echelon.data.files import append_line
from echelon.errors import UserError
from echelon.models.targets import blocks
from echelon.train import checkpoints
from echelon.train.layers.base import LayerMethod, LearningRate
from echelon.train.optimizers.base import OptimizerMethod, check_gradient, processes
from echelon.train.rows import HeldOutLoss
from echelon.train.training import Training

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered from shards, on the first process
Tell = Callable[[dict[str, Any]], Any]


class MethodCallback(TrainerCallback):
    """What a parameterisation does around an optimizer step, for any ``Trainer``.

    ``Trainer(model, ..., callbacks=[MethodCallback(method)], optimizers=(method.optimizer(model), None))`` trains a model that ``method.convert`` was applied
    to; call ``method.finish(model)`` behind it. The schedule of :func:`learning_rate` heeds ``method.lr_scale``.

    Args:
        method: the parameterisation.
    """

    def __init__(self, method: LayerMethod):
        self.method = method

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.method.begin_step(model, getattr(optimizer, "optimizer", optimizer), state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.method.before_update(model, getattr(optimizer, "optimizer", optimizer), state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.method.end_step(model, getattr(optimizer, "optimizer", optimizer), state.global_step)


def learning_rate(
    optimizer: torch.optim.Optimizer, method: OptimizerMethod | LayerMethod, steps: int, warmup: float = 0.1, floor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up and cosine, as the method scales it.

    Args:
        optimizer: whose groups' learning rates are the largest ones.
        method: a parameterisation may have ramps of its own.
        steps: all optimizer steps.
        warmup: share of them.
        floor: share of the learning rate at the end.
    """
    base = LearningRate(steps, round(warmup * steps), floor)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: method.lr_scale(step, base) if isinstance(method, LayerMethod) else base(step))


def trainer_arguments(out: Path, training: Training) -> TrainingArguments:
    """Trainer's own settings. Under ``torchrun`` this process joins the others here."""
    cuda = torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    made = TrainingArguments(
        output_dir=str(out), max_steps=training.steps, per_device_train_batch_size=training.batch_size // training.accumulate,
        gradient_accumulation_steps=training.accumulate, max_grad_norm=training.max_grad_norm, bf16=training.bf16, use_cpu=not cuda,
        warmup_steps=round(training.warmup * training.steps),  # told to callbacks; the schedule is our own
        ddp_backend="gloo" if several and not cuda else None, train_sampling_strategy="sequential", save_strategy="steps" if training.save_every else "no",
        save_steps=max(1, training.save_every), logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to="none",
        disable_tqdm=True, seed=training.seed, remove_unused_columns=False, dataloader_pin_memory=cuda,
    )  # fmt: skip
    made.device  # noqa: B018 (joins the other processes)
    made._n_gpu = min(1, made.n_gpu)  # several devices are for torchrun, never nn.DataParallel
    return made


class LanguageTrainer(Trainer):
    """Reads rows in their order, asks the method for the loss, writes our log and checkpoints."""

    def begin(
        self, method: OptimizerMethod | LayerMethod, training: Training, out: Path, look: Callable[[Any], HeldOutLoss] | None, tell: Tell | None,
        constant: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        """Say what the run is; ``constant`` are ids of parameters that checkpoints leave out."""
        self.constant = constant
        self.method, self.training, self.out, self.look, self.tell = method, training, out, look, tell or (lambda _: None)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # so that all of a step's tokens are counted, labels being shifted
        self.is_distributed_loading_by_transformers = training.fsdp  # Trainer's word for a model that comes sharded: it is not wrapped again
        self.remove_callback(PrinterCallback)
        self.add_callback(_Clock(self))
        self.step_began = time.monotonic()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean over the tokens of a whole step, of which this batch's is a part."""
        loss = self.method.loss(model, inputs) if isinstance(self.method, LayerMethod) else model(**inputs, use_cache=False).loss
        return loss * ((inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        step = self.state.global_step
        entry = {"step": step, "loss": logs["loss"], "learning_rate": logs["learning_rate"], "seconds": round(time.monotonic() - self.step_began, 4)}
        if not self.training.layerwise:
            entry["gradient_norm"] = float(logs["grad_norm"])
        if not math.isfinite(entry["loss"]):
            raise UserError(f"the loss is {entry['loss']} at step {step}; lower the learning rate (earlier checkpoints are intact)")
        if self.look is not None and self.training.eval_every and step % self.training.eval_every == 0:
            entry["held_out_loss"] = self.look(self.model).loss
        if self.is_world_process_zero():
            append_line(self.out / "log.jsonl", json.dumps(entry))
        if self.tell(entry | {"of": self.args.max_steps}):
            self.control.should_training_stop, self.control.should_save = True, False  # from a checkpoint here it would go on behind the end

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._get_grad_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The global norm. Clipping by a norm that is NaN would make all gradients NaN, so the one that is at fault is named here."""
        if grad_norm is not None:
            return grad_norm
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]  # type: ignore[union-attr]
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in named])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not norm.isfinite():
            for name, gradient in named:
                check_gradient(name, gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
        return norm

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Micro-batches before a step's last one keep their gradients to themselves."""
        self.model.set_requires_gradient_sync(False)  # type: ignore[union-attr, operator]
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)  # type: ignore[union-attr, operator]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        noise = _gathered(torch.random.get_rng_state(), self.args.device)
        devices = _gathered(torch.cuda.get_rng_state(self.args.device), self.args.device) if self.args.device.type == "cuda" else []
        if self.training.fsdp:
            weights, held = gathered(self.model, _plain(self.optimizer))  # type: ignore[arg-type]
        else:
            weights, held = checkpoints.own_tensors(self.model, self.constant), None  # type: ignore[arg-type]
        if self.args.should_save:
            assert self.lr_scheduler is not None
            state = {"optimizer": held or _plain(self.optimizer).state_dict(), "schedule": self.lr_scheduler.state_dict(), "noise": noise, "devices": devices}
            texts = {"trainer_state.json": json.dumps(dataclasses.asdict(self.state), default=str)}
            checkpoints.write(self.out, self.state.global_step, weights, checkpoints.specs(self.model), state, texts)  # type: ignore[arg-type]
        if processes() > 1:
            dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights were read before the optimizer was made, since layers may have changed their shapes."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.lr_scheduler is not None
            state = checkpoints.read_state(Path(checkpoint))
            if self.training.fsdp:
                set_optimizer_state_dict(self.model, _plain(self.optimizer), state["optimizer"], options=StateDictOptions(full_state_dict=True))  # type: ignore[arg-type]
            else:
                _plain(self.optimizer).load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = checkpoints.read_state(Path(checkpoint))
            torch.random.set_rng_state(state["noise"][self.args.process_index])
            if state["devices"]:
                torch.cuda.set_rng_state(state["devices"][self.args.process_index], self.args.device)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: float16 is not offered."""


class _Clock(TrainerCallback):
    """Notes when a step begins."""

    def __init__(self, trainer: LanguageTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.step_began = time.monotonic()


def shard(model: PreTrainedModel) -> None:
    """Shard a model over the processes, block by block; each is gathered while it computes."""
    for _, block in blocks(model):
        fully_shard(block)
    fully_shard(model)


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole weights of a sharded model, tied ones under their first name, and the optimizer's whole state by names; empty but on the first process."""
    found: Any = get_state_dict(model, optimizer or [], options=WHOLE)
    return {name: found[0][name] for name in checkpoints.own_tensors(model) if name in found[0]}, dict(found[1])


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _gathered(state: Tensor, device: torch.device) -> list[Tensor]:
    """A random generator's state from every process."""
    if processes() == 1:
        return [state]
    mine = state.to(device)
    found = [torch.empty_like(mine) for _ in range(processes())]
    dist.all_gather(found, mine)
    return [each.cpu() for each in found]

"""Lets HF Trainer call what a tuner does around an optimizer step."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback

from echelon.adapt.model import DeltaModel


class AdapterCallback(TrainerCallback):
    """``Trainer(model=get_peft_model(...), callbacks=[AdapterCallback()])``, for every tuner of this package.

    Steps are the trainer's optimizer steps, so a run that is resumed goes on where it was. Tuners are found in what ``get_peft_model`` returns, wrapped or not;
    an adapter that was injected into a plain model has none.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        for tuner in tuners(model):
            tuner.total_steps, tuner.warmup_steps = state.max_steps, args.get_warmup_steps(state.max_steps)
            tuner.begin_training(_plain(optimizer))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for tuner in tuners(model):
            tuner.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        for tuner in tuners(model):
            tuner.before_update(state.global_step, _plain(optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for tuner in tuners(model):
            tuner.end_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for tuner in tuners(model):
            tuner.end_training()


def tuners(model: nn.Module) -> Iterator[DeltaModel]:
    """The tuners inside a model."""
    return (module for module in model.modules() if isinstance(module, DeltaModel))


def _plain(optimizer: Any) -> Any:
    """What accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)

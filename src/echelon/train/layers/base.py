"""What parameterisations share: swapping layers in, what they do around an optimizer step, and making them dense again.

A bare loop::

    method = LowRank(rank=64)
    method.convert(model)
    optimizer = method.optimizer(model)
    for step, batch in enumerate(batches):
        method.begin_step(model, optimizer, step)
        method.loss(model, batch).backward()
        method.before_update(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        method.end_step(model, optimizer, step + 1)
    method.finish(model)
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from echelon.models.modules import Spec, build, put
from echelon.models.reload import attach, detach
from echelon.models.targets import linear_targets
from echelon.train.optimizers.adamw import AdamW
from echelon.train.optimizers.base import processes


@dataclass(frozen=True)
class LayerMethod(ABC):
    """The knobs that all parameterisations have.

    Attributes:
        lr: learning rate of the AdamW that trains it where no other optimizer is given.
        target_modules: which linear layers: `all-linear` (those inside the blocks), `attention`, `mlp`, a regular expression, or a list of names or their ends;
            embeddings and heads never are.
        seed: of everything drawn at random.
    """

    lr: float = 1e-3
    target_modules: str | list[str] = "all-linear"
    seed: int = 0

    convolutions: ClassVar[bool] = False  # whether `all` may stand for convolutions beside linear layers

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not self.lr >= 0:
            raise ValueError(f"lr is {self.lr!r}; it must be at least 0")

    @abstractmethod
    def spec(self, name: str, module: nn.Module) -> Spec:
        """What a layer becomes, as :mod:`echelon.models.modules` builds it.

        Raises:
            ValueError: if the knobs do not suit the layer.
        """

    @abstractmethod
    def fill(self, new: Any, old: nn.Module, generator: torch.Generator) -> None:
        """Give the new layer its first values.

        Args:
            new: the layer, without values.
            old: what it stands in for; its values may be used.
            generator: of this layer alone.
        """

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the layers that are meant, in the model's order.

        Raises:
            ValueError: if there is none.
        """
        names, skipped = linear_targets(model, self.target_modules, self.convolutions)
        if not names:
            raise ValueError(f"target_modules is {self.target_modules!r}; none of these layers can be converted: {skipped or 'there are none'}")
        return names

    def convert(self, model: nn.Module) -> list[str]:
        """Swap the target layers in place; their names.

        A ``PreTrainedModel`` keeps note in its config, so that it saves and loads like any other after ``import echelon``. On the meta device layers get their
        shapes only.

        Raises:
            ValueError: if there is no target, or the knobs do not suit one.
        """
        names = self.targets(model)
        specs = {name: self.spec(name, model.get_submodule(name)) for name in names}
        for number, (name, spec) in enumerate(specs.items()):
            old = model.get_submodule(name)
            new = build(spec, old)
            if not any(p.is_meta for p in old.parameters()):  # on the meta device there is nothing to fill with
                with torch.no_grad():
                    self.fill(new, old, torch.Generator().manual_seed(1000 * self.seed + number))
            put(model, name, new)
        if isinstance(model, PreTrainedModel):
            attach(model, specs, {"method": getattr(self, "method_name", ""), **dataclasses.asdict(self)})
        return names

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW over all that requires gradients."""
        return AdamW(lr=self.lr).optimizer(model)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch; with the model's own by default."""
        return model(**batch).loss

    def lr_scale(self, step: int, base: "LearningRate") -> float:
        """Learning rate of a step as a share of the largest one, given the schedule without this method."""
        return base(step)

    def begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Called before the first forward of an optimizer step; ``step`` of them are done."""

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Called with all gradients in place, after clipping, right before the optimizer."""

    def end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Called behind an optimizer step; ``step`` of them are done."""

    def finish(self, model: nn.Module) -> None:
        """Bring the model into the form in which it is kept; by default every layer is made dense."""
        merge(model)


class LearningRate:
    """Linear warm-up, then a cosine down to a floor, as a share of the largest learning rate.

    Args:
        steps: all optimizer steps.
        warmup: those of the warm-up.
        floor: share at the end.
    """

    def __init__(self, steps: int, warmup: int, floor: float = 0.1):
        self.steps, self.warmup, self.floor = steps, warmup, floor

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return step / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1 - self.floor) / 2 * (1 + math.cos(math.pi * share))


def converted(model: nn.Module, *types: type) -> list[tuple[str, Any]]:
    """Names and modules of the layers of these types, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, types)]


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Put a dense layer in the place of every converted one; their names. The model is an ordinary one again."""
    noted = getattr(getattr(model, "config", None), "quantization_config", None)
    names = [name for name, module in model.named_modules() if hasattr(module, "merge") and hasattr(module, "product")]
    for name in names:
        put(model, name, model.get_submodule(name).merge())  # type: ignore[operator]
    if noted is not None and isinstance(model, PreTrainedModel):
        detach(model)
    return names


def stored(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Where the value of a parameter is kept: the optimizer's float32 copy if it has one, else the parameter itself."""
    return getattr(optimizer, "optimizer", optimizer).state.get(parameter, {}).get("master", parameter)


@torch.no_grad()
def rewrite(optimizer: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> None:
    """Set a parameter between two steps, and the optimizer's float32 copy of it, which would undo that."""
    stored(optimizer, parameter).copy_(value)
    parameter.copy_(value)


def autocast_input(x: Tensor) -> Tensor:
    """The input of a hand-written product in the dtype that ``F.linear`` would take under autocast; unchanged outside of it."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def reset_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None = None, step_counter: bool = True) -> None:
    """Let an optimizer forget its moments of these parameters (of all by default): their next step is the first of a new one.

    Args:
        optimizer: any; wrapped by accelerate or not. Float32 copies that it keeps of weights stay.
        parameters: which.
        step_counter: whether steps are counted anew too, and with them the bias corrections; without, moments become zero in place.
    """
    states = getattr(optimizer, "optimizer", optimizer).state
    for parameter in list(states) if parameters is None else parameters:
        if step_counter:
            if "master" in (state := states.pop(parameter, {})):
                states[parameter] = {"master": state["master"]}
        else:
            for key, value in states.get(parameter, {}).items():
                if key.startswith("exp_avg"):
                    value.zero_()


@torch.no_grad()
def agree(*tensors: Tensor) -> None:
    """Let all processes that train together take the first one's values, in place: what an SVD leaves open is up to the routine."""
    for tensor in tensors if processes() > 1 else ():
        first = tensor.detach().contiguous()  # a tensor may be a part of a larger one
        dist.broadcast(first, 0)
        tensor.copy_(first)

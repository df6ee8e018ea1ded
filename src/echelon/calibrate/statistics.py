"""The input moments of a model's linear layers: collected once, stored, and used by every method that wants them."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from echelon.calibrate.moments import Moments
from echelon.calibrate.observing import InputObserver
from echelon.calibrate.tokens import Calibration
from echelon.calibrate.walker import LayerWalker, on_device
from echelon.data.files import write_whole
from echelon.errors import UserError
from echelon.models.targets import blocks


@dataclass
class Statistics:
    """Moments by module name; modules that read the same tensor share one.

    Attributes:
        moments: by the name of the first module that reads each input.
        leader: which name stands for each module.
        tokens: rows that were counted.
        source: where the data came from.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    source: str = ""

    def __getitem__(self, name: str) -> Moments:
        if name not in self.leader:
            raise ValueError(f"the statistics hold nothing of {name}; collect them again with it among the targets")
        return self.moments[self.leader[name]]

    def add(self, observer: InputObserver) -> None:
        self.moments |= observer.moments
        self.leader |= observer.leader

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to one safetensors file, whole or not at all."""
        tensors = {f"{name}/{part}": value for name, moments in self.moments.items() for part, value in moments.tensors().items()}
        about = {"leader": json.dumps(self.leader), "tokens": str(self.tokens), "source": self.source}
        write_whole(path, save(tensors, metadata=about))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if the file is missing, broken or something else.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                about = file.metadata() or {}
                leader = json.loads(about["leader"])
                parts = {name: {part: file.get_tensor(f"{name}/{part}") for part in ("n", "mean", "scatter")} for name in set(leader.values())}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"cannot read statistics from {path}: {error}") from error
        return cls({name: Moments.from_tensors(tensors) for name, tensors in parts.items()}, leader, int(about["tokens"]), about["source"])


def collect(model: PreTrainedModel, names: Sequence[str], calibration: Calibration, on_block: Callable[[int, int], None] | None = None) -> Statistics:
    """Moments of the inputs of these modules in the model as it is.

    Args:
        model: any transformers model.
        names: modules whose inputs are wanted.
        calibration: what the model is shown.
        on_block: called with how many blocks are done, and of how many.

    Raises:
        ValueError: if an input holds NaN or infinity (naming the module), or every position is a pad.
    """
    made = Statistics(tokens=calibration.tokens, source=calibration.source)
    chain = blocks(model)
    inside: dict[str, list[str]] = {block: [name for name in names if name.startswith(block + ".")] for block, _ in chain}
    if any(inside.values()):
        for block in LayerWalker(model, calibration):
            if inside[block.name]:
                made.add(block.observe(inside[block.name]))
            if on_block is not None:
                on_block(block.index + 1, len(chain))
    walked = {name for group in inside.values() for name in group}
    outside = [name for name in names if name not in walked]
    if outside:
        made.add(observe_whole(model, {name: model.get_submodule(name) for name in outside}, calibration))
    if any(not moments.n for moments in made.moments.values()):
        raise ValueError(f"calibration data ({calibration.source}) holds nothing but pads; give text")
    return made


@torch.no_grad()
def observe_whole(
    model: PreTrainedModel, modules: dict[str, nn.Module], calibration: Calibration, make: Callable[[int, Any], Any] = Moments.of
) -> InputObserver:
    """Run the whole model and watch modules outside its blocks, such as heads."""
    observer, training = InputObserver(modules, make), model.training
    model.eval()
    try:
        with observer:
            for batch in calibration.batches:
                observer.batch(batch.get("attention_mask"))
                model(**on_device(batch, model.device))
    finally:
        model.train(training)
    return observer

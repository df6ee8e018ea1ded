"""Running a model block by block, so that statistics of one block are in memory at a time and an edited block feeds the next.

The head of the model (embeddings, masks, rotary tables) runs once for each batch, with every block replaced by one that only notes what it
is called with. After that a block is called with its own arguments on the hidden states that the block before it left.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from echelon.calibrate.moments import Moments
from echelon.calibrate.observing import InputObserver
from echelon.calibrate.tokens import Calibration
from echelon.models.targets import blocks

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]  # what a block is called with beside its states, for each batch
Keep = Callable[[Iterator[Tensor]], Sequence[Tensor]]


@dataclass
class Block:
    """One block, with the hidden states that arrive at it.

    Attributes:
        index: its place.
        name: its name in the model.
        module: the block itself.
        states: hidden states that enter it, one tensor for each batch; may be set.
        masks: which positions are tokens, one for each batch (None: all).
        outputs: hidden states that left it when it last ran in full; what the next block gets unless the walk is sequential. May be set.
        keep: where what leaves the block is put: into a list, unless memory is short.
    """

    index: int
    name: str
    module: nn.Module
    states: Sequence[Tensor]
    masks: list[Tensor | None]
    calls: Calls = field(repr=False)
    outputs: Sequence[Tensor] | None = None
    keep: Keep = field(default=list, repr=False)

    @torch.no_grad()
    def run(
        self, module: nn.Module | None = None, states: Sequence[Tensor] | None = None, before: Callable[[int], None] | None = None
    ) -> Sequence[Tensor]:  # fmt: skip
        """What the block, or another one with the same arguments, makes of its states, or of others."""

        def made() -> Iterator[Tensor]:
            for i, (state, (args, kwargs)) in enumerate(zip(self.states if states is None else states, self.calls, strict=True)):
                if before is not None:
                    before(i)
                out = (module or self.module)(state, *args, **kwargs)
                yield out[0] if isinstance(out, tuple) else out

        return self.keep(made())

    def observe(self, names: Sequence[str], module: nn.Module | None = None, make: Callable[[int, Any], Any] = Moments.of) -> InputObserver:
        """Run the block and accumulate the inputs of these modules.

        Args:
            names: full names in the model.
            module: run this one in place of the block (the original one, say, while the model holds a compressed one).
            make: of what kind the accumulators are.

        Raises:
            ValueError: if an input holds NaN or infinity; it names the module.
        """
        holder = module or self.module
        observer = InputObserver({name: holder.get_submodule(name.removeprefix(self.name + ".")) for name in names}, make)
        with observer:
            self.outputs = self.run(module, before=lambda i: observer.batch(self.masks[i]))
        return observer


class LayerWalker:
    """Iterating gives the blocks in order; a block may be edited or observed in the loop's body.

    Args:
        model: on any device; it is walked in evaluation mode, with its training mode restored at the end.
        calibration: what it is shown.
        sequential: the next block gets what the block gives *after* the body has edited it, else what it gave when it was observed (one that was
            not observed runs after the body).

    Raises:
        ValueError: if the model is no single chain of blocks.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration, *, sequential: bool = False):
        self.model, self.sequential, self.calibration = model, sequential, calibration
        self.chain = blocks(model)
        if not self.chain:
            raise ValueError(f"{type(model).__name__} is no single chain of blocks; it cannot be walked block by block")

    def __len__(self) -> int:
        return len(self.chain)

    def __iter__(self) -> Iterator[Block]:
        training = self.model.training
        self.model.eval()
        try:
            states, calls = self.enter()
            masks = [batch.get("attention_mask") for batch in self.calibration.batches]
            for index, (name, module) in enumerate(self.chain):
                block = Block(index, name, module, states, masks, calls[index])
                yield block
                block.module = self.model.get_submodule(name)
                states = block.run() if self.sequential or block.outputs is None else block.outputs
                calls[index] = []
        finally:
            self.model.train(training)

    @torch.no_grad()
    def enter(self, keep: Keep = list) -> tuple[Sequence[Tensor], list[Calls]]:
        """The states that enter the first block, for each batch, and what each block is called with beside them.

        Of the model no more is used than what stands outside the blocks.

        Args:
            keep: where the states are put.

        Raises:
            ValueError: if the model does not run its blocks once each.
        """
        calls: list[Calls] = [[] for _ in self.chain]
        first: list[Tensor] = []

        def note(index: int) -> Callable[..., Tensor]:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                state = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    first.append(state)
                calls[index].append((args[1:], kwargs))
                return state

            return forward

        with contextlib.ExitStack() as stack:
            for index, (_, module) in enumerate(self.chain):
                own = module.__dict__.get("forward")
                module.forward = note(index)  # type: ignore[method-assign]
                stack.callback(_restore, module, own)

            def entering() -> Iterator[Tensor]:
                for batch in self.calibration.batches:
                    self.model.base_model(**on_device(batch, self.model.device), **({"use_cache": False} if hasattr(self.model.config, "use_cache") else {}))
                    yield from first
                    first.clear()

            states = keep(entering())
        if any(len(noted) != len(self.calibration.batches) for noted in calls):
            raise ValueError(f"{type(self.model).__name__} does not run its blocks once each, in order; it cannot be walked block by block")
        return states, calls


    @torch.no_grad()
    def leave(self, states: Sequence[Tensor], before: Callable[[int], None]) -> None:
        """Run what stands behind the blocks on the states that leave the last one.

        Args:
            states: one tensor for each batch.
            before: called with the number of each batch before it is run.
        """
        current: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for _, module in self.chain:
                own = module.__dict__.get("forward")
                module.forward = lambda *_, **__: current[0]  # type: ignore[method-assign]
                stack.callback(_restore, module, own)
            for index, (batch, state) in enumerate(zip(self.calibration.batches, states, strict=True)):
                before(index)
                current[:] = [state]
                self.model(**on_device(batch, self.model.device), **({"use_cache": False} if hasattr(self.model.config, "use_cache") else {}))


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}

"""Hooks that feed the inputs of modules to accumulators, one accumulator for each distinct input."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from echelon.calibrate.moments import Moments


class InputObserver:
    """While it is entered, the inputs of some modules are accumulated.

    Query, key and value read the same tensor, and so do gate and up: which modules share is seen in the first batch, and only the
    first of them counts.

    Args:
        modules: names and modules.
        make: makes an accumulator, given the width and the device; it has ``update(x, mask)``.
    """

    def __init__(self, modules: Mapping[str, nn.Module], make: Callable[[int, Any], Any] = Moments.of):
        self.modules, self.make = modules, make
        self.leader: dict[str, str] = {}
        self.moments: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self._alive: dict[int, tuple[str, Tensor]] = {}
        self._handles: list[Any] = []

    def batch(self, mask: Tensor | None) -> None:
        """Say that the next batch begins, and which of its positions are tokens."""
        self.mask = mask
        self._alive = {}

    def __enter__(self) -> "InputObserver":
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        self._alive = {}
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0]
            if name not in self.leader:
                # Holding on to the tensor keeps its id from being used again within the batch.
                self.leader[name] = self._alive.setdefault(id(x), (name, x))[0]
            if self.leader[name] != name:
                return
            if name not in self.moments:
                self.moments[name] = self.make(x.shape[-1], x.device)
            mask = self.mask
            if mask is not None and mask.numel() != x.numel() // x.shape[-1]:
                mask = None  # patches, experts: positions that the mask of tokens says nothing of
            try:
                self.moments[name].update(x.detach(), None if mask is None else mask.to(x.device).bool().reshape(x.shape[:-1]))
            except ValueError as error:
                raise ValueError(f"the inputs of {name}: {error}") from error

        return hook

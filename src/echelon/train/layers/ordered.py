"""Factored layers whose components stand in order: any prefix of them is a layer of its own.

The components of ``W = A B`` are columns of A (out, k) and rows of B (k, in); a layer cut to ``b`` uses the first ``b``. A buffer ``kept`` says how many are
left for good, which only ever falls; the parameters keep their size until :func:`export`, so that an optimizer's state fits all along.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from echelon.models.factored_conv import FactoredConv
from echelon.models.modules import LowRankLinear, Spec, build, kind, like, put
from echelon.models.reload import renote


class Ordered(nn.Module):
    """What ordered layers share; ``up`` and ``down`` hold A and B."""

    up: Any
    down: Any
    kept: Tensor
    limit: int | None = None  # set by a budget
    planned: int | None = None  # drawn for the optimizer step that is running
    cut: int | None = None  # for the pass that is running
    _read: tuple[Tensor, int, int] | None = None

    def kept_rank(self) -> int:
        """Components that are left for good."""
        if self._read is None or self._read[0] is not self.kept or self._read[1] != self.kept._version:
            self._read = self.kept, self.kept._version, int(self.kept)  # reading a tensor in every forward would make a GPU wait
        return self._read[2]

    def keep(self, rank: int) -> None:
        """Leave only the first components, for good.

        Raises:
            ValueError: if fewer are left already.
        """
        if not 0 <= rank <= self.kept_rank():
            raise ValueError(f"rank is {rank}; it must be in 0..{self.kept_rank()}, since ranks only ever decrease")
        self.kept.fill_(rank)

    def width(self) -> int:
        """Components that the next forward uses."""
        return min(rank for rank in (self.kept_rank(), self.limit, self.cut) if rank is not None)

    def squared_norms(self) -> tuple[Float[Tensor, " kept"], Float[Tensor, " kept"]]:
        """Squared norms of the kept components in both factors, in float32 at least; they have gradients."""
        wide, kept = torch.promote_types(self.up.weight.dtype, torch.float32), self.kept_rank()
        up = self.up.weight.narrow(1, 0, kept).transpose(0, 1).flatten(1)
        return up.to(wide).square().sum(1), self.down.weight.narrow(0, 0, kept).flatten(1).to(wide).square().sum(1)

    def cost(self, rank: int) -> int:
        """Numbers in the factors at a rank, but never more than in the dense weight, into which they can be merged."""
        return min(rank * (self.up.weight[:, 0].numel() + self.down.weight[0].numel()), self.up.weight[:, 0].numel() * self.down.weight[0].numel())

    def prefix(self) -> tuple[Tensor, Tensor]:
        """The weights of both factors that :meth:`width` leaves, views."""
        width = self.width()
        return self.up.weight.narrow(1, 0, width), self.down.weight.narrow(0, 0, width)


class OrderedLinear(Ordered, LowRankLinear):
    """``y = A[:, :b] (B[:b] x) + bias``."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.register_buffer("kept", torch.full((), self.down.weight.shape[0], dtype=torch.int64, device=self.down.weight.device))

    def spec(self) -> Spec:
        return super().spec() | {"kind": "ordered.linear"}

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        up, down = self.prefix()
        return nn.functional.linear(nn.functional.linear(x, down), up, self.up.bias)

    def product(self) -> Float[Tensor, "out in"]:
        up, down = self.prefix()
        return (up.double() @ down.double()).to(up.dtype)

    def pruned(self) -> tuple[Spec, LowRankLinear]:
        """An ordinary factored layer of the same function; of rank 0 it has one component of zeros."""
        up, down = self.prefix()
        if not up.shape[1]:
            up, down = torch.zeros_like(self.up.weight[:, :1]), torch.zeros_like(self.down.weight[:1])
        spec = LowRankLinear.spec(self) | {"rank": up.shape[1]}
        made: Any = build(spec, self)
        made.fill(up, down, self.bias)
        return spec, made


class OrderedConv(Ordered, FactoredConv):
    """A convolution with B into the first ``b`` channels, then one of width 1 with ``A[:, :b]``."""

    def __init__(self, old: Any, rank: int, **factory: Any):
        super().__init__(old, "nc", rank, **factory)
        self.register_buffer("kept", torch.full((), rank, dtype=torch.int64, device=self.down.weight.device))

    def spec(self) -> Spec:
        return {"kind": "ordered.convolution", "rank": self.rank}

    def forward(self, x: Float[Tensor, "*batch channels space"]) -> Float[Tensor, "*batch out space_out"]:
        up, down = self.prefix()
        if not up.shape[1]:  # convolutions want at least one channel
            up, down = torch.zeros_like(self.up.weight[:, :1]), torch.zeros_like(self.down.weight[:1])
        return self.up._conv_forward(self.down._conv_forward(x, down, None), up, self.up.bias)

    def product(self) -> Float[Tensor, "out channels *kernel"]:
        up, down = self.prefix()
        made = up.flatten(1).double() @ down.flatten(1).double()
        return made.view(self.out_channels, self.in_channels, *self.geometry["kernel_size"]).to(up.dtype)

    def pruned(self) -> tuple[Spec, FactoredConv]:
        """An ordinary factored convolution of the same function; of rank 0 it has one component of zeros."""
        up, down = self.prefix()
        if not up.shape[1]:
            up, down = torch.zeros_like(self.up.weight[:, :1]), torch.zeros_like(self.down.weight[:1])
        spec = FactoredConv.spec(self) | {"rank": up.shape[1]}
        made = FactoredConv(self.merge(), "nc", up.shape[1], **like(self))
        with torch.no_grad():
            made.up.weight.copy_(up)
            made.down.weight.copy_(down)
            if self.bias is not None:
                made.up.bias.copy_(self.bias)
        return spec, made


@kind("ordered.linear")
def _linear(spec: Spec, old: nn.Module) -> nn.Module:
    return OrderedLinear(spec["in"], spec["out"], spec["rank"], spec["bias"], spec.get("transposed", False), **like(old))


@kind("ordered.convolution")
def _convolution(spec: Spec, old: nn.Module) -> nn.Module:
    return OrderedConv(old, spec["rank"], **like(old))


def ordered(model: nn.Module) -> dict[str, Any]:
    """Names and modules of the ordered layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Ordered)}


def tails(squares: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Norm of the components from each one on. Its gradient is finite, zero, where they all are zero."""
    return root(squares.flip(0).cumsum(0).flip(0))


def root(squares: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Square root with the gradient zero at zero."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt() * (squares > 0)


@contextlib.contextmanager
def ordered_dropout(
    model: nn.Module, ranks: Mapping[str, int] | None = None, *, layer: str | int | None = None, rank: int | None = None
) -> Iterator[None]:  # fmt: skip
    """Run layers at fewer components: ``with ordered_dropout(model, layer="blocks.0.q", rank=3): ...``.

    With gradient checkpointing the backward pass belongs inside too, since layers are run again there.

    Args:
        model: with ordered layers.
        ranks: components for some of them, by name; more than a layer has left means all.
        layer: name or number of one layer, in place of that.
        rank: its components.

    Raises:
        ValueError: if there is no such layer, or a rank is negative.
    """
    known = ordered(model)
    if ranks is None:
        if layer is None or rank is None:
            raise ValueError("give ranks, or layer and rank")
        ranks = {list(known)[layer] if isinstance(layer, int) and layer < len(known) else str(layer): rank}
    for name, wanted in ranks.items():
        if name not in known or wanted < 0:
            raise ValueError(f"layer {name!r} at rank {wanted}; the ordered layers are {', '.join(known) or 'none'}, and ranks are at least 0")
    before = {name: module.cut for name, module in known.items()}
    set_cuts(known, ranks)
    try:
        yield
    finally:
        set_cuts(known, before)


def set_cuts(layers: Mapping[str, Any], ranks: Mapping[str, int | None]) -> None:
    for name, module in layers.items():
        module.cut = ranks.get(name)


@torch.no_grad()
def set_rank_budget(
    model: nn.Module, *, params: int | None = None, macs: int | None = None, inputs: Mapping[str, Any] | None = None,
    loss: Callable[[], float] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Run a model at smaller ranks that fit a budget, until another is set; the rank of each ordered layer. :func:`export` makes it permanent.

    Components are given up from the ends of the layers: those of least importance, the product of the norms of a layer's tails in both factors, or, given a
    validation loss, those that raise it least for each parameter or multiplication saved. Every layer keeps one.

    Args:
        model: with ordered layers.
        params: parameters that the whole model may have. A layer counts as dense where that is smaller.
        macs: multiplications that its ordered layers may take for ``inputs``.
        inputs: a batch, ``model(**inputs)`` is called once with; for ``macs`` only.
        loss: computes a validation loss of ``model``. It is called once for each layer and component given up.

    Raises:
        ValueError: if not exactly one budget is given, ``inputs`` is missing, or the budget is too small for one component a layer; nothing has changed then.
    """
    layers, limits = ordered(model), {name: module.limit for name, module in ordered(model).items()}
    if (params is None) == (macs is None) or (macs is not None and inputs is None):
        raise ValueError("give params, or macs together with inputs")
    for module in layers.values():
        module.limit = None
    ranks = {name: module.kept_rank() for name, module in layers.items()}
    if macs is not None:
        uses, fixed, budget = _positions(model, layers, inputs or {}), 0, macs
    else:
        shared = {id(p): p for p in model.parameters()}
        factors = {id(factor.weight) for module in layers.values() for factor in (module.up, module.down)}
        uses, budget = dict.fromkeys(layers, 1), params or 0
        fixed = sum(p.numel() for number, p in shared.items() if number not in factors)

    def spent(at: Mapping[str, int]) -> int:
        return fixed + sum(uses[name] * module.cost(at[name]) for name, module in layers.items())

    def restored(message: str) -> ValueError:
        for name, module in layers.items():
            module.limit = limits[name]
        return ValueError(message)

    least = spent({name: min(1, rank) for name, rank in ranks.items()})
    if least > budget:
        raise restored(f"{'params' if macs is None else 'macs'} is {budget:,}; with one component a layer it is {least:,}, so it must be at least that")
    if loss is None:
        worth = {name: _importance(module) for name, module in layers.items()}
        order = sorted((float(worth[name][b - 1]), -b, name) for name in layers for b in range(2, ranks[name] + 1))
        for _, _, name in order:
            if spent(ranks) <= budget:
                break
            ranks[name] -= 1
    else:
        while spent(ranks) > budget:
            ranks = _give_up_one(layers, ranks, spent, loss)
    for name, module in layers.items():
        module.limit = ranks[name]
    return ranks


def _give_up_one(layers: Mapping[str, Any], ranks: dict[str, int], spent: Callable[[Mapping[str, int]], int], loss: Callable[[], float]) -> dict[str, int]:
    """One component less where that raises the loss least for what it saves.

    A layer above its break-even costs as much as a dense one; there the whole way down to the first saving is one step.
    """
    for name, module in layers.items():
        module.limit = ranks[name]
    before, now, tried = loss(), spent(ranks), []
    for name, module in layers.items():
        for fewer in range(ranks[name] - 1, 0, -1):
            saved = now - spent(ranks | {name: fewer})
            if saved > 0:
                module.limit = fewer
                tried.append(((loss() - before) / saved, name, fewer))
                module.limit = ranks[name]
                break
    _, name, fewer = min(tried)
    return ranks | {name: fewer}


def _importance(module: Any) -> Float[Tensor, " kept"]:
    up, down = module.squared_norms()
    return (tails(up) * tails(down)).detach()


def _positions(model: nn.Module, layers: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, int]:
    """How many vectors each layer maps in one call of the model."""
    uses = dict.fromkeys(layers, 0)
    hooks = []
    for name, module in layers.items():

        def count(module: Any, _: Any, output: Tensor, name: str = name) -> None:
            uses[name] += output.numel() // module.up.weight.shape[0]

        hooks.append(module.register_forward_hook(count))
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return uses


@torch.no_grad()
def export(model: nn.Module, merge_if_larger: bool = True) -> dict[str, int]:
    """Cut every ordered layer to the components that it uses, in place, for good; the rank of each, 0 standing for one component of zeros.

    The layers become ordinary factored ones, so the model saves, loads and trains on like any of these.

    Args:
        model: with ordered layers.
        merge_if_larger: make a layer dense where the factors would hold as many numbers or more.
    """
    ranks: dict[str, int] = {}
    specs: dict[str, Spec | None] = {}
    for name, module in ordered(model).items():
        ranks[name] = module.width()
        one = module.up.weight[:, 0].numel(), module.down.weight[0].numel()
        if merge_if_larger and max(1, ranks[name]) * sum(one) >= math.prod(one):
            specs[name], new = None, module.merge()
        else:
            specs[name], new = module.pruned()
        put(model, name, new)
    if isinstance(model, PreTrainedModel):
        renote(model, specs)
    return ranks

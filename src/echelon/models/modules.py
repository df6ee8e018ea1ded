"""The modules that stand in for a dense one, and the one table by which surgery and reloading build them.

A module is described by a spec, a JSON object ``{"kind": ..., ...}`` in ``config.json``. ``KINDS[kind](spec, old)`` returns the module that takes the place
of ``old``: a new one, or ``old`` itself given another class, other tensors or more parameters. It is called on a live model when that is compressed, and on a
skeleton on the meta device when it is loaded again, so it makes its tensors with :func:`like` and leaves their values alone.

A kind named ``module.word`` is declared in ``module.py`` of ``echelon/models``, ``echelon/compress`` or ``echelon/train/layers``, which is imported when such a
spec is met.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Spec = dict[str, Any]
KINDS: dict[str, Callable[[Spec, nn.Module], nn.Module]] = {}


def kind(name: str) -> Callable[[Callable[[Spec, nn.Module], nn.Module]], Callable[[Spec, nn.Module], nn.Module]]:
    """Declare the function below as the builder of a kind of module."""

    def declare(builder: Callable[[Spec, nn.Module], nn.Module]) -> Callable[[Spec, nn.Module], nn.Module]:
        KINDS[name] = builder
        return builder

    return declare


def build(spec: Spec, old: nn.Module) -> nn.Module:
    """The module that a spec describes, in the dtype and on the device of the one it replaces.

    Raises:
        ValueError: if its kind is unknown.
    """
    name = spec["kind"]
    if name not in KINDS and re.fullmatch(r"[a-z_]+\.[a-z_]+", name):
        for package in ("models", "compress", "train.layers"):
            module = f"echelon.{package}.{name.partition('.')[0]}"
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
    if name not in KINDS:
        raise ValueError(f"unknown kind of module {name!r}; this echelon knows {', '.join(sorted(KINDS))}: is the model from a newer one?")
    return KINDS[name](spec, old)


def install(model: nn.Module, modules: Mapping[str, Spec]) -> dict[str, nn.Module]:
    """Build every spec into the model, outer modules before inner ones; the modules that now bear the names.

    A module that stands in several places is replaced in all of them. Names that the model does not have are left out (a bare
    ``AutoModel`` has no head).
    """
    made: dict[str, nn.Module] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    parents = list(model.modules())  # kept to the end: a new module must not be given the id of one that is gone
    for parent in parents:
        for child, module in parent._modules.items():  # named_children would leave out a second place
            places.setdefault(id(module), []).append((parent, child))
    for name in sorted(modules, key=lambda name: name.count(".")):
        try:
            old = model.get_submodule(name)
        except AttributeError:
            continue
        before = type(old).__name__
        made[name] = put(model, name, build(modules[name], old), places.get(id(old)))
        whole = getattr(model, "_no_split_modules", None) or ()
        if before in whole and type(made[name]).__name__ not in whole:
            model._no_split_modules = {*whole, type(made[name]).__name__}  # type: ignore[assignment]
    return made


def put(model: nn.Module, name: str, new: nn.Module, places: list[tuple[nn.Module, str]] | None = None) -> nn.Module:
    """Set the module of this name (and the other places where the old one stands, if given)."""
    parent, _, child = name.rpartition(".")
    for owner, attribute in places or [(model.get_submodule(parent), child)]:
        if owner._modules[attribute] is not new:
            new.train(owner._modules[attribute].training)  # type: ignore[union-attr]
            owner._modules[attribute] = new
    return new


def like(old: nn.Module) -> dict[str, Any]:
    """The ``dtype`` and ``device`` of a module's first floating-point tensor."""
    tensor = next(t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point())
    return {"dtype": tensor.dtype, "device": tensor.device}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear map with a floating-point matrix (``nn.Linear`` or GPT-2's ``Conv1D``)."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight without calling it
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.ndim == 2 and module.weight.is_floating_point()


def dense_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix of a linear module as ``(out, in)``, also where it is stored the other way round."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight  # type: ignore[return-value, union-attr, operator]


def empty_linear(in_features: int, out_features: int, bias: bool, **factory: Any) -> nn.Linear:
    """An ``nn.Linear`` without values; the global random state is left alone."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, **factory)  # type: ignore[return-value]


@torch.no_grad()
def dense_module(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, transposed: bool = False) -> nn.Module:
    """An ``nn.Linear`` with these values, or a ``Conv1D``, which always has a bias."""
    rows, columns = weight.shape
    if transposed:
        made: Any = Conv1D.__new__(Conv1D)  # its constructor draws random numbers
        nn.Module.__init__(made)
        made.nf, made.nx = rows, columns
        made.weight, made.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(weight.new_zeros(rows))
    else:
        made = empty_linear(columns, rows, bias is not None, dtype=weight.dtype, device=weight.device)
        made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


@kind("linear")
def _linear(spec: Spec, old: nn.Module) -> nn.Module:
    """``{"in", "out", "bias"}``: an ``nn.Linear`` of another size."""
    return empty_linear(spec["in"], spec["out"], spec["bias"], **like(old))


@kind("lowrank")
def _lowrank(spec: Spec, old: nn.Module) -> nn.Module:
    return LowRankLinear(spec["in"], spec["out"], spec["rank"], spec["bias"], spec.get("transposed", False), **like(old))


class LowRankLinear(nn.Module):
    """``y = up(down(x))`` with the bias on ``up``: two ``nn.Linear``, so that quantisers and PEFT find what they know.

    ``weight`` is an empty buffer. It answers ``module.weight.dtype``, and it makes a process that does not know Echelon fail on the
    shape of ``weight`` when it loads the model, where it would otherwise start from random numbers.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between the factors.
        bias: whether there is one.
        transposed: whether the dense module was a ``Conv1D``, which :meth:`merge` makes again.
        factory: dtype and device.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, transposed: bool = False, **factory: Any):
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.down = empty_linear(in_features, rank, False, **factory)
        self.up = empty_linear(rank, out_features, bias, **factory)
        self.register_buffer("weight", torch.empty(0, **factory))

    @property
    def rank(self) -> int:
        return self.down.weight.shape[0]

    @property
    def bias(self) -> nn.Parameter | None:
        return self.up.bias

    def spec(self) -> Spec:
        """What it takes to build it again."""
        made = {"kind": "lowrank", "in": self.in_features, "out": self.out_features, "rank": self.rank, "bias": self.bias is not None}
        return made | ({"transposed": True} if self.transposed else {})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.up(self.down(x))

    @torch.no_grad()
    def fill(self, up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"], bias: Float[Tensor, " out"] | None) -> None:
        """Set the values, cast to this module's dtype."""
        self.up.weight.copy_(up)
        self.down.weight.copy_(down)
        if bias is not None:
            self.up.bias.copy_(bias)

    @torch.no_grad()
    def widen(self, up: Float[Tensor, "out more"], down: Float[Tensor, "more in"]) -> None:
        """Add ``up @ down`` to the product, exactly, by setting the factors side by side; the rank grows."""
        self._resize(torch.cat([self.up.weight, up.to(self.up.weight)], 1), torch.cat([self.down.weight, down.to(self.down.weight)], 0))

    @torch.no_grad()
    def narrow(self, more: int) -> None:
        """Undo :meth:`widen` by ``more`` directions."""
        self._resize(self.up.weight[:, : self.rank - more].clone(), self.down.weight[: self.rank - more].clone())

    def _resize(self, up: Tensor, down: Tensor) -> None:
        trainable = self.up.weight.requires_grad, self.down.weight.requires_grad
        self.up.weight, self.down.weight = nn.Parameter(up, trainable[0]), nn.Parameter(down, trainable[1])
        self.up.in_features = self.down.out_features = down.shape[0]

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The dense module of the same function and the original size."""
        return dense_module(self.product(), self.bias, self.transposed)

    def product(self) -> Float[Tensor, "out in"]:
        """The dense matrix that the factors stand for."""
        return (self.up.weight.double() @ self.down.weight.double()).to(self.up.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def factored(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Names and modules of all factored layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))

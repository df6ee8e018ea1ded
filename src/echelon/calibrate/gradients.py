"""Gradients of a model's linear layers, summed over data layer by layer: what adapters start from, and the diagonal of the Fisher matrix.

The gradient of a matrix is the product of what arrives at the layer's output and what went into the layer, so hooks on the layer are enough: no weight needs a
gradient of its own, quantised layers work like others, and one gradient at a time is alive. Sums are kept on the CPU in float32.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from echelon.calibrate.walker import on_device
from echelon.data.files import write_whole
from echelon.errors import UserError

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_KINDS = ("sums", "squares")


@dataclass
class Gradients:
    """Sums over batches of the gradients of matrices, as (out, in) whatever the layer stores, on the CPU in float32.

    Attributes:
        sums: of the gradients, by module name.
        squares: of their squares, element by element: over ``batches``, the diagonal of the empirical Fisher matrix.
        batches: that were counted; rows where each row's gradient was squared by itself.
    """

    sums: dict[str, Float[Tensor, "out in"]] = field(default_factory=dict)
    squares: dict[str, Float[Tensor, "out in"]] = field(default_factory=dict)
    batches: int = 0

    def fisher(self, name: str) -> Float[Tensor, "out in"]:
        """Mean square of the gradient of one matrix.

        Raises:
            ValueError: if its squares were not collected.
        """
        if name not in self.squares:
            raise ValueError(f"there are no squared gradients of {name}; collect them with squares=True and it among the names")
        return self.squares[name] / max(1, self.batches)

    def save(self, path: str | os.PathLike[str], **about: str) -> None:
        """Write them to one safetensors file, whole or not at all."""
        tensors = {f"{name}/{kind}": value for kind in _KINDS for name, value in getattr(self, kind).items()}
        write_whole(path, save(tensors, metadata={"gradients": "1", "batches": str(self.batches), **about}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Gradients":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if the file is missing, broken or something else.
        """
        return _read(path)[0]


class GradientCollector:
    """While it is entered, every backward adds the gradients of some linear layers to ``found``; call :meth:`step` behind each.

    A layer that runs several times in one forward (shared layers) counts once, with the sum. Gradient checkpointing of either kind may be on.

    Args:
        modules: names and layers whose last dimension is what they map: ``nn.Linear``, ``Conv1D``, quantised ones, adapters around them.
        sums: whether to sum gradients.
        squares: whether to sum their squares.
        per_sample: square the gradient of each row of a batch by itself; the loss must be a sum over rows, and inputs must keep the batch in front.
        found: sums to go on from.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], *, sums: bool = True, squares: bool = False, per_sample: bool = False, found: Gradients | None = None
    ):  # fmt: skip
        self.modules, self.sums, self.squares, self.per_sample = modules, sums, squares, per_sample
        self.found = Gradients() if found is None else found
        self.rows: int | None = None
        self._open = dict.fromkeys(modules, 0)
        self._seen = dict.fromkeys(modules, 0)
        self._pending: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "GradientCollector":
        self._handles = [module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in self.modules.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def step(self, rows: int = 1) -> None:
        """Say that a batch is done; ``rows`` of them count where gradients are taken per sample."""
        for name in list(self._pending):
            self._add(name, self._pending.pop(name))
        self._open, self._seen = dict.fromkeys(self.modules, 0), dict.fromkeys(self.modules, 0)
        self.found.batches += rows if self.per_sample else 1

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            out = y if y.requires_grad else y.detach().clone().requires_grad_()
            result = out if out is y else out.clone()  # layers behind may write into what they get, but not into a leaf
            replayed = torch._C._current_graph_task_id() != -1 and self._open[name] > 0
            if not replayed:  # else this is a forward within backward whose output gets no gradient: the first one's does
                self._open[name] += 1
                self._seen[name] += 1
                x = (args or tuple(kwargs.values()))[0].detach()
                version = x._version
                out.register_hook(lambda g: self._arrived(name, x, version, g.detach()))
            return result

        return hook

    @torch.no_grad()
    def _arrived(self, name: str, x: Tensor, version: int, g: Tensor) -> None:
        if x._version != version:
            raise RuntimeError(f"the input of {name} was changed in place after its forward; its gradient cannot be formed")
        self._open[name] -= 1
        if self.per_sample:
            self._each_row(name, x, g)
            return
        gradient = g.reshape(-1, g.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        if name in self._pending or self._open[name] > 0:
            gradient = gradient + self._pending.pop(name, 0)
        if self._open[name] > 0:
            self._pending[name] = gradient
        else:
            self._add(name, gradient)

    def _each_row(self, name: str, x: Tensor, g: Tensor) -> None:
        if self._seen[name] > 1:
            raise ValueError(f"{name} runs several times in a forward; per_sample=True does not know which of them belong to one row")
        if self.rows is not None and len(x) != self.rows:
            raise ValueError(f"the inputs of {name} do not keep the {self.rows} rows of the batch in front; use per_sample=False")
        for row, out in zip(x, g, strict=True):
            self._add(name, out.reshape(-1, out.shape[-1]).float().T @ row.reshape(-1, row.shape[-1]).float())

    def _add(self, name: str, gradient: Float[Tensor, "out in"]) -> None:
        if not gradient.isfinite().all():
            raise ValueError(f"the gradient of {name} holds NaN or infinity; look for them in the data, or load the model in float32 or bfloat16")
        for kind, wanted in zip(_KINDS, (self.sums, self.squares), strict=True):
            if wanted:
                totals = getattr(self.found, kind)
                value = (gradient if kind == "sums" else gradient.square()).cpu()
                totals[name] = totals[name].add_(value) if name in totals else value.clone()


def collect_gradients(
    model: nn.Module, names: Sequence[str], data: Iterable[Mapping[str, Any]] | Callable[[], None], *, sums: bool = True, squares: bool = False,
    per_sample: bool = False, loss: Loss | None = None, cache: str | os.PathLike[str] | None = None, save_every: int = 16,
) -> Gradients:  # fmt: skip
    """Gradients of some linear layers over data, in evaluation mode.

    Weights, flags, modes, ``.grad`` and the global random state are as before afterwards. Where torch.distributed is initialised the sums are those of all
    processes. The default loss is the model's own times the labels that it averages over, so that sums do not depend on how rows are put into batches.

    Args:
        model: gives a ``loss`` when called with a batch.
        names: of the layers.
        data: batches with labels, or a function without arguments that runs forward and backward itself and is called once (it counts as one batch).
        sums: whether to sum gradients.
        squares: whether to sum their squares.
        per_sample: see `GradientCollector`.
        loss: of a model and a batch, in place of the default.
        cache: a file, one for each process. What it holds of the same layers, weights and data is not computed again, and after every ``save_every`` batches it
            is written.
        save_every: batches between two writes.

    Raises:
        ValueError: if there is no batch, a layer is unknown or got no gradient at all, or a gradient holds NaN or infinity.
        UserError: if the cache is another kind of file, or cannot be written.
    """
    modules = {}
    for name in names:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the model has no module {name}") from error
    with torch.random.fork_rng([]):  # loaders draw from the global state
        batches = None if callable(data) else list(data)
    if batches is None and cache is not None:
        raise ValueError("a cache is kept for batches; a function's data cannot be compared with it")
    if batches is not None and not batches:
        raise ValueError("there are no batches; give at least one")
    found, key, done = Gradients(), "", 0
    if cache is not None and batches is not None:
        key = _key(modules, batches, (sums, squares, per_sample))
        if Path(cache).exists():
            stored, about = _read(cache)
            found, done = (stored, int(about.get("done", 0))) if about.get("key") == key else (found, 0)
            batches = batches[done:]
    collector = GradientCollector(modules, sums=sums, squares=squares, per_sample=per_sample, found=found)
    device = next(model.parameters()).device
    with _as_found(model), collector:
        if callable(data):
            data()
            collector.step()
        for number, batch in enumerate(batches or (), 1):
            batch = on_device(dict(batch), device)
            collector.rows = rows = len(next(iter(batch.values())))
            (summed_loss if loss is None else loss)(model, batch).backward()
            collector.step(rows)
            if cache is not None and (number % save_every == 0 or number == len(batches or ())):
                found.save(cache, key=key, done=str(done + number))
    missing = [name for name in names if name not in (found.sums if sums else found.squares)] if sums or squares else []
    if missing:
        raise ValueError(f"{missing[0]} got no gradient; the loss does not depend on it")
    _all_reduce(found, device)
    return found


def summed_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's mean loss times the labels that count: tokens that are not -100, without the first of each row where the model shifts them.

    Raises:
        ValueError: if the batch has no labels.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"a batch holds {', '.join(batch)}; it needs labels, or give a loss")
    shifts = getattr(model, "loss_type", None) in (None, "ForCausalLM") and not getattr(model.config, "is_encoder_decoder", False)
    counted = labels[:, 1:] if shifts and labels.ndim > 1 else labels
    return model(**batch).loss * (counted != -100).sum()


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without any parameter's gradient, and all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    cards = sorted({p.device.index for p, _ in flags if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(cards), torch.enable_grad():
            model.eval()
            for p, _ in flags:
                p.requires_grad_(False)
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _key(modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]], settings: tuple[bool, ...]) -> str:
    """A hash of names, of some numbers of every weight, and of all the data."""
    digest = hashlib.sha256(repr((settings, len(batches))).encode())
    for name, module in modules.items():
        digest.update(name.encode())
        for tensor in module.state_dict().values():
            if isinstance(tensor, Tensor) and tensor.numel():
                flat = tensor.detach().reshape(-1)
                digest.update(repr((tuple(tensor.shape), flat[:: max(1, len(flat) // 64)].double().tolist())).encode())
    for batch in batches:
        for name in sorted(batch):
            value = torch.as_tensor(batch[name]).detach().cpu().contiguous()
            digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[Gradients, dict[str, str]]:
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            about = file.metadata() or {}
            if "gradients" not in about:
                raise ValueError("it holds something else")
            made = Gradients(batches=int(about["batches"]))
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                name, _, kind = key.rpartition("/")
                getattr(made, kind)[name] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read gradients from {path}: {error}") from error
    return made, about


def _all_reduce(found: Gradients, device: torch.device) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for kind in _KINDS:
        for total in getattr(found, kind).values():
            shared = total.to(device)
            torch.distributed.all_reduce(shared)
            total.copy_(shared)
    found.batches = over_processes(found.batches, device)


def over_processes(count: int, device: torch.device) -> int:
    """The sum of a count over all processes that work together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total)
    return int(total)

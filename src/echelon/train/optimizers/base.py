"""What our optimizers share: a frozen dataclass of knobs says how one parameter changes; one ``torch.optim.Optimizer`` does the rest.

    optimizer = GaLore(lr=0.01, rank=128).optimizer(model)

is an ordinary optimizer: schedulers change ``param_groups[i]["lr"]``, ``state_dict`` holds tensors, numbers and words only, and
``Trainer(optimizers=(optimizer, None))`` takes it.
"""

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from echelon.errors import UserError
from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.projection import METHODS, SIDES, Projector, projected_numbers
from echelon.models.targets import Targets, linear_targets
from echelon.train.optimizers.moments import State, adam_step

Group = dict[str, Any]


@dataclass(frozen=True)
class OptimizerMethod(ABC):
    """The knobs of Adam, and how weights and moments are stored.

    Attributes:
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        state_bits: bits a number of the moments: 32, 16 (bfloat16), or 8 (block-wise; tensors under 4096 numbers stay in float32). Directions of a projection
            are in bfloat16 below 32.
        rounding: how half-precision weights take a step: `nearest`, which loses small ones, `stochastic` (bfloat16 only), or `master`, from a float32 copy.
        seed: of stochastic rounding and of random directions.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    state_bits: Literal[32, 16, 8] = 32
    rounding: Literal["nearest", "stochastic", "master"] = "nearest"
    seed: int = 0

    projects: ClassVar[bool] = False  # whether some parameters are targets

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not self.lr >= 0:
            raise ValueError(f"lr is {self.lr!r}; it must be at least 0")
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            number(name, beta, 0, 1, open_high=True)
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps!r}; it must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay!r}; it must be at least 0")
        if self.state_bits not in (32, 16, 8):
            raise ValueError(f"state_bits is {self.state_bits!r}; it must be 32, 16 or 8")
        one_of("rounding", self.rounding, ("nearest", "stochastic", "master"))

    def optimizer(self, parameters: nn.Module | Iterable[Any]) -> "Stepper":
        """An optimizer over a model, or over parameters or groups of them as ``torch.optim`` takes them.

        Of a model, the target matrices are found by :meth:`groups`. Where groups are given, those with a ``rank`` hold targets; a group's own keys go
        before the knobs of the same name.

        Raises:
            ValueError: if there is no target, or a target is no matrix.
        """
        return Stepper(self, self.groups(parameters) if isinstance(parameters, nn.Module) else parameters)

    def prepare(self, model: Any) -> Any:
        """What is trained in the place of a model: the model itself, unless the method brings an adapter."""
        return model

    def groups(self, model: nn.Module) -> list[Group]:
        """Parameter groups of a model: all that require gradients, in one group."""
        return [{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad]}]

    @abstractmethod
    def update(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        """Change one weight in place.

        Args:
            weight: to change, in float32 (or float64).
            gradient: finite, of the same shape and dtype; it may be overwritten.
            state: of this parameter, its own to fill; ``step`` counts from 1.
            knobs: the parameter's group.
        """

    def check_target(self, name: str, shape: tuple[int, ...], knobs: Mapping[str, Any]) -> None:  # noqa: B027 (most take every matrix)
        """Raises: ValueError: if a target matrix does not suit the knobs of its group."""

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        """How many numbers the method keeps for a parameter: Adam's two moments by default. Counters and the scales of blocks are left out.

        Args:
            shape: of the parameter.
            rank: of its group, where it is a target.
        """
        return 2 * math.prod(shape)

    def by_number(self, knobs: Mapping[str, Any]) -> bool:
        """Whether a group's rule treats every number apart, so that a process can update its own shard of a parameter; else the whole one is gathered."""
        return self.projects and "rank" not in knobs and type(self).update_plain is OptimizerMethod.update_plain

    def update_plain(self, weight: Float[Tensor, "..."], gradient: Float[Tensor, "..."], state: State, knobs: Mapping[str, Any]) -> None:
        """AdamW as GaLore's code has it: ``eps`` beside the uncorrected root, decay behind the update."""
        adam_step(weight, gradient, state, knobs)
        decay(weight, knobs)


@dataclass(frozen=True)
class ProjectedMethod(OptimizerMethod):
    """Methods that keep Adam's moments for a projection of each target matrix's gradient.

    Attributes:
        rank: directions kept of a gradient; at most its smaller side.
        update_proj_gap: steps between two choices of the directions.
        proj_type: side that is projected: `std` the shorter one, `reverse_std` the longer, `left`, `right`, or `full` for both.
        projection: how directions are chosen: `exact` SVD, a `randomized` one, `random` ones, or `dct` for those of a fixed cosine basis in which the gradient
            is largest.
        refresh_offset: step within the gap at which directions are chosen, or `stagger` to spread the matrices over the gap (their first directions then
            come from a quick randomized SVD).
        deterministic: fix the signs of the directions, so that they do not depend on the SVD routine.
        optim_target_modules: which matrices are projected: `all-linear` (those inside the blocks), `attention`, `mlp`, a regular expression, or a list of
            names or their ends; embeddings, heads, norms and biases never are.
    """

    rank: int = 128
    update_proj_gap: int = 200
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    projection: Literal["exact", "randomized", "random", "dct"] = "exact"
    refresh_offset: int | Literal["stagger"] = 0
    deterministic: bool = False
    optim_target_modules: str | list[str] = "all-linear"

    projects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rank", self.rank, 1)
        whole("update_proj_gap", self.update_proj_gap, 1)
        one_of("proj_type", self.proj_type, SIDES)
        one_of("projection", self.projection, METHODS)
        if self.refresh_offset != "stagger":
            whole("refresh_offset", self.refresh_offset, 0, self.update_proj_gap - 1)

    def groups(self, model: nn.Module) -> list[Group]:
        """Two groups: the target matrices, which get a ``rank``, and all other parameters that require gradients."""
        return target_groups(model, self.optim_target_modules, self.rank)

    def state_numbers(self, shape: tuple[int, ...], rank: int | None = None) -> int:
        """Of a target: its directions, and Adam's two moments of the projected gradient."""
        if rank is None:
            return super().state_numbers(shape)
        basis, low = projected_numbers((shape[0], shape[1]), rank, self.proj_type, self.projection)
        return basis + super().state_numbers(low)

    def refresh(self, gradient: Float[Tensor, "m n"], state: State, knobs: Mapping[str, Any]) -> Projector:
        """The parameter's projector; its directions are chosen anew when there are none yet or the gap is over.

        Every process gets the directions of one of them; which one computes them goes round over the parameters.
        """
        projector = Projector(knobs["rank"], knobs["proj_type"], knobs["projection"], knobs["deterministic"])
        count, gap = int(state["step"]) - 1, knobs["update_proj_gap"]
        offset = int(state["offset"]) % gap
        due, first = count % gap == offset, count == 0 or "blank" in state
        if first or due:
            if first:  # a zero gradient (LoRA's A while B is zero) says nothing: the first other one chooses
                if gradient.any():
                    state.pop("blank", None)
                else:
                    state["blank"] = torch.ones((), dtype=torch.bool, device=gradient.device)
            chosen = dataclasses.replace(projector, method="randomized", power_steps=1) if offset and not due and knobs["projection"] == "exact" else projector
            source = int(state["index"]) % processes()
            shared = processes() > 1 and knobs["projection"] != "dct"  # indices of the largest coefficients are cheap and the same everywhere
            if not shared or source == dist.get_rank():
                chosen.fit(gradient, state, seed=hash((knobs["seed"], int(state["index"]), count)))
            if shared:
                share_directions(gradient, state, source)
            for side in ("left", "right"):
                if knobs["state_bits"] < 32 and side in state and state[side].is_floating_point():  # indices of a fixed basis are whole numbers
                    state[side] = state[side].bfloat16()
        return projector


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_directions(gradient: Float[Tensor, "m n"], state: State, source: int) -> None:
    """Give every process the directions that one of them chose."""
    widths = torch.tensor([state[side].shape[1] if side in state else 0 for side in ("left", "right")], device=gradient.device)
    dist.broadcast(widths, source)
    for side, size, width in zip(("left", "right"), gradient.shape, widths.tolist(), strict=True):
        if width:
            state[side] = state[side].to(gradient.dtype) if dist.get_rank() == source else gradient.new_empty(size, width)
            dist.broadcast(state[side], source)


def decay(weight: Tensor, knobs: Mapping[str, Any]) -> None:
    """Decoupled weight decay."""
    if knobs["weight_decay"]:
        weight.mul_(1 - knobs["lr"] * knobs["weight_decay"])


def target_groups(model: nn.Module, target_modules: Targets, rank: int) -> list[Group]:
    """Groups of named parameters: target matrices with a ``rank``, and the others. Of a layer with a LoRA adapter of PEFT, its factors are the targets.

    Raises:
        ValueError: if no target requires gradients.
    """
    names, skipped = linear_targets(model, target_modules)
    wanted = {f"{name}.weight" for name in names}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ends = tuple(f"{name}.lora_{factor}." for name in skipped for factor in "AB")  # PEFT's layers, whose own weights are frozen
    wanted |= {name for name, p in named if name.startswith(ends) and p.ndim == 2}
    targets = [(name, p) for name, p in named if name in wanted]
    if not targets:
        raise ValueError(f"optim_target_modules is {target_modules!r}; no matrix of these requires gradients")
    narrow = [(name, tuple(p.shape)) for name, p in targets if min(p.shape) < rank]
    if narrow:
        told = f"rank {rank} is above the smaller side of {len(narrow)} matrices, the first is {narrow[0][0]} {narrow[0][1]}; they keep all their directions"
        warnings.warn(told, stacklevel=3)
    others = [(name, p) for name, p in named if name not in wanted]
    return [{"params": targets, "rank": rank}, *([{"params": others}] if others else [])]


class Stepper(torch.optim.Optimizer):
    """The one optimizer: it keeps groups and state, checks gradients, and lets its method change one parameter after the other.

    Args:
        method: the method with its knobs.
        parameters: parameters, named parameters, or groups of them. A group with a ``rank`` holds target matrices.

    Raises:
        ValueError: if the method needs targets and no group has any, or a target is no matrix.
    """

    def __init__(self, method: OptimizerMethod, parameters: Iterable[Any]):
        self.method = method
        self.passes: int | None = None  # backward passes since the last step, while backward itself steps (see echelon.train.layerwise)
        knobs = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.name != "optim_target_modules"}
        rank = knobs.pop("rank", None)
        super().__init__(parameters, knobs)
        if method.projects and not any("rank" in group for group in self.param_groups):
            raise ValueError(f"no target parameters found for {type(method).__name__}; give the model, or groups with a rank (its knob is {rank})")

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        dataclasses.replace(self.method, **{key: group[key] for key in group if key in {f.name for f in dataclasses.fields(self.method)}})  # checks the knobs
        if "rank" in group:
            for name, p in _named(group):
                if p.ndim != 2:
                    raise ValueError(f"{name} has shape {tuple(p.shape)}; only matrices can be projected")
                self.method.check_target(name, tuple(p.shape), group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: if a gradient is sparse, NaN or infinite; nothing has changed then.
        """
        if self.passes is not None:
            if hasattr(self, "found_inf"):  # a GradScaler leaves it here
                raise UserError("a GradScaler cannot be used with steps in backward: parameters have been updated before it could look at their gradients")
            self.passes = 0
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            for _, p in _named(group):
                if p.grad is not None:
                    self._update(p, group)
        return loss

    @torch.no_grad()
    def step_one(self, parameter: Tensor) -> None:
        """The update of one parameter that has a gradient.

        Raises:
            ValueError: if its gradient is sparse, NaN or infinite.
        """
        name, group = next((name, group) for group in self.param_groups for name, p in _named(group) if p is parameter)
        assert parameter.grad is not None
        check_gradient(name, parameter.grad)
        self._update(parameter, group)

    def _check_gradients(self) -> None:
        error, shard = None, None
        for group in self.param_groups:
            for name, p in _named(group):
                if p.grad is not None:
                    shard = _local(p.grad) if isinstance(p.grad, DTensor) else shard
                    try:
                        check_gradient(name, _local(p.grad))
                    except ValueError as found:
                        error = error or found
        if shard is not None:  # the shard with the NaN is one process's; all must stop
            bad = torch.tensor(float(error is not None), device=shard.device)
            dist.all_reduce(bad, dist.ReduceOp.MAX)
            if bad and error is None:
                error = ValueError("a gradient holds NaN or infinity on another process; nothing was changed")
        if error is not None:
            raise error

    def _update(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        if "step" not in state:  # behind a reset a float32 copy may be there alone
            index = self._index(parameter)
            state |= {"step": torch.zeros((), dtype=torch.int64), "index": torch.tensor(index), "offset": torch.tensor(self._offset(index, group))}
        state["step"] += 1
        assert parameter.grad is not None
        if not isinstance(parameter, DTensor):
            self._change(parameter, parameter.grad, state, group)
            return
        place: dict[str, Any] = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
        if self.method.by_number(group) and group["state_bits"] != 8:
            local = _local(parameter)
            shards = {key: _local(value) for key, value in state.items()}
            self._change(local, _local(parameter.grad), shards, group, dist.get_rank())
            for key, value in shards.items():
                if value.ndim and value.shape == local.shape:
                    value = DTensor.from_local(value, **place, run_check=False, shape=parameter.shape, stride=parameter.stride())
                state[key] = value
        else:
            whole = parameter.full_tensor()
            self._change(whole, parameter.grad.full_tensor(), state, group)  # type: ignore[attr-defined]
            _local(parameter).copy_(_local(distribute_tensor(whole, **place, src_data_rank=None)))

    def _change(self, parameter: Tensor, gradient: Tensor, state: State, group: Group, shard: int = 0) -> None:
        """One update of a parameter in any dtype."""
        wide = parameter.dtype in (torch.float32, torch.float64)
        if wide:
            weight = parameter
        elif group["rounding"] == "master":
            weight = state.setdefault("master", parameter.float())
        else:
            weight = parameter.float()
        (self.method.update if "rank" in group or not self.method.projects else self.method.update_plain)(weight, gradient.to(weight.dtype), state, group)
        if not wide:
            rounded = weight
            if group["rounding"] == "stochastic":
                rounded = stochastic_round(weight, parameter.dtype, hash((group["seed"], int(state["index"]), int(state["step"]), shard)))
            parameter.copy_(rounded)

    def _index(self, parameter: Tensor) -> int:
        return next(i for i, p in enumerate(p for group in self.param_groups for p in group["params"]) if p is parameter)

    def _offset(self, index: int, group: Group) -> int:
        offset = group.get("refresh_offset", 0)
        if offset != "stagger":
            return offset
        targets = [i for i, p in enumerate((g, p) for g in self.param_groups for p in g["params"]) if "rank" in p[0]]
        return targets.index(index) * group["update_proj_gap"] // len(targets) if index in targets else 0

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, but moments keep the dtype they were stored in, and knobs other than the learning rate must be the same.

        Raises:
            UserError: if the state was saved with other knobs.
        """
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in sorted((mine.keys() | saved.keys()) - {"params", "param_names", "lr", "initial_lr"}):
                was, now = (tuple(value) if isinstance(value, list) else value for value in (saved.get(key), mine.get(key)))  # files may turn tuples into lists
                if was != now:
                    raise UserError(f"the optimizer's state was saved with {key} {was!r}, this one has {now!r}; give the same knobs")
        super().load_state_dict(dict(state_dict))
        order = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number_, p in zip(numbers, order, strict=True):
            for key, value in state_dict["state"].get(number_, {}).items():
                counter = key in ("step", "index", "offset", "left_size", "right_size")
                self.state[p][key] = value.clone() if counter else value.to(device=p.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of all state tensors of this process, counted once."""
        found = {id(t): _local(t) for state in self.state.values() for t in state.values()}
        return sum(t.numel() * t.element_size() for t in found.values())


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a distributed tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _named(group: Group) -> Iterable[tuple[str, Tensor]]:
    names = group.get("param_names") or [f"parameter {i} of its group" for i in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def check_gradient(name: str, gradient: Tensor) -> None:
    """Raises: ValueError: if a gradient is sparse, or holds NaN or infinity."""
    if gradient.is_sparse:
        raise ValueError(f"the gradient of {name} is sparse; only dense ones are supported (for an embedding: sparse=False)")
    if not torch.isfinite(gradient.sum()) and not torch.isfinite(gradient).all():  # the sum is the quick test
        raise ValueError(f"the gradient of {name} holds NaN or infinity; nothing was changed")


def stochastic_round(value: Float[Tensor, "..."], dtype: torch.dtype, seed: int) -> Float[Tensor, "..."]:
    """float32 to bfloat16, up or down with the probability that makes it right on average.

    Raises:
        ValueError: if another dtype is wanted.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"rounding is 'stochastic' and a weight is in {dtype}; it is for bfloat16 only")
    generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()

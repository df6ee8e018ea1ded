"""IncreLoRA: every layer starts with one component, and those that matter grow while the model is trained.

Source: "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", arXiv 2308.12043, and its released code. Differs from that
code: all components that a layer may come to have are one parameter from the start, so that schedulers, DistributedDataParallel and resuming work. What is not
in use stays put, and what was added later has its own learning rate and its own bias correction, as separate parameters would have (exactly but for epsilon).
The penalty is added to the gradients behind clipping, so it is not in the loss that is shown. The score needs no matrix of a layer's size in forward; it is a
mean over micro-batches and processes, each with its own absolute values, where the code keeps the last micro-batch. Ties go by name, the last growth is cut to
what is left, and reserves are left out of evaluation. With fp16 and a scaler, scores and penalty change with its scale: use bf16. Shards are not supported.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from echelon.adapt.config import DeltaConfig
from echelon.adapt.generations import Rows, restarted, step_by_generation
from echelon.adapt.linear import DeltaLinear, LoraFactors
from echelon.adapt.model import DeltaModel
from echelon.adapt.registration import register
from echelon.linalg.checks import number, one_of, whole
from echelon.registry import method

_STD = 0.02
_RESERVE = 1e-5  # scale of a component that is being warmed up
_AVOIDS_ZERO = 1e-5
_ROWS = 1024  # of the gradient that are in memory at once


@method(
    kind="adapter", name="increlora", year=2023, arxiv="2308.12043",
    title="IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
    summary="Starts every LoRA at rank one and, while training, gives rank to the layers whose updates matter most, up to a budget.",
    needs="an AdapterCallback, or a loop that calls the tuner, since ranks grow while training",
    published="GLUE, DeBERTaV3-base: above LoRA and AdaLoRA at the same budget, most where data are few",
)  # fmt: skip
@dataclass
class IncreLoraConfig(DeltaConfig):
    """``y = W x + lora_alpha / (n + 1e-5) B diag(E) A dropout(x)`` where n, the components in use, grows layer by layer.

    Every so often the layers of the largest importance grow: the smoothed sensitivity of what they add, times its smoothed uncertainty. Each layer has a few
    components in reserve, which train with E fixed at 1e-5 before they come into use. `rank_pattern` of the model tells what came out.

    Attributes:
        r: components that are allocated for each layer, the most that it can have; rank_pattern gives some layers another limit.
        init_r: components at the start, at most target_r.
        target_r: rank of a layer on average at the end; at most r.
        target_total_rank: sum of all ranks at the end; by default target_r times the layers.
        max_r: another name for r, as which it counts where it is given.
        rank_increment: components that a layer grows by, and those in reserve.
        top_h: layers that grow at a time; the paper takes 2 to 18 of 72.
        init_warmup: steps before the first growth, after which it comes at the next multiple of interval; by default as long as interval.
        interval: steps between growths (the paper: 1000, and 100 on small data); by default such that the budget is spent half-way.
        beta1: decay of the smoothed sensitivity, in (0, 1).
        beta2: decay of its smoothed uncertainty, in (0, 1).
        orth_reg_weight: weight of the penalty on rows of A and columns of B that are not orthonormal, at least 0; 0.3 for RTE and STS-B in the paper.
        advance_learn: train the components in reserve before they come into use; otherwise they wait, at E = 0.
        lr_restart: give what is added later its own warm-up and its own linear decay to zero at the end of training.
        scale_mode: `active` divides lora_alpha by the components in use, so that growth from one to two halves what the layer had; `fixed` divides by target_r,
            and growth changes nothing.
    """

    init_r: int = 1
    target_r: int = 2
    target_total_rank: int | None = None
    max_r: int | None = None
    rank_increment: int = 1
    top_h: int = 2
    init_warmup: int | None = None
    interval: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    advance_learn: bool = True
    lr_restart: bool = True
    scale_mode: str = "active"

    peft_name: ClassVar[str] = "echelon_increlora"

    def __post_init__(self) -> None:
        if self.max_r is not None:
            self.r = whole("max_r", self.max_r, 1)
        super().__post_init__()
        whole("init_r", self.init_r, 1)
        whole("target_r", self.target_r, self.init_r)
        whole("r" if self.max_r is None else "max_r", self.r, self.target_r)
        for name in ("rank_increment", "top_h"):
            whole(name, getattr(self, name), 1)
        for name, low in (("target_total_rank", 1), ("init_warmup", 0), ("interval", 1)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), low)
        number("beta1", self.beta1, 0, 1, open_low=True, open_high=True)
        number("beta2", self.beta2, 0, 1, open_low=True, open_high=True)
        number("orth_reg_weight", self.orth_reg_weight, 0, float("inf"), open_high=True)
        one_of("scale_mode", self.scale_mode, ("active", "fixed"))

    def target(self, layers: int) -> int:
        """Sum of the ranks of so many layers at the end."""
        return self.target_r * layers if self.target_total_rank is None else self.target_total_rank

    def schedule(self, layers: int, total_steps: int | None) -> tuple[int, int]:
        """``init_warmup`` and ``interval`` for a model of so many adapted layers.

        Raises:
            ValueError: if they depend on the length of training and that is unknown.
        """
        if self.interval is not None:
            return self.interval if self.init_warmup is None else self.init_warmup, self.interval
        if total_steps is None:
            raise ValueError("interval is null and the length of training is unknown; give interval, or set total_steps of the tuner before training")
        events = self.events(layers)
        if self.init_warmup is None:
            interval = max(1, total_steps // 2 // (events + 1))
            return interval, interval
        return self.init_warmup, max(1, (total_steps // 2 - self.init_warmup) // max(1, events))

    def events(self, layers: int) -> int:
        """Growths that it takes to spend the budget where no layer is at its limit."""
        return math.ceil((self.target(layers) - self.init_r * layers) / (self.top_h * self.rank_increment))


class IncreLoraLinear(DeltaLinear):
    """A linear layer with adapters of which the first components are in use, the next few in reserve, and the rest asleep.

    What is frozen by adapter: ``count`` has the components in use, and those with the reserve; ``since`` (r, 2) the optimizer step from which on each
    took part, and from which on its E trained (0 from the start); ``scores`` the smoothed sensitivity and its smoothed uncertainty.

    Attributes:
        scored: adapters whose sensitivity is taken in backward.
        gathered: what this step's backward passes gave.
        divisors: what ``lora_alpha`` is divided by, or none for the components in use.
    """

    prefix = "echelon_increlora_"
    trained = ("A", "E", "B")
    frozen = ("count", "since", "scores")
    kept = ("scored", "gathered", "divisors", "_counts")
    scored: dict[str, bool]
    gathered: dict[str, Tensor]
    divisors: dict[str, int | None]
    _counts: dict[str, tuple[Tensor, int, tuple[int, int]]]

    @classmethod
    def check(cls, key: str, module: nn.Module, config: Any) -> None:
        super().check(key, module, config)
        whole(f"r of {key}", config.rank_of(key), config.init_r)

    def start(self, name: str, config: Any) -> dict[str, Tensor]:
        rank = self.ranks[name]
        self.divisors[name] = config.target_r if config.scale_mode == "fixed" else None
        A, B, E = (
            torch.randn(*shape, generator=self.generator(config, part)) * _STD
            for part, shape in (("A", (rank, self.in_features)), ("B", (self.out_features, rank)), ("E", (rank, 1)))
        )
        return {
            "A": A, "E": torch.zeros_like(E) if config.init_weights else E, "B": B, "count": torch.tensor([config.init_r, config.init_r]),
            "since": torch.zeros(rank, 2, dtype=torch.long), "scores": torch.zeros(2),
        }  # fmt: skip

    def counts(self, name: str) -> tuple[int, int]:
        """Components in use, and those with the reserve."""
        buffer, known = self.part("count", name), self._counts.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:  # so that a device is asked only behind a change
            active, live = buffer.tolist()
            known = self._counts[name] = buffer, buffer._version, (active, live)
        return known[2]

    def factors(self, name: str) -> LoraFactors:
        """Of the components in use, scaled already: as a LoRA its ``lora_alpha`` is its rank."""
        return self._first(name, self.counts(name)[0])

    def apply_delta(self, name: str, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What an adapter adds to the output; the reserve takes part in training only."""
        if not self.training:
            return super().apply_delta(name, x)
        A, B, _ = self._first(name, self.counts(name)[1])
        y = nn.functional.linear(nn.functional.linear(x, A), B)
        return _Scored.apply(y, x, self, name) if self.scored.get(name) else y

    @torch.no_grad()
    def gather(self, name: str, x: Float[Tensor, "*batch in"], gradient: Float[Tensor, "*batch out"]) -> None:
        """Add the sensitivity in one backward pass: the sum of ``|delta * gradient of delta|`` over the root of its entries."""
        A, B, _ = self._first(name, self.counts(name)[1])
        x, gradient = x.reshape(-1, self.in_features).to(A.dtype), gradient.reshape(-1, self.out_features).to(A.dtype)
        total = A.new_zeros(())
        for rows in (slice(start, start + _ROWS) for start in range(0, self.out_features, _ROWS)):
            total += ((B[rows] @ A) * (gradient[:, rows].T @ x)).abs().sum()
        total /= math.sqrt(self.in_features * self.out_features)
        self.gathered[name] = self.gathered[name] + total if name in self.gathered else total

    @torch.no_grad()
    def reserve(self, name: str, config: Any, step: int) -> None:
        """Fill up the reserve, with components that take part from the step after this one."""
        active, live = self.counts(name)
        end = min(active + config.rank_increment, self.ranks[name])
        if end <= live:
            return
        self.part("E", name)[live:end] = _RESERVE if config.advance_learn else 0
        self.part("since", name)[live:end, 0] = step + 1
        self.part("count", name)[1] = end

    @torch.no_grad()
    def grow(self, name: str, config: Any, step: int, most: int) -> int:
        """Take the reserve, or the first ``most`` of it, into use and fill it up again; by how many components that was."""
        active, live = self.counts(name)
        grown = min(live - active, most)
        self.part("since", name)[active : active + grown, 1] = step + 1
        self.part("count", name)[0] = active + grown
        self.reserve(name, config, step)
        return grown

    @torch.no_grad()
    def drop_reserve(self, name: str) -> None:
        """Take the reserve out of the function; its A and B still count in the penalty, as in the released code."""
        active, live = self.counts(name)
        self.part("E", name)[active:live] = 0
        self.scored[name] = False

    def _first(self, name: str, count: int) -> LoraFactors:
        active = self.counts(name)[0]
        A, E, B = self.part("A", name)[:count], self.part("E", name)[:count], self.part("B", name)[:, :count]
        if count > active:
            E = torch.cat([E[:active], E[active:].detach()])
        scale = self.alphas[name] / (self.divisors[name] or active + _AVOIDS_ZERO)
        return LoraFactors(A, B * (E.T * scale), 1.0)


class _Scored(torch.autograd.Function):
    """Nothing in forward; in backward the sensitivity is taken from the gradient that arrives. Under gradient checkpointing the input is made again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, layer: IncreLoraLinear, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.name = layer, name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.layer.gather(ctx.name, *ctx.saved_tensors, gradients[0])
        return gradients[0], None, None, None


class IncreLoraModel(DeltaModel):
    """A model with IncreLoRA adapters; :meth:`rank_pattern` tells the ranks.

    In a loop of one's own set ``total_steps`` and ``warmup_steps`` first. A run may be broken off and resumed: all that growth depends on is saved with the
    adapter.
    """

    prefix = "echelon_increlora_"
    tuner_layer_cls = IncreLoraLinear

    def rank_pattern(self, adapter_name: str = "default") -> dict[str, int]:
        """Components in use by layer.

        Raises:
            ValueError: if there is no such adapter.
        """
        self._config(adapter_name)
        return {key: layer.counts(adapter_name)[0] for key, layer in self.layers(adapter_name)}

    def importance(self, adapter_name: str = "default") -> dict[str, float]:
        """By layer, the smoothed sensitivity times its smoothed uncertainty.

        Raises:
            ValueError: if there is no such adapter.
        """
        self._config(adapter_name)
        layers = dict(self.layers(adapter_name))
        return dict(zip(layers, torch.stack([layer.part("scores", adapter_name).prod() for layer in layers.values()]).tolist(), strict=True))

    def orthogonality(self, adapter_name: str = "default") -> Float[Tensor, ""]:
        """Mean over both factors of all layers of ``|A A^T - I|`` and ``|B^T B - I|`` (Frobenius), reserve included; differentiable.

        Raises:
            ValueError: if there is no such adapter.
        """
        self._config(adapter_name)
        norms = []
        for _, layer in self.layers(adapter_name):
            live = layer.counts(adapter_name)[1]
            for rows in (layer.part("A", adapter_name)[:live], layer.part("B", adapter_name)[:, :live].T):
                norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(live, dtype=rows.dtype, device=rows.device)))
        return torch.stack(norms).mean()

    def check_together(self, names: list[str], config: Any) -> None:
        target, low, high = config.target(len(names)), config.init_r * len(names), sum(map(config.rank_of, names))
        if not low <= target <= high:
            raise ValueError(f"the target is a total rank of {target}; {len(names)} layers can have {low} (init_r) to {high} (r, rank_pattern) together")

    def begin_training(self, optimizer: torch.optim.Optimizer) -> None:
        self.end_training()
        for name in self._training():
            config, layers = self._config(name), [layer for _, layer in self.layers(name)]
            if config.lr_restart and self.total_steps is None:
                raise ValueError("lr_restart needs the length of training; set total_steps of the tuner before training, or lr_restart=False")
            warmup, interval = config.schedule(len(layers), self.total_steps)
            first, events = (warmup // interval + 1) * interval, config.events(len(layers))
            if events and self.total_steps is not None and first + (events - 1) * interval >= self.total_steps:
                warnings.warn(
                    f"init_warmup {warmup} and interval {interval} need {first + (events - 1) * interval + 1} steps to reach a total rank of "
                    f"{config.target(len(layers))}; training has {self.total_steps}; lower interval or raise top_h", stacklevel=2,
                )  # fmt: skip
            for layer in layers:
                layer.scored[name] = self._left(name) > 0
        self._hooks = step_by_generation(optimizer, self._rows)

    def begin_step(self, step: int) -> None:
        for name in self._training():
            for _, layer in self.layers(name):
                layer.gathered.pop(name, None)

    def before_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self._step = step
        for name in self._training():
            config, layers = self._config(name), dict(self.layers(name))
            self._pull(name)
            if self._left(name) <= 0:
                continue
            self._smooth(name, list(layers.values()))
            for layer in layers.values():
                layer.reserve(name, config, step)
            warmup, interval = config.schedule(len(layers), self.total_steps)
            if step > warmup and step % interval == 0:
                importance = self.importance(name)
                free = [key for key, layer in layers.items() if layer.counts(name)[0] < layer.ranks[name]]
                for key in sorted(free, key=lambda key: (-importance[key], key))[: config.top_h]:
                    layers[key].grow(name, config, step, self._left(name))
            if self._left(name) <= 0:
                for layer in layers.values():
                    layer.drop_reserve(name)

    def end_training(self) -> None:
        for handle in self.__dict__.pop("_hooks", ()):
            handle.remove()
        for _, layer in self.layers():
            layer.scored.clear()

    def _training(self) -> list[str]:
        return [name for name in self.active_adapters if not self._config(name).inference_mode]

    def _left(self, name: str) -> int:
        """Budget that is not spent."""
        ranks = self.rank_pattern(name)
        return int(self._config(name).target(len(ranks)) - sum(ranks.values()))

    def _pull(self, name: str) -> None:
        """Add the gradient of the penalty to those of the factors."""
        config = self._config(name)
        if not config.orth_reg_weight:
            return
        places = [(layer, part, dim) for _, layer in self.layers(name) for part, dim in (("A", 0), ("B", 1))]
        parameters = [layer.part(part, name) for layer, part, _ in places]
        with torch.enable_grad():
            gradients = torch.autograd.grad(config.orth_reg_weight * self.orthogonality(name), parameters)
        for (layer, _, dim), parameter, gradient in zip(places, parameters, gradients, strict=True):
            count = layer.counts(name)[1 if config.advance_learn else 0]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.narrow(dim, 0, count).add_(gradient.narrow(dim, 0, count))

    @torch.no_grad()
    def _smooth(self, name: str, layers: list[Any]) -> None:
        """Take this step's sensitivity into the averages; one that is not finite, as in a step that a scaler skips, is left out."""
        config = self._config(name)
        first = layers[0].part("scores", name)
        found = torch.stack([layer.gathered.pop(name, torch.zeros(())).to(first) for layer in layers])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size()
        for layer, value in zip(layers, found, strict=True):
            scores = layer.part("scores", name)
            value = value.to(scores.device, scores.dtype)
            sensitivity = config.beta1 * scores[0] + (1 - config.beta1) * value
            uncertainty = config.beta2 * scores[1] + (1 - config.beta2) * (value - sensitivity).abs()
            scores.copy_(torch.where(value.isfinite(), torch.stack([sensitivity, uncertainty]), scores))

    def _rows(self) -> Iterator[Rows]:
        """What the optimizer may move at this step: the components in use, and A and B of the reserve."""
        for name, layer in [(adapter, layer) for adapter in self._training() for _, layer in self.layers(adapter)]:
            config, (active, live), since = self._config(name), layer.counts(name), layer.part("since", name)
            rate = restarted(since[:, 0], self._step, self.warmup_steps, int(self.total_steps or 0)) if config.lr_restart else None
            place = torch.arange(len(since), device=since.device)
            for part, dim in (("A", 0), ("E", 0), ("B", 1)):
                early = part != "E" and config.advance_learn
                started = since[:, 0 if early else 1]
                yield Rows(layer.part(part, name), dim, (place < (live if early else active)) & (started <= self._step), started, rate, self._step)


register("echelon_increlora", IncreLoraConfig, IncreLoraModel)

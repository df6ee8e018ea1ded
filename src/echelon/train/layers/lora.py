"""LoRA and ReLoRA as ways to pre-train, two baselines: a frozen matrix plus a product of two factors, for good or merged again and again.

Sources: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695; the
setting (``lora_alpha`` 32, dropout 0.05) of the baselines in arXiv 2403.03507. Only the target matrices are frozen: biases, norms, embeddings and the head
train in full. Differs from both codes: dropout is drawn from ``seed``, the step and the layer, so that a resumed run repeats it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.linalg.blockwise import quantize
from echelon.linalg.checks import number, whole
from echelon.models.modules import Spec, dense_module, dense_weight, empty_linear, kind, like
from echelon.registry import method
from echelon.train.layers.base import LayerMethod, LearningRate, converted, reset_moments, rewrite
from echelon.train.layers.restarts import recovery
from echelon.train.optimizers.moments import read


class LoRALinear(nn.Module):
    """``y = base(x) + s lora_B(lora_A(dropout(x)))`` with the matrix of ``base`` frozen.

    ``weight`` is an empty buffer, as in :class:`~echelon.models.modules.LowRankLinear`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between the factors.
        bias: whether ``base`` has one, which trains.
        transposed: whether the dense module was a ``Conv1D``, which :meth:`merge` makes again.
        scale: of the product.
        dropout: share of the inputs of ``lora_A`` that are zero while training.
        factory: dtype and device.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, transposed: bool = False, *, scale: float, dropout: float, **factory: Any
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.transposed, self.scale, self.dropout = in_features, out_features, transposed, scale, dropout
        self.base = empty_linear(in_features, out_features, bias, **factory)
        self.base.weight.requires_grad_(False)
        self.lora_A = empty_linear(in_features, rank, False, **factory)
        self.lora_B = empty_linear(rank, out_features, False, **factory)
        self.register_buffer("weight", torch.empty(0, **factory))
        self.draw = 0, 0  # seeds the dropout: of the step and the layer, and which batch of the step it is

    @property
    def rank(self) -> int:
        return self.lora_A.weight.shape[0]

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def spec(self) -> Spec:
        """What it takes to build it again."""
        made: Spec = {"kind": "lora.linear", "in": self.in_features, "out": self.out_features, "rank": self.rank, "bias": self.bias is not None}
        return made | {"scale": self.scale, "dropout": self.dropout} | ({"transposed": True} if self.transposed else {})

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        dropped = x
        if self.training and self.dropout > 0:
            generator = torch.Generator(x.device).manual_seed(hash(self.draw))
            kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
            dropped = x * kept / (1 - self.dropout)
        return self.base(x) + self.lora_B(self.lora_A(dropped)) * self.scale

    def product(self) -> Float[Tensor, "out in"]:
        """The dense matrix that base and factors stand for together."""
        added = self.scale * self.lora_B.weight.double() @ self.lora_A.weight.double()
        return (self.base.weight.double() + added).to(self.base.weight.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The dense module of the same function and the original size."""
        return dense_module(self.product(), self.bias, self.transposed)

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """Put the product into the frozen matrix and begin again: a new A, uniform within one over the root of its inputs, and B zero."""
        self.base.weight.copy_(self.product())
        self.begin(generator)

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """The first values of the factors."""
        bound = self.in_features**-0.5  # Kaiming with a = sqrt(5)
        self.lora_A.weight.copy_((2 * torch.rand(self.lora_A.weight.shape, generator=generator) - 1) * bound)
        self.lora_B.weight.zero_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


@kind("lora.linear")
def _lora(spec: Spec, old: nn.Module) -> nn.Module:
    sizes = spec["in"], spec["out"], spec["rank"], spec["bias"], spec.get("transposed", False)
    return LoRALinear(*sizes, scale=spec["scale"], dropout=spec["dropout"], **like(old))


@method(
    kind="layer", name="lora", title="LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", year=2021,
    summary="Freeze the matrices and train two factors beside each of them, from random weights on: a baseline of pre-training.",
    published="C4, LLaMA 60M/130M/350M/1B (arXiv 2403.03507): perplexity 34.99/33.92/25.58/19.21, full rank 34.06/25.08/18.80/15.56",
)  # fmt: skip
@dataclass(frozen=True)
class LoRA(LayerMethod):
    """``W + (lora_alpha / r) B A`` with W frozen where it stands, A uniform within one over the root of its inputs, and B zero.

    Attributes:
        r: width between the factors; at most the smaller side.
        lora_alpha: numerator of the scale.
        lora_dropout: share of the inputs of A that are zero while training.
    """

    r: int = 128
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r", self.r, 1)
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; it must be above 0")
        number("lora_dropout", self.lora_dropout, 0, 1, open_high=True)

    def spec(self, name: str, module: nn.Module) -> Spec:
        rows, columns = dense_weight(module).shape
        if self.r > min(rows, columns):
            raise ValueError(f"r is {self.r}; {name} is {rows} x {columns}, so it must be at most {min(rows, columns)}")
        made: Spec = {"kind": "lora.linear", "in": columns, "out": rows, "rank": self.r, "bias": module.bias is not None}
        return made | {"scale": self.lora_alpha / self.r, "dropout": self.lora_dropout} | ({"transposed": True} if isinstance(module, Conv1D) else {})

    def fill(self, new: LoRALinear, old: nn.Module, generator: torch.Generator) -> None:
        new.base.weight.copy_(dense_weight(old))
        if new.bias is not None:
            new.bias.copy_(old.bias)  # type: ignore[arg-type]
        new.begin(generator)

    def begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for place, (_, layer) in enumerate(converted(model, LoRALinear)):
            layer.draw = hash((self.seed, step, place)), 0

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The model's own; each batch of a step draws its own dropout, which a second forward in backward (gradient checkpointing) repeats."""
        for _, layer in converted(model, LoRALinear):
            layer.draw = layer.draw[0], layer.draw[1] + 1
        return super().loss(model, batch)


@method(
    kind="layer", name="relora", title="ReLoRA: High-Rank Training Through Low-Rank Updates", arxiv="2307.05695", year=2023,
    summary="LoRA whose factors are merged into the frozen matrix and begun anew every so many steps, so that updates add up to a high rank.",
    published="C4, LLaMA 60M/130M/350M/1B (arXiv 2403.03507): perplexity 37.04/29.37/29.08/18.33, full rank 34.06/25.08/18.80/15.56",
)  # fmt: skip
@dataclass(frozen=True)
class ReLoRA(LoRA):
    """Every ``reset_every`` optimizer steps: merge, a new A, B zero, the factors' moments forgotten, and a ramp of the learning rate.

    The paper trains in full rank first, for about a quarter of the steps: train with AdamW, then go on from that model with this. Each merge rounds the frozen
    matrix to its dtype; in bfloat16 it loses what is small beside it.

    Attributes:
        reset_every: optimizer steps between two merges; 0 for none.
        recovery_steps: steps of the linear ramp of the learning rate behind a merge.
        recovery_start: share of the target at which the ramp begins.
        optimizer_magnitude_pruning: set this share of the factors' moments to zero at a merge, smallest magnitudes first, and count steps on (the paper takes
            0.99); `null` forgets them all and counts steps anew.
    """

    reset_every: int = 1000
    recovery_steps: int = 100
    recovery_start: float = 0.0
    optimizer_magnitude_pruning: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reset_every", "recovery_steps"):
            whole(name, getattr(self, name), 0)
        number("recovery_start", self.recovery_start, 0, 1)
        if self.optimizer_magnitude_pruning is not None:
            number("optimizer_magnitude_pruning", self.optimizer_magnitude_pruning, 0, 1)

    def lr_scale(self, step: int, base: LearningRate) -> float:
        return recovery(step, base, self.reset_every, self.recovery_steps, self.recovery_start)

    def end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if not self.reset_every or step % self.reset_every:
            return
        for place, (_, layer) in enumerate(converted(model, LoRALinear)):
            layer.restart(torch.Generator().manual_seed(hash((self.seed, step, place))))
            factors = [layer.lora_A.weight, layer.lora_B.weight]
            for factor in factors:
                rewrite(optimizer, factor, factor)
            if self.optimizer_magnitude_pruning is None:
                reset_moments(optimizer, factors)
            else:
                inner = getattr(optimizer, "optimizer", optimizer)
                for factor in factors:
                    prune_moments(inner.state.get(factor, {}), factor, self.optimizer_magnitude_pruning)


@torch.no_grad()
def prune_moments(state: Mapping[str, Any], like: Tensor, share: float) -> None:
    """Set the smallest ``share`` of each of Adam's moments of one parameter to zero, in place.

    Args:
        state: the optimizer's state of the parameter.
        like: the parameter.
        share: in [0, 1]; numbers as small as the last of them go too.
    """
    for name in ("exp_avg", "exp_avg_sq"):
        count = math.floor(share * like.numel())
        if name not in state or count == 0:
            continue
        signed, stored = name == "exp_avg", state[name]
        magnitude = read(state, name, like.float() if like.dtype != torch.float64 else like, signed).abs()  # type: ignore[arg-type]
        zero = 0 if stored.is_floating_point() else int(quantize(torch.zeros(1), signed)[0])  # of eight bits: the code of zero
        stored.masked_fill_(magnitude <= magnitude.flatten().kthvalue(count).values, zero)

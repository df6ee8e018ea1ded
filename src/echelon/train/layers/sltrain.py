"""SLTrain: every matrix is a low-rank product plus values at fixed random positions, trained from scratch.

Source: "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arXiv 2406.02214. Differs from its code: positions are drawn
from a seed and stored in 32 bits where they fit, half of the pair (the product or the sparse part) may be left out, positions may follow the residual of the
weight that is replaced, and a dense model can be converted (``init=svd``). The paper's dropout, which its code ignores, is left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.lowrank import Factors, svd
from echelon.models.modules import Spec, dense_module, dense_weight, kind, like
from echelon.registry import method
from echelon.train.layers.base import autocast_input, converted
from echelon.train.layers.restarts import Restarts

BLOCK = 1 << 24  # numbers of the weight's gradient that are held at once


def assemble(
    up: Float[Tensor, "out r"], down: Float[Tensor, "r in"], value: Float[Tensor, " nnz"], index: Int[Tensor, " nnz"], dtype: torch.dtype
) -> Float[Tensor, "out in"]:  # fmt: skip
    """The dense matrix: the product, and the values added at their places in it."""
    weight = up.to(dtype) @ down.to(dtype)
    weight.view(-1).index_add_(0, index, value.to(weight.dtype))
    return weight


class _SparseLowRank(torch.autograd.Function):
    """``F.linear`` with the assembled matrix, which is built again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, scale: Tensor, value: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, up, down, scale, value, index)
        return nn.functional.linear(x, assemble(up, down * scale, value, index, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, unscaled, scale, value, index = ctx.saved_tensors
        for_x, for_up, for_unscaled, for_scale, for_value, _, for_bias = ctx.needs_input_grad
        down, for_down = unscaled * scale, for_unscaled or for_scale
        made_x = gradient @ assemble(up, down, value, index, x.dtype) if for_x else None
        dtype, shape = x.dtype, x.shape
        gradient, x = gradient.reshape(-1, up.shape[0]), x.reshape(-1, down.shape[1])
        (rows, columns), tokens = (up.shape[0], down.shape[1]), x.shape[0]
        # The factors' gradients from the weight's gradient D cost about 2 r m n, straight from x and g about 2 T r (m + n).
        straight = tokens * (rows + columns) < rows * columns or not for_value
        made_up = made_down = made_value = None
        if straight:
            made_up = (gradient.T @ (x @ down.to(dtype).T)).to(up.dtype) if for_up else None
            made_down = (gradient @ up.to(dtype)).T @ x if for_down else None
        elif for_up or for_down:
            made_up, made_down = torch.empty_like(up), torch.zeros(down.shape, dtype=torch.promote_types(dtype, torch.float32), device=down.device)
        if for_value:
            made_value = torch.empty_like(value)
            step = max(1, BLOCK // columns)
            starts = torch.arange(0, rows + step, step, device=index.device).clamp_(max=rows) * columns
            bounds = torch.searchsorted(index.long(), starts).tolist() if rows > step else [0, len(index)]
            for first, low, high in zip(range(0, rows, step), bounds, bounds[1:], strict=False):
                # One rounding of a sum in float32, also for half precision: that is how matrix products accumulate.
                part = gradient[:, first : first + step].T @ x
                made_value[low:high] = part.view(-1).index_select(0, index[low:high] - first * columns)
                if not straight and made_up is not None and made_down is not None:
                    made_up[first : first + step] = part @ down.to(dtype).T
                    made_down += up[first : first + step].to(dtype).T @ part
        made_bias = gradient.sum(0) if for_bias else None
        made_scale = (made_down * unscaled).sum().to(scale.dtype) if for_scale and made_down is not None else None
        made_down = (made_down * scale).to(unscaled.dtype) if for_unscaled and made_down is not None else None
        return None if made_x is None else made_x.view(shape), made_up, made_down, made_scale, made_value, None, made_bias


class SparseLowRankLinear(nn.Module):
    """``y = x (s B A + S)^T + bias`` with ``S`` zero but for ``value`` at the row-major positions ``index``.

    Nothing of the matrix's size is kept for the backward pass: the matrix is built again there.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between the factors ``up`` (out, rank), the paper's B, and ``down`` (rank, in), its A; may be 0.
        nnz: values of the sparse part; may be 0.
        bias: whether there is one.
        scale: s; None for ``tanh`` of a parameter that is trained and starts at 1.
        transposed: whether the dense module was a ``Conv1D``, which :meth:`merge` makes again.
        factory: dtype and device.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, nnz: int, bias: bool, scale: float | None, transposed: bool = False, **factory: Any
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.transposed, self.fixed_scale = in_features, out_features, transposed, scale
        self.up = nn.Parameter(torch.zeros(out_features, rank, **factory))
        self.down = nn.Parameter(torch.zeros(rank, in_features, **factory))
        self.value = nn.Parameter(torch.zeros(nnz, **factory))
        self.bias = nn.Parameter(torch.zeros(out_features, **factory)) if bias else None
        self.scaling = nn.Parameter(torch.ones((), **factory)) if scale is None else None
        size = torch.int32 if in_features * out_features < 1 << 31 else torch.int64
        self.register_buffer("index", torch.arange(nnz, dtype=size, device=factory.get("device")))
        self.register_buffer("weight", torch.empty(0, **factory))
        self.index: Tensor
        self.weight: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> Float[Tensor, ""] | float:
        return self.scaling.tanh() if self.scaling is not None else self.fixed_scale  # type: ignore[return-value]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        scale = torch.as_tensor(self.scale, dtype=self.down.dtype, device=self.down.device)
        return _SparseLowRank.apply(autocast_input(x), self.up, self.down, scale, self.value, self.index, self.bias)

    @torch.no_grad()
    def product(self) -> Float[Tensor, "out in"]:
        """The dense matrix, the very one that :meth:`forward` multiplies with."""
        return assemble(self.up, self.down * self.scale, self.value, self.index, self.up.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The dense module of the same function and the original size."""
        return dense_module(self.product(), self.bias, self.transposed)

    @torch.no_grad()
    def split(self) -> tuple[Factors, Tensor]:
        """The low-rank part, with the scale in ``down``, and the sparse part (out, in) in CSR, for kernels that take them so."""
        index = self.index.long()
        starts = torch.searchsorted(index, torch.arange(self.out_features + 1, device=index.device) * self.in_features)
        shape = (self.out_features, self.in_features)
        csr = torch.sparse_csr_tensor(starts, index % self.in_features, self.value.detach().clone(), shape, check_invariants=True)
        return Factors(self.up.detach().clone(), self.down * self.scale), csr

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, nnz={len(self.value)}, bias={self.bias is not None}"


@kind("sltrain.sparse_low_rank")
def _sparse_low_rank(spec: Spec, old: nn.Module) -> nn.Module:
    return SparseLowRankLinear(spec["in"], spec["out"], spec["rank"], spec["nnz"], spec["bias"], spec["scale"], spec.get("transposed", False), **like(old))


@method(
    kind="layer", name="sltrain", title="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arxiv="2406.02214",
    year=2024, summary="Train every matrix as a low-rank product plus values at fixed random positions.",
    published="C4, LLaMA 60M/130M/350M/1B: perplexity 34.15/26.04/19.42/16.14 with 44M/97M/194M/646M parameters, full rank 34.06/24.36/18.80/15.56",
)  # fmt: skip
@dataclass(frozen=True)
class SLTrain(Restarts):
    """``W = s B A + S`` with ``s = lora_alpha / r``: ``B`` starts at zero, ``A`` and the values uniformly within one over the root of the inputs.

    A new layer is thus sparse at first, and a model needs warm-up. ``refactor_every=200, reset_every=200`` is SLTrain-restarts of arXiv 2505.22922. Weight
    decay would shrink the only part of full rank; leave it at 0.

    Attributes:
        r: width between the factors; 0 for a sparse part alone.
        sp_ratio: share of the positions that hold a value of their own, in [0, 1); 0 for a product alone.
        lora_alpha: numerator of the scale. The paper takes 32, 16, 16 and 8 for ranks 128, 256, 256 and 512.
        trainable_scaling: learn the scale of every layer, as tanh of a number that starts at 1, in place of `lora_alpha / r`.
        init: `scratch`, or `svd` for the best factors of the weight that is there, with what they miss in the values.
        support: where the values are: `random` positions, `topk` where the best factors of the present weight miss most, or `channel`, the inputs for which
            they miss most (LOST, arXiv 2508.02668, chooses whole channels so).
    """

    lr: float = 0.003
    r: int = 128
    sp_ratio: float = 0.03
    lora_alpha: float = 32.0
    trainable_scaling: bool = False
    init: Literal["scratch", "svd"] = "scratch"
    support: Literal["random", "topk", "channel"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r", self.r, 0)
        number("sp_ratio", self.sp_ratio, 0, 1, open_high=True)
        if self.r == 0 and self.sp_ratio == 0:
            raise ValueError("r is 0 and sp_ratio is 0; one of them must be above 0")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; it must be above 0")
        one_of("init", self.init, ("scratch", "svd"))
        one_of("support", self.support, ("random", "topk", "channel"))

    def spec(self, name: str, module: nn.Module) -> Spec:
        rows, columns = dense_weight(module).shape
        nnz = int(self.sp_ratio * rows * columns)
        if self.r == 0 and nnz == 0:
            raise ValueError(f"r is 0 and sp_ratio is {self.sp_ratio}; {name} is {rows} x {columns} and would hold no value at all")
        scale = None if self.trainable_scaling else self.lora_alpha / self.r if self.r else 1.0
        made: Spec = {"kind": "sltrain.sparse_low_rank", "in": columns, "out": rows, "rank": self.r, "nnz": nnz, "bias": module.bias is not None}
        return made | {"scale": scale} | ({"transposed": True} if isinstance(module, Conv1D) else {})

    def fill(self, new: SparseLowRankLinear, old: nn.Module, generator: torch.Generator) -> None:
        weight, rest = dense_weight(old), None
        scale = float(new.scale)
        if self.init == "svd" or self.support != "random":
            rank = min(self.r, *weight.shape)
            factors = svd(weight, rank, balance="sqrt", dtype=torch.float64) if rank else None
            if self.init == "svd" and factors is not None:
                new.up[:, :rank] = factors.up / scale**0.5
                new.down[:rank] = factors.down / scale**0.5
            rest = weight.double() - (factors.dense() if factors is not None else 0)
        index = self._support(new, rest, generator)
        new.index.copy_(index)
        if self.init == "svd":
            missed = weight.double() - (new.up.double() @ new.down.double()) * scale  # what the factors miss as they are stored
            new.value.copy_(missed.reshape(-1)[index.to(missed.device)])
            if new.bias is not None:
                new.bias.copy_(old.bias)  # type: ignore[arg-type]
        else:
            bounds = {"down": new.in_features**-0.5, "value": new.in_features**-0.5, "bias": new.out_features**-0.5}
            for part, bound in bounds.items():
                if (tensor := getattr(new, part)) is not None:
                    tensor.copy_((2 * torch.rand(tensor.shape, generator=generator) - 1) * bound)

    def _support(self, new: SparseLowRankLinear, rest: Float[Tensor, "out in"] | None, generator: torch.Generator) -> Int[Tensor, " nnz"]:
        """Sorted positions; ``rest`` is what the best factors miss."""
        nnz, columns = len(new.value), new.in_features
        if rest is None:
            chosen = torch.randperm(new.out_features * columns, generator=generator)[:nnz]
        elif self.support == "random":
            chosen = torch.randperm(rest.numel(), generator=generator)[:nnz]
        elif self.support == "topk":
            chosen = rest.abs().reshape(-1).topk(nnz).indices
        else:  # the last column may be filled in part only
            order = rest.norm(dim=0).argsort(descending=True, stable=True)[: -(-nnz // new.out_features)]
            chosen = (order[:, None] + torch.arange(new.out_features, device=order.device) * columns).reshape(-1)[:nnz]
        return chosen.sort().values

    def factors(self, model: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        return ((module.up, module.down) for _, module in converted(model, SparseLowRankLinear) if module.rank)

    def finish(self, model: nn.Module) -> None:
        """The layers stay as they are: they are what was trained, and smaller than the dense ones. :func:`merge` makes them dense."""

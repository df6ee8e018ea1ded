"""SST: every matrix is its singular value decomposition; all singular values are trained, and a few singular vectors at a time.

Source: "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", arXiv 2405.15481; its authors' code was not
consulted. Where the paper leaves it open: the moments of the singular values are reset together with those of the vectors; draws of different iterations are
independent; the ramp of the learning rate rises from ``1 / warmup_per_iteration``; layers with fewer singular values than the others train them all.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.linalg.checks import number, one_of, whole
from echelon.linalg.lowrank import svd
from echelon.models.modules import LowRankLinear, Spec, build, dense_module, dense_weight, kind, like, put
from echelon.models.reload import renote
from echelon.models.targets import linear_targets
from echelon.registry import method
from echelon.train.layers.base import LayerMethod, LearningRate, agree, autocast_input, converted, merge, reset_moments, rewrite

SAMPLING = ("mixed", "sigma", "uniform", "sequential", "topk")


class _Spectral(torch.autograd.Function):
    """``y = ((x V) * sigma) U^T``, with the gradients that SST asks for.

    ``V`` and ``U`` come as their active and their frozen columns; ``order`` says which singular value belongs to each, active ones first. Kept for the
    backward pass: x and ``z = x V``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, sigma: Tensor, left_frozen: Tensor, right_frozen: Tensor, order: Tensor, bias: Tensor | None,
        enhanced: bool, active_only: bool,
    ) -> Tensor:  # fmt: skip
        rank = left.shape[1]
        z = torch.cat([x @ right.to(x.dtype), x @ right_frozen.to(x.dtype)], -1)
        ctx.save_for_backward(x, z, left, right, sigma, left_frozen, right_frozen, order)
        ctx.enhanced, ctx.active_only = enhanced, active_only
        scaled = (z * sigma[order]).to(x.dtype)
        y = nn.functional.linear(scaled[..., :rank], left.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y + scaled[..., rank:] @ left_frozen.to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, z, left, right, sigma, left_frozen, right_frozen, order = ctx.saved_tensors
        rank, dtype = left.shape[1], x.dtype
        for_x, for_left, for_right, for_sigma, *_, for_bias, _, _ = ctx.needs_input_grad
        a = torch.cat([gradient @ left.to(dtype), gradient @ left_frozen.to(dtype)], -1)
        made_x = made_left = made_right = made_sigma = made_bias = None
        if for_x:
            scaled = (a * sigma[order]).to(dtype)
            made_x = scaled[..., :rank] @ right.to(dtype).T + scaled[..., rank:] @ right_frozen.to(dtype).T
        tokens, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        a, z = a.view(-1, len(order)), z.view(-1, len(order))
        factor = 1 if ctx.enhanced else sigma[order[:rank]]  # the true gradient of a vector is the enhanced one times its singular value
        if for_left:
            made_left = ((tokens.T @ z[:, :rank]) * factor).to(left.dtype)
        if for_right:
            made_right = ((x.T @ a[:, :rank]) * factor).to(right.dtype)
        if for_sigma:
            made_sigma = torch.zeros_like(sigma)
            trained = slice(rank if ctx.active_only else None)
            made_sigma[order[trained]] = (a[:, trained].to(sigma.dtype) * z[:, trained].to(sigma.dtype)).sum(0)
        if for_bias:
            made_bias = tokens.sum(0)
        return made_x, made_left, made_right, made_sigma, None, None, None, made_bias, None, None


class SpectralLinear(nn.Module):
    """``y = ((x V) * sigma) U^T + bias`` with all ``k = min(out, in)`` singular values, of which ``rank`` have their vectors trained at the moment.

    The parameters ``left`` (out, rank) and ``right`` (in, rank) hold the active columns of U and V, the buffers ``left_frozen`` and ``right_frozen`` the other
    ones. ``order`` (k) holds the number of the singular value of every column, active ones first. ``sigma`` (k) is in float32 at least, whatever the
    model's dtype is.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: active directions, 1..k.
        bias: whether there is one.
        transposed: whether the dense module was a ``Conv1D``, which :meth:`merge` makes again.
        enhanced_grad: leave the singular values out of the vectors' gradients, so that weak directions learn as fast as strong ones.
        active_only: whether only the singular values of active directions are trained.
        dense_cache: keep the dense matrix between forward passes without gradients, as long as nothing changes.
        factory: dtype and device.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool, transposed: bool = False, enhanced_grad: bool = True, active_only: bool = False,
        dense_cache: bool = False, **factory: Any,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.enhanced_grad, self.active_only, self.dense_cache = enhanced_grad, active_only, dense_cache
        full, device = min(in_features, out_features), factory.get("device")
        self.left = nn.Parameter(torch.zeros(out_features, rank, **factory))
        self.right = nn.Parameter(torch.zeros(in_features, rank, **factory))
        self.sigma = nn.Parameter(torch.zeros(full, device=device, dtype=torch.promote_types(factory.get("dtype", torch.float32), torch.float32)))
        self.bias = nn.Parameter(torch.zeros(out_features, **factory)) if bias else None
        self.register_buffer("left_frozen", torch.zeros(out_features, full - rank, **factory))
        self.register_buffer("right_frozen", torch.zeros(in_features, full - rank, **factory))
        self.register_buffer("order", torch.arange(full, device=device))
        self.register_buffer("weight", torch.empty(0, **factory))
        self.left_frozen: Tensor
        self.right_frozen: Tensor
        self.order: Tensor
        self.weight: Tensor
        self._cached: tuple[Any, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def active(self) -> Int[Tensor, " rank"]:
        """Which singular values have their vectors trained."""
        return self.order[: self.rank]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        x = autocast_input(x)
        if self.dense_cache and not torch.is_grad_enabled():
            return nn.functional.linear(x, self._dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return _Spectral.apply(
            x, self.left, self.right, self.sigma, self.left_frozen, self.right_frozen, self.order, self.bias, self.enhanced_grad, self.active_only
        )

    def _dense(self) -> Float[Tensor, "out in"]:
        parts = (self.left, self.right, self.sigma, self.left_frozen, self.right_frozen)
        state = [(part.data_ptr(), part.dtype, part._version) for part in parts]
        if self._cached is None or self._cached[0] != state:
            self._cached = (state, self.product())
        return self._cached[1]

    def _apply(self, fn: Any, recurse: bool = True) -> "SpectralLinear":
        before = self.sigma.detach()
        super()._apply(fn, recurse)
        if self.sigma.dtype in (torch.float16, torch.bfloat16):  # a model is cast as a whole; its singular values stay as fine as they were
            self.sigma.data = before.to(self.sigma.device)
        self._cached = None
        return self

    @torch.no_grad()
    def vectors(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, "in k"]]:
        """U and V with their columns in the order of ``sigma``."""
        back = self.order.argsort()
        return torch.cat([self.left, self.left_frozen], 1)[:, back], torch.cat([self.right, self.right_frozen], 1)[:, back]

    @torch.no_grad()
    def set_vectors(self, left: Float[Tensor, "out k"], right: Float[Tensor, "in k"]) -> None:
        """Put the columns of U and V in their places."""
        for values, active, frozen in ((left, self.left, self.left_frozen), (right, self.right, self.right_frozen)):
            active.copy_(values[:, self.order[: self.rank]])
            frozen.copy_(values[:, self.order[self.rank :]])

    @torch.no_grad()
    def activate(self, chosen: Int[Tensor, " rank"]) -> None:
        """Let the vectors of these singular values be trained, and freeze the others; no value changes."""
        left, right = self.vectors()
        frozen = torch.ones(len(self.order), dtype=torch.bool)
        chosen = chosen.cpu()
        frozen[chosen] = False
        self.order.copy_(torch.cat([chosen.sort().values, frozen.nonzero()[:, 0]]))
        self.set_vectors(left, right)

    @torch.no_grad()
    def decompose(self, weight: Float[Tensor, "out in"]) -> None:
        """Hold this matrix: its singular values, descending, and its vectors, from an SVD in float32 at least."""
        left, values, right = torch.linalg.svd(weight.to(self.sigma), full_matrices=False)
        self.sigma.copy_(values)
        self.set_vectors(left, right.T)

    def product(self) -> Float[Tensor, "out in"]:
        """The dense matrix, multiplied in the dtype of ``sigma``."""
        return self._product().to(self.left.dtype)

    @torch.no_grad()
    def _product(self) -> Float[Tensor, "out in"]:
        left, right = self.vectors()
        return (left.to(self.sigma) * self.sigma) @ right.to(self.sigma).T

    def merge(self) -> nn.Module:
        """The dense module of the same function and the original size."""
        return dense_module(self.product(), self.bias, self.transposed)

    @torch.no_grad()
    def constrain(self, optimizer: torch.optim.Optimizer) -> None:
        """No singular value below zero, and active vectors of unit length; also in the copies that an optimizer keeps in float32."""
        self.sigma.clamp_(min=0)
        for vectors in (self.left, self.right):
            master = optimizer.state.get(vectors, {}).get("master", vectors)
            unit = master.to(self.sigma.dtype)
            unit = unit / unit.norm(dim=0).clamp_min(torch.finfo(unit.dtype).tiny)
            master.copy_(unit)
            vectors.copy_(unit)

    @torch.no_grad()
    def refresh(self) -> None:
        """Decompose the matrix that is held anew, which makes the vectors orthonormal again. The function stays; all processes get the first one's vectors."""
        self.decompose(self._product())
        agree(self.sigma, self.left, self.right, self.left_frozen, self.right_frozen)

    @torch.no_grad()
    def begin_anew(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer forget moments, and float32 copies, of columns that are others now."""
        trained = [self.left, self.right, self.sigma]
        for parameter in trained:
            rewrite(optimizer, parameter, parameter)
        reset_moments(optimizer, trained)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank} of {len(self.order)}"
        return f"{sizes}, bias={self.bias is not None}"


@kind("sst.spectral")
def _spectral(spec: Spec, old: nn.Module) -> nn.Module:
    options = {key: spec[key] for key in ("enhanced_grad", "active_only", "dense_cache")}
    return SpectralLinear(spec["in"], spec["out"], spec["rank"], spec["bias"], spec.get("transposed", False), **options, **like(old))


def probabilities(sigma: Float[Tensor, " k"], sampling: str = "mixed") -> Float[Tensor, " k"]:
    """With what probability the next direction is drawn, in float64 on the CPU: uniform, in proportion to ``sigma``, or half of each.

    Where all singular values are zero, the uniform one.
    """
    values = sigma.detach().double().cpu()
    uniform = torch.full_like(values, 1 / len(values))
    if sampling == "uniform" or not values.any():
        return uniform
    spectral = values / values.sum()
    return spectral if sampling == "sigma" else (uniform + spectral) / 2


def draw(sigma: Float[Tensor, " k"], rank: int, sampling: str, iteration: int, seed: int) -> Int[Tensor, " rank"]:
    """Distinct directions for one iteration of one layer; the same ones in every process that gives the same arguments.

    Args:
        sigma: singular values.
        rank: how many.
        sampling: ``mixed``, ``sigma`` or ``uniform`` to draw without replacement, ``sequential`` for one run of neighbours after the other, ``topk`` for the
            largest singular values.
        iteration: counted from 0.
        seed: of this layer and iteration.
    """
    if sampling == "sequential":
        return (iteration * rank + torch.arange(rank)) % len(sigma)
    if sampling == "topk":
        return sigma.detach().cpu().argsort(descending=True, stable=True)[:rank]
    # The largest p / e with exponential e are a draw without replacement; unlike torch.multinomial this may go on among zeros.
    noise = torch.rand(len(sigma), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (probabilities(sigma, sampling) / -torch.log1p(-noise).clamp_max(-1e-300)).topk(rank).indices


@method(
    kind="layer", name="sst", title="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", arxiv="2405.15481", year=2024,
    summary="Train all singular values of every matrix, and a sampled few of its singular vectors at a time.",
    published="LLaMA-1.3B on 13.1B tokens: perplexity 14.59, full rank 14.54, LoRA 16.50; OpenWebText, OPT-125M: 26.98, full rank 23.50, LoRA 34.23",
)  # fmt: skip
@dataclass(frozen=True)
class SST(LayerMethod):
    """``W = U diag(sigma) V^T``: an iteration trains ``sigma`` and ``r`` drawn columns of U and V, a round of iterations ends with a new SVD.

    Saves memory of gradients and moments only: U and V hold about twice the numbers of a square matrix. :func:`truncate` keeps the leading directions alone.

    Attributes:
        r: active directions; layers with fewer singular values than that train all they have, which is said in a warning.
        steps_per_iteration: optimizer steps between two draws.
        iterations_per_round: iterations between two decompositions; by default as many as it takes to draw every direction of the widest layer once.
        warmup_per_iteration: steps of the linear ramp of the learning rate behind a draw, on top of the schedule.
        sampling: `mixed` draws half uniformly and half in proportion to the singular values; or `sigma` or `uniform` alone, `sequential`, or `topk`.
        enhanced_grad: leave the singular values out of the vectors' gradients.
        train_sigma: train `all` singular values, or the `active` ones.
        init: `svd` of the weight that is there, or `random` unit vectors with equal singular values (an ablation).
        dense_cache: keep the dense matrix too where no gradients are needed, which makes evaluation faster.
        final_rank: directions that are kept at the end, as a low-rank layer where that is smaller; 0 for dense layers.
    """

    r: int = 64
    steps_per_iteration: int = 200
    iterations_per_round: int | None = None
    warmup_per_iteration: int = 20
    sampling: Literal["mixed", "sigma", "uniform", "sequential", "topk"] = "mixed"
    enhanced_grad: bool = True
    train_sigma: Literal["all", "active"] = "all"
    init: Literal["svd", "random"] = "svd"
    dense_cache: bool = False
    final_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r", self.r, 1)
        whole("steps_per_iteration", self.steps_per_iteration, 1)
        if self.iterations_per_round is not None:
            whole("iterations_per_round", self.iterations_per_round, 1)
        whole("warmup_per_iteration", self.warmup_per_iteration, 0)
        one_of("sampling", self.sampling, SAMPLING)
        one_of("train_sigma", self.train_sigma, ("all", "active"))
        one_of("init", self.init, ("svd", "random"))
        whole("final_rank", self.final_rank, 0)

    def convert(self, model: nn.Module) -> list[str]:
        names, _ = linear_targets(model, self.target_modules)
        smaller = {name: min(dense_weight(model.get_submodule(name)).shape) for name in names}
        if smaller and self.r > max(smaller.values()):
            raise ValueError(f"r is {self.r}; it must be at most {max(smaller.values())}, the most singular values that a layer has")
        if clipped := [name for name, size in smaller.items() if size < self.r]:
            least = min(smaller[name] for name in clipped)
            warnings.warn(f"r is {self.r}; {', '.join(clipped)} have fewer singular values (down to {least}) and train all of them", stacklevel=2)
        return super().convert(model)

    def spec(self, name: str, module: nn.Module) -> Spec:
        rows, columns = dense_weight(module).shape
        made: Spec = {"kind": "sst.spectral", "in": columns, "out": rows, "rank": min(self.r, rows, columns), "bias": module.bias is not None}
        made |= {"enhanced_grad": self.enhanced_grad, "active_only": self.train_sigma == "active", "dense_cache": self.dense_cache}
        return made | ({"transposed": True} if isinstance(module, Conv1D) else {})

    def fill(self, new: SpectralLinear, old: nn.Module, generator: torch.Generator) -> None:
        weight = dense_weight(old)
        if self.init == "svd":
            new.decompose(weight)
        else:
            drawn = [torch.randn(size, len(new.sigma), generator=generator).to(new.sigma) for size in weight.shape]
            new.set_vectors(*(vectors / vectors.norm(dim=0) for vectors in drawn))
            new.sigma.fill_(float(weight.double().norm()) / math.sqrt(len(new.sigma)))
        if new.bias is not None:
            new.bias.copy_(old.bias)  # type: ignore[arg-type]

    def lr_scale(self, step: int, base: LearningRate) -> float:
        inside = step % self.steps_per_iteration
        return base(step) * (min(1.0, (inside + 1) / self.warmup_per_iteration) if self.warmup_per_iteration else 1.0)

    def round_steps(self, model: nn.Module) -> int:
        """Optimizer steps of a round."""
        iterations = self.iterations_per_round
        if iterations is None:
            iterations = math.ceil(max(len(layer.sigma) for _, layer in converted(model, SpectralLinear)) / self.r)
        return iterations * self.steps_per_iteration

    def begin_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """At the start of an iteration, draw anew and forget the moments."""
        iteration, inside = divmod(step, self.steps_per_iteration)
        if inside:
            return
        for place, (_, layer) in enumerate(converted(model, SpectralLinear)):
            layer.activate(draw(layer.sigma, layer.rank, self.sampling, iteration, hash((self.seed, place, iteration))))
            layer.begin_anew(optimizer)

    def end_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Bring singular values and vectors back to where they belong, and at the end of a round decompose anew."""
        inner = getattr(optimizer, "optimizer", optimizer)
        layers = [layer for _, layer in converted(model, SpectralLinear)]
        for layer in layers:
            layer.constrain(inner)
        if layers and step % self.round_steps(model) == 0:
            for layer in layers:
                layer.refresh()
                layer.begin_anew(optimizer)

    def finish(self, model: nn.Module) -> None:
        """Dense layers, or low-rank ones of ``final_rank`` where these are smaller."""
        if self.final_rank:
            truncate(model, self.final_rank)
        else:
            merge(model)


@torch.no_grad()
def truncate(model: nn.Module, rank: int | None = None, energy: float | None = None) -> dict[str, int]:
    """Keep the leading directions of every SST layer, as a low-rank layer where that is smaller than the dense one; the rank of each.

    A layer whose rank is not below ``out in / (out + in)`` becomes dense, with all its directions, and is left out of the result.

    Args:
        model: with SST layers.
        rank: directions to keep; or
        energy: share of the squared singular values to keep at least, in (0, 1].

    Raises:
        ValueError: if not exactly one of both is given, or it is out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank is {rank} and energy is {energy}; give exactly one of them")
    if rank is not None:
        whole("rank", rank, 1)
    if energy is not None:
        number("energy", energy, 0, 1, open_low=True)
    layers, specs = dict(converted(model, SpectralLinear)), {}
    for name, layer in layers.items():
        weight = layer._product()
        kept = rank
        if energy is not None:
            squares = torch.linalg.svdvals(weight.double()).square().cumsum(0)
            kept = min(len(squares), int((squares < energy * squares[-1] * (1 - 1e-12)).sum()) + 1)
        assert kept is not None
        if kept * (layer.in_features + layer.out_features) >= layer.in_features * layer.out_features:
            put(model, name, layer.merge())
            continue
        spec = {"kind": "lowrank", "in": layer.in_features, "out": layer.out_features, "rank": kept, "bias": layer.bias is not None}
        specs[name] = spec | ({"transposed": True} if layer.transposed else {})
        new = build(specs[name], layer)
        assert isinstance(new, LowRankLinear)
        factors = svd(weight, kept, balance="sqrt")
        new.fill(factors.up, factors.down, layer.bias)
        put(model, name, new)
    if isinstance(model, PreTrainedModel):
        renote(model, {name: specs.get(name) for name in layers})
    return {name: spec["rank"] for name, spec in specs.items()}

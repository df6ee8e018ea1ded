"""Greenformers: every linear layer and convolution of a model as two factors of one relative rank, before or after training.

Source: "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation", arXiv 2108.10808.
Differs from its code: layers are named by ``target_modules`` and ``exclude_modules`` and a layer is not passed over because it hangs directly on the
model; the SVD is exact up to a smaller side of 4096, and seeded beyond; each group of a grouped convolution is factored for itself; random factors keep
the bias; an unknown solver is an error for every layer. Its `nmf` needs weights without negative entries and is left out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from echelon import linalg
from echelon.compress.base import Job
from echelon.compress.linear import Layer, LinearCompressor, left_out, lowrank_spec
from echelon.compress.report import Report
from echelon.linalg.lowrank import Factors
from echelon.linalg.ranks import break_even
from echelon.models.modules import Spec, build, kind, like
from echelon.models.targets import Targets, linear_targets
from echelon.registry import method


@method(
    kind="compressor", name="greenformers", arxiv="2108.10808", year=2021,
    title="Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
    summary="Factor every layer at one share of its break-even rank, by SVD, semi-NMF or at random.",
    published="over 30 % less compute, cost and emissions in developing BERT-base (abstract)",
)  # fmt: skip
@dataclass(frozen=True)
class Greenformers(LinearCompressor):
    """Replace ``W (out, in)`` by two factors of rank ``int(rank * floor(in out / (in + out)))``, and a convolution by a thin one and one of width 1.

    A layer whose rank would be 0, or reach the break-even, stays as it is. For a convolution the break-even counts channels (of a group) and not the
    kernel, which leaves it more of its parameters than `rank` says. Optimizers must be built anew: all factors are new parameters.

    Without `balance` the scale of the weight lies in the first factor (for `snmf` it lies where the updates left it), which fine-tuning at one
    learning rate does not like. Weight decay on two factors shrinks the singular values of their product. A network with batch norm wants its running
    statistics measured again.

    Attributes:
        rank: the rank itself if a whole number, or a share in (0, 1) of the rank at which nothing would be saved.
        solver: `svd`, the best factors; `snmf`, the second one non-negative; `random`, new ones to train from scratch.
        num_iter: updates of `snmf`, or power iterations of `svd` above a smaller side of 4096.
        target_modules: layers to take: `linear` for all but the head, `all` for convolutions too, `all-linear` for those inside the blocks, `attention`,
            `mlp`, a regular expression, or a list of name ends. A layer whose weight is tied to another's is never taken.
        exclude_modules: layers to leave among them: a regular expression or a list of name ends.
        balance: give both factors the same scale; for `svd` and `snmf`.
        on_skip: `warn` of layers that stay dense because their rank saves nothing, raise an `error`, or `ignore` them; all are in the report.
    """

    budget_knob: ClassVar[str] = "rank"
    budget_range: ClassVar[tuple[float, float]] = (0.02, 1 - 1e-4)  # below it small layers get rank 0 and are dense again

    rank: int | float = 0.5
    solver: Literal["svd", "snmf", "random"] = "svd"
    num_iter: int = 10
    target_modules: Targets = "linear"
    exclude_modules: Targets = None
    balance: bool = False
    on_skip: Literal["warn", "error", "ignore"] = "warn"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        legal = self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank < 1
        if isinstance(self.rank, bool) or not legal:
            raise ValueError(f"rank is {self.rank!r}; it must be a whole number of at least 1, or a fraction in (0, 1) of the break-even rank")
        if self.num_iter < 0:
            raise ValueError(f"num_iter is {self.num_iter!r}; it must be at least 0")
        for name, choices in (("solver", ("svd", "snmf", "random")), ("on_skip", ("warn", "error", "ignore"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    @property
    def strict(self) -> bool:  # type: ignore[override]
        return self.on_skip == "error"

    def layers(self, job: Job) -> dict[str, Layer]:
        names, skipped = linear_targets(job.model, self.target_modules, convolutions=True)
        for name, reason in skipped.items():
            job.refuse(name, reason)
        found = {name: Layer(name, job.model.get_submodule(name), seed=job.seed + place) for place, name in enumerate(names)}
        return left_out(job, found, self.exclude_modules, "exclude_modules") if self.exclude_modules is not None else found

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        made: dict[str, Spec] = {}
        for name, layer in state.items():
            rows, columns = channels(layer.module) if is_convolution(layer.module) else layer.shape
            limit = break_even(rows, columns)
            rank = self.rank if isinstance(self.rank, int) else int(limit * self.rank)
            if not 0 < rank < limit:
                why = f"rank {rank} of {rows} x {columns} saves nothing" if rank else f"{self.rank} of its break-even rank is less than 1"
                job.refuse(name, f"{why} (it breaks even at {limit})")
            elif is_convolution(layer.module):
                made[name] = {"kind": "greenformers.convolution", "rank": rank}
            else:
                made[name] = lowrank_spec(layer, rank, layer.bias is not None)
        if self.on_skip == "ignore":
            job.refused.clear()
        return made

    def replace(self, layer: Layer, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
        old, rank = layer.module, spec["rank"]
        generator = torch.Generator().manual_seed(layer.seed)
        if is_convolution(old):
            groups = [self.solve(part, rank, generator) for part in layer.weight.flatten(1).chunk(old.groups)]  # type: ignore[arg-type]
        else:
            groups = [self.solve(layer.weight, rank, generator)]
        module: Any = build(spec, old)
        module.fill(torch.cat([factors.up for factors in groups]), torch.cat([factors.down for factors in groups]), layer.bias)
        lost = sum(factors.report["tail"] for factors in groups)
        share = lost / max(float(layer.weight.double().square().sum()), 1e-300)
        return module, {"rank": rank, "lost": lost, "tail_energy": share, "rel_err": share**0.5}

    def solve(self, weight: Float[Tensor, "out in"], rank: int, generator: torch.Generator) -> Factors:
        """Factors of one matrix, in float64; the generator is drawn from by what is random."""
        if self.solver == "random":
            # What nn.Linear does for a new layer, for either factor.
            up, down = (
                (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / shape[1] ** 0.5
                for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
            )  # fmt: skip
            return Factors(up, down, None, {"tail": float((weight.double() - up.to(weight.device) @ down.to(weight.device)).square().sum())})
        seed = int(torch.randint(2**31, (), generator=generator))
        if self.solver == "snmf":
            factors = linalg.snmf(weight, rank, num_iter=self.num_iter, seed=seed, dtype=torch.float64)
        else:
            factors = linalg.svd(weight, rank, niter=self.num_iter, seed=seed, dtype=torch.float64)
        return linalg.balance(factors, "sqrt" if self.balance else "none")


def auto_fact(module: nn.Module, *, seed: int = 0, **knobs: Any) -> nn.Module:
    """Factor the layers of any module in place and return it; ``knobs`` are those of :class:`Greenformers`.

    For a transformers model :meth:`Greenformers.compress` does the same and notes it in the configuration, so that ``from_pretrained`` can read the
    result; here the state dict fits only a module that was factored alike.

    Raises:
        ValueError: if a knob is out of range, no layer is meant, or one is skipped under ``on_skip="error"``.
    """
    made = Greenformers(**knobs)
    job = Job(module, None, None, Report(), seed)  # type: ignore[arg-type]
    state = made.prepare(job)
    _, specs = made.settle(job, state)
    made.apply(job, state, specs)
    return module


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def channels(module: Any) -> tuple[int, int]:
    """Output and input channels of one group."""
    return module.out_channels // module.groups, module.in_channels // module.groups


@kind("greenformers.convolution")
def _convolution(spec: Spec, old: Any) -> nn.Module:
    return LowRankConvolution(old, spec["rank"], **like(old))


class LowRankConvolution(nn.Module):
    """A convolution into ``rank`` channels a group, then one of width 1 into the outputs: the encoder and decoder of Greenformers' CED.

    ``weight`` is an empty buffer, as in :class:`echelon.models.modules.LowRankLinear`.

    Args:
        old: the convolution whose sizes, stride, padding, dilation and groups it has.
        rank: channels between the factors, for each group.
        factory: dtype and device.
    """

    def __init__(self, old: nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int, **factory: Any):
        super().__init__()
        cls = next(cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(old, cls))
        self.in_channels, self.out_channels, self.rank = old.in_channels, old.out_channels, rank
        middle, ones = rank * old.groups, (1,) * len(old.kernel_size)
        self.down = nn.utils.skip_init(
            cls, old.in_channels, middle, old.kernel_size, old.stride, old.padding, old.dilation, old.groups, False, old.padding_mode, **factory
        )  # fmt: skip
        self.up = nn.utils.skip_init(cls, middle, old.out_channels, ones, groups=old.groups, bias=old.bias is not None, **factory)
        self.register_buffer("weight", torch.empty(0, **factory))

    @property
    def bias(self) -> nn.Parameter | None:
        return self.up.bias  # type: ignore[return-value]

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.up(self.down(x))

    @torch.no_grad()
    def fill(self, up: Float[Tensor, "out rank"], down: Float[Tensor, "middle kernel"], bias: Float[Tensor, " out"] | None) -> None:
        """Set the values; rows of ``down`` are the flattened kernels, group after group."""
        self.up.weight.copy_(up.view_as(self.up.weight))  # type: ignore[operator]
        self.down.weight.copy_(down.view_as(self.down.weight))  # type: ignore[operator]
        if bias is not None:
            self.up.bias.copy_(bias)  # type: ignore[operator, union-attr]

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The one convolution of the same function and the original size."""
        down: Any = self.down
        made: Any = nn.utils.skip_init(
            type(down), self.in_channels, self.out_channels, down.kernel_size, down.stride, down.padding, down.dilation, down.groups,
            self.bias is not None, down.padding_mode, **like(self),
        )  # fmt: skip
        ups, downs = self.up.weight.flatten(1).chunk(down.groups), down.weight.flatten(1).chunk(down.groups)  # type: ignore[operator]
        product = torch.cat([up.double() @ down.double() for up, down in zip(ups, downs, strict=True)])
        made.weight.copy_(product.view_as(made.weight))
        if self.bias is not None:
            made.bias.copy_(self.bias)
        return made

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"

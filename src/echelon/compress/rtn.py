"""Quantised linear layers: weights of 2 to 8 bits, rounded to the nearest level or so that the outputs suffer least, and activations too if wished.

Source: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation", arXiv 2303.08302; GPTQ is that of
arXiv 2210.17323.
Differs from it: ZQ-Local optimises the layer's output error through the second moment of its inputs, which is the same objective without passes over data;
it and GPTQ see weights alone, so activations are rounded afterwards. ZQ-Global (a whole block as the unit) is not here. What LoRC adds is a compensator of its
own, :mod:`echelon.compress.lorc`, for whatever was compressed.
The number of parameters stays; what shrinks is their bytes: bits + 16 (symmetric), 24 (whole zero point) or 32 (minimum) / group_size for a weight.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.calibrate.statistics import observe_whole
from echelon.compress.base import Job
from echelon.compress.linear import Layer, LinearCompressor, left_out
from echelon.linalg.quantize import Quantized
from echelon.linalg.rounding import Grid, gptq, learned_rounding
from echelon.models.modules import Spec, build
from echelon.models.targets import Targets
from echelon.registry import method

_HALF = torch.finfo(torch.float16)


@method(
    kind="compressor", name="rtn", title="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
    arxiv="2303.08302", year=2023, summary="Quantise weights to 2-8 bits (round to nearest, GPTQ or ZQ-Local), and activations.",
    needs="calibration text unless weights are rounded to nearest and activation ranges are dynamic",
)  # fmt: skip
@dataclass(frozen=True)
class RTN(LinearCompressor):
    """Store each weight as a code of few bits; groups of neighbours in a row (one output channel) share a step.

    Attributes:
        w_bits: bits of a weight, 2 to 8; 16 leaves weights as they are.
        a_bits: bits to which each layer's input is rounded when it runs, 2 to 8; 16 leaves it as it is.
        w_sym: lay the levels of weights about zero; else from the minimum of a group to its maximum.
        a_sym: the same for activations.
        group_size: neighbours in a row that share a step; -1 the whole row, 0 the whole matrix.
        a_granularity: `token`, each token by its own range; `block`, each `group_size` of a token; `tensor`, one range for all, from calibration text.
        zero_point: with asymmetric weights `float` keeps a group's minimum, `int` a whole code for zero, which stays exact.
        convention: `standard`, or `deepspeed` to clip the largest value of a group as DeepSpeed's training quantisers do.
        pad_groups: let the last group of a row be short; else `group_size` must divide the row.
        scale_bits: bits of steps and minima, 16 or 32; a layer whose steps 16 bits cannot hold takes 32.
        method: `rtn` rounds to nearest; `gptq` lets later columns make up for errors; `zq_local` learns the rounding.
        damp: with `gptq`, share of the mean diagonal that is added to it, above 0.
        steps: with `zq_local`, steps of its optimisation.
        target_modules: layers to take: `all-linear` inside the blocks, `attention`, `mlp`, a regular expression, or a list of name ends.
        skip_modules: layers to leave among them: a regular expression or a list of name ends.
        sequential: with `gptq` and `zq_local`, take each block's statistics behind the blocks already quantised.
        nsamples: rows of calibration text.
        seqlen: tokens a row.
        strict: raise where a layer that was named cannot be taken.
    """

    budget_knob: ClassVar[str] = "w_bits"
    budget_range: ClassVar[tuple[float, float]] = (2, 8)
    shrinks: ClassVar[tuple[str, ...]] = ("bytes",)

    w_bits: int = 4
    a_bits: int = 16
    w_sym: bool = False
    a_sym: bool = True
    group_size: int = 128
    a_granularity: Literal["token", "block", "tensor"] = "token"
    zero_point: Literal["float", "int"] = "float"
    convention: Literal["standard", "deepspeed"] = "standard"
    pad_groups: bool = False
    scale_bits: int = 16
    method: Literal["rtn", "gptq", "zq_local"] = "rtn"
    damp: float = 0.01
    steps: int = 100
    target_modules: Targets = None
    skip_modules: Targets = None
    sequential: bool = True
    nsamples: int = 128
    seqlen: int = 2048
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name in ("w_bits", "a_bits"):
            value = getattr(self, name)
            if value != 16 and not 2 <= value <= 8:
                raise ValueError(f"{name} is {value!r}; it must be in 2..8, or 16 for no rounding")
        if self.w_bits == self.a_bits == 16:
            raise ValueError("w_bits and a_bits are both 16; one of them must be in 2..8")
        if self.group_size < 8 and self.group_size not in (-1, 0):
            raise ValueError(f"group_size is {self.group_size!r}; it must be -1 (a row), 0 (the matrix) or at least 8")
        legal = {"a_granularity": ("token", "block", "tensor"), "zero_point": ("float", "int"), "convention": ("standard", "deepspeed")}
        for name, words in {**legal, "method": ("rtn", "gptq", "zq_local"), "scale_bits": (16, 32)}.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, words))}")
        if self.a_granularity == "block" and self.group_size < 8:
            raise ValueError(f"group_size is {self.group_size}; it must be at least 8 with a_granularity block")
        if self.convention == "deepspeed" and self.zero_point == "int":
            raise ValueError("zero_point is 'int'; it must be 'float' with convention deepspeed, which has its own zero")
        if not self.damp > 0:
            raise ValueError(f"damp is {self.damp!r}; it must be above 0")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps!r}; it must be at least 0")

    @property
    def uses_moments(self) -> bool:
        return self.method != "rtn" and self.w_bits < 16

    @property
    def static(self) -> bool:
        """Whether the range of activations is fixed beforehand."""
        return self.a_bits < 16 and self.a_granularity == "tensor"

    @property
    def needs_data(self) -> bool:
        return self.uses_moments or self.static

    def layers(self, job: Job) -> dict[str, Layer]:
        return left_out(job, super().layers(job), self.skip_modules)

    def prepare(self, job: Job) -> dict[str, Layer]:
        layers = super().prepare(job)
        if self.static:
            if job.calibration is None:
                raise ValueError("a_granularity='tensor' measures the range of activations and needs calibration data, not statistics alone")
            seen = observe_whole(job.model, {name: layer.module for name, layer in layers.items()}, job.calibration, Range)
            for name, layer in layers.items():
                layer.limits = seen.moments[seen.leader[name]].limits(name)
        return layers

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        """Every layer quantised, whatever its size."""
        return {name: self._spec(layer) for name, layer in state.items()}

    def replace(self, layer: Layer, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
        module: Any = build(spec, layer.module)
        if spec["bits"] == 16:
            module.fill(layer.weight, layer.bias, layer.limits)
            return module, {"bits": 16, "rel_err": 0.0}
        found = self._rounded(layer, self._grid(spec["scale_bits"]))
        module.fill(found, layer.bias, layer.limits)
        weight = layer.weight.double()
        error = weight - found.dequantize(torch.float64)
        told = {"bits": spec["bits"], "lost": float(error.square().sum()), "rel_err": float(error.norm() / weight.norm()) if bool(weight.any()) else 0.0}
        if layer.moments is not None:
            seen = layer.moments.second_moment.to(error.device)
            told["output_error"] = float(((error @ seen) * error).sum())
        return module, told

    def _grid(self, scale_bits: int) -> Grid:
        kept_in = torch.float16 if scale_bits == 16 else torch.float32
        return Grid(self.w_bits, self.w_sym, self.group_size, self.zero_point, self.convention, self.pad_groups, kept_in)

    def _rounded(self, layer: Layer, grid: Grid) -> Quantized:
        weight, name = layer.weight.float(), layer.name
        if self.method == "rtn":
            return grid.fit(weight, name)
        assert layer.moments is not None
        if self.method == "gptq":
            return gptq(weight, layer.moments.second_moment, grid, damp=self.damp, name=name)
        return learned_rounding(weight, layer.moments.second_moment, grid, steps=self.steps, name=name)

    def _spec(self, layer: Layer) -> Spec:
        rows, columns = layer.shape
        if self.group_size > 0 and columns % self.group_size and not self.pad_groups:
            raise ValueError(f"group_size is {self.group_size}; it must divide {columns}, the row length of {layer.name}, or pad_groups be set")
        levels = "symmetric" if self.w_sym else "minimum" if self.zero_point == "float" else "zero"
        made: Spec = {"kind": "packed.quantized", "in": columns, "out": rows, "bias": layer.bias is not None}
        made |= {"bits": self.w_bits, "group_size": self.group_size, "levels": levels, "scale_bits": self._scale_bits(layer.weight)}
        made |= {"a_bits": self.a_bits, "a_sym": self.a_sym, "a_granularity": self.a_granularity, "a_group": max(self.group_size, 1)}
        return made | ({"transposed": True} if isinstance(layer.module, Conv1D) else {})

    def _scale_bits(self, weight: Tensor) -> int:
        """32 where half precision would lose steps, or minima of a size that matters."""
        if self.scale_bits == 32 or self.w_bits == 16:
            return self.scale_bits
        steps = self._grid(32).fit(weight.float()).scale
        # GPTQ and ZQ-Local move weights: leave a factor of 8.
        fits = float(steps.min()) > 8 * _HALF.tiny and float(steps.max()) * 2**self.w_bits < _HALF.max / 8 and float(weight.abs().max()) < _HALF.max / 8
        return 16 if fits else 32


class Range:
    """Smallest and largest number seen."""

    def __init__(self, size: int, device: torch.device | str):
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        seen = x if mask is None else x[mask]
        if not seen.isfinite().all():
            raise ValueError("activations hold NaN or infinity")
        if seen.numel():
            self.low, self.high = min(self.low, float(seen.min())), max(self.high, float(seen.max()))

    def limits(self, name: str) -> tuple[float, float]:
        """Raises: ValueError: if there was no token, or all numbers were the same."""
        if not self.low < self.high:
            raise ValueError(f"the inputs of {name} have no range: every token was a pad, or all numbers were the same")
        return self.low, self.high



"""Magnitude pruning: the smallest weights go, anywhere or two of every four, and are no longer stored.

Sources: "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626; the 2:4 pattern: "Accelerating Sparse Deep Neural
Networks", arXiv 2104.08378.
Differs from them: weights are pruned once and not trained again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.compress.base import Job
from echelon.compress.linear import Layer, LinearCompressor, left_out
from echelon.models.modules import Spec, build
from echelon.models.targets import Targets
from echelon.registry import method


@method(
    kind="compressor", name="pruning", title="Learning both Weights and Connections for Efficient Neural Networks", arxiv="1506.02626", year=2015,
    summary="Drop the smallest weights, anywhere or in a 2:4 pattern, and store only the rest.",
)  # fmt: skip
@dataclass(frozen=True)
class Pruning(LinearCompressor):
    """Keep the largest weights by magnitude; the others are zero and take one bit.

    Attributes:
        sparsity: share of the weights of the targeted layers to drop, in (0, 1); a `2:4` pattern always drops half.
        pattern: `unstructured`, or `2:4`, two of every four neighbours in a row, which sparse tensor cores can run.
        scope: compare weights within a `row` (an output), a `layer`, or the whole `model`; for `unstructured`.
        target_modules: layers to take: `all-linear` inside the blocks, `attention`, `mlp`, a regular expression, or a list of name ends.
        skip_modules: layers to leave among them: a regular expression or a list of name ends.
        strict: raise where a layer would be left dense because nothing is saved or the pattern does not fit.
    """

    budget_knob: ClassVar[str] = "sparsity"

    sparsity: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    scope: Literal["row", "layer", "model"] = "layer"
    target_modules: Targets = None
    skip_modules: Targets = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity!r}; it must be in (0, 1)")
        if self.pattern not in ("unstructured", "2:4"):
            raise ValueError(f"pattern is {self.pattern!r}; it must be unstructured or 2:4")
        if self.scope not in ("row", "layer", "model"):
            raise ValueError(f"scope is {self.scope!r}; it must be row, layer or model")

    def layers(self, job: Job) -> dict[str, Layer]:
        return left_out(job, super().layers(job), self.skip_modules)

    def prepare(self, job: Job) -> dict[str, Layer]:
        layers = super().prepare(job)
        if self.scope == "model":
            for layer in layers.values():  # magnitudes, descending: sizes for any threshold are then cheap to find
                layer.spectrum = layer.weight.abs().flatten().float().sort(descending=True).values
        return layers

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        """How many weights each layer keeps; one that would not get smaller stays dense."""
        made: dict[str, Spec] = {}
        for name, kept in self._kept(state).items():
            layer = state[name]
            (rows, columns), size = layer.shape, layer.weight.element_size()
            if self.pattern == "2:4" and columns % 4:
                job.refuse(name, f"its rows of {columns} are not made of fours")
            elif kept * size + rows * -(-columns // 8) >= rows * columns * size:
                job.refuse(name, f"keeping {kept} of {rows} x {columns} weights saves nothing")
            else:
                made[name] = {"kind": "packed.pruned", "in": columns, "out": rows, "bias": layer.bias is not None, "kept": kept}
                made[name] |= {"transposed": True} if isinstance(layer.module, Conv1D) else {}
        return made

    def replace(self, layer: Layer, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
        module: Any = build(spec, layer.module)
        keep = self._largest(layer.weight, spec["kept"])
        module.fill(layer.weight, keep, layer.bias)
        total, lost = float(layer.weight.double().square().sum()), float(layer.weight.double()[~keep].square().sum())
        return module, {"kept": spec["kept"], "sparsity": 1 - spec["kept"] / keep.numel(), "lost": lost, "rel_err": (lost / total) ** 0.5 if total else 0.0}

    def _kept(self, layers: dict[str, Layer]) -> dict[str, int]:
        sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        if self.pattern == "2:4":
            return {name: size // 2 for name, size in sizes.items()}
        if self.scope == "row":
            return {name: layer.shape[0] * max(1, round((1 - self.sparsity) * layer.shape[1])) for name, layer in layers.items()}
        if self.scope == "layer":
            return {name: max(1, round((1 - self.sparsity) * size)) for name, size in sizes.items()}
        spectra = {name: layer.spectrum for name, layer in layers.items() if layer.spectrum is not None}
        together = torch.cat([values.cpu() for values in spectra.values()])
        least = together.kthvalue(min(len(together), round(self.sparsity * len(together)) + 1)).values
        return {name: max(1, int((values.cpu() >= least).sum())) for name, values in spectra.items()}

    def _largest(self, weight: Tensor, kept: int) -> Bool[Tensor, "out in"]:
        """Which weights stay: the largest, and of equal ones the first."""
        magnitude = weight.detach().abs()
        if self.pattern == "2:4":
            groups, count = magnitude.reshape(len(weight), -1, 4), 2
        elif self.scope == "row":
            groups, count = magnitude, kept // len(weight)
        else:
            groups, count = magnitude.flatten(), kept
        places = groups.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places, True).reshape(weight.shape)

"""Compressors that treat a model one linear layer at a time; they need to know nothing of its architecture."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon import registry
from echelon.calibrate import LayerWalker, Moments, collect
from echelon.compress.base import Compressor, Job
from echelon.linalg.lowrank import Factors
from echelon.linalg.ranks import break_even
from echelon.models.modules import Spec, build, dense_weight, put
from echelon.models.targets import Targets, in_attention, linear_targets, matches


@dataclass
class Layer:
    """A linear layer that may be replaced.

    Attributes:
        name: its name in the model.
        module: an ``nn.Linear`` or a ``Conv1D``.
        moments: of its inputs; None where the method asks for none.
        spectrum: what the method's ``spectrum`` made of it; None where it asks for none.
        seed: of what a method draws for this layer alone.
        limits: smallest and largest input; None where the method asks for none.
    """

    name: str
    module: nn.Module
    moments: Moments | None = None
    spectrum: Float[Tensor, " k"] | None = None
    seed: int = 0
    limits: tuple[float, float] | None = None

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix, ``(out, in)`` also for a ``Conv1D``."""
        return dense_weight(self.module).detach()

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        bias: Any = self.module.bias
        return None if bias is None else bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return tuple(self.weight.shape)  # type: ignore[return-value]


class LinearCompressor(Compressor):
    """Base of methods that replace linear layers one by one.

    :meth:`specs` says what each becomes, :meth:`replace` makes it. Where that is two factors of a planned rank, :class:`LowRankCompressor` has both.

    Attributes:
        target_modules: which layers; see :func:`linear_targets`.
        sequential: take each block's statistics behind the blocks already compressed, where the method uses statistics.
    """

    target_modules: Targets = None
    sequential: bool = False

    @property
    def uses_moments(self) -> bool:
        """Whether the method wants the moments of the layer's inputs."""
        return False

    @property
    def uses_spectrum(self) -> bool:
        """Whether :meth:`specs` wants spectra."""
        return False

    @property
    def needs_data(self) -> bool:
        return self.uses_moments

    def spectrum(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None) -> Float[Tensor, " k"]:
        """Singular values (or what stands for them), descending, from which ranks are planned."""
        return torch.linalg.svdvals(weight.double())

    def layers(self, job: Job) -> dict[str, Layer]:
        """The layers that may be replaced."""
        names, skipped = linear_targets(job.model, self.target_modules)
        for name, reason in skipped.items():
            job.refuse(name, reason)
        return {name: Layer(name, job.model.get_submodule(name), seed=job.seed + place) for place, name in enumerate(names)}

    def prepare(self, job: Job) -> dict[str, Layer]:
        layers = self.layers(job)
        for layer in layers.values():
            if not layer.weight.isfinite().all():
                raise ValueError(f"the weight of {layer.name} holds NaN or infinity")
        if self.uses_moments and (self.uses_spectrum or not self.sequential):
            self._observe(job, layers)
        if self.uses_moments and self.sequential and job.calibration is None:
            raise ValueError("sequential=True runs the model again and again and needs calibration data, not statistics alone")
        if self.uses_spectrum:
            for done, layer in enumerate(layers.values(), 1):
                layer.spectrum = self.spectrum(layer.weight, layer.bias, layer.moments)
                job.progress("spectra", done, len(layers))
        return layers

    def apply(self, job: Job, state: dict[str, Layer], specs: Mapping[str, Spec]) -> None:
        done = 0

        def convert(names: Sequence[str]) -> None:
            nonlocal done
            for name in names:
                # The dense weight and, once its last reader is done, the moments may go.
                self.convert(job, state.pop(name), specs[name])
                done += 1
                job.progress("layers", done, len(specs))

        if not (self.sequential and self.uses_moments):
            convert(list(specs))
            return
        assert job.calibration is not None
        left = set(specs)
        for block in LayerWalker(job.model, job.calibration, sequential=True):
            inside = [name for name in specs if name.startswith(block.name + ".")]
            if inside:
                observer = block.observe(inside)
                for name in inside:
                    state[name].moments = observer.moments[observer.leader[name]]
                convert(inside)
                left -= set(inside)
        outside = [name for name in specs if name in left]
        if outside:
            found = collect(job.model, outside, job.calibration)
            for name in outside:
                state[name].moments = found[name]
            convert(outside)

    def convert(self, job: Job, layer: Layer, spec: Spec) -> None:
        """Put what takes a layer's place into the model, and what is known of it into the report."""
        module, job.report.modules[layer.name] = self.replace(layer, spec)
        put(job.model, layer.name, module, places(job.model, layer.module))

    @abstractmethod
    def replace(self, layer: Layer, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
        """The module that takes a layer's place, with its values, and what the report says of it."""

    def _observe(self, job: Job, layers: Mapping[str, Layer]) -> None:
        found = job.statistics
        if found is None:
            assert job.calibration is not None
            found = collect(job.model, list(layers), job.calibration, lambda done, of: job.progress("statistics", done, of))
        for layer in layers.values():
            layer.moments = found[layer.name]
            if len(layer.moments.mean) != layer.shape[1]:
                raise ValueError(f"the statistics of {layer.name} are {len(layer.moments.mean)} wide, its input is {layer.shape[1]}; they are of another model")
        few = {layer.moments.n for layer in layers.values() if layer.moments is not None and layer.moments.n < layer.shape[1]}
        if few:
            warn_of_few_tokens(self, min(few), max(layer.shape[1] for layer in layers.values()))


class LowRankCompressor(LinearCompressor):
    """Base of methods that put two factors in a layer's place: :meth:`plan` chooses ranks, :meth:`factor` the factors.

    :meth:`spectrum` says what ranks are planned from, where they depend on spectra.
    """

    @property
    def adds_bias(self) -> bool:
        """Whether a layer without a bias gets one."""
        return False

    @property
    def may_grow(self) -> bool:
        """Whether a layer is factored even where this takes more parameters than it has."""
        return False

    @abstractmethod
    def plan(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        """The rank of each layer; one that is not named stays dense."""

    @abstractmethod
    def factor(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: Moments | None, rank: int
    ) -> Factors:
        """The factors of one layer."""

    def specs(self, job: Job, state: dict[str, Layer]) -> dict[str, Spec]:
        """Factors of the planned ranks; layers for which that saves nothing stay as they are."""
        made: dict[str, Spec] = {}
        ranks = self.plan(state)
        for name, layer in state.items():
            if name not in ranks:
                job.report.skip(name, "the rank rule leaves it dense")
                continue
            rank = ranks[name]
            (rows, columns), bias = layer.shape, layer.bias is not None or self.adds_bias
            dense = rows * columns + rows * (layer.bias is not None)
            if rank < 1:
                raise ValueError(f"{self.method_name}: the rank of {name} would be {rank}; it must be at least 1")
            if not self.may_grow and rank * (rows + columns) + rows * bias >= dense:
                job.refuse(name, f"rank {rank} of {rows} x {columns} saves nothing (it breaks even at {break_even(rows, columns)})")
                continue
            if rank > min(rows, columns):
                raise ValueError(f"{self.method_name}: rank {rank} of {name} is above min({rows}, {columns})")
            made[name] = lowrank_spec(layer, rank, bias)
        return made

    def replace(self, layer: Layer, spec: Spec) -> tuple[nn.Module, dict[str, Any]]:
        """The module that takes a layer's place, with its values, and what the report says of it."""
        factors = self.factor(layer.weight, layer.bias, layer.moments, spec["rank"])
        module: Any = build(spec, layer.module)
        bias = layer.bias
        if factors.bias_delta is not None:
            bias = factors.bias_delta if bias is None else bias.double() + factors.bias_delta
        module.fill(factors.up, factors.down, torch.zeros(layer.shape[0]) if bias is None and spec["bias"] else bias)
        lost, error = factors.report["tail"], factors.report["rel_err"]
        return module, {"rank": spec["rank"], "lost": lost, "tail_energy": error**2, "rel_err": error}


def warn_of_few_tokens(compressor: Compressor, tokens: int, width: int) -> None:
    told = f"{compressor.method_name} saw {tokens} tokens, fewer than the {width} inputs of a layer: directions that they do not show are lost; give more text"
    if compressor.strict:
        raise ValueError(told)
    warnings.warn(told, stacklevel=2)


def lowrank_spec(layer: Layer, rank: int, bias: bool) -> Spec:
    """The spec of a ``LowRankLinear`` in a layer's place."""
    rows, columns = layer.shape
    made: Spec = {"kind": "lowrank", "in": columns, "out": rows, "rank": rank, "bias": bias}
    return made | ({"transposed": True} if isinstance(layer.module, Conv1D) else {})


def left_out(job: Job, layers: dict[str, Layer], skip_modules: Targets, knob: str = "skip_modules") -> dict[str, Layer]:
    """The layers without those that ``skip_modules`` (a knob of any name) names (a regular expression for whole names, or a list of names or their ends).

    Raises:
        ValueError: if a name is none of a layer, or none is left.
    """
    kept = dict(layers)
    for pattern in [skip_modules] if isinstance(skip_modules, str) else skip_modules or ():
        matched = [name for name in layers if matches(name, pattern, isinstance(skip_modules, str))]
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(f"{knob}: {pattern!r} matches none of the layers{registry.suggest(pattern, ends)}; there are {', '.join(ends)}")
        for name in matched:
            if kept.pop(name, None) is not None:
                job.report.skip(name, f"{knob} names it")
    if not kept:
        raise ValueError(f"{knob} is {skip_modules!r}; it must leave at least one layer")
    return kept


def named_by(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A setting for each name from settings for ``mlp``, ``attention`` or ends of names; names that none is for are left out.

    Raises:
        ValueError: if a key is for no name at all.
    """
    words = {"attention": in_attention, "mlp": lambda name: not in_attention(name)}
    made: dict[str, Any] = {}
    names = list(names)
    for key, value in settings.items():
        found = [name for name in names if (words[key](name) if key in words else matches(name, key, False))]
        if not found:
            raise ValueError(f"{key!r} is for none of the layers; there are {', '.join(sorted({n.rpartition('.')[2] for n in names}))}")
        made |= dict.fromkeys(found, value)
    return made


def places(model: nn.Module, old: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a module stands: parents and attributes."""
    return [(parent, child) for parent in model.modules() for child, module in parent._modules.items() if module is old]

"""Query, key and value that a family keeps in one matrix, taken apart so that each can be treated for itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.compress.base import Job
from echelon.compress.linear import Layer, places
from echelon.models.families import UnsupportedFamily, attention_shape, family_roles
from echelon.models.modules import LowRankLinear, Spec, build, dense_module, empty_linear, kind, like, put

PARTS = ("query", "key", "value")


@dataclass
class Part(Layer):
    """One of the three parts of a fused projection, before the projection itself is taken apart.

    Attributes:
        whole: name of the projection.
        split: spec of the module that takes its place.
    """

    whole: str = ""
    split: Spec | None = None


def split_layers(model: PreTrainedModel, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same layers, with three parts in place of each fused projection; the model is not changed.

    Families whose fused projection is not known to :mod:`echelon.models.families` keep it in one piece.
    """
    try:
        family = family_roles(model.config)
    except UnsupportedFamily:
        return dict(layers)
    if not family.fused_qkv:
        return dict(layers)
    heads = 1 if family.fused_by == "block" else attention_shape(model.config).heads
    made: dict[str, Layer] = {}
    for name, layer in layers.items():
        if not name.endswith("." + family.attention[0]):
            made[name] = layer
            continue
        (rows, columns), bias = layer.shape, layer.bias
        spec: Spec = {"kind": "fused.split", "in": columns, "out": rows, "heads": heads, "bias": bias is not None}
        spec |= {"transposed": True} if isinstance(layer.module, Conv1D) else {}
        weights, biases = take_apart(layer.weight, heads), take_apart(bias, heads) if bias is not None else (None,) * 3
        for place, (part, weight, own) in enumerate(zip(PARTS, weights, biases, strict=True)):
            made[f"{name}.{part}"] = Part(f"{name}.{part}", dense_module(weight, own), seed=3 * layer.seed + place, whole=name, split=spec)
    return made


def split_specs(layers: Mapping[str, Layer], specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The specs of the parts, and those of the modules around them."""
    made: dict[str, Spec] = {}
    for name, spec in specs.items():
        layer = layers[name]
        if isinstance(layer, Part) and layer.split is not None:
            made[layer.whole] = layer.split
        made[name] = spec
    return made


def split_modules(job: Job, layers: Mapping[str, Layer], specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Take apart the projections that ``specs`` name, without changing what they compute; the specs that are left to be applied."""
    for name, spec in specs.items():
        if spec["kind"] == "fused.split":
            old = job.model.get_submodule(name)
            module = build(spec, old)
            put(job.model, name, module, places(job.model, old))
            for layer in layers.values():
                if isinstance(layer, Part) and layer.whole == name:
                    module.get_submodule(layer.name.rpartition(".")[2]).load_state_dict(layer.module.state_dict())
                    layer.module = job.model.get_submodule(layer.name)
    return {name: spec for name, spec in specs.items() if spec["kind"] != "fused.split"}


def take_apart(rows: Float[Tensor, "out *rest"], heads: int) -> tuple[Float[Tensor, "third *rest"], ...]:
    """Queries, keys and values out of rows that hold, for each head (or once, with ``heads`` 1), first its queries, then keys, then values."""
    return tuple(part.flatten(0, 1) for part in rows.unflatten(0, (heads, 3, -1)).unbind(1))


@kind("fused.split")
def _split(spec: Spec, old: nn.Module) -> nn.Module:
    return SplitLinear(spec["in"], spec["out"], spec["heads"], spec["bias"], spec.get("transposed", False), **like(old))


class SplitLinear(nn.Module):
    """A fused projection as three linear layers, whose outputs are put together as the model expects them.

    ``weight`` is an empty buffer, as in :class:`echelon.models.modules.LowRankLinear`.

    Args:
        in_features: width of the input.
        out_features: width of the three outputs together.
        heads: how many heads the outputs alternate by; 1 where all queries come first.
        bias: whether there is one.
        transposed: whether the dense module was a ``Conv1D``.
        factory: dtype and device.
    """

    def __init__(self, in_features: int, out_features: int, heads: int, bias: bool, transposed: bool = False, **factory: Any):
        super().__init__()
        self.in_features, self.out_features, self.heads, self.transposed = in_features, out_features, heads, transposed
        self.query, self.key, self.value = (empty_linear(in_features, out_features // 3, bias, **factory) for _ in PARTS)
        self.register_buffer("weight", torch.empty(0, **factory))

    @property
    def bias(self) -> Tensor | None:
        if self.query.bias is None:
            return None
        return self._together([part.bias for part in (self.query, self.key, self.value)])

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self._together([self.query(x), self.key(x), self.value(x)])

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The dense module of the same function and the original size."""
        weights = [part.product() if isinstance(part, LowRankLinear) else part.weight for part in (self.query, self.key, self.value)]
        return dense_module(self._together([weight.T for weight in weights]).T, self.bias, self.transposed)

    def _together(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(-1, (self.heads, -1)) for part in parts], -2).flatten(-3)

"""PEFT's DoRA layer with three things mended; what it saves is a DoRA adapter like any other.

Norms are taken in float32 and kept off zero, so that zero rows of a pruned matrix give zeros where PEFT's give NaN. The norm may stay in the graph, which
makes the gradient exact: tangential to each row. And unmerging brings back the very matrix that was there, where PEFT divides and subtracts.

Source of the layer: "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora.dora import DoraLinearLayer, cache_decorator
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

SMALLEST_NORM = 1e-12


class DoraLayer(DoraLinearLayer):
    """``W = M (W0 + s B A) / |W0 + s B A|`` with one norm for each output. Made of PEFT's layer by :func:`mend`."""

    detach_norm: bool

    @cache_decorator("weight-norm")
    def get_weight_norm(
        self, weight: Float[Tensor, "..."], lora_weight: Float[Tensor, "out in"], scaling: float, adapter_name: str | None = None
    ) -> Float[Tensor, " out"]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        whole = transpose(weight, self.fan_in_fan_out).to(dtype) + scaling * lora_weight.to(dtype)
        return torch.linalg.vector_norm(whole, dim=1).clamp_min(SMALLEST_NORM)

    def forward(
        self, x: Float[Tensor, "*batch in"], *, lora_A: nn.Module, lora_B: nn.Module, scaling: float, base_layer: Any,
        base_result: Float[Tensor, "*batch out"] | None = None, adapter_name: str = "default",
    ) -> Float[Tensor, "*batch out"]:  # fmt: skip
        """What is to be added to the output of ``base_layer``."""
        if self.detach_norm:
            return super().forward(
                x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, base_layer=base_layer, base_result=base_result, adapter_name=adapter_name
            )  # fmt: skip
        weight = dequantize_module_weight(base_layer).to(x.dtype)
        factor = self.weight / self.get_weight_norm(weight, self.get_lora_weight(lora_A=lora_A, lora_B=lora_B).to(x.dtype), scaling)
        if base_result is None:  # x went through dropout, which the norm must not see
            base_result = nn.functional.linear(x, transpose(weight, self.fan_in_fan_out))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (factor - 1) * base_result + factor * lora_B(lora_A(x)) * scaling


class KeptWeight(DoraLinearVariant):
    """PEFT's merging, which remembers the matrix it replaces until that comes back."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged = DoraLinearVariant.merge_safe(module, active_adapter, orig_weight)
        module._cache_store(f"{active_adapter}-kept", module.get_base_layer().weight.data)
        return merged

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        kept = orig_weight.data
        DoraLinearVariant.merge_unsafe(module, active_adapter, orig_weight)  # gives the parameter another tensor
        module._cache_store(f"{active_adapter}-kept", kept)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        module._cache_pop(f"{active_adapter}-weight_norm")
        return module._cache_pop(f"{active_adapter}-kept").to(orig_weight)


def mend(model: nn.Module, detach_norm: bool, fresh: bool) -> int:
    """Make all of PEFT's DoRA layers around linear ones such layers, in place; how many there are.

    Args:
        model: with adapters.
        detach_norm: take the norm for a constant in backward, as DoRA's authors suggest to save memory.
        fresh: also set magnitudes to the norms of the base matrices, in float32: PEFT rounds them to the base's dtype.
    """
    count = 0
    module: Any
    for module in model.modules():
        for name, layer in dict(getattr(module, "lora_magnitude_vector", None) or {}).items():
            if type(layer) not in (DoraLinearLayer, DoraLayer):
                continue  # embeddings and convolutions stay PEFT's
            layer.__class__ = DoraLayer
            layer.detach_norm = detach_norm
            count += 1
            if type(module.lora_variant.get(name)) is DoraLinearVariant:
                module.lora_variant[name] = KeptWeight()
            if fresh:
                weight = transpose(dequantize_module_weight(module.get_base_layer()), layer.fan_in_fan_out)
                layer.weight.data = torch.linalg.vector_norm(weight.data.to(torch.promote_types(weight.dtype, torch.float32)), dim=1)
    return count

"""LoRA on factored and packed layers through PEFT.

PEFT's ``all-linear`` puts adapters on the two factors and needs nothing from here. An adapter on the layer as a whole merges without any loss:
``up down + s B A = [up, s B] [down; A]``, at the price of ``r`` more in rank. Quantised and pruned layers are ``nn.Linear`` to PEFT, so plain configs
find them too; an adapter stays beside them for good.
"""

import os
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedModel

from echelon.compress.dense_sparse import DenseSparseLinear
from echelon.compress.packed import PackedLinear
from echelon.models.modules import LowRankLinear
from echelon.models.reload import refresh
from echelon.models.targets import linear_targets


class LoraLowRank(Linear):
    """PEFT's LoRA layer around a `LowRankLinear`, or another layer that can be widened by two factors."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}  # DoRA and its like need the dense weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Set the adapters beside the factors.

        Raises:
            ValueError: if ``safe_merge`` and an adapter holds NaN or infinity.
        """
        base: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            up, down = cast(Tensor, self.lora_B[name].weight) * self.scaling[name], cast(Tensor, self.lora_A[name].weight)
            if safe_merge and not (up.isfinite().all() and down.isfinite().all()):
                raise ValueError(f"adapter {name} holds NaN or infinity")
            base.widen(up, down)
            if self.lora_bias[name]:
                if base.bias is None:
                    raise RuntimeError("cannot merge an adapter with a bias into a layer without one")
                base.bias += self.lora_B[name].bias * self.scaling[name]
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            base.narrow(self.r[name])
            if self.lora_bias[name]:
                base.bias -= self.lora_B[name].bias * self.scaling[name]


class LoraPacked(Linear):
    """PEFT's LoRA layer around a quantised or pruned layer, which it leaves bit for bit as it is."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}  # the others need the dense weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises: ValueError: always; the sum of a packed matrix and an adapter is neither on the grid nor in the pattern."""
        raise ValueError("an adapter cannot be merged into a quantised or pruned layer: the sum is not on its grid or in its pattern; use merge_to_dense first")


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Names of the layers for adapters: the factored and packed ones as a whole, and the linear ones in the blocks that stayed dense."""
    try:
        dense = linear_targets(model)[0]
    except ValueError:
        dense = []
    names = {name for name, module in model.named_modules() if isinstance(module, (LowRankLinear, PackedLinear))} | set(dense)
    return [name for name, _ in model.named_modules() if name in names]


def lora_config(model: PreTrainedModel, **arguments: Any) -> LoraConfig:
    """A PEFT config for ``get_peft_model`` that knows factored layers; ``target_modules`` are `lora_targets` unless given."""
    return _knowing(LoraConfig(**({"target_modules": lora_targets(model)} | arguments)))


def load_lora(model: PreTrainedModel, path: str | os.PathLike[str], **arguments: Any) -> PeftModel:
    """``PeftModel.from_pretrained`` for adapters on factored layers: PEFT does not store which classes a config knew."""
    return PeftModel.from_pretrained(model, os.fspath(path), config=_knowing(LoraConfig.from_pretrained(os.fspath(path))), **arguments)


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merge all active adapters, bring the noted ranks up to date, and return the plain model."""
    merged: Any = model.merge_and_unload()
    refresh(merged)
    return merged


def _knowing(config: Any) -> LoraConfig:
    known: dict[type[nn.Module], type[nn.Module]] = {LowRankLinear: LoraLowRank, DenseSparseLinear: LoraLowRank, PackedLinear: LoraPacked}
    config._register_custom_module(known)
    return config

"""``from_pretrained`` for compressed models: ``config.json`` tells what every module became, and the skeleton is rebuilt before its weights are read.

transformers calls this a quantizer. Importing :mod:`echelon` registers it (see :mod:`echelon.hooks`); a process that has not imported it gets an error about
shapes, since every replaced module stores a ``weight`` of another shape.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from echelon.models.modules import Spec, install

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VERSION = 1


class EchelonConfig(QuantizationConfigMixin):
    """The part of ``config.json`` that says what was done to the model.

    Args:
        modules: name of each replaced module and its spec; names stand for many layers as ``layers.{0-3,7}.mlp``.
        provenance: for each method applied, in order: its name, knobs, seed, and the calibration data's source and tokens.
        version: of this format.
    """

    def __init__(self, modules: Mapping[str, Spec] | None = None, provenance: list[dict[str, Any]] | None = None, version: int = VERSION, **_: Any):
        if version > VERSION:
            raise ValueError(f"the model was compressed by a newer echelon (format {version}, this one reads {VERSION}); upgrade echelon")
        self.quant_method = "echelon"  # type: ignore[assignment]
        self.version = version
        self.modules: dict[str, Spec] = unfold(modules or {})
        self.provenance = list(provenance or [])

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"modules": fold(self.modules)}


class EchelonQuantizer(HfQuantizer):
    """Rebuilds the modules on the skeleton, then steps aside: what is loaded is an ordinary model that may be cast and trained."""

    is_trainable = True  # type: ignore[assignment]
    is_qat_trainable = True  # type: ignore[assignment]
    is_compileable = True  # type: ignore[assignment]

    quantization_config: EchelonConfig
    made: dict[str, nn.Module]  # between the two hooks of loading
    frozen: set[tuple[str, str]]

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("an EchelonConfig says how a model was compressed; to compress one, use `echelon compress` or echelon.compress")

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("tensor parallelism (tp_plan) is not supported for compressed models; load without it, or use merge_to_dense first")
        self.made = install(model, local_names(model, self.quantization_config.modules))
        # transformers makes new parameters of what it reads, and lets all of them train.
        self.frozen = {(name, key) for name, module in self.made.items() for key, p in module.named_parameters() if not p.requires_grad}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        model.is_quantized = False  # else model.float() and training are refused
        for name, module in self.made.items():
            for key, tensor in module.state_dict(keep_vars=True).items():
                # transformers marks what it has read from a file; the rest it fills with random numbers and a mere warning.
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(f"the checkpoint has no tensor {name}.{key}; it is incomplete")
                if (name, key) in self.frozen:
                    tensor.requires_grad_(False)
        del self.made, self.frozen

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        refresh(model)  # ranks may have grown since, by merged adapters
        return None, {}


def local_names(model: Any, modules: Mapping[str, Spec]) -> dict[str, Spec]:
    """Specs under the names that this class of model has: with the base model's prefix, or without it."""
    prefix = model.base_model_prefix + "."
    known = {name for name, _ in model.named_modules()}
    made = {}
    for name, spec in modules.items():
        # What stands inside another module of these is not there before that one is.
        parts = name.split(".")
        outer = next(whole for end in range(1, len(parts) + 1) if (whole := ".".join(parts[:end])) in modules)
        other = outer.removeprefix(prefix) if outer.startswith(prefix) else prefix + outer
        made[name if outer in known or other not in known else other + name.removeprefix(outer)] = spec
    return made


def attach(model: "PreTrainedModel", modules: Mapping[str, Spec], provenance: dict[str, Any]) -> None:
    """Note in a model's config what its modules became, in addition to what is noted there."""
    noted = getattr(model.config, "quantization_config", None)
    if not isinstance(noted, EchelonConfig):
        noted = EchelonConfig()
    noted = EchelonConfig(local_names(model, noted.modules) | dict(modules), [*noted.provenance, provenance])
    model.config.quantization_config = noted
    model.hf_quantizer = EchelonQuantizer(noted)  # type: ignore[assignment]
    model.is_quantized = False  # type: ignore[assignment]


def detach(model: "PreTrainedModel") -> None:
    """Forget that a model was compressed, after its modules have been made dense again."""
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)


def renote(model: "PreTrainedModel", modules: Mapping[str, Spec | None]) -> None:
    """Note that noted modules became something else: another spec, or None for dense again. With none left the model is an ordinary one."""
    noted = getattr(model.config, "quantization_config", None)
    if not isinstance(noted, EchelonConfig):
        return
    known = local_names(model, noted.modules) | dict(modules)
    noted.modules = {name: spec for name, spec in known.items() if spec is not None}
    if not noted.modules:
        detach(model)


def refresh(model: "PreTrainedModel") -> None:
    """Bring the noted ranks up to date with the modules."""
    noted = model.config.quantization_config.modules
    known = dict(model.named_modules())
    for name, local in zip(list(noted), local_names(model, noted), strict=True):
        module = known.get(local)
        if hasattr(module, "widen"):
            noted[name] = module.spec()  # type: ignore[operator, union-attr]


def from_config(config: "PreTrainedConfig", auto_class: Any = None) -> "PreTrainedModel":
    """A new model with random weights in the shape of a compressed one (``AutoModel.from_config`` would build the dense one).

    Raises:
        ValueError: if the config does not come from a compressed model.
    """
    from transformers import AutoModelForCausalLM

    noted = getattr(config, "quantization_config", None)
    if isinstance(noted, dict) and noted.get("quant_method") == "echelon":
        noted = EchelonConfig.from_dict(noted)
    if not isinstance(noted, EchelonConfig):
        raise ValueError("the config has no quantization_config of echelon; use transformers' own from_config")
    model = (auto_class or AutoModelForCausalLM).from_config(config)
    for module in install(model, local_names(model, noted.modules)).values():
        module.apply(model._init_weights)
    model.config.quantization_config = noted
    model.hf_quantizer = EchelonQuantizer(noted)
    return model


def fold(modules: Mapping[str, Spec]) -> dict[str, Spec]:
    """Modules of the same place in several layers and with the same spec under one name.

    >>> fold({"h.0.fc": {"kind": "linear"}, "h.1.fc": {"kind": "linear"}, "head": {"kind": "linear"}})
    {'h.{0-1}.fc': {'kind': 'linear'}, 'head': {'kind': 'linear'}}
    """
    groups: dict[tuple[str, str], tuple[list[int], Spec]] = {}
    for name, spec in modules.items():
        place = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name, count=1)
        number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        numbers, _ = groups.setdefault((place, repr(sorted(spec.items()))), ([], spec))
        numbers += [int(number[0])] if number else []
    return {place.replace("{}", "{" + _ranges(sorted(numbers)) + "}"): spec for (place, _), (numbers, spec) in groups.items()}


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def unfold(modules: Mapping[str, Spec]) -> dict[str, Spec]:
    """The inverse of :func:`fold`."""
    made = {}
    for name, spec in modules.items():
        found = re.search(r"\{([\d,-]+)\}", name)
        if not found:
            made[name] = dict(spec)
            continue
        for part in found[1].split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                made[name.replace(found[0], str(number))] = dict(spec)
    return made


# A second import (a reload, a second copy) finds the names taken; transformers would raise.
if "echelon" not in auto.AUTO_QUANTIZER_MAPPING:
    auto.AUTO_QUANTIZER_MAPPING["echelon"] = EchelonQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["echelon"] = EchelonConfig

"""What all tuners share at the level of the model: which layers are adapted, what is refused, training, and export to plain LoRA."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_lora_target_modules_mamba, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_peft_model_state_dict,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from echelon.adapt.config import DeltaConfig
from echelon.adapt.linear import DeltaLinear
from echelon.data.files import folder_whole
from echelon.registry import suggest


class DeltaModel(BaseTuner):
    """A model whose linear layers carry adapters; ``get_peft_model`` makes it, and what it has is found on the ``PeftModel`` too.

    In a loop of one's own::

        tuner.begin_training(optimizer)
        for step, batch in enumerate(batches):
            tuner.begin_step(step)
            model(**batch).loss.backward()
            tuner.before_update(step, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(step + 1)
        tuner.end_training()

    With HF Trainer, :class:`~echelon.adapt.callbacks.AdapterCallback` does this.

    Attributes:
        total_steps: optimizer steps of the training, for tuners with a schedule; set before ``begin_training`` where it is known.
        warmup_steps: how many of them the learning rate rises for.
    """

    total_steps: int | None = None
    warmup_steps: int = 0

    prefix: str
    tuner_layer_cls: type[DeltaLinear]
    target_module_mapping: ClassVar[dict[str, Any]] = dict(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)  # type: ignore[misc]

    def layers(self, adapter_name: str | None = None) -> Iterator[tuple[str, Any]]:
        """Names in the base model and layers of all that are adapted, or of those that have this adapter."""
        for name, module in self.model.named_modules():
            if isinstance(module, DeltaLinear) and (adapter_name is None or adapter_name in module.ranks):
                yield name, module

    def check_together(self, names: list[str], config: Any) -> None:
        """Refuse layers that do not suit a config together, before any is replaced.

        Raises:
            ValueError: if they do not.
        """

    def begin_training(self, optimizer: torch.optim.Optimizer) -> None:
        """Called with the optimizer before the first step."""

    def begin_step(self, step: int) -> None:
        """Called before the first forward of an optimizer step; ``step`` of them are done."""

    def before_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called with all gradients in place, after clipping, right before the optimizer."""

    def end_step(self, step: int) -> None:
        """Called behind an optimizer step; ``step`` of them are done."""

    def end_training(self) -> None:
        """Called behind the last step."""

    @torch.no_grad()
    def to_lora(self, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
        """The same function as a plain LoRA, exactly, as config and checkpoint of PEFT; no decomposition is needed.

        Trained biases and ``modules_to_save`` come along.

        Raises:
            ValueError: if there is no such adapter.
        """
        config = self._config(adapter_name)
        tensors, ranks, alphas = {}, {}, {}
        for name, layer in self.layers(adapter_name):
            A, B, scale = layer.factors(adapter_name)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.clone().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.clone().contiguous()
            alpha = scale * len(A)
            ranks[name], alphas[name] = len(A), round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
        saved = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
        tensors |= {f"base_model.{key}": value.clone().contiguous() for key, value in saved.items() if "." + self.prefix not in key}
        rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
        targets = config.target_modules
        made = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=targets if isinstance(targets, str) else sorted(targets or ()), exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform, layers_pattern=config.layers_pattern, bias=config.bias, modules_to_save=config.modules_to_save,
            rank_pattern={name: r for name, r in ranks.items() if r != rank}, alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
            fan_in_fan_out=any(layer.transposed for _, layer in self.layers(adapter_name)), task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path, revision=config.revision, inference_mode=True,
        )  # type: ignore[arg-type]  # fmt: skip
        return made, tensors

    def save_lora(self, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Write :meth:`to_lora` to a folder, whole, that ``PeftModel.from_pretrained`` reads in a process without echelon.

        Raises:
            ValueError: if there is no such adapter.
            UserError: if the folder cannot be written.
        """
        config, tensors = self.to_lora(adapter_name)
        with folder_whole(path) as folder:
            save_file({name: value.cpu() for name, value in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(os.fspath(folder))

    def param_summary(self, adapter_name: str = "default") -> dict[str, int]:
        """How many layers an adapter has, and how many numbers it trains and keeps frozen there."""
        layers = [layer for _, layer in self.layers(adapter_name)]
        counted = {kind: sum(layer.part(part, adapter_name).numel() for layer in layers for part in getattr(layer, kind)) for kind in ("trained", "frozen")}
        return {"layers": len(layers)} | counted

    def _config(self, adapter_name: str) -> Any:
        if adapter_name not in self.peft_config:
            raise ValueError(f"there is no adapter {adapter_name!r}{suggest(adapter_name, self.peft_config)}; there are {', '.join(self.peft_config)}")
        return self.peft_config[adapter_name]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        meant = targets(model, peft_config, type(self))
        for name, module in meant.items():
            _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])  # Mamba's kernels take some matrices past their layers
            self.tuner_layer_cls.check(name, module, peft_config)
        self.check_together(list(meant), peft_config)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str, parameter_name: str | None = None
    ) -> None:
        if parameter_name is not None:
            raise NotImplementedError(f"{type(self).__name__} adapts linear layers, not the parameter {parameter_name} of {current_key}")
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        new = self.tuner_layer_cls(target, adapter_name, peft_config, current_key, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32 from the start; without autocast they get the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for _, layer in self.layers(adapter_name):
                _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                for part in (*layer.trained, *layer.frozen):
                    tensor = layer.part(part, adapter_name)
                    if dtype is not None and dtype.is_floating_point and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)


def targets(model: nn.Module, config: DeltaConfig, tuner: type[DeltaModel]) -> dict[str, nn.Module]:
    """Names and layers that a config means in a model; its ``target_modules`` are settled if they were open.

    Raises:
        ValueError: if no layer is meant, one is no linear layer, or shares its matrix with another module.
    """
    if config.target_modules is None:
        kind = tuner.get_model_config(model).get("model_type", "")
        found = tuner.target_module_mapping.get(kind)
        if found is None:
            raise ValueError(f"target_modules is null, and PEFT has no usual ones for a model of type {kind!r}; name them, or use all-linear")
        config.target_modules = found if isinstance(found, str) else set(found)
    _maybe_include_all_linear_layers(config, model)  # type: ignore[arg-type]
    shared = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    inside: tuple[str, ...] = ()
    known, meant = [], {}
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        if isinstance(module, BaseTunerLayer | nn.Linear | Conv1D):
            known.append(name)
        if tuner._check_target_module_exists(config, name):  # type: ignore[arg-type]
            _refuse(name, module, tuner, shared)
            meant[name] = module
    ends = sorted({name.rpartition(".")[2] for name in known})
    names = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    if not meant:
        near = "".join({suggest(name, ends) for name in names})
        raise NoMatchingPeftModuleError(f"target_modules is {names}; no layer of the model is meant{near}; its linear layers end in {', '.join(ends)}")
    for name in () if isinstance(config.target_modules, str) or config.exclude_modules or config.layers_to_transform is not None else names:
        if not any(key == name or key.endswith("." + name) for key in meant):
            warnings.warn(f"target_modules: no layer is called {name!r}{suggest(name, ends)}", stacklevel=2)
    return meant


def _refuse(name: str, module: nn.Module, tuner: type[DeltaModel], shared: Counter[int]) -> None:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, BaseTunerLayer) and not isinstance(module, tuner.tuner_layer_cls):
        raise ValueError(f"{name} already carries an adapter of another kind ({type(module).__name__}); merge or unload that first")
    if any(p is not None and p.ndim == 3 for p in base._parameters.values()) and not isinstance(base, nn.modules.conv._ConvNd):
        raise ValueError(f"{name} holds its experts in three-dimensional tensors; only plain LoRA adapts those (LoraConfig, target_parameters)")
    if not isinstance(base, nn.Linear | Conv1D) and not _quantised(base):
        raise ValueError(f"{name} is a {type(base).__name__}; {tuner.__name__} adapts nn.Linear, Conv1D and quantised linear layers")
    if any(p is not None and shared[id(p)] > 1 for p in base._parameters.values()):
        raise ValueError(f"{name} shares its matrix with another module (tied embeddings); leave it out, or load the model with tie_word_embeddings=False")


def _quantised(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)
    return backend is not None and backend.layer_type == "linear"

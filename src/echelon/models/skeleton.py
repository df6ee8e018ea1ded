"""A model whose weights are still on disk: its modules stand on the meta device, and are filled from a safetensors checkpoint and emptied part by part."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from echelon.errors import UserError
from echelon.models.families import UnsupportedFamily

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """Where a tensor is, and what it is like; ``dtype`` as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a safetensors checkpoint, in one file or in shards; only their headers are read at first.

    Args:
        folder: of ``model.safetensors``, or of shards and their index.

    Attributes:
        tensors: where each tensor is, by name.

    Raises:
        UserError: if there is no such checkpoint, or a shard is missing, cut short or broken.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, Stored] = {}
        promised: dict[str, str] = {}
        if (self.folder / SINGLE).is_file():
            self.files = [self.folder / SINGLE]
        elif (self.folder / INDEX).is_file():
            try:
                promised = dict(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"cannot read {self.folder / INDEX}: it is no index of shards") from error
            self.files = sorted({self.folder / name for name in promised.values()})
        else:
            raise UserError(f"{self.folder} has no {SINGLE} and no {INDEX}; only safetensors are streamed (load the model and save_pretrained it once)")
        for file in self.files:
            if not file.is_file():
                raise UserError(f"cannot read {self.folder}: the shard {file.name} is missing")
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        part = opened.get_slice(name)
                        self.tensors[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise _broken(file, error) from error
        for name, wanted in promised.items():
            if name not in self.tensors:
                raise UserError(f"cannot read {self.folder}: its index has {name} in {wanted}, where it is not")

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, one at a time, mapped from the file for as long as they are held.

        Raises:
            UserError: if a shard has become unreadable.
        """
        for file in dict.fromkeys(self.tensors[name].file for name in names):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in names:
                        if self.tensors[name].file == file:
                            yield name, opened.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise _broken(file, error) from error

    def stamp(self) -> dict[str, list[int]]:
        """Size and time of each file, by which a changed checkpoint is told."""
        found = {file.name: file.stat() for file in self.files}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


class Slot(NamedTuple):
    """The place of a tensor in a model: ``holder``, its ``_parameters`` or ``_buffers``, and the whole name."""

    name: str
    holder: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.key]


class Skeleton:
    """A causal language model on the meta device and the checkpoint of its weights.

    Buffers that no checkpoint stores (rotary tables) are real from the start.

    Args:
        folder: with ``config.json`` and safetensors.
        dtype: of the weights once they are filled in; ``auto`` is what the config says, or else the checkpoint.

    Attributes:
        model: in evaluation mode.
        checkpoint: where its tensors are.

    Raises:
        UserError: if config and checkpoint cannot be read or do not fit together, or the model is quantised or compressed already.
        UnsupportedFamily: if its checkpoint needs more than renaming.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: str | torch.dtype = "auto") -> None:
        if not Path(folder).is_dir():
            raise UserError(f"{str(folder)!r} is no folder; a streamed model must lie on disk")
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot read the config of {folder}: {str(error).strip().splitlines()[0]}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"the model in {folder} is quantised or compressed already; start from the original one")
        if config.is_encoder_decoder:
            raise UnsupportedFamily(f"{config.model_type} is an encoder-decoder; only models with one chain of blocks are streamed")
        self.checkpoint = Checkpoint(folder)
        if dtype == "auto":
            kinds = [FLOATS[stored.dtype] for stored in self.checkpoint.tensors.values() if stored.dtype in FLOATS]
            dtype = config.dtype or (kinds[0] if kinds else torch.float32)
        self.model = on_meta(config, dtype)
        _rebuild_buffers(self.model)
        self.keys = self._locate()

    def slots(self, inside: Callable[[str], bool] = lambda name: True) -> Iterator[Slot]:
        """Places of stored tensors; a tied one comes once for each name."""
        for path, module in self.model.named_modules():
            for holder, skipped in ((module._parameters, set()), (module._buffers, module._non_persistent_buffers_set)):
                for key, tensor in holder.items():
                    name = f"{path}.{key}".lstrip(".")
                    if tensor is not None and key not in skipped and inside(name):
                        yield Slot(name, holder, key)

    def fill(self, slots: Sequence[Slot]) -> None:
        """Read the tensors of these places; what is tied on the meta device stays tied.

        Raises:
            ValueError: if one holds NaN or infinity.
        """
        sharing: dict[int, list[Slot]] = {}
        for slot in slots:
            sharing.setdefault(id(slot.tensor), []).append(slot)
        wanted: dict[str, list[list[Slot]]] = {}
        for group in sharing.values():
            wanted.setdefault(self.keys[group[0].name], []).append(group)
        for key, values in self.checkpoint.read(list(wanted)):
            if values.is_floating_point() and not values.isfinite().all():
                raise ValueError(f"{key} holds NaN or infinity")
            for group in wanted[key]:
                old = group[0].tensor
                _replace(group, values.to(old.dtype, copy=True))  # a copy: the file must not stay mapped

    def release(self, slots: Sequence[Slot]) -> None:
        """Put these tensors back on the meta device."""
        sharing: dict[int, list[Slot]] = {}
        for slot in slots:
            sharing.setdefault(id(slot.tensor), []).append(slot)
        for group in sharing.values():
            _replace(group, group[0].tensor.detach().to("meta"))

    def _locate(self) -> dict[str, str]:
        """The checkpoint's name of each tensor of the model."""
        state: dict[str, Tensor] = {slot.name: slot.tensor for slot in self.slots()}
        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        found: dict[str, str] = {}
        for key in self.checkpoint.tensors:
            name, converted = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if converted is not None:
                raise UnsupportedFamily(f"the checkpoint of this {self.model.config.model_type} stores {key} in another layout; it cannot be streamed")
            found[name if name in state else key] = key
        for name, tensor in state.items():
            for other, twin in state.items() if name not in found else ():
                if twin is tensor and other in found:
                    found[name] = found[other]
            if name not in found:
                raise UserError(f"the checkpoint in {self.checkpoint.folder} has no tensor {name}")
            shape = self.checkpoint.tensors[found[name]].shape
            if shape != tuple(tensor.shape):
                raise UserError(f"{name} is {shape} in the checkpoint and {tuple(tensor.shape)} by config.json in {self.checkpoint.folder}")
        return {name: found[name] for name in state}


def on_meta(config: PreTrainedConfig, dtype: Any = None) -> PreTrainedModel:
    """A causal language model of this config without values, in evaluation mode."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype).eval()
    except ValueError as error:
        raise UnsupportedFamily(f"model_type {config.model_type!r} has no causal language model in transformers") from error


@torch.no_grad()
def _rebuild_buffers(model: PreTrainedModel) -> None:
    for path, module in model.named_modules():
        ghosts = [key for key in module._non_persistent_buffers_set if (tensor := module._buffers.get(key)) is not None and tensor.is_meta]
        for key in ghosts:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")  # type: ignore[arg-type]
        if ghosts:
            model._init_weights(module)
        for key in ghosts:
            if module._buffers[key]._version == 0:  # type: ignore[union-attr]  # nothing has been written into it
                raise UnsupportedFamily(f"{path}.{key} is in no checkpoint, and transformers does not rebuild it; the model cannot be streamed")


def _replace(group: Sequence[Slot], values: Tensor) -> None:
    made = nn.Parameter(values, requires_grad=False) if isinstance(group[0].tensor, nn.Parameter) else values
    for slot in group:
        slot.holder[slot.key] = made


def _broken(file: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {file}: {str(error).strip().splitlines()[0]}; the shard is cut short or broken, fetch it again")

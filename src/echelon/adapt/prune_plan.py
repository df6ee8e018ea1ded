"""Which part of a base model is pruned away for training: a plan that is made once, checked against the model, and shipped as JSON and safetensors."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from echelon.data.files import folder_whole, read_text, write_whole
from echelon.errors import UserError
from echelon.models.families import UnsupportedFamily, attention_shape, family_roles
from echelon.models.modules import dense_weight
from echelon.models.narrowing import Cut, Kept, cuts, hidden_units, narrow, note
from echelon.models.skeleton import Skeleton

FORMAT = 1
_TOLD = ("base", "revision", "weights", "config", "hidden", "strategy", "ratios")
_CHUNK = 1 << 24  # numbers of a tensor that are hashed at a time


@dataclass(frozen=True)
class PrunePlan:
    """What stays of a base model: heads and hidden units of each block, or single weights.

    Attributes:
        base: hub id or path of the base model.
        revision: of it, where the hub told one.
        weights: SHA-256 of its parameters, see :func:`fingerprint`.
        config: its configuration, as ``config.json`` has it.
        hidden: units of its MLPs.
        strategy: how the plan was chosen.
        ratios: what it was asked for, by knob.
        kept: for each block; empty where single weights are pruned.
        masks: by module name, where True is a weight that stays; empty where heads and units are pruned.
    """

    base: str
    revision: str | None
    weights: str
    config: dict[str, Any]
    hidden: int
    strategy: str
    ratios: dict[str, float]
    kept: tuple[Kept, ...] = ()
    masks: dict[str, Bool[Tensor, "out in"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError: if a block keeps nothing, something twice or out of order, or what the model does not have."""
        if not self.kept and not self.masks:
            raise ValueError("kept and masks are both empty; a plan must say what stays")
        heads, blocks = attention_shape(self.model_config).kv_heads, self.model_config.num_hidden_layers
        if self.kept and len(self.kept) != blocks:
            raise ValueError(f"kept speaks of {len(self.kept)} blocks; the model has {blocks}")
        for index, one in enumerate(self.kept):
            for name, ids, of in (("heads", one.heads, heads), ("neurons", one.neurons, self.hidden)):
                if not len(ids):
                    raise ValueError(f"kept[{index}].{name} is empty; a block must keep at least 1 of its {of}")
                if int(ids[0]) < 0 or int(ids[-1]) >= of or bool((ids[1:] <= ids[:-1]).any()):
                    raise ValueError(f"kept[{index}].{name} must be ascending numbers in 0..{of - 1}, each once")

    @property
    def model_config(self) -> PreTrainedConfig:
        """The configuration of the base model."""
        return AutoConfig.for_model(**self.config)

    def cuts(self) -> dict[str, Cut]:
        """The matrices that get smaller, by name; none where single weights are pruned."""
        return cuts(self.model_config, self.kept, self.hidden)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` to a folder that is whole or absent.

        Raises:
            UserError: if it cannot be written.
        """
        tensors = {f"{index}.{name}": getattr(one, name).int().contiguous() for index, one in enumerate(self.kept) for name in ("heads", "neurons")}
        for name, mask in self.masks.items():
            tensors[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None))
        told = {"format": FORMAT} | {name: getattr(self, name) for name in _TOLD} | {"shapes": {name: list(mask.shape) for name, mask in self.masks.items()}}
        with folder_whole(folder) as aside:
            save_file(tensors, aside / "plan.safetensors")
            write_whole(aside / "plan.json", json.dumps(told, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "PrunePlan":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if the folder holds no plan, a broken one, or one of a newer format.
        """
        try:
            told = json.loads(read_text(Path(folder) / "plan.json"))
            if told["format"] > FORMAT:
                raise ValueError(f"format {told['format']} is newer than {FORMAT}, which this echelon reads; upgrade it")
            tensors = load_file(Path(folder) / "plan.safetensors")
            blocks = range(sum(name.endswith(".heads") for name in tensors))
            masks = {}
            for name, (rows, columns) in told["shapes"].items():
                bits = np.unpackbits(tensors[f"{name}.mask"].numpy(), count=rows * columns)
                masks[name] = torch.from_numpy(bits.astype(bool)).view(rows, columns)
            kept = tuple(Kept(tensors[f"{index}.heads"].long(), tensors[f"{index}.neurons"].long()) for index in blocks)
            return cls(**{name: told[name] for name in _TOLD}, kept=kept, masks=masks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(f"cannot read a plan from {folder}: {error}") from error

    def require(self, weights: str, config: PreTrainedConfig) -> None:
        """Raises: UserError: if this is not the model that the plan was made for."""
        if config.model_type != self.config["model_type"] or weights != self.weights:
            raise UserError(
                f"the plan was made for {self.base or 'another model'}{f' at {self.revision}' if self.revision else ''}, whose weights have the hash "
                f"{self.weights[:12]}; this {config.model_type} has {weights[:12]}: load that very model, or make a new plan"
            )


def prune(model: PreTrainedModel, plan: PrunePlan) -> PreTrainedModel:
    """Prune a base model in place and return it.

    Where heads and units go, what stays computes the same as before; where single weights go, they are zero. After ``import echelon`` the result can be saved
    and loaded like any model. The full model must be loaded again for inference.

    Raises:
        UserError: if this is not the model of the plan; it is unchanged then.
        UnsupportedFamily: if its family is not supported, or it has been compressed already.
    """
    refuse_compressed(model)
    plan.require(fingerprint(model.named_parameters()), model.config)
    narrow(model, plan.cuts())
    mask_weights(model, plan)
    _note(model, plan)
    return model


def prune_folder(folder: str | os.PathLike[str], plan: PrunePlan, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The pruned model of a base model's safetensors folder; never more than one block of the whole is in memory.

    Raises:
        UserError: if the folder cannot be read, or holds another model than the plan's.
        UnsupportedFamily: if the model cannot be streamed or its family is not supported.
    """
    skeleton = Skeleton(folder, dtype)
    model, made = skeleton.model, plan.cuts()
    refuse_compressed(model)
    first = [name for name, _ in model.named_parameters()]
    where = family_roles(model.config).layers
    prefixes = [f"{where}.{index}." for index in range(len(model.get_submodule(where)))]  # type: ignore[arg-type]
    digests: dict[str, bytes] = {}
    rest = [slot for slot in skeleton.slots() if not slot.name.startswith(tuple(prefixes))]
    for slots in (*([*skeleton.slots(lambda name, prefix=prefix: name.startswith(prefix))] for prefix in prefixes), rest):  # type: ignore[misc]
        skeleton.fill(slots)
        names = {slot.name: slot.tensor for slot in slots}
        digests |= {name: _digest(name, names[name]) for name in first if name in names}
        narrow(model, {name: cut for name, cut in made.items() if f"{name}.weight" in names})
    plan.require(_together(digests), model.config)
    mask_weights(model, plan)
    _note(model, plan)
    return model


@torch.no_grad()
def mask_weights(model: PreTrainedModel, plan: PrunePlan) -> None:
    """Set the weights that a plan's masks take away to zero."""
    for name, mask in plan.masks.items():
        weight = dense_weight(model.get_submodule(name))
        weight.mul_(mask.to(weight.device))


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of parameters by name, shape and value, in whichever order they come.

    Values count as float32, so a checkpoint in bfloat16 has one hash whether it is loaded as bfloat16 or as float32.
    """
    return _together({name: _digest(name, tensor) for name, tensor in named})


def _together(digests: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digest for _, digest in sorted(digests.items()))).hexdigest()


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(repr((name, tuple(tensor.shape))).encode())
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        digest.update(chunk.float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _note(model: PreTrainedModel, plan: PrunePlan) -> None:
    if plan.kept:
        note(model, plan.kept, plan.hidden, {"method": "loram", "base": plan.base, "revision": plan.revision, "weights": plan.weights})


def refuse_compressed(model: PreTrainedModel) -> int:
    """The hidden units of a model that a plan can be made for.

    Raises:
        UnsupportedFamily: if it is quantised or compressed, or its family is not supported.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedFamily("the model is quantised or compressed already; prune the original one, and quantise what is left of it")
    return hidden_units(model)

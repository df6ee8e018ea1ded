"""Checkpoints of a training run: folders that are whole or absent, the last one and the one before it, read without pickle."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echelon.data.files import folder_whole, write_whole
from echelon.errors import UserError
from echelon.models.modules import build, put

KEPT = 2


def folders(out: Path) -> list[Path]:
    """Checkpoints of a run, the newest first."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Optimizer steps that were done."""
    return int(folder.name.rpartition("-")[2])


def write(out: Path, step: int, weights: Mapping[str, Tensor], layers: Mapping[str, Any], state: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Write a checkpoint, then remove all but the last two.

    Args:
        out: folder of the run.
        step: optimizer steps done.
        weights: what :func:`own_tensors` says of the model, or the same gathered from shards.
        layers: :func:`specs` of the model.
        state: of optimizer, schedule and random generators: tensors, numbers, words, lists and dictionaries.
        texts: other files and their contents.

    Raises:
        UserError: if it cannot be written; earlier ones are intact.
    """
    with folder_whole(out / f"checkpoint-{step}") as aside:
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, aside / "weights.safetensors")
        torch.save(dict(state), aside / "state.pt")
        for name, text in texts.items():
            write_whole(aside / name, text)
        (aside / "layers.json").write_text(json.dumps(layers))
        sums = {file.name: _digest(file) for file in sorted(aside.iterdir())}
        (aside / "checkpoint.json").write_text(json.dumps({"step": step, "sha256": sums}, indent=2))
    for old in folders(out)[KEPT:]:
        remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is never seen in part."""
    going = folder.with_name(f".{folder.name}.going")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in out.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint, None if there is none; a damaged one is passed over with a warning.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    found = folders(out)
    for place, folder in enumerate(found):
        fault = damage(folder)
        if fault is None:
            return folder
        if place + 1 == len(found):
            raise UserError(f"checkpoint {folder} is damaged: {fault}; there is no other one to go on from: remove it to begin anew")
        warnings.warn(f"checkpoint {folder} is damaged: {fault}; going on from {found[place + 1].name}", stacklevel=2)
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    try:
        sums = json.loads((folder / "checkpoint.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "checkpoint.json is missing or unreadable"
    for name, digest in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is truncated or was changed"
    return None


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def own_tensors(model: nn.Module, constant: Collection[int] = ()) -> dict[str, Tensor]:
    """Weights and stored buffers, a tied one under its first name only, without those of the ids in ``constant``."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in constant:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def specs(model: nn.Module) -> dict[str, Any]:
    """What the converted layers are now: ranks may change while training."""
    return {name: module.spec() for name, module in model.named_modules() if hasattr(module, "spec") and hasattr(module, "product")}  # type: ignore[operator]


@torch.no_grad()
def restore(folder: Path, model: nn.Module, constant: Collection[int] = ()) -> None:
    """Put a checkpoint's weights into a model that was converted as the saved one had been; ``constant`` as in :func:`own_tensors`.

    Raises:
        UserError: if they do not fit it.
    """
    now = json.loads(json.dumps(specs(model)))
    for name, spec in json.loads((folder / "layers.json").read_text()).items():
        if name in now and now[name] != spec:
            put(model, name, build(spec, model.get_submodule(name)))
    mine, stored = own_tensors(model, constant), load_file(folder / "weights.safetensors")
    for name in sorted(mine.keys() ^ stored.keys()):
        raise UserError(f"checkpoint {folder} is of another model: {name} is {'not in it' if name in mine else 'unknown'}")
    for name, tensor in mine.items():
        if tensor.shape != stored[name].shape:
            raise UserError(f"checkpoint {folder} is of another model: {name} is {tuple(stored[name].shape)} there, {tuple(tensor.shape)} here")
        tensor.copy_(stored[name])


def read_state(folder: Path) -> dict[str, Any]:
    """The state that was stored beside the weights."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)

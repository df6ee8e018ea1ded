"""Saving a compressed model whole, and turning one back into a plain one."""

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.compress.report import Report
from echelon.data.files import folder_whole
from echelon.errors import UserError
from echelon.models.modules import put
from echelon.models.reload import EchelonConfig, detach, local_names, refresh

REPORT = "compression_report.json"


def save(
    model: PreTrainedModel, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None, report: Report | None = None
) -> None:  # fmt: skip
    """Write a model so that the folder holds all of it or, after a crash or on a full disk, what it held before (see :func:`whole_folder`).

    Raises:
        UserError: if it cannot be written, or the folder holds something else than a model.
    """
    with whole_folder(folder) as aside:
        if isinstance(getattr(model.config, "quantization_config", None), EchelonConfig):
            refresh(model)
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if report is not None:
            (aside / REPORT).write_text(report.to_json(), encoding="utf-8")


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike[str], mark: str = "config.json") -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` at the end: flushed to disk and renamed, or not at all.

    Args:
        folder: what is replaced as a whole if it is there.
        mark: file by which a folder may be known as one to be replaced.

    Raises:
        UserError: if it cannot be written, or the folder holds something else.
    """
    refuse_other(folder, mark)
    try:
        with folder_whole(folder) as aside:
            yield aside
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise UserError(f"cannot write {folder}: {error}") from error


def refuse_other(folder: str | os.PathLike[str], mark: str = "config.json") -> None:
    """Raises: UserError: if there is something else than a model (``mark`` is the file that tells), or an empty folder, where one is to be written."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / mark).is_file())):
        raise UserError(f"{folder} exists and is no {'model' if mark == 'config.json' else 'adapter'}; give a new folder")


def merge_to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Make every replaced module dense again, in place: the original size, the compressed quality, and a checkpoint that needs no Echelon.

    Where a method gave layers a bias that they had not (centred LoRD), the family's configuration is told so if it can be (Llama), and the
    layers beside them get a bias of zeros.

    Raises:
        ValueError: if a module has no dense form of the original size (a sliced layer, say), or the family has no place for a bias; nothing is
            changed then.
    """
    noted = getattr(model.config, "quantization_config", None)
    if not isinstance(noted, EchelonConfig):
        return model
    known = dict(model.named_modules())
    names = local_names(model, noted.modules)
    # A module inside another one is merged by that one.
    modules: dict[str, Any] = {n: known[n] for n in names if n in known and not any(n.startswith(outer + ".") for outer in names)}
    for name, module in modules.items():
        if not hasattr(module, "merge"):
            raise ValueError(f"{name} is a {type(module).__name__} and has no dense form of the original size")
    switches, blank = _room_for(model, [f"{name}.bias" for name, module in modules.items() if module.bias is not None])
    for name, module in modules.items():
        put(model, name, module.merge(), [(p, child) for p in model.modules() for child, m in p._modules.items() if m is module])
    for switch in switches:
        setattr(model.config, switch, True)
    for name in blank:
        linear: Any = model.get_submodule(name.removesuffix(".bias"))
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    detach(model)
    return model


def _room_for(model: PreTrainedModel, biases: list[str]) -> tuple[list[str], list[str]]:
    """Switches of the configuration under which the family has all these biases, and the biases beyond them that it then wants."""

    def names() -> set[str]:
        with torch.device("meta"):
            return set(type(model)(config).state_dict())

    config: Any = copy.deepcopy(model.config)
    del config.quantization_config
    before, switches = names(), []
    for switch in ("attention_bias", "mlp_bias"):
        lacking = set(biases) - names()
        if lacking and getattr(config, switch, None) is False:
            setattr(config, switch, True)
            if lacking - names() < lacking:
                switches.append(switch)
            else:
                setattr(config, switch, False)
    after = names()
    if homeless := sorted(set(biases) - after):
        told = f"{type(model).__name__} has no place for {homeless[0]}, a bias that compression added"
        raise ValueError(f"{told}; keep it factored, or compress without new biases")
    return switches, sorted(after - before - set(biases))

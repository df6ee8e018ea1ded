"""From an adapter of a pruned model to one of the whole model, and what that is worth."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from echelon.adapt.fitting import mean_loss
from echelon.adapt.prune_plan import PrunePlan
from echelon.calibrate.rows import row_length, training_rows
from echelon.data.files import folder_whole
from echelon.errors import UserError
from echelon.linalg.bases import seed_of
from echelon.linalg.checks import one_of


def recover(adapter_folder: str | os.PathLike[str], plan: PrunePlan, out: str | os.PathLike[str], *, fill: str = "zero", seed: int = 0) -> None:
    """Give a LoRA that was trained on a pruned model the size of the whole one, as a folder that stock PEFT loads on the original weights.

    The factor at the pruned side is spread over zeros, the other one is copied, so what is added is the same where something stays and nothing elsewhere.

    Args:
        adapter_folder: of the trained LoRA.
        plan: that the model was pruned by.
        out: folder to write, whole or absent.
        fill: what inputs that were pruned get in ``lora_A``: `zero`, or `normal`, numbers of variance 1 / r^2.
        seed: of these.

    Raises:
        UserError: if the folder holds no plain LoRA of a model that was pruned by this plan, or the result cannot be written.
    """
    one_of("fill", fill, ("zero", "normal"))
    try:
        config = PeftConfig.from_pretrained(os.fspath(adapter_folder))
        tensors = load_file(Path(adapter_folder) / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read a LoRA from {adapter_folder}: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"the adapter in {adapter_folder} is of type {config.peft_type}; only a plain LoRA can be recovered")
    made, found = plan.cuts(), {}
    for key, value in tensors.items():
        if _untrained(key, config):
            continue
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        name = name if part else name.rpartition(".")[0].removesuffix(".base_layer")
        cut = made.get(name)
        if cut is None:
            found[key] = value
            continue
        if part not in ("A.weight", "B.weight"):
            raise UserError(f"{key} in {adapter_folder} is no factor of a plain LoRA, but of a pruned layer; train without DoRA, biases, modules_to_save")
        side, kept, size = (1, cut.columns, cut.shape[1]) if part == "A.weight" else (0, cut.rows, cut.shape[0])
        if value.shape[side] != (size if kept is None else len(kept)):
            told = f"{key} in {adapter_folder} has {value.shape[side]} {('rows', 'columns')[side]}"
            raise UserError(f"{told}; on a model pruned by this plan it has {size if kept is None else len(kept)}")
        if kept is None:
            found[key] = value
            continue
        shape = (len(value), size) if side else (size, value.shape[1])
        spread = torch.zeros(shape, dtype=value.dtype)
        if fill == "normal" and side:
            generator = torch.Generator().manual_seed(seed_of(seed, name, "fill"))
            spread = (torch.randn(shape, generator=generator) / len(value)).to(value.dtype)
        found[key] = spread.index_copy(side, kept, value)
    config.base_model_name_or_path, config.revision, config.inference_mode = plan.base, plan.revision, True
    with folder_whole(out) as aside:
        save_file(found, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(os.fspath(aside))


def _untrained(key: str, config: LoraConfig) -> bool:
    """Whether PEFT has put a whole head or embedding of the pruned model beside its LoRA: it saves those of layers by the usual names."""
    module, _, kind = key.rpartition(".")
    saved = any(module.endswith(name) for name in config.modules_to_save or ())
    return kind == "weight" and not saved and ".lora_" not in key and "trainable_tokens" not in key


def evaluate_gap(
    full: PreTrainedModel, small: PeftModel, recovered: str | os.PathLike[str], data: Any, tokenizer: Any = None, *, seqlen: int = 512
) -> dict[str, float]:  # fmt: skip
    """What is lost and won on the way: the loss of the whole model, of the pruned one with its LoRA, and of the whole one with the recovered LoRA.

    The LoRA was trained beside other weights than it is used with, so only the last number says what it is worth.

    Args:
        full: the base model; as it was afterwards.
        small: the pruned model with its adapter.
        recovered: folder of the recovered adapter.
        data: anything that :func:`echelon.calibrate.calibration_batches` takes.
        tokenizer: for texts.
        seqlen: tokens a row.

    Returns:
        ``full``, ``pruned_lora``, ``full_lora``.
    """
    rows = training_rows(data, tokenizer, row_length(full, seqlen))
    found = {"full": mean_loss(full, rows), "pruned_lora": mean_loss(small, rows)}
    with torch.random.fork_rng():  # PEFT draws factors before it reads them
        tuned = PeftModel.from_pretrained(full, os.fspath(recovered))
    try:
        return found | {"full_lora": mean_loss(tuned, rows)}
    finally:
        tuned.unload()  # type: ignore[operator]

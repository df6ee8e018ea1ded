"""Training a language model by any optimizer or parameterisation, on transformers' Trainer.

Source of the protocol: "Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and Benchmarking", arXiv 2505.22922.
Differs from its code: documents are packed by default, held-out loss is a mean over tokens (theirs stands beside it on request), all methods see the same
batches in an order whose hash is reported, and memory is measured beside the formula. A run that was killed goes on bit for bit where the device computes
the same twice.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from echelon.data.files import folder_whole, read_text, write_whole
from echelon.data.rankgen_pairs import read_documents
from echelon.errors import UserError
from echelon.models.loading import LoadedModel, embedded_dir
from echelon.models.randomness import own_randomness
from echelon.models.reload import from_config
from echelon.train import checkpoints
from echelon.train.layers.base import LayerMethod, LearningRate
from echelon.train.layerwise import step_in_backward
from echelon.train.memory import formula
from echelon.train.optimizers.adamw import AdamW
from echelon.train.optimizers.base import OptimizerMethod, Stepper, processes
from echelon.train.rows import HeldOutLoss, Reading, Rows, document_rows, held_out_loss, packed_rows
from echelon.train.trainer import LanguageTrainer, MethodCallback, Tell, gathered, learning_rate, shard, trainer_arguments
from echelon.train.training import Training

MAY_CHANGE = {"save_every"}  # what may differ when a run goes on
CONFIGS = ("config.json", "adapter_config.json")  # without one of them a folder is none that loads
Prepare = Callable[[PreTrainedModel, Iterable[Mapping[str, Any]], float], None]


def new_model(name_or_path: str | os.PathLike[str], seed: int = 0, dtype: str = "float32") -> LoadedModel:
    """A model of random weights in the shape of a stored one, with its tokenizer; only config and tokenizer need be there.

    Args:
        name_or_path: a folder, a hub id, or ``embedded``.
        seed: of the weights.
        dtype: a torch dtype's name; ``auto`` for what the config states.

    Raises:
        UserError: if they cannot be read, it is no causal language model, or the dtype is none of torch's.
    """
    path = str(embedded_dir() / "lm") if str(name_or_path) == "embedded" else str(name_or_path)
    named = torch.float32 if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise UserError(f"dtype {dtype!r} is not a torch dtype; use auto, float32, bfloat16 or float16")
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        with own_randomness(seed):
            compressed = getattr(config, "quantization_config", None) is not None
            model: Any = from_config(config) if compressed else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot make a new model like {path!r}: {str(error).strip().splitlines()[0]}") from error
    kept = (config.dtype if dtype == "auto" else None) or named
    return LoadedModel(model.to(kept).eval(), tokenizer)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    out: str | os.PathLike[str],
    method: OptimizerMethod | LayerMethod | None = None,
    training: Training | None = None,
    *,
    held_out: Any = None,
    optimizer: OptimizerMethod | None = None,
    adapter: PeftConfig | None = None,
    prepare: Prepare | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_step: Tell | None = None,
) -> dict[str, Any]:
    """Train a causal language model, or an adapter on it; run again after a crash, it goes on from the last checkpoint.

    ``out`` becomes an ordinary model folder, or that of an adapter, which ``PeftModel.from_pretrained`` reads, with ``run.json`` (all knobs), ``log.jsonl``
    (a line a step) and ``result.json``. Under ``torchrun`` every process calls this, with the whole data; it trains with DistributedDataParallel, or with
    ``fsdp`` in shards, which the model in memory remains; the folder holds whole weights.

    Args:
        model: trained in place.
        tokenizer: of the model.
        data: a .jsonl with a ``text`` in each line, a .txt, a folder of these, or a list of texts.
        out: folder for all of it.
        method: an optimizer, or a parameterisation, which is swapped in; AdamW by default.
        training: the protocol.
        held_out: text like ``data`` to measure perplexity on, before and after.
        optimizer: that trains a parameterisation; its own by default.
        adapter: PEFT's config, or one of :mod:`echelon.adapt`, of an adapter that is put on the model and is all that the optimizer trains; PEFT settles its
            open knobs in place. What it draws from the global generator comes from the seed of the training.
        prepare: called before that with the model, batches of each row of the data once in the order of the training, and the learning rate behind the first
            step, for adapters that start from data.
        callbacks: of transformers' Trainer; the adapters of :mod:`echelon.adapt` need its ``AdapterCallback``.
        on_step: called with each line of the log and the number of steps as ``of``; training ends behind a step for which it returns true.

    Returns:
        What ``result.json`` holds: ``held_out`` {perplexity and byte_perplexity, before and after, tokens}, ``steps``, ``tokens`` (without pads),
        ``order`` (SHA-256 of the token ids as they were read), ``loss`` (mean of the last tenth), ``seconds``, ``median_step_seconds``,
        ``worst_step_seconds``, ``stalled_seconds`` (what steps above twice the median took beyond it) and ``memory``: bytes of weights, gradients and
        optimizer state, ``peak_rss`` of this process and ``peak_gpu``, and the ``formula``'s count of numbers.

    Raises:
        UserError: if the data is too short or cannot be read, the model is no causal one, the loss or a gradient is no number, ``out`` holds a run with other
            knobs, data or number of processes, or its checkpoints are damaged. Earlier checkpoints stay.
        ValueError: if the method finds no target, or a knob is out of range.
    """
    out, method, training = Path(out), method or AdamW(), training or Training()
    _refuse(model, method, optimizer, adapter, training)
    arguments = trainer_arguments(out, training)
    world, rank = arguments.world_size, arguments.process_index
    rows = _rows("data", data, tokenizer, training)
    reading = Reading(rows, training.steps * training.batch_size * world, training.seed)
    aside = _rows("held_out", held_out, tokenizer, training).first(training.eval_tokens) if held_out is not None else None
    if adapter is not None:
        adapter.task_type = adapter.task_type or "CAUSAL_LM"
    told = {
        "method": _described(method), "optimizer": _described(optimizer), "adapter": _described_adapter(adapter),
        "training": dataclasses.asdict(training), "processes": world,
        "model": _fingerprint(model), "order": reading.digest(), "held_out": None if aside is None else Reading(aside, len(aside), 0).digest(),
    }  # fmt: skip
    _claim(out, json.loads(json.dumps(told)))
    if (out / "result.json").is_file():
        return json.loads(read_text(out / "result.json"))
    micro = training.batch_size // training.accumulate
    look: Callable[[Any], HeldOutLoss] = lambda model: held_out_loss(model, aside, micro, training.bf16)  # type: ignore[arg-type]  # noqa: E731
    was_training, cached = model.training, model.config.use_cache
    model.to(arguments.device)  # type: ignore[arg-type]
    before = _before(out, lambda: look(model), rank) if aside is not None else None
    constant: frozenset[int] = frozenset()
    if adapter is not None:
        if prepare is not None:
            mine = Subset(Reading(rows, len(rows), training.seed), range(rank, len(rows), world))
            rate = method.lr * LearningRate(training.steps, round(training.warmup * training.steps), training.floor)(1)
            with own_randomness(training.seed):
                prepare(model, DataLoader(mine, batch_size=micro), rate)
        model, constant = _adapted(model, adapter, training.seed)  # type: ignore[assignment]  # what trainer and file need, both have
    model = method.prepare(model) if isinstance(method, OptimizerMethod) else model
    counted: dict[str, float] | None = None
    with contextlib.suppress(ValueError):  # an optimizer that is not ours
        counted = dataclasses.asdict(formula(model, method, optimizer))
    if isinstance(method, LayerMethod):
        method.convert(model)
    resume = checkpoints.newest(out)
    if resume is not None:
        checkpoints.restore(resume, model, constant)
    if rank == 0:
        checkpoints.remove_leftovers(out)
        _shorten(out / "log.jsonl", checkpoints.step_of(resume) if resume else 0)
    if training.fsdp:
        shard(model)
    chosen = optimizer.optimizer(model) if optimizer is not None else method.optimizer(model)
    held = [0]  # bytes of the optimizer's state at most: a method may drop it behind the last step
    chosen.register_step_post_hook(lambda stepped, *_: held.append(max(held.pop(), _state_bytes(stepped))))
    unhook = None
    if training.layerwise:
        assert isinstance(chosen, Stepper)
        unhook = step_in_backward(chosen, training.accumulate, max_parameter_norm=training.max_parameter_norm)
    try:
        with own_randomness(training.seed):
            trainer = LanguageTrainer(
                model, arguments, train_dataset=reading, optimizers=(chosen, learning_rate(chosen, method, training.steps, training.warmup, training.floor)),
                callbacks=[*([MethodCallback(method)] if isinstance(method, LayerMethod) else []), *callbacks],
            )  # fmt: skip
            trainer.begin(method, training, out, look if aside is not None else None, on_step, constant)
            torch.manual_seed(training.seed + rank)  # dropout differs between processes
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"step {trainer.state.global_step + 1}: {error} (earlier checkpoints are intact)") from error
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    finally:
        model.config.use_cache = cached
        model.train(was_training)
        if unhook is not None:
            unhook()
    memory = _memory(model, held[0] or _state_bytes(chosen), training.layerwise)
    for parameter in model.parameters():
        parameter.grad = None
    if isinstance(method, LayerMethod):
        method.finish(model)
    steps = trainer.state.global_step
    result: dict[str, Any] = {"steps": steps, "processes": world, "tokens": reading.tokens(steps * training.batch_size * world), "order": told["order"]}
    result |= _timings(out / "log.jsonl") | {"memory": memory | {"formula": counted}}
    if before is not None:
        result["held_out"] = _perplexities(before, look(model), training.legacy_eval)
    whole = gathered(model)[0] if training.fsdp else None
    if rank == 0:
        _keep(out, model, tokenizer, whole)
        write_whole(out / "result.json", json.dumps(result, indent=2) + "\n")
        for folder in checkpoints.folders(out):
            checkpoints.remove(folder)
    if world > 1:
        dist.barrier()
    return result


def _refuse(model: Any, method: Any, optimizer: Any, adapter: Any, training: Training) -> None:
    """Raises: UserError: for what does not go together."""
    masked = getattr(model, "loss_type", None) not in (None, "ForCausalLM")
    if masked or getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} is no causal language model; only these can be trained here")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and training.seqlen > limit:
        raise UserError(f"seqlen is {training.seqlen}; the model takes at most {limit} tokens")
    if optimizer is not None and not isinstance(method, LayerMethod):
        raise UserError("optimizer is for a parameterisation; this method is an optimizer itself")
    if training.layerwise and isinstance(method, LayerMethod) and type(method).before_update is not LayerMethod.before_update:
        raise UserError(f"layerwise does not go with {type(method).__name__}, which looks at all gradients together before the step")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise UserError("accelerate's own FSDP is not used here; start with torchrun and set fsdp")
    if adapter is not None and isinstance(method, LayerMethod):
        raise UserError(f"an adapter does not go with {type(method).__name__}, which swaps layers itself; give an optimizer as method")
    if adapter is not None and (training.layerwise or training.fsdp):
        raise UserError(f"{'layerwise' if training.layerwise else 'fsdp'} does not go with an adapter, whose gradients and state are small")
    if training.fsdp and isinstance(method, LayerMethod):
        raise UserError(f"fsdp does not go with {type(method).__name__}, whose layers change between steps; it is for optimizers")
    if training.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise UserError("fsdp is for several processes; start with torchrun")


def _rows(what: str, data: Any, tokenizer: PreTrainedTokenizerBase, training: Training) -> Rows:
    texts = list(read_documents(os.fspath(data)).values()) if isinstance(data, (str, os.PathLike)) else [str(text) for text in data]
    try:
        return (packed_rows if training.pack else document_rows)(texts, tokenizer, training.seqlen)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _described(method: Any) -> dict[str, Any] | None:
    return None if method is None else {"name": getattr(method, "method_name", type(method).__name__), **dataclasses.asdict(method)}


def _described_adapter(adapter: PeftConfig | None) -> dict[str, Any] | None:
    if adapter is None:
        return None
    name = getattr(adapter, "method_name", str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower())
    return {"name": name} | {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.to_dict().items()}


def _adapted(model: PreTrainedModel, adapter: PeftConfig, seed: int) -> tuple[PeftModel, frozenset[int]]:
    """The model with an adapter, and the ids of parameters that are and stay as the model had them (PiSSA changes some)."""
    before = {id(p): (p.data_ptr(), p._version) for p in model.parameters()}
    with own_randomness(seed):
        made = get_peft_model(model, adapter)
    return made, frozenset(id(p) for p in made.parameters() if not p.requires_grad and before.get(id(p)) == (p.data_ptr(), p._version))


@torch.no_grad()
def _fingerprint(model: PreTrainedModel) -> str:
    """Of the architecture and a sample of each weight."""
    made = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        made.update(flat[:: max(1, len(flat) // 64)].double().cpu().numpy().tobytes())
    return made.hexdigest()


def _claim(out: Path, told: dict[str, Any]) -> None:
    """Take the folder for this run, or find that it is this run's.

    Raises:
        UserError: if it holds another one.
    """
    begun = (out / "log.jsonl").is_file() or (out / "result.json").is_file() or bool(checkpoints.folders(out))
    if begun and (out / "run.json").is_file():
        there = json.loads(read_text(out / "run.json"))
        for key, value in _flat(told).items():
            other = _flat(there).get(key)
            if other != value and key.rpartition(".")[2] not in MAY_CHANGE:
                named = {"model": "another model", "order": "other data", "held_out": "another held-out text"}
                what = named.get(key, f"{key} {other!r} where this one has {value!r}")
                raise UserError(f"{out} holds a run with {what}; give the same, choose another folder, or remove it")
    elif not begun and any((out / name).is_file() for name in CONFIGS):
        raise UserError(f"{out} holds a model that this did not make; give a new folder")
    if processes() > 1:
        dist.barrier()  # all have looked
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_whole(out / "run.json", json.dumps(told, indent=2) + "\n")


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{key}.{name}": v for key, value in told.items() if isinstance(value, dict) for name, v in value.items()} | {
        key: value for key, value in told.items() if not isinstance(value, dict)
    }


def _before(out: Path, look: Callable[[], HeldOutLoss], rank: int) -> HeldOutLoss:
    """The held-out loss of the model as it came, measured once."""
    kept = out / "before.json"
    if kept.is_file():
        return HeldOutLoss(**json.loads(read_text(kept)))
    found = look()
    if rank == 0:
        write_whole(kept, json.dumps(dataclasses.asdict(found)))
    return found


def _shorten(log: Path, steps: int) -> None:
    """Lines behind the checkpoint are made again."""
    if log.is_file():
        write_whole(log, "".join(line + "\n" for line in read_text(log).splitlines()[:steps]))


def _timings(log: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in read_text(log).splitlines()]
    seconds = [line["seconds"] for line in lines]
    median = statistics.median(seconds)
    late = [line["loss"] for line in lines[-max(1, len(lines) // 10) :]]
    return {
        "loss": sum(late) / len(late), "seconds": round(sum(seconds), 3), "median_step_seconds": median, "worst_step_seconds": max(seconds),
        "stalled_seconds": round(sum(each - median for each in seconds if each > 2 * median), 4),
    }  # fmt: skip


def _bytes(tensors: Iterable[Any]) -> int:
    """Of tensors, each counted once; of sharded ones, this process's part."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in {id(t): t for t in tensors}.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in own)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return _bytes(value for state in optimizer.state.values() for value in state.values())


def _memory(model: nn.Module, state: int, layerwise: bool) -> dict[str, Any]:
    trained = [_bytes([p]) for p in model.parameters() if p.requires_grad]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    made = {
        "weights": _bytes(model.state_dict(keep_vars=True).values()),
        "gradients": max(trained, default=0) if layerwise else sum(trained),
        "optimizer_state": state,
        "peak_rss": peak,
    }  # fmt: skip
    return made | ({"peak_gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def _perplexities(before: HeldOutLoss, after: HeldOutLoss, legacy: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"tokens": after.tokens}
    for name, found in (("_before", before), ("", after)):
        made |= {f"perplexity{name}": found.perplexity(), f"byte_perplexity{name}": found.byte_perplexity()}
        if legacy:
            made[f"legacy_perplexity{name}"] = math.exp(min(found.legacy, 700.0))
    return made


def _keep(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor] | None) -> None:
    """Put the finished model or adapter into the folder, its config last."""
    ready = out / ".model"
    with folder_whole(ready) as aside:
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
    for file in sorted(ready.iterdir(), key=lambda file: file.name in CONFIGS):
        os.replace(file, out / file.name)
    ready.rmdir()

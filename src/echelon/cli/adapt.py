"""``echelon adapt``: train an adapter on a language model."""

from collections.abc import Sequence
from dataclasses import dataclass

from echelon.cli.options import parse
from echelon.cli.train_language import fit_and_tell
from echelon.errors import UserError
from echelon.train.training import Training

KINDS = ("adapter", "baseline")


@dataclass(frozen=True)
class Options(Training):
    """What to adapt, on what, for how long, and where to put the adapter.

    Attributes:
        model: the model, which stays as it is: a folder, a hub id, or `embedded`.
        data: a .jsonl with a `text` in each line, a .txt, or a folder of these.
        out: folder for the adapter, which PEFT loads; a run that was interrupted goes on there.
        held_out: text like --data to measure perplexity on, before and after.
        export_lora: folder for the same function as a plain LoRA, for those who have PEFT alone.
        lr: learning rate of AdamW.
        weight_decay: of AdamW, times the learning rate.
        dtype: of the model's weights: float32, bfloat16, or `auto` as they are stored; the adapter's own are float32.
        json: print the result as JSON.
    """

    model: str = "embedded"
    data: str | None = None
    out: str | None = None
    held_out: str | None = None
    export_lora: str | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    dtype: str = "auto"
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, method, _ = parse("adapt", "Train an adapter on a language model.", Options, KINDS, arguments, default_method="lora")
    for name, what in (("data", "text to train on"), ("out", "a folder for the adapter")):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing; give {what}")
    from echelon.adapt import AdapterCallback, DeltaConfig, load_adapter
    from echelon.models import load
    from echelon.models.loading import is_ctr
    from echelon.train.optimizers.adamw import AdamW

    ours = isinstance(method, DeltaConfig)
    if options.export_lora is not None and not ours:
        raise UserError(f"--export_lora is not for {method.method_name}, which is PEFT's own: --out is read without echelon already")
    if is_ctr(options.model):
        raise UserError(f"--model {options.model} is a click model; adapters are for language models")
    optimizer = AdamW(lr=options.lr, weight_decay=options.weight_decay)
    model, tokenizer = load(options.model, options.dtype)
    status = fit_and_tell(
        options, model, tokenizer, optimizer, method.method_name, adapter=method if ours else method.config(), prepare=method.start_from if ours else None,
        callbacks=[AdapterCallback()],
    )  # fmt: skip
    if status == 0 and options.export_lora is not None:
        del model  # one is enough in memory
        load_adapter(load(options.model, options.dtype).model, options.out).save_lora(options.export_lora)
    return status

"""``echelon compress``: make a model smaller, or, with a compensator as ``--method``, give back what that took."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon import registry
from echelon.cli.arguments import OneLineParser
from echelon.cli.options import parse
from echelon.cli.progress import progress
from echelon.errors import UserError


@dataclass
class Options:
    """What to compress, on what, to which size, and where to put it.

    Attributes:
        model: the model: a folder, a hub id, or `embedded`.
        data: calibration text: a .jsonl with a `text` in each line, a .txt, or a folder of these; for a click model its log, a .csv.
        out: folder for the compressed model; it appears whole.
        parameters: how many parameters the whole model may have, or a share of what it has if at most 1; sets the method's size knob.
        bytes: the same for the stored bytes.
        eval: text to measure perplexity on, before and after; for a click model a log to measure AUC and logloss on, without which --data is taken.
        statistics: file of the calibration's statistics: read if it is there, written from --data if not; several methods can share it.
        stream: read, compress and write one block at a time, for models that do not fit into memory; killed, the same command goes on.
        work: with --stream, folder of what is half done, on the disk of --out; by default a hidden one beside it.
        recover_steps: afterwards, fine-tune for so many steps on --data what the method leaves trainable (for welore its low-rank layers).
        recover_lr: learning rate of that.
        seed: of everything drawn at random.
        json: print the report as JSON.
    """

    model: str = "embedded"
    data: str | None = None
    out: str | None = None
    parameters: float | None = None
    bytes: float | None = None
    eval: str | None = None
    statistics: str | None = None
    stream: bool = False
    work: str | None = None
    recover_steps: int = 0
    recover_lr: float = 5e-5
    seed: int = 0
    json: bool = False


@dataclass
class CompensationOptions:
    """What to repair, what it was before, on what, and where to put the adapter.

    Attributes:
        model: the compressed model: a folder or a hub id.
        original: the model that it was made from: a folder, a hub id, or `embedded`.
        data: calibration text: a .jsonl with a `text` in each line, a .txt, or a folder of these.
        task_data: the same from the task that matters, for a share of the rows.
        out: folder for the adapter, a PEFT LoRA on the compressed model; it appears whole.
        seed: of everything drawn at random.
        json: print the report as JSON.
    """

    model: str | None = None
    original: str | None = None
    data: str | None = None
    task_data: str | None = None
    out: str | None = None
    seed: int = 0
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    first = OneLineParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    compensators = [card.name for card in registry.cards("compensator")]
    if first.parse_known_args(list(arguments))[0].method in compensators:
        return compensate(arguments)
    about = f"Make a model smaller. To repair a compressed one, give as --method one of: {', '.join(compensators)}."
    options, compressor, _ = parse("compress", about, Options, "compressor", arguments, default_method="svd")
    if options.out is None:
        raise UserError("--out is missing; give a folder for the compressed model")
    if compressor.needs_data and options.data is None and options.statistics is None:
        raise UserError(f"--data is missing; {compressor.method_name} needs calibration text")
    if options.recover_steps < 0 or not options.recover_lr > 0:
        raise UserError(f"--recover_steps is {options.recover_steps} and --recover_lr {options.recover_lr}; they must be at least 0 and above 0")
    if options.recover_steps and options.data is None:
        raise UserError("--data is missing; --recover_steps needs text to fine-tune on")
    if options.stream:
        return _stream(options, compressor)
    if options.work is not None:
        raise UserError("--work is for --stream")
    from echelon.compress.export import refuse_other
    from echelon.data.rankgen_pairs import read_documents
    from echelon.models import load
    from echelon.models.loading import is_ctr

    refuse_other(options.out)
    texts = list(read_documents(options.eval).values()) if options.eval is not None and not is_ctr(options.model) else None
    model, tokenizer = load(options.model)
    evaluate: Callable[[Any], float | dict[str, float]] | None = None
    if texts is not None:
        from echelon.evaluate import perplexity

        evaluate = lambda model: perplexity((model, tokenizer), texts).value  # noqa: E731
    elif is_ctr(options.model):
        if options.recover_steps:
            raise UserError("--recover_steps is not for click models; it predicts the next token")
        if options.statistics is not None:
            raise UserError("--statistics is not for click models; their log is read each time")
        from echelon.models.ctr import click_metrics

        log: Any = options.eval or options.data
        if log is not None:
            reader: Any = tokenizer  # a click model comes with the schema of its log in the tokenizer's place
            clicks = reader.read(log)
            evaluate = lambda model: click_metrics(model, clicks)  # noqa: E731
    if options.statistics is not None and not Path(options.statistics).exists():
        if options.data is None:
            raise UserError(f"--statistics {options.statistics} is not there; give --data to collect them from")
        from echelon.calibrate import collect
        from echelon.compress import linear_targets

        shown = compressor.calibration(model, options.data, tokenizer, options.seed)
        collect(model, linear_targets(model)[0], shown).save(options.statistics)
    with progress() as bar:
        task = bar.add_task(f"compressing by {compressor.method_name}", total=None)
        made = compressor.compress(
            model, options.data, tokenizer, seed=options.seed, statistics=options.statistics, parameters=options.parameters, bytes=options.bytes,
            evaluate=evaluate, on_progress=lambda entry: bar.update(task, description=entry["step"], completed=entry["done"], total=entry["of"]),
        )  # fmt: skip
        if options.recover_steps:
            from echelon.compress import recover

            task = bar.add_task("recovery", total=options.recover_steps)
            told = recover(
                made.model, options.data, tokenizer, steps=options.recover_steps, learning_rate=options.recover_lr, seed=options.seed,
                on_progress=lambda entry: bar.update(task, description=f"recovery, loss {entry['loss']:.3f}", completed=entry["done"]),
            )  # fmt: skip
            made.report.details["recovery"] = told | {"perplexity_before": made.report.perplexity_after}
            if evaluate is not None:
                made.report.perplexity_after = evaluate(made.model)  # type: ignore[assignment]
        made.save(options.out, tokenizer)
    print(json.dumps({"out": options.out, **made.report.to_dict()}, indent=2) if options.json else f"{options.out}: {made.report.summary()}")
    return 0


def _stream(options: Options, compressor: Any) -> int:
    """The verb with --stream."""
    for name, given in (("eval", options.eval), ("statistics", options.statistics), ("recover_steps", options.recover_steps)):
        if given:
            raise UserError(f"--{name} does not go with --stream: it needs the whole model in memory")
    from echelon.compress import compress_checkpoint

    with progress() as bar:
        task = bar.add_task(f"compressing by {compressor.method_name}", total=None)
        report = compress_checkpoint(
            options.model, compressor, str(options.out), options.data, work=options.work, seed=options.seed, parameters=options.parameters, bytes=options.bytes,
            on_progress=lambda entry: bar.update(task, description=entry["step"], completed=entry["done"], total=entry["of"]),
        )  # fmt: skip
    print(json.dumps({"out": options.out, **report.to_dict()}, indent=2) if options.json else f"{options.out}: {report.summary()}")
    return 0


def compensate(arguments: Sequence[str]) -> int:
    """The verb with a compensator as its method."""
    options, compensator, _ = parse("compress", "Give back what compression took, as an adapter.", CompensationOptions, "compensator", arguments)
    for name, what in (("model", "the compressed model"), ("original", "the model that it was made from"), ("out", "a folder for the adapter")):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing; give {what}")
    if compensator.needs_data and options.data is None and options.task_data is None:
        raise UserError(f"--data is missing; {compensator.method_name} needs calibration text")
    from echelon.compress.export import refuse_other
    from echelon.models import load

    refuse_other(options.out, "adapter_config.json")
    original, compressed = load(options.original), load(options.model)
    with progress() as bar:
        task = bar.add_task(f"compensating by {compensator.method_name}", total=None)
        made = compensator.compensate(
            original, compressed, options.data, compressed.tokenizer or original.tokenizer, task_data=options.task_data, seed=options.seed,
            on_progress=lambda entry: bar.update(task, description=entry["step"], completed=entry["done"], total=entry["of"]),
        )  # fmt: skip
        made.save(options.out, compressed.tokenizer or original.tokenizer)
    print(json.dumps({"out": options.out, **made.report.to_dict()}, indent=2) if options.json else f"{options.out}: {made.report.summary()}")
    return 0

"""``echelon train``: train a ranker or a click model on your own data, or a language model by any optimizer or parameterisation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echelon.cli.arguments import OneLineParser
from echelon.cli.options import kind_of, parse
from echelon.cli.progress import progress
from echelon.errors import UserError

KINDS = ("trainer", "optimizer", "layer")


@dataclass
class Options:
    """What to train, on what, and where to put it.

    Attributes:
        model: the model to start from: a folder, a hub id, or `embedded`.
        data: a .jsonl with a `text` in each line, a .txt, or a folder of these.
        out: folder for the result; a run that was interrupted goes on there.
        seed: of everything drawn at random.
        json: print the result as JSON.
    """

    model: str = "embedded"
    data: str | None = None
    out: str | None = None
    seed: int = 0
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    first = OneLineParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="rankgen")
    kind = kind_of(first.parse_known_args(list(arguments))[0].method, KINDS)
    if kind != "trainer":
        return _language(arguments)
    about = "Train a method on your own data; an optimizer or a layer as --method trains a language model, and has options of its own."
    options, trainer, _ = parse("train", about, Options, KINDS, arguments, default_method="rankgen")
    _needs(options)
    with progress() as bar:
        task = bar.add_task(f"training {trainer.method_name}", total=None)

        def show(entry: dict[str, Any]) -> None:
            if "rows" in entry:
                bar.update(task, description="writing negatives", completed=entry["rows"], total=entry["of"])
            else:
                bar.update(task, description=f"loss {entry['loss']:.3f}", completed=entry["step"], total=entry["of"])

        result = trainer.train(options.model, options.data, options.out, options.seed, show)
        if trainer.method_name == "hyperfit":
            from echelon.evaluate.hyperfitting import write_report

            result |= write_report(trainer, options.model, options.data, options.out, options.seed, lambda step: bar.update(task, description=step))
    if options.json:
        print(json.dumps({"out": options.out, **result}, indent=2))
    else:
        print(f"{options.out}: " + ", ".join(f"{name} {value}" for name, value in result.items()))
    return 0


def _needs(options: Any) -> None:
    if options.data is None or options.out is None:
        raise UserError(f"--{'data' if options.data is None else 'out'} is missing; train needs --data and --out")


def _language(arguments: Sequence[str]) -> int:
    """The verb with an optimizer or a parameterisation as its method."""
    from echelon.cli.train_language import LanguageOptions, fit_and_tell

    options, method, _ = parse("train", "Train a language model.", LanguageOptions, KINDS, arguments, default_method="rankgen")
    _needs(options)
    from echelon.models import load
    from echelon.models.loading import is_ctr
    from echelon.train.language import new_model

    if is_ctr(options.model):
        raise UserError(f"--model {options.model} is a click model; train it with --method ctr")
    model, tokenizer = new_model(options.model, options.seed, options.dtype) if options.scratch else load(options.model, options.dtype)
    return fit_and_tell(options, model, tokenizer, method, method.method_name)

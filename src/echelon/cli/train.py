"""``echelon train``: train a method on your own data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echelon.cli.options import parse
from echelon.cli.progress import progress
from echelon.errors import UserError


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
    options, trainer, _ = parse("train", "Train a method on your own data.", Options, "trainer", arguments, default_method="rankgen")
    if options.data is None or options.out is None:
        raise UserError(f"--{'data' if options.data is None else 'out'} is missing; train needs --data and --out")
    with progress() as bar:
        task = bar.add_task(f"training {trainer.method_name}", total=None)

        def show(entry: dict[str, Any]) -> None:
            if "rows" in entry:
                bar.update(task, description="writing negatives", completed=entry["rows"], total=entry["of"])
            else:
                bar.update(task, description=f"loss {entry['loss']:.3f}", completed=entry["step"], total=entry["of"])

        result = trainer.train(options.model, options.data, options.out, options.seed, show)
    if options.json:
        print(json.dumps({"out": options.out, **result}, indent=2))
    else:
        print(f"{options.out}: " + ", ".join(f"{name} {value}" for name, value in result.items()))
    return 0

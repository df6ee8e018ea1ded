"""``echelon edit``: take texts out of a language model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from echelon.cli.options import parse
from echelon.cli.progress import progress
from echelon.errors import UserError


@dataclass
class Options:
    """What to forget, what must stay, and where to put the result.

    Attributes:
        model: the model: a folder, a hub id, or `embedded`.
        forget: what to forget: a .jsonl with a `question` and an `answer`, or a `text`, in each line.
        retain: what must stay, in the same form and of the same kind as what is forgotten.
        out: folder for the result; it appears whole.
        seed: of everything drawn at random.
        json: print the report as JSON.
    """

    model: str = "embedded"
    forget: str | None = None
    retain: str | None = None
    out: str | None = None
    seed: int = 0
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, editor, _ = parse("edit", "Take texts out of a language model.", Options, "editor", arguments, default_method="loku")
    for name, what in (("forget", "what is to be forgotten"), ("retain", "what must stay"), ("out", "a folder for the result")):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing; give {what}")
    from echelon.compress.export import refuse_other
    from echelon.models import load
    from echelon.models.loading import is_ctr

    refuse_other(str(options.out), "config.json" if editor.export == "merged" else "adapter_config.json")
    if is_ctr(options.model):
        raise UserError(f"--model {options.model} is a click model; editors are for language models")
    model = load(options.model)
    with progress() as bar:
        task = bar.add_task(f"editing by {editor.method_name}", total=None)
        made = editor.edit(
            model, options.forget, options.retain, seed=options.seed,
            on_progress=lambda entry: bar.update(task, description=entry["step"], completed=entry["done"], total=entry["of"]),
        )  # fmt: skip
        made.save(options.out, model.tokenizer)
    print(json.dumps({"out": options.out, **made.report}, indent=2) if options.json else f"{options.out}: {made.summary()}")
    return 0

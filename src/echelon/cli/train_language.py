"""The options of ``echelon train`` with an optimizer or a parameterisation, and the run that they share with ``echelon adapt``."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.cli.progress import progress
from echelon.train.training import Training


@dataclass(frozen=True)
class LanguageOptions(Training):
    """What to train, on what, for how long, and where to put it.

    Attributes:
        model: the model to start from: a folder, a hub id, or `embedded`.
        data: a .jsonl with a `text` in each line, a .txt, or a folder of these.
        out: folder for the model; a run that was interrupted goes on there.
        held_out: text like --data to measure perplexity on, before and after.
        scratch: begin with random weights in the shape of --model: pre-training.
        dtype: of the weights: float32, bfloat16, or `auto` as they are stored (in bfloat16 small updates get lost, see --method.rounding).
        json: print the result as JSON.
    """

    model: str = "embedded"
    data: str | None = None
    out: str | None = None
    held_out: str | None = None
    scratch: bool = False
    dtype: str = "float32"
    json: bool = False


def fit_and_tell(options: Any, model: Any, tokenizer: Any, method: Any, named: str, **more: Any) -> int:
    """Train as options say that hold all of ``Training``, and print the result; the exit status.

    Args:
        options: with ``data``, ``out``, ``held_out`` and ``json``.
        model: trained in place.
        tokenizer: of the model.
        method: see :func:`echelon.train.language.fit`.
        named: what the progress bar calls it.
        more: further arguments of ``fit``.
    """
    from echelon.train import checkpoints
    from echelon.train.language import fit

    training = Training(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Training)})
    with progress() as bar:
        task = bar.add_task(f"training by {named}", total=options.steps)
        try:
            result = fit(
                model, tokenizer, options.data, options.out, method, training, held_out=options.held_out, **more,
                on_step=lambda entry: bar.update(task, description=f"loss {entry['loss']:.3f}", completed=entry["step"]),
            )  # fmt: skip
        except KeyboardInterrupt:
            kept = checkpoints.folders(Path(options.out))
            after = f"behind step {checkpoints.step_of(kept[0])}" if kept else "from the start, there was no checkpoint yet"
            print(f"echelon: interrupted; the same command goes on {after}", file=sys.stderr)
            return 130
    print(json.dumps({"out": options.out, **result}, indent=2) if options.json else f"{options.out}: {_summary(result)}")
    return 0


def _summary(result: dict[str, Any]) -> str:
    said = [f"loss {result['loss']:.4f}", f"steps {result['steps']}", f"tokens {result['tokens']}"]
    if "held_out" in result:
        shown = result["held_out"]
        said += [f"perplexity {shown['perplexity_before']:.3f} to {shown['perplexity']:.3f}"]
        said += [f"per byte {shown['byte_perplexity_before']:.4f} to {shown['byte_perplexity']:.4f}"]
        said += [f"with the papers' bias {shown['legacy_perplexity']:.3f}"] if "legacy_perplexity" in shown else []
    said += [f"{name.replace('_', ' ')} {result['memory'][name] / 1e6:.1f} MB" for name in ("weights", "optimizer_state", "peak_rss")]
    return ", ".join([*said, f"seconds {result['seconds']:.1f}"])

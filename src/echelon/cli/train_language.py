"""The options of ``echelon train`` with an optimizer or a parameterisation."""

import dataclasses
from dataclasses import dataclass

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

    def training(self) -> Training:
        """The protocol alone."""
        return Training(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Training)})

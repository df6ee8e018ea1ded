"""The knobs that all tuners have, as PEFT's shared code expects them, and what a saved adapter says about itself."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from echelon.adapt.registration import peft_type
from echelon.data.files import write_whole
from echelon.linalg.checks import number, one_of, whole

_HEADING = "## Loading this adapter"
_CARD = """{heading}

PEFT knows this type of adapter (`{kind}`) once echelon is imported:

```python
import echelon.adapt
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

Without that import PEFT stops with `KeyError: '{kind}'`. `model.save_lora("folder")` writes the same function as a plain LoRA, which needs PEFT alone.
"""


@dataclass
class DeltaConfig(PeftConfig):
    """A PEFT config of a tuner that adds a product of two factors to linear layers.

    Attributes:
        task_type: what the model is for, as PEFT names it, such as `CAUSAL_LM`.
        peft_type: set by the config itself.
        auto_mapping: set by PEFT when it saves.
        peft_version: set by PEFT.
        base_model_name_or_path: set by PEFT.
        revision: of the base model.
        inference_mode: whether the adapter is loaded without being trained.
        r: rank, at least 1.
        lora_alpha: numerator of the scale of what is added, above 0.
        lora_dropout: share of the inputs that are zero while training, in [0, 1); drawn like the model's own dropout.
        target_modules: linear layers that are adapted: names or their ends, a regular expression for whole names, or `all-linear`; by default what PEFT takes
            for LoRA on a model of this type.
        exclude_modules: names, their ends, or a regular expression, of those that are not.
        rank_pattern: other ranks for some layers, by name, end of name or regular expression.
        alpha_pattern: other values of lora_alpha in the same way.
        fan_in_fan_out: accepted as other tuners have it; how a layer stores its matrix is seen from the layer.
        bias: which biases train: `none`, `all`, or `lora_only` for those of the adapted layers.
        modules_to_save: modules that train as a whole and are saved.
        init_weights: whether the adapter starts as the method says; otherwise from random numbers, for tests.
        layers_to_transform: indices of the blocks that are adapted, all by default.
        layers_pattern: name of the list of blocks, where it is an unusual one.
        target_parameters: must stay null: only plain LoRA adapts parameters that are not a linear layer's.
        seed: of all that is drawn, at least 0.
    """

    task_type: str | None = None  # type: ignore[assignment]
    peft_type: str | None = None  # type: ignore[assignment]
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] | set[str] | None = None
    exclude_modules: str | list[str] | set[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: Any = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    target_parameters: list[str] | None = None
    seed: int = 0

    peft_name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        super().__post_init__()
        self.peft_type = peft_type(self.peft_name)
        whole("r", self.r, 1)
        whole("seed", self.seed, 0, 2**63 - 1)
        number("lora_dropout", self.lora_dropout, 0, 1, open_high=True)
        one_of("bias", self.bias, ("none", "all", "lora_only"))
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for pattern, rank in self.rank_pattern.items():
            whole(f"rank_pattern[{pattern!r}]", rank, 1)
        given = {} if self.lora_alpha is None and type(self).lora_alpha is None else {"lora_alpha": self.lora_alpha}
        alphas = given | {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            number(name, alpha, 0, float("inf"), open_low=True, open_high=True)
        for field in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, field), list | tuple):
                setattr(self, field, set(getattr(self, field)))
        if self.target_parameters:
            raise ValueError(f"target_parameters is {self.target_parameters!r}; {self.peft_name} adapts linear layers, not experts; use LoraConfig")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform goes with a list of target_modules; put the indices into the regular expression")
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError(f"layers_pattern is {self.layers_pattern!r}; it needs layers_to_transform")

    def rank_of(self, name: str) -> int:
        """Rank of the layer of this name."""
        ranks: dict[str, int] = self.rank_pattern or {}
        return ranks.get(get_pattern_key(list(ranks), name), self.r)

    def alpha_of(self, name: str) -> float:
        """``lora_alpha`` of the layer of this name."""
        alphas: dict[str, float] = self.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), name), self.lora_alpha)
        return self.usual_alpha(self.rank_of(name)) if alpha is None else alpha

    def usual_alpha(self, rank: int) -> float:
        """``lora_alpha`` of a layer of this rank where none is given, for tuners whose default is null: its rank, which makes the scale 1."""
        return float(rank)

    def start_from(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], learning_rate: float) -> None:
        """Look at training data, where the method starts from it: called before an adapter of this config is put on a model.

        Args:
            model: the base model, which stays as it is.
            batches: of the training to come, with labels.
            learning_rate: behind its first step.
        """

    def save_pretrained(self, save_directory: str | os.PathLike[str], **arguments: Any) -> None:
        """Write the config as PEFT does, and how to load the adapter into the folder's model card."""
        super().save_pretrained(os.fspath(save_directory), **arguments)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else "---\nlibrary_name: peft\n---\n"
        if _HEADING not in text:
            section = _CARD.format(heading=_HEADING, kind=peft_type(self.peft_name).value)
            write_whole(card, text.rstrip() + "\n\n" + section)

"""Taking things out of a model that was trained on them.

::

    from echelon.edit import LoKU

    made = LoKU(r=8, epochs=5).edit(load("folder"), "forget.jsonl", "retain.jsonl")
    made.save("forgotten")  # a LoRA for the model as it was

The losses (:mod:`echelon.edit.losses`) and :class:`UnlearnTrainer` also work without the method, and `fila_init` with any loss.
"""

import importlib
from typing import Any

_LAZY = {
    "Edited": "loku", "LoKU": "loku", "PairedRows": "rows", "Start": "fila", "UnlearnTrainer": "trainer", "collated_pairs": "rows", "fila_factors": "fila",
    "fila_init": "fila", "fisher": "fila", "gradient_ascent_loss": "losses", "gradient_difference_loss": "losses", "inverted_hinge_loss": "losses",
    "kl_loss": "losses", "npo_loss": "losses", "row_importance": "fila", "sequence_log_probs": "losses", "token_cross_entropy": "losses",
    "unlearning_rows": "rows",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.edit.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.edit' has no attribute {name!r}")

"""Making, loading and asking click models."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from sklearn.metrics import log_loss, roc_auc_score

from echelon.data.clicks import Clicks, ClickSchema
from echelon.errors import UserError
from echelon.models.ctr.architectures import ARCHITECTURES, CTRModel
from echelon.registry import suggest


def new_ctr(architecture: str, schema: ClickSchema, seed: int = 0, **sizes: Any) -> CTRModel:
    """A click model with random weights for the fields of a log; ``sizes`` go to its configuration.

    Raises:
        UserError: if the architecture is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"unknown click model {architecture!r}{suggest(architecture, ARCHITECTURES)}; there are {', '.join(sorted(ARCHITECTURES))}")
    cls = ARCHITECTURES[architecture]
    config = cls.config_class(
        vocab_sizes=schema.vocab_sizes, field_names=list(schema.fields), field_slots=list(schema.slots), dense_features=len(schema.dense), **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()  # type: ignore[arg-type]


def load_ctr(path: str | os.PathLike[str]) -> tuple[CTRModel, ClickSchema]:
    """A click model, compressed or not, and how its ids were made.

    Raises:
        UserError: if either cannot be read.
    """
    kind = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["model_type"].removeprefix("ctr_")
    if kind not in ARCHITECTURES:
        raise UserError(f"cannot load model {str(path)!r}: {kind!r} is none of {', '.join(sorted(ARCHITECTURES))}")
    try:
        model = ARCHITECTURES[kind].from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load model {str(path)!r}: {str(error).strip().splitlines()[0]}") from error
    return model.eval(), ClickSchema.load(path)


@torch.no_grad()
def predict(model: CTRModel, clicks: Clicks, batch_size: int = 4096) -> Float[np.ndarray, " rows"]:
    """Probability of a click for each row, in float64."""
    training = model.training
    model.eval()
    found = [torch.sigmoid(model(**batch).logits.double()).cpu() for batch in clicks.batches(batch_size, device=model.device)]
    model.train(training)
    return torch.cat(found).numpy()


def click_metrics(model: CTRModel, clicks: Clicks) -> dict[str, float]:
    """``auc`` (left out where all labels are the same) and ``logloss`` on a log."""
    labels, found = clicks.labels.numpy(), predict(model, clicks)
    made = {"auc": float(roc_auc_score(labels, found))} if 0 < labels.mean() < 1 else {}
    return made | {"logloss": float(log_loss(labels, found, labels=[0, 1]))}

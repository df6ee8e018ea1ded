"""Training click models, from nothing or from a compressed one.

Source: the setting of "Unified Low-rank Compression Framework for Click-through Rate Prediction", arXiv 2405.18146: binary cross-entropy, a squared
penalty on embeddings, 90 to 10 split. Its authors published no training code; the schedule of fine-tuning (some epochs at the rate of training) is ours.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from echelon.data.clicks import Clicks, ClickSchema, Layout, read_table
from echelon.data.files import folder_whole, write_whole
from echelon.errors import UserError
from echelon.models.ctr import ARCHITECTURES, CTRModel, click_metrics, load_ctr, new_ctr
from echelon.models.loading import is_ctr
from echelon.registry import method, suggest

Tell = Callable[[dict[str, Any]], None]


def fit_clicks(
    model: CTRModel, clicks: Clicks, *, epochs: int = 1, batch_size: int = 512, learning_rate: float = 1e-3, l2_embedding: float = 1e-5, seed: int = 0,
    on_step: Tell | None = None,
) -> list[float]:  # fmt: skip
    """Minimise the binary cross-entropy of a click model in place, by Adam.

    Args:
        model: dense or compressed.
        clicks: what to learn from.
        epochs: passes over it.
        batch_size: rows a step.
        learning_rate: of Adam.
        l2_embedding: factor of the sum of squares of all embedding tables in the loss.
        seed: of the order of rows and of dropout.
        on_step: called with ``{"step", "of", "loss"}``.

    Returns:
        The mean loss of each epoch, without the penalty.

    Raises:
        UserError: if the loss is no number any more.
    """
    tables = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    others = [p for p in model.parameters() if id(p) not in tables and p.requires_grad]
    # Adam's weight decay (unlike AdamW's) is the gradient of half the factor times the sum of squares.
    groups = [{"params": [p for p in tables.values() if p.requires_grad], "weight_decay": 2 * l2_embedding}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=learning_rate)
    steps = epochs * -(-len(clicks) // batch_size)
    generator, step, losses = torch.Generator().manual_seed(seed), 0, []
    training = model.training
    model.train()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout knows no generator
        for _ in range(epochs):
            total = 0.0
            for batch in clicks.batches(batch_size, generator, model.device):
                if len(batch["labels"]) == 1 and len(clicks) > 1:
                    continue  # a batch norm cannot train on one row
                loss: Any = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                value, step = loss.item(), step + 1
                if value != value:
                    raise UserError(f"the loss is {value} at step {step}; lower learning_rate")
                total += value * len(batch["labels"])
                if on_step is not None:
                    on_step({"step": step, "of": steps, "loss": value})
            losses.append(total / len(clicks))
    model.train(training)
    return losses


@method(
    kind="trainer", name="ctr", title="Unified Low-rank Compression Framework for Click-through Rate Prediction", arxiv="2405.18146", year=2024,
    summary="Train a click model, or go on training one that was compressed.", needs="a click log, and the name or folder of a click model",
    published="DeepFM on Criteo: AUC 0.7964 (name of a checkpoint in the authors' repository)",
)  # fmt: skip
@dataclass(frozen=True)
class CTRTrainer:
    """Binary cross-entropy on a click log. ``--model`` is deepfm, dcn, xdeepfm, autoint, nfm or fibinet, or the folder of a trained one.

    Of a folder, the sizes and the layout of the log are taken from there, and the knobs that say them are not used.

    Attributes:
        embedding_dim: width of the embeddings.
        hidden_sizes: widths of the deep part.
        dropout: behind each of its activations.
        batch_norm: behind each of its linear layers.
        epochs: passes over the log; after the first, click models are prone to overfitting.
        batch_size: rows a step.
        learning_rate: of Adam.
        l2_embedding: factor of the sum of squares of the embeddings in the loss.
        valid_share: share of the rows that are held out and measured on.
        layout: `criteo`, `generic`, or `auto`.
        label: column of the label; by default one named label, click or clicked.
        dense: columns of numbers; every other one is a field of ids.
        several: fields that hold several values in a cell, separated by `|`.
        ignore: columns to leave out.
        min_count: values that occur less often have no id of their own.
        threshold: labels of at least this are clicks; by default they are 0 and 1.
    """

    embedding_dim: int = 16
    hidden_sizes: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.0
    batch_norm: bool = False
    epochs: int = 1
    batch_size: int = 512
    learning_rate: float = 1e-3
    l2_embedding: float = 1e-5
    valid_share: float = 0.1
    layout: Literal["auto", "criteo", "generic"] = "auto"
    label: str = ""
    dense: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    min_count: int = 1
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name in ("embedding_dim", "epochs", "batch_size", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes is {self.hidden_sizes!r}; it must hold widths of at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must be above 0")
        if not self.l2_embedding >= 0:
            raise ValueError(f"l2_embedding is {self.l2_embedding!r}; it must be at least 0")
        for name in ("dropout", "valid_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be in [0, 1)")

    def train(self, model: str, data: str | Path, out: str | Path, seed: int = 0, on_step: Tell | None = None) -> dict[str, Any]:
        """Train and write a model folder, with ``click_schema.json`` and ``result.json``.

        Args:
            model: name of an architecture, or a folder.
            data: a .csv of clicks.
            out: folder for the result; it appears whole.
            seed: of weights, split and order.
            on_step: called with ``{"step", "of", "loss"}``.

        Returns:
            Rows, parameters, seconds, the last epoch's loss, and AUC and logloss on the held-out rows (before training too, for a folder).

        Raises:
            UserError: if the data or the model cannot be read, or ``out`` holds something else.
        """
        out = Path(out)
        layout: Layout = self.layout
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not is_ctr(out))):
            raise UserError(f"{out} exists and is no click model; give a new folder")
        started = time.perf_counter()
        result: dict[str, Any] = {}
        if is_ctr(model):
            made, schema = load_ctr(model)
            clicks = schema.read(data)
        elif model in ARCHITECTURES:
            table = read_table(data)
            schema = ClickSchema.fit(
                table, layout=layout, label=self.label, dense=self.dense, several=self.several, ignore=self.ignore, min_count=self.min_count,
                threshold=self.threshold,
            )  # fmt: skip
            clicks = schema.read(table)
            sizes = {"embedding_dim": self.embedding_dim, "hidden_sizes": list(self.hidden_sizes), "dropout": self.dropout, "batch_norm": self.batch_norm}
            made = new_ctr(model, schema, seed, **sizes)
        else:
            told = f"{model!r} is neither a folder of a click model nor one of {', '.join(sorted(ARCHITECTURES))}{suggest(model, ARCHITECTURES)}"
            raise UserError(f"--model {told}")
        train, valid = clicks.split(self.valid_share, seed)
        if is_ctr(model) and valid is not None:
            result |= {f"{name}_before": round(value, 5) for name, value in click_metrics(made, valid).items()}
        losses = fit_clicks(
            made, train, epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate, l2_embedding=self.l2_embedding, seed=seed,
            on_step=on_step,
        )  # fmt: skip
        if valid is not None:
            result |= {name: round(value, 5) for name, value in click_metrics(made, valid).items()}
        result |= {"loss": round(losses[-1], 5), "rows": len(train), "held_out": 0 if valid is None else len(valid)}
        result |= {"parameters": sum(p.numel() for p in made.parameters()), "seconds": round(time.perf_counter() - started, 1)}
        with folder_whole(out) as aside:
            made.save_pretrained(aside)
            schema.save_pretrained(aside)
            write_whole(aside / "result.json", json.dumps(result, indent=2) + "\n")
        return result

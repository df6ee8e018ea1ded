"""Click logs and click models, small enough for a test."""

import functools

import torch

from echelon.data.clicks import ClickSchema, synthetic_log
from echelon.models.ctr import ARCHITECTURES

NUMBERS = ["I1", "I2"]


@functools.cache
def log(rows=3000, noise=0.1, **more):
    """A table, its schema, and the log read with it."""
    table, _ = synthetic_log(rows, fields=5, values=200, dense=2, noise=noise, seed=4, **more)
    schema = ClickSchema.fit(table, dense=NUMBERS)
    return table, schema, schema.read(table)


def model(name="deepfm", seed=1, **sizes):
    """Random weights that are all of a size to matter, biases included."""
    _, schema, _ = log()
    cls = ARCHITECTURES[name]
    said = {
        "vocab_sizes": schema.vocab_sizes, "field_names": list(schema.fields), "dense_features": 2, "embedding_dim": 8, "hidden_sizes": [24, 20, 16],
    } | ({"cin_sizes": [6, 4]} if name == "xdeepfm" else {}) | sizes  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = cls(cls.config_class(**said)).eval()
        mixing = torch.randn(said["embedding_dim"], said["embedding_dim"])
        for key, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
            elif key.startswith("embedding"):
                # Rows lie about a mean and along some axes more than along others.
                parameter.data.copy_((0.3 * torch.randn_like(parameter)) @ mixing * torch.linspace(1, 0.2, parameter.shape[1]) + 0.2)
        for part in (made.embedding, made.wide):
            for table in part.tables:
                if table.padding_idx is not None:
                    table.weight.data[table.padding_idx] = 0
    return made


@torch.no_grad()
def logits(made, clicks, rows=400):
    return made(**next(clicks.batches(rows))).logits

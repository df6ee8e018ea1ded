"""Feature mimicking on click models: AUC and logloss of the model, compressed, and tuned, beside two controls of the same training time.

    python benchmarks/ctr.py [--rows 30000] [--seeds 2]

The log is made up (:func:`echelon.data.clicks.synthetic_log`); with ECHELON_DATA the 200 public rows of Criteo are run too, to show the shapes.
"""

import argparse
import copy
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from echelon.compress import FeatureMimic
from echelon.data.clicks import Clicks, ClickSchema, synthetic_log
from echelon.data.files import write_whole
from echelon.models.ctr import ARCHITECTURES, click_metrics, new_ctr
from echelon.train import fit_clicks

RESULTS = Path(__file__).parent / "results" / "ctr.md"
EPOCHS, TUNING, WIDTH, RANK, RATE = 1, 1, 16, 4, 3e-3
ROWS = (
    "dense model", "dense model, trained on as long as tuned", f"small from the start (width {RANK}), trained as long in all",
    "mimicked", "mimicked, tuned", "mimicked with the activation between", "mimicked with the activation between, tuned",
)  # fmt: skip


def run(name: str, schema: ClickSchema, train: Clicks, test: Clicks, seed: int, hidden: list[int]) -> list[tuple[int, float, float]]:
    """Parameters, AUC and logloss of each of ROWS."""
    made = []

    def note(model) -> None:
        found = click_metrics(model, test)
        made.append((model.num_parameters(), found["auc"], found["logloss"]))

    sizes = {"hidden_sizes": hidden} | ({"cin_sizes": [16, 16]} if name == "xdeepfm" else {})
    base = new_ctr(name, schema, seed, embedding_dim=WIDTH, **sizes)
    fit_clicks(base, train, epochs=EPOCHS, learning_rate=RATE, seed=seed)
    note(base)
    longer = copy.deepcopy(base)
    fit_clicks(longer, train, epochs=TUNING, learning_rate=RATE / 3, seed=seed + 100)
    note(longer)
    small = new_ctr(name, schema, seed, embedding_dim=RANK, **sizes)
    fit_clicks(small, train, epochs=EPOCHS, learning_rate=RATE, seed=seed)
    fit_clicks(small, train, epochs=TUNING, learning_rate=RATE / 3, seed=seed + 100)
    note(small)
    for activation in ("none", "same"):
        mimicked = FeatureMimic(embedding_rank=RANK, inter_activation=activation).compress(copy.deepcopy(base), train).model
        note(mimicked)
        fit_clicks(mimicked, train, epochs=TUNING, learning_rate=RATE / 3, seed=seed + 100)
        note(mimicked)
    return made


def table(name: str, runs: list[list[tuple[int, float, float]]]) -> list[str]:
    lines = []
    for number, what in enumerate(ROWS):
        found = [run[number] for run in runs]
        ratio = runs[0][0][0] / found[0][0]
        aucs, losses = np.array([f[1] for f in found]), np.array([f[2] for f in found])
        change = aucs - np.array([run[0][1] for run in runs])
        spread = f" ({aucs.min():.4f} to {aucs.max():.4f})" if len(runs) > 1 else ""
        lines.append(f"| {name} | {what} | {found[0][0]:,} | {ratio:.2f} | {aucs.mean():.4f}{spread} | {change.mean():+.4f} | {losses.mean():.4f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30000)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    started = time.process_time()
    head = ["| model | what | parameters | times smaller | AUC | change of AUC | logloss |", "|---|---|---|---|---|---|---|"]
    values, hidden = 1000, [64, 64, 64]
    made, chances = synthetic_log(args.rows, fields=10, values=values, dense=4, noise=0.02, seed=11)
    schema = ClickSchema.fit(made, dense=[f"I{i}" for i in range(1, 5)])
    clicks = schema.read(made)
    cut = int(0.8 * args.rows)
    train, test = clicks.take(torch.arange(cut)), clicks.take(torch.arange(cut, args.rows))
    ceiling = roc_auc_score(test.labels.numpy(), chances[cut:])
    lines = [
        "# Feature mimicking on click models", "", f"    python benchmarks/ctr.py --rows {args.rows} --seeds {args.seeds}", "",
        f"Small scale, on a made-up log: {cut:,} rows to train on and {args.rows - cut:,} to measure on, 10 fields of up to {values:,} ids each that are "
        f"drawn by Zipf's law, 4 numbers, {clicks.labels.mean():.0%} clicks. The AUC of the true probabilities is {ceiling:.4f}. Embeddings of width {WIDTH}, "
        f"hidden layers {hidden}, xDeepFM with 16 maps twice, {EPOCHS} epoch, then {TUNING} of tuning at a third of the rate. Codes of width {RANK}, layers "
        f"to 0.16 of their width. Means over {args.seeds} seeds of training (smallest to largest); one log. {platform.machine()}, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}.", "",
        "None of this says anything of Criteo or Avazu, whose logs may not be passed on. Published there (abstract): 3 to 5 times smaller, with an AUC above "
        "the original's.", "", *head,
    ]  # fmt: skip
    changes = []
    for name in ARCHITECTURES:
        runs = [run(name, schema, train, test, seed, hidden) for seed in range(args.seeds)]
        changes += [[found[1] - made[0][1] for found in made] for made in runs]
        lines += table(name, runs)
        print(*lines[-len(ROWS) :], sep="\n", file=sys.stderr)
    told = [f"{what} {np.mean(found):+.4f} ({min(found):+.4f} to {max(found):+.4f})" for what, found in zip(ROWS, zip(*changes, strict=True), strict=True)]
    lines += ["", f"Change of AUC over all models and seeds, mean (smallest to largest): {'; '.join(told[1:])}."]
    if "ECHELON_DATA" in os.environ:
        path = Path(os.environ["ECHELON_DATA"]) / "ctr_sample" / "criteo_sample.txt"
        schema = ClickSchema.fit(path)
        train, held = schema.read(path).split(0.3, seed=0)
        assert held is not None
        lines += [
            "", f"The 200 public sample rows of Criteo ({len(train)} to train on, {len(held)} to measure on, one seed): they show that the layout and the "
            "shapes fit. AUCs on so few rows are noise, and with so few ids decoders weigh more than they do on a real log.", "", *head,
        ]  # fmt: skip
        for name in ("deepfm", "dcn", "autoint"):
            lines += table(name, [run(name, schema, train, held, 0, hidden)])
    lines += ["", f"{time.process_time() - started:.0f} s of processor time in all."]
    write_whole(RESULTS, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""LoRAM on a small model: what a LoRA trained beside a pruned model is worth beside the whole one, and what aligning the pruned model first changes.

    python benchmarks/loram.py [--e2e FOLDER] [--quick]

The embedded model learns sentences about restaurants with the folder of the E2E NLG Challenge (development set, tested on the test set), else the prose that
ships. The first and the last block stay whole; of the others the same share of hidden units and of key-value heads goes. Alignment trains all weights of the
pruned model on prose. Each row is at the better of its learning rates, chosen with the first seed by the loss of the whole model with the recovered LoRA on
texts that are neither trained on nor tested.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from echelon.adapt import LoRAM
from echelon.compare.tuning import evenly
from echelon.data.e2e import read_e2e
from echelon.data.files import write_whole
from echelon.data.passages import passages

RESULTS = Path(__file__).parent / "results" / "loram.md"
LOSSES = {"full": "whole model", "pruned_lora": "pruned, LoRA", "full_lora": "whole, LoRA recovered"}


def texts(e2e: str | None) -> dict[str, list[str]]:
    """To train on, to choose rates by, to test on, and to align on."""
    prose = {half: [passage.text for passage in passages(half)] for half in ("calibration", "test")}
    if e2e is None:
        return {"train": prose["calibration"][::2], "tune": prose["test"][::2], "test": prose["test"][1::2], "align": prose["calibration"][1::2]}
    told = [text for meaning in read_e2e(Path(e2e) / "devset.csv") for text in meaning.references]
    tested = [text for meaning in read_e2e(Path(e2e) / "testset_w_refs.csv") for text in meaning.references]
    tune = set(evenly(told, 300))
    return {"train": [text for text in told if text not in tune], "tune": sorted(tune), "test": evenly(tested, 300), "align": prose["calibration"]}


def rows(options: Any, align: str) -> dict[str, LoRAM]:
    base = LoRAM(
        skip_first=1, skip_last=1, align_to=1, align_data=align, align_lr=options.align_lr, r=4, lora_alpha=8, lora_dropout=0.0, steps=options.steps,
        batch_size=8, micro_batch_size=8, warmup=options.steps // 10, seqlen=64, mlp_ratio=0.0, kv_ratio=0.0,
    )  # fmt: skip
    made = {"nothing pruned (LoRA)": base}
    for ratio in options.ratios:
        for strategy in ("structured", "random"):
            for steps in (0, options.align_steps):
                name = f"{strategy}, {100 * ratio:g} %" + (f", aligned for {steps} steps" if steps else "")
                made[name] = replace(base, strategy=strategy, mlp_ratio=ratio, kv_ratio=ratio, align_steps=steps)
    return made


def trained(recipe: LoRAM, files: dict[str, str], held_out: str, rate: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        return replace(recipe, learning_rate=rate, held_out=files[held_out]).train("embedded", files["train"], out, seed)


def told(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", help="folder with devset.csv and testset_w_refs.csv")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--align_steps", type=int, default=80)
    parser.add_argument("--align_lr", type=float, default=3e-4)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two steps of one row: shows that it works, and nothing else; writes no file")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.align_steps, options.lr, options.ratios, options.seeds = 2, 2, [0.01], [0.5], 1
    lines = [
        "# LoRAM on a small model", "", "    python benchmarks/loram.py" + (" --e2e FOLDER" if options.e2e else ""), "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        f"{'E2E' if options.e2e else 'The prose that ships'}: {options.steps} steps of 8 rows of 64 tokens, rank 4, {options.seeds} seeds. "
        "Test losses, nats a token, means (least to most) over seeds.", "",
        "| pruned | weights beside the LoRA | " + " | ".join(LOSSES.values()) + " | best rate |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, some in texts(options.e2e).items():
            files[name] = str(Path(folder) / f"{name}.jsonl")
            write_whole(files[name], "".join(json.dumps({"text": text}) + "\n" for text in some))
        for name, recipe in rows(options, files["align"]).items():
            rates = {rate: trained(recipe, files, "tune", rate, 0)["loss_full_lora"] for rate in options.lr} if len(options.lr) > 1 else {}
            rate = min(rates, key=rates.__getitem__) if rates else options.lr[0]
            made = [trained(recipe, files, "test", rate, seed) for seed in range(options.seeds)]
            cells = [told([run[f"loss_{loss}"] for run in made]) for loss in LOSSES]
            share = fmean(run["pruned_parameters"] / run["base_parameters"] for run in made)
            lines.append("| " + " | ".join([name, f"{share:.2f}", *cells, f"{rate:g}"]) + " |")
            print(lines[-1], flush=True)
    if not options.quick:
        write_whole(RESULTS, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()

"""DyLoRA used at every rank after one training, against a LoRA trained for each rank, and a LoRA of the largest rank that is cut down afterwards.

    python benchmarks/dylora_ranks.py [--e2e FOLDER] [--quick]

On the embedded model: sentences for meanings with the folder of the E2E NLG Challenge, else the prose that ships. All trainings see the same batches in the
same order, DyLoRA twice as many of them as each LoRA: a quarter of what eight LoRAs take together. It is trained in both of its ways: ``last`` trains what the
drawn rank has beyond the next lower one, ``all`` everything up to it. Learning rates are chosen from two for each training by
short ones, on units that are neither trained on nor tested. "Cut" keeps the largest singular directions of each layer's product. Losses are means over test
units, weighted by tokens; intervals are of paired differences over these units.
"""

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from echelon.compare.adapted import Adapted, Batches, adapted, config_of
from echelon.compare.recipe import MethodEntry, load_recipe
from echelon.compare.tasks.adapt import Task
from echelon.compare.tuning import tuned
from echelon.data.files import write_whole
from echelon.evaluate.significance import paired

RESULTS = Path(__file__).parent / "results" / "dylora_ranks.md"
TARGETS = "all-linear"


class Runs:
    """Trainings of one task on the same batches, each at the better of two learning rates.

    Args:
        options: of the command line.
    """

    def __init__(self, options: Any):
        data = {"tasks": ["e2e" if options.e2e else "text"], "e2e": options.e2e, "units": options.units, "tune_units": options.tune_units}
        told = {"task": "adapt", "data": data, "methods": [{"name": "lora", "sweep": {"lr": options.lr}}]}
        context = Task().prepare(load_recipe(told))
        [self.task], self.options = context.tasks, options
        self.rows = context.rows[self.task.name]

    def run(self, name: str, rank: int, steps: int, **more: Any) -> tuple[Adapted, float, float]:
        """A trained adapter, its learning rate, and the seconds that both took."""
        started = time.perf_counter()

        def trained(knobs: dict[str, Any], count: int) -> Adapted:
            config = config_of(name, {"r": rank, **more}, TARGETS, steps=count, task_type="CAUSAL_LM")
            return adapted(self.task, Batches(self.rows, self.options.batch_size, count, 0), config, lr=knobs["lr"])

        entry = MethodEntry(name, {}, name, {"lr": self.options.lr})
        short = max(1, steps // 3)

        def tried_with(knobs: dict[str, Any]) -> dict[str, Any]:
            started = time.perf_counter()
            return {"loss": self.task.tuning_loss(trained(knobs, short).loaded), "seconds": time.perf_counter() - started}

        chosen, _ = tuned(entry, tried_with, steps=short)
        return trained(chosen, steps), chosen["lr"], time.perf_counter() - started

    def losses(self, made: Adapted) -> np.ndarray:
        return self.task.losses(made.loaded, self.task.test)  # type: ignore[attr-defined]


@torch.no_grad()
def cut(made: Adapted, rank: int, kept: dict[str, Any]) -> None:
    """Leave the largest singular directions of each layer's product; ``kept`` holds the factors as they were trained."""
    for name, layer in made.tuned.named_modules():
        if isinstance(layer, LoraLayer):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            whole_A, whole_B = kept.setdefault(name, (A.clone(), B.clone()))
            up, values, down = torch.linalg.svd(whole_B @ whole_A, full_matrices=False)
            A.zero_()
            B.zero_()
            A[:rank], B[:, :rank] = down[:rank], up[:, :rank] * values[:rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", default=None, help="folder with devset.csv and testset_w_refs.csv")
    parser.add_argument("--quick", action="store_true", help="a few steps at three ranks: shows that it works, and nothing else")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--units", type=int, default=50)
    parser.add_argument("--tune_units", type=int, default=20)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    ranks = list(range(1, options.r + 1))
    if options.quick:
        options.steps, options.batch_size, options.units, options.tune_units, ranks = 4, 2, 6, 3, [1, 2, options.r]
    load = os.getloadavg()[0]
    runs = Runs(options)
    dylora: dict[str, dict[int, np.ndarray]] = {}
    took = []
    for update in ("last", "all"):
        nested, rate, taken = runs.run("dylora", options.r, 2 * options.steps, update=update)
        dylora[update] = {}
        for rank in ranks:
            nested.tuned.set_rank(rank)
            dylora[update][rank] = runs.losses(nested)
        took.append(f"{taken:.0f} s with update={update} (lr {rate:g})")
    alone, rates, seconds, shrunk, kept = {}, {}, 0.0, {}, {}
    for rank in ranks:
        made, rates[rank], taken = runs.run("lora", rank, options.steps)
        alone[rank], seconds = runs.losses(made), seconds + taken
    for rank in ranks:
        cut(made, rank, kept)
        shrunk[rank] = runs.losses(made)
    where = "E2E, sentences of the development set, tested on the test set" if options.e2e else "the prose that ships"
    command = "python benchmarks/dylora_ranks.py" + (" --e2e FOLDER" if options.e2e else "") + (" --quick" if options.quick else "")
    lines = [
        "# DyLoRA at every rank", "", f"    {command}", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; load average {load:.1f} before. {where}: {options.steps} steps "
        f"of {options.batch_size} rows (DyLoRA {2 * options.steps}), {len(alone[ranks[0]])} test units, one seed.", "",
        f"One DyLoRA for all ranks took {' and '.join(took)}, its two short trainings included; {len(ranks)} LoRAs took {seconds:.0f} s. Losses:", "",
        f"| rank | DyLoRA, last | DyLoRA, all | LoRA of this rank | its lr | LoRA of rank {options.r} cut | last less LoRA | all less LoRA | all less cut |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rank in ranks:
        last, both = dylora["last"][rank], dylora["all"][rank]
        gaps = [paired(one, other[rank]) for one, other in ((last, alone), (both, alone), (both, shrunk))]
        told = [f"{gap.difference:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})" for gap in gaps]
        means = [f"{losses.mean():.3f}" for losses in (last, both, alone[rank], shrunk[rank])]
        lines.append("| " + " | ".join([str(rank), *means[:3], f"{rates[rank]:g}", means[3], *told]) + " |")
    write_whole(options.out, "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Compression: what one calibration for several methods saves, how fast statistics are gathered, and where a factored layer is faster.

    python benchmarks/compression.py [--repeats 5]

Everything runs in this process, the two sides of a ratio in turn.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from echelon.calibrate import Moments, collect
from echelon.compress import SVD, FeatureMimic, LoRD, LowRankLinear, linear_targets
from echelon.data.files import write_whole
from echelon.data.passages import passages
from echelon.models import load

RESULTS = Path(__file__).parent / "results" / "compression.md"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def told(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def shared_calibration(repeats: int) -> list[str]:
    """Three methods on the embedded model, each with its own calibration, and all with one."""
    texts = [passage.text for passage in passages("calibration")]
    methods = [SVD(whiten=True, ratio=0.7), LoRD(rank=0.5, round_rank=1, target_modules="all-linear"), FeatureMimic(mlp_rank=0.4, skip=())]
    apart, together = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        for method in methods:
            method.compress(load("embedded"), texts)
        apart.append(time.perf_counter() - start)
        start = time.perf_counter()
        loaded = load("embedded")
        found = collect(loaded.model, linear_targets(loaded.model)[0], methods[0].calibration(loaded.model, texts, loaded.tokenizer, 0))
        for method in methods:
            method.compress(load("embedded"), statistics=found)
        together.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(apart, together, strict=True))
    return [
        "## One calibration for three methods", "",
        "Whitened SVD, LoRD and feature mimicking of the embedded model, on the calibration half of the passages.", "",
        "| | seconds |", "|---|---|", f"| a calibration each | {told(apart)} |", f"| one for all | {told(together)} |", f"| ratio | {ratio:.2f} |", "",
    ]  # fmt: skip


def covariance(repeats: int) -> list[str]:
    """Updates of second moments against the matrix product of the same size."""
    lines = [
        "## Second moments", "", "4096 float32 rows; GFLOP/s of `x.T @ x` in float32 and float64, and of `Moments.update`, which multiplies in float64.", "",
        "| width | float32 product | float64 product | update | share of float64 | share of float32 |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for width in (704, 2048, 4096):
        x = torch.randn(4096, width, generator=torch.Generator().manual_seed(0))
        double, moments = x.double(), Moments.of(width)
        sides: dict[str, Callable[[], object]] = {
            "single": lambda x=x: x.T @ x, "double": lambda x=double: x.T @ x, "update": lambda x=x, moments=moments: moments.update(x)
        }  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(repeats + 1):
            for name, work in sides.items():
                taken = seconds(work)
                rates[name] += [2 * len(x) * width**2 / 1e9 / taken] if number else []
        shares = [statistics.median(a / b for a, b in zip(rates["update"], rates[name], strict=True)) for name in ("double", "single")]
        lines.append(f"| {width} | " + " | ".join(map(told, rates.values())) + f" | {shares[0]:.2f} | {shares[1]:.2f} |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def factored(repeats: int) -> list[str]:
    """A dense linear layer and one of two factors with 30 % fewer parameters, from one row to many."""
    lines = [
        "## A factored layer with 30 % fewer parameters", "",
        "Seconds of the dense layer over seconds of the factored one, float32: above 1 the factored one is faster.", "",
        "| out x in, rank | 1 row | 4 | 16 | 64 | 256 | 1024 |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rows, columns in ((704, 256), (2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096)):
        rank = int(0.7 * rows * columns / (rows + columns))
        dense, thin = torch.nn.Linear(columns, rows, bias=False), LowRankLinear(columns, rows, rank, False)
        with torch.no_grad():
            for part in (thin.up, thin.down):
                part.weight.normal_(generator=torch.Generator().manual_seed(0))
        cells = []
        for batch in (1, 4, 16, 64, 256, 1024):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))
            inner = max(1, 256 // batch)
            found = []
            with torch.inference_mode():
                for number in range(repeats + 1):
                    a, b = (seconds(lambda layer=layer, x=x, n=inner: [layer(x) for _ in range(n)]) for layer in (dense, thin))
                    found += [a / b] if number else []
            cells.append(f"{statistics.median(found):.2f}")
        lines.append(f"| {rows} x {columns}, {rank} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    head = [
        "# Compression", "", f"    python benchmarks/compression.py --repeats {args.repeats}", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {args.repeats} (smallest to largest), taken in turn; "
        f"load average {os.getloadavg()[0]:.1f} before.", "",
    ]  # fmt: skip
    text = "\n".join([*head, *shared_calibration(args.repeats), *covariance(args.repeats), *factored(args.repeats)])
    write_whole(RESULTS, text)
    print(text)


if __name__ == "__main__":
    main()

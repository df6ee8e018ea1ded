"""Time of MAUVE on given features, beside mauve-text 0.4 where an interpreter that has it is named.

    python benchmarks/mauve.py [--peer-python PATH] [--repeats 5]

mauve-text is under the GPL and is no dependency; make an environment for it apart (``pip install mauve-text==0.4.0 faiss-cpu
scikit-learn transformers torch``). Both read the same .npy files, take turns, and use as many threads; loading is not timed.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from echelon.data.files import write_whole
from echelon.evaluate.mauve import mauve_score

RESULTS = Path(__file__).parent / "results" / "mauve.md"
PEER_NAME = "mauve-text 0.4.0, one seed"
PEER = """
import sys, time, numpy as np, mauve
p, q = (np.load(path) for path in sys.argv[1:3])
start = time.perf_counter()
found = mauve.compute_mauve(p_features=p, q_features=q, seed=25, verbose=False)
print(time.perf_counter() - start, found.mauve)
"""


def features(count: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two mixtures of 40 blobs with a decaying spectrum, whose weights differ: the shape that sentence features have."""
    random = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -0.5
    blobs = random.normal(size=(40, width)) * spectrum
    sides = []
    for _ in range(2):
        weights = random.dirichlet(np.ones(40))
        sides.append((blobs[random.choice(40, count, p=weights)] + random.normal(size=(count, width)) * spectrum).astype(np.float32))
    return sides[0], sides[1]


def ours(p: np.ndarray, q: np.ndarray, seeds: tuple[int, ...]) -> tuple[float, float]:
    start = time.perf_counter()
    value = mauve_score(p, q, seeds=seeds).value
    return time.perf_counter() - start, value


def theirs(python: str, p: Path, q: Path) -> tuple[float, float]:
    done = subprocess.run([python, "-c", PEER, str(p), str(q)], capture_output=True, text=True, check=True)
    seconds, value = done.stdout.split()[-2:]
    return float(seconds), float(value)


def summary(runs: list[tuple[float, float]]) -> tuple[float, str]:
    seconds = sorted(run[0] for run in runs)
    median, value = float(np.median(seconds)), np.median([run[1] for run in runs])
    return median, f"{median:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}) | {value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of MAUVE on given features, beside mauve-text.")
    parser.add_argument("--peer-python", help="interpreter of an environment with mauve-text 0.4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000, help="texts a side")
    args = parser.parse_args()
    peer_option = " --peer-python PATH" if args.peer_python else ""
    lines = [
        "# MAUVE on given features", "",
        f"    python benchmarks/mauve.py{peer_option} --repeats {args.repeats} --count {args.count}", "",
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
        f"Python {platform.python_version()}, numpy {np.__version__}. {args.count} + {args.count} random features; "
        f"median of {args.repeats} (fastest to slowest), taken in turn; load average {os.getloadavg()[0]:.1f} before.",
        "", "| features | what | seconds | MAUVE | time as a share of mauve-text's |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for width in (384, 1280):
        p, q = features(args.count, width, seed=width)
        runs: dict[str, list[tuple[float, float]]] = {PEER_NAME: [], "echelon, one seed": [], "echelon, three seeds": []}
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, "p.npy"), Path(folder, "q.npy")]
            np.save(paths[0], p)
            np.save(paths[1], q)
            for _ in range(args.repeats):
                if args.peer_python:
                    runs[PEER_NAME].append(theirs(args.peer_python, *paths))
                runs["echelon, one seed"].append(ours(p, q, (25,)))
                runs["echelon, three seeds"].append(ours(p, q, (25, 26, 27)))
                print(f"{width}-d: " + ", ".join(f"{name} {made[-1][0]:.2f} s" for name, made in runs.items() if made), file=sys.stderr)
        peer = summary(runs[PEER_NAME])[0] if args.peer_python else None
        for name, made in runs.items():
            if made:
                median, told = summary(made)
                lines.append(f"| {width}-d | {name} | {told} | {f'{median / peer:.3f}' if peer else 'not run'} |")
    lines += ["", "The values differ a little because the two k-means begin differently; mauve-text runs all 500 steps of each restart."]
    table = "\n".join(lines) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    write_whole(RESULTS, table)
    print(table)


if __name__ == "__main__":
    main()

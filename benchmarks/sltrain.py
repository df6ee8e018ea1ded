"""An SLTrain layer against a dense one and a plain low-rank one: time of forward and backward, what is kept between them, and the peak.

    python benchmarks/sltrain.py

Float32, rank a quarter of the smaller side, 3 % of the positions. "Kept" is what autograd saves for the backward pass beside input and parameters,
"peak" the largest sum of all that the pass allocates (from the profiler's allocation events), parameters and input not counted; their gradients are.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from echelon.train.layers import LowRank, SLTrain

RESULTS = Path(__file__).parent / "results" / "sltrain.md"
SHAPES = [(512, 512), (1376, 512), (2048, 2048), (5461, 2048)]
TOKENS = (256, 2048)


def layers(rows: int, columns: int) -> dict[str, nn.Module]:
    """The three layers under their names."""
    made: dict[str, nn.Module] = {"dense": nn.Linear(columns, rows, bias=False)}
    rank = min(rows, columns) // 4
    for name, method in (("low rank", LowRank(rank=rank, target_modules=["0"])), ("SLTrain", SLTrain(r=rank, target_modules=["0"]))):
        model = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Identity())
        method.convert(model)
        made[name] = model[0]
    return made


def once(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> None:
    layer(x).backward(slope)
    for parameter in layer.parameters():
        parameter.grad = None
    x.grad = None


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that are saved for backward beside the input and the parameters."""
    known = {t.data_ptr() for t in [x, *layer.parameters(), *layer.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    return sum(saved.values())


def peak(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> int:
    """The largest sum of bytes that a forward and backward pass has allocated at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        once(layer, x, slope)
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    load = psutil.getloadavg()[0]
    lines = [
        "# SLTrain", "", "    python benchmarks/sltrain.py", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.repeats} (smallest to largest) in turn; "
        f"load average {load:.1f} before.", "",
        "| out x in | tokens | layer | parameters, M | forward + backward, ms | over dense | kept, MB | peak, MB | over dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rows, columns in SHAPES:
        for tokens in TOKENS:
            made = layers(rows, columns)
            x, slope = torch.randn(tokens, columns, requires_grad=True), torch.randn(tokens, rows)
            seconds: dict[str, list[float]] = {name: [] for name in made}
            for layer in made.values():
                once(layer, x, slope)
            for _ in range(options.repeats):
                for name, layer in made.items():
                    started = time.perf_counter()
                    once(layer, x, slope)
                    seconds[name].append(time.perf_counter() - started)
            held = {name: peak(layer, x, slope) for name, layer in made.items()}
            for name, layer in made.items():
                middle, dense = statistics.median(seconds[name]), statistics.median(seconds["dense"])
                spread = f"{1000 * middle:.1f} ({1000 * min(seconds[name]):.1f} to {1000 * max(seconds[name]):.1f})"
                cells = [f"{rows} x {columns}", str(tokens), name, f"{sum(p.numel() for p in layer.parameters()) / 1e6:.2f}", spread, f"{middle / dense:.2f}"]
                cells += [f"{kept(layer, x) / 1e6:.2f}", f"{held[name] / 1e6:.1f}", f"{held[name] / held['dense']:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
    options.out.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

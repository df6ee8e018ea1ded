"""GaLore's step against galore-torch and pytorch_optimizer, its state counted, and how a step's cost grows.

    pip install --no-deps --target PEERS galore-torch pytorch_optimizer
    python benchmarks/galore.py --peers PEERS

The matrices are those of the 60 M LLaMA of the papers (hidden 512, intermediate 1376, 8 layers, vocabulary 32000), float32, with fixed random gradients and
rank 128. All optimizers take their steps in turn in one process. A gap of 200 steps is charged one step with fresh directions and 199 without; the stall is
the slowest single step of a gap. galore-torch's 8-bit file is not imported (it needs bitsandbytes).
"""

import argparse
import importlib
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echelon.train.optimizers import AdamW, GaLore

RESULTS = Path(__file__).parent / "results" / "galore.md"
GAP, RANK = 200, 128
SIZES = {"60M": (512, 1376, 8, 8, 128), "1B": (2048, 5461, 24, 32, 512)}


def model(size: str, **factory: Any) -> LlamaForCausalLM:
    hidden, inner, layers, heads, _ = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=False
    )
    with torch.device(factory.get("device", "cpu")):
        return LlamaForCausalLM(config).to(factory.get("dtype", torch.float32))


def parameters(seed: int = 0) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Target matrices and the others, with gradients: like a model's, of its shapes only."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, layers, _, _ = SIZES["60M"]
    shapes = ([(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]) * layers
    others = [(32000, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)

    def made(shape: tuple[int, ...]) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        return parameter

    return [made(shape) for shape in shapes], [made(shape) for shape in others]


def peers(folder: Path) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    sys.path.append(str(folder))
    package = types.ModuleType("galore_torch")  # its __init__ needs bitsandbytes
    package.__path__ = [str(folder / "galore_torch")]  # type: ignore[attr-defined]
    sys.modules["galore_torch"] = package
    theirs = importlib.import_module("galore_torch.adamw").AdamW
    other = importlib.import_module("pytorch_optimizer.optimizer.galore").GaLore

    def grouped(cls: Any) -> Callable[..., torch.optim.Optimizer]:
        def make(targets: list[Any], rest: list[Any]) -> torch.optim.Optimizer:
            settings = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std", "projection_type": "std"}  # both names
            return cls([{"params": targets, **settings}, {"params": rest}], lr=0.01)

        return make

    return {"galore-torch": grouped(theirs), "pytorch_optimizer": grouped(other)}


def ours(**knobs: Any) -> Callable[..., torch.optim.Optimizer]:
    method = GaLore(rank=RANK, update_proj_gap=GAP, **knobs)
    return lambda targets, rest: method.optimizer([{"params": targets, "rank": RANK}, {"params": rest}])


def timed(optimizer: torch.optim.Optimizer) -> float:
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


def spread(values: list[float]) -> str:
    return f"{1000 * statistics.median(values):.0f} ({1000 * min(values):.0f} to {1000 * max(values):.0f})"


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, also of those inside other objects (a projector)."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Parameter):
            walk(vars(value))

    for state in optimizer.state.values():
        walk(state)
    return sum(seen.values())


def against_peers(folder: Path, repeats: int) -> list[str]:
    makers = peers(folder) | {
        "ours, exact": ours(), "ours, randomized": ours(projection="randomized"),
        "ours, exact, staggered": ours(refresh_offset="stagger"), "ours, randomized, staggered": ours(projection="randomized", refresh_offset="stagger"),
    }  # fmt: skip
    fresh: dict[str, list[float]] = {name: [] for name in makers}
    plain: dict[str, list[float]] = {name: [] for name in makers}
    size: dict[str, int] = {}
    for _ in range(repeats):
        for name, make in makers.items():
            optimizer = make(*parameters())
            fresh[name].append(timed(optimizer))
            plain[name] += [timed(optimizer) for _ in range(5)]
            size[name] = bytes_of(optimizer)
            del optimizer
    # With staggering the refreshes of a gap are spread over its steps: they are run in full.
    whole: dict[str, list[float]] = {}
    for name in [name for name in makers if "staggered" in name]:
        optimizer = makers[name](*parameters())
        whole[name] = [timed(optimizer) for _ in range(GAP + 1)]
    medians = {name: (statistics.median(fresh[name]), statistics.median(plain[name])) for name in makers}
    amortised = {name: sum(whole[name][1:]) / GAP if name in whole else (first + (GAP - 1) * rest) / GAP for name, (first, rest) in medians.items()}
    stall = {name: max(whole[name]) if name in whole else statistics.median(fresh[name]) for name in makers}
    base = "galore-torch"
    lines = [
        "| | first step, ms | a step without fresh directions, ms | amortised, ms | over galore-torch's | slowest step, ms | over galore-torch's | state, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in makers:
        cells = [spread(fresh[name]), spread(plain[name])]
        for figures in (amortised, stall):
            cells += [f"{1000 * figures[name]:.0f}", f"{figures[name] / figures[base]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {size[name] / 1e6:.1f} |")
    return lines


def state_bytes() -> list[str]:
    """Eight-bit GaLore's state after a real step, against AdamW's in float32 (on the meta device, counted from its tensors)."""
    lines = ["| size | AdamW, float32 | GaLore, 8 bits, bfloat16 weights | less |", "|---|---|---|---|"]
    for size in SIZES:
        dense = model(size, device="meta")
        adam = torch.optim.AdamW(dense.parameters(), foreach=False)
        for p in dense.parameters():
            p.grad = torch.empty_like(p)
        adam.step()
        whole = sum(t.numel() * t.element_size() for s in adam.state.values() for k, t in s.items() if k != "step")
        del dense, adam
        network = model(size, dtype=torch.bfloat16)
        # Random directions take the bytes of the others and need no SVD.
        optimizer = GaLore(rank=SIZES[size][4], state_bits=8, projection="random").optimizer(network)
        for p in network.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        small = bytes_of(optimizer)
        lines.append(f"| {size} | {whole / 1e6:,.0f} MB | {small / 1e6:,.0f} MB | {100 * (1 - small / whole):.1f} % |")
        del network, optimizer
    return lines


def growth(repeats: int) -> list[str]:
    """A step without fresh directions and one refresh, as rank, width and depth grow one at a time from 512 wide, 8 matrices, rank 128."""
    lines = ["| width | matrices | rank | step, ms | AdamW's, ms | exact refresh, ms | randomized refresh, ms |", "|---|---|---|---|---|---|---|"]
    points = [(512, 8, 128), (512, 8, 32), (512, 8, 256), (256, 8, 128), (1024, 8, 128), (512, 4, 128), (512, 16, 128)]
    for width, count, rank in points:
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, knobs in (("exact", {}), ("randomized", {"projection": "randomized"})):
                weights = parameters_of(width, count)
                optimizer = GaLore(rank=rank, update_proj_gap=GAP, **knobs).optimizer([{"params": weights, "rank": rank}])  # type: ignore[arg-type]
                first = timed(optimizer)
                steps = [timed(optimizer) for _ in range(3)]
                found.setdefault(name, []).append(first - statistics.median(steps))
                found.setdefault("step", []).extend(steps)
            plain = AdamW().optimizer(parameters_of(width, count))
            timed(plain)
            found.setdefault("adamw", []).extend(timed(plain) for _ in range(3))
        lines.append(f"| {width} | {count} | {rank} | " + " | ".join(spread(found[name]) for name in ("step", "adamw", "exact", "randomized")) + " |")
    return lines


def parameters_of(width: int, count: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.zeros(width, width)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(width, width, generator=generator)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder with galore-torch and pytorch_optimizer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    load = psutil.getloadavg()[0]
    text = [
        "# GaLore", "", "    python benchmarks/galore.py --peers PEERS", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.repeats} (smallest to largest) in turn; "
        f"load average {load:.1f} before.", "",
        "## A step at the shapes of the 60 M LLaMA, rank 128, gap 200", "", *against_peers(options.peers, options.repeats), "",
        "## Optimizer state", "", *state_bytes(), "",
        "## How a step grows", "", "Square matrices; one of width, number and rank changes at a time.", "", *growth(options.repeats), "",
    ]  # fmt: skip
    options.out.write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()

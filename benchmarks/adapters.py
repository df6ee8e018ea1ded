"""Adapters: speed against LoRA, bytes on disk, what starting from gradients takes, and what training on a pruned model saves.

    python benchmarks/adapters.py [--quick]

Sides of a ratio run in turn in this process. Memory is measured in a process for each case, as the largest resident size sampled every millisecond, less what
was resident before; sums of gradients are kept in float32 beside the model, on the CPU by design, and are named apart.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from echelon.adapt import DeltaConfig, DyLoraConfig, IncreLoraConfig, LoraSbConfig, NolaConfig, RandLoraConfig, prepare
from echelon.adapt.baselines import Dora, Lora, Pissa, Vera
from echelon.adapt.loram import LoRAM
from echelon.adapt.prune_plan import prune
from echelon.data.files import write_whole
from echelon.edit.fila import fila_init, fisher
from echelon.models import load
from echelon.models.targets import linear_targets

RESULTS = Path(__file__).parent / "results" / "adapters.md"
TOKENS = 256
FEW = 8  # of them where tensors are measured, so that activations are small beside the matrix
RANK = 8
CASES = ("plain backward", "LoRA-SB", "FILA")


def model(size: str) -> nn.Module:
    """The embedded model, or a Llama of 162 million random parameters."""
    if size == "embedded":
        return load("embedded").model
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 32000}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512)).eval()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made while it is entered."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.numbers = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def once(wrapped: Any, x: Tensor, slope: Tensor) -> None:
    wrapped(x).backward(slope)
    for parameter in wrapped.parameters():
        parameter.grad = None


def speed(widths: list[int], repeats: int) -> list[str]:
    """Forward and backward of one adapted layer."""
    lines = [
        "## Speed", "",
        f"One square layer in float32, {TOKENS} tokens, rank {RANK}; medians of {repeats}. \"Largest\" is the largest tensor that forward makes, over the "
        "matrix that the adapter stands for: where it is below 1 the matrix is not formed. NOLA makes its random matrices in parts; RandLoRA scales its own, "
        "whose inner dimensions add up to the width.", "",
        "| width | adapter | trained | forward + backward, ms | over LoRA | largest |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for width in widths:
        x, slope = torch.randn(TOKENS, width, requires_grad=True), torch.randn(TOKENS, width)
        configs: dict[str, Any] = {
            "LoRA": LoraConfig(r=RANK, target_modules=["0"]), "NOLA, 64 bases": NolaConfig(r=RANK, num_basis=64, target_modules=["0"]),
            "NOLA, 512 bases": NolaConfig(r=RANK, num_basis=512, target_modules=["0"]), "RandLoRA": RandLoraConfig(r=RANK, target_modules=["0"]),
            "RandLoRA, r a quarter of the width": RandLoraConfig(r=width // 4, target_modules=["0"]),
        }  # fmt: skip
        made: dict[str, Any] = {name: get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config) for name, config in configs.items()}  # type: ignore[arg-type]
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for number in range(repeats + 1):
            for name, wrapped in made.items():
                started = time.perf_counter()
                once(wrapped, x, slope)
                seconds[name] += [time.perf_counter() - started] if number else []
        for name, wrapped in made.items():
            known = {t.untyped_storage().data_ptr() for t in [x, *wrapped.parameters(), *wrapped.buffers()]}
            with Largest(known) as seen:
                wrapped(x[:FEW])
            trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            middle, ratio = statistics.median(seconds[name]), statistics.median(a / b for a, b in zip(seconds[name], seconds["LoRA"], strict=True))
            lines.append(f"| {width} | {name} | {trained:,} | {1000 * middle:.2f} | {ratio:.2f} | {seen.numbers / width**2:.2f} |")
            print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def stored() -> list[str]:
    """Bytes of every adapter of the embedded model, as it is saved and as the plain LoRA of the same function."""
    configs: dict[str, Any] = {
        "LoRA, r 8": Lora(r=8, target_modules="all-linear").config(), "DoRA, r 8": Dora(r=8, target_modules="all-linear").config(),
        "PiSSA, r 8": Pissa(r=8, target_modules="all-linear").config(), "VeRA, r 256": Vera(target_modules="all-linear").config(),
        "DyLoRA, r 8": DyLoraConfig(r=8, target_modules="all-linear"), "IncreLoRA, up to r 8": IncreLoraConfig(r=8, target_modules="all-linear"),
        "NOLA, 512 bases": NolaConfig(r=8, num_basis=512, target_modules="all-linear"),
        "NOLA, 512 bases, 8 bits": NolaConfig(r=8, num_basis=512, coef_bits=8, target_modules="all-linear"),
        "RandLoRA, r 32": RandLoraConfig(r=32, target_modules="all-linear"),
        "RandLoRA, r 32, its bases saved": RandLoraConfig(r=32, save_projection=True, target_modules="all-linear"),
        "LoRA-XS, r 32": LoraSbConfig(r=32, init_weights="svd_weight", target_modules="all-linear"),
        "LoRA-XS, r 32, factors not saved": LoraSbConfig(r=32, init_weights="svd_weight", save_factors=False, target_modules="all-linear"),
    }  # fmt: skip
    lines = [
        "## Bytes", "", "All linear layers of the embedded model (7.3 M parameters); kB of the weights' file.", "",
        "| adapter | trained | saved, kB | bytes a trained number | as a plain LoRA, kB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, config in configs.items():
        wrapped: Any = get_peft_model(load("embedded").model, config)
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(f"{folder}/own", save_embedding_layers=False)
            own = size_of(Path(folder) / "own")
            plain = "-"
            if isinstance(config, DeltaConfig):
                wrapped.save_lora(f"{folder}/plain")
                plain = f"{size_of(Path(folder) / 'plain') / 1e3:.0f}"
        lines.append(f"| {name} | {trained:,} | {own / 1e3:.0f} | {own / trained:.2f} | {plain} |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Resident:
    """The largest resident size while it is entered, over that before, in bytes."""

    def __enter__(self) -> "Resident":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        self.process, self.over, self.started = psutil.Process(), threading.Event(), time.perf_counter()
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.most = max(self.most, self.process.memory_info().rss)
        self.bytes, self.seconds = self.most - self.before, time.perf_counter() - self.started


def starting(case: str, size: str) -> dict[str, float]:
    """What a start from gradients takes beside the model: of one batch of 4 rows and 32 tokens."""
    made, generator = model(size), torch.Generator().manual_seed(0)
    ids = torch.randint(3, made.config.vocab_size, (4, 32), generator=generator)  # type: ignore[union-attr, operator]
    names = linear_targets(made)[0]  # type: ignore[arg-type]
    numbers = [made.get_submodule(name).weight.numel() for name in names]  # type: ignore[union-attr, operator]
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    made(input_ids=ids, labels=ids).loss.backward()  # libraries get what they keep
    made.zero_grad()
    kept = {"plain backward": 0, "LoRA-SB": 1, "FILA": 3}[case]  # FILA: of both sets, and the weights as they were
    with Resident() as seen:
        if case == "plain backward":
            made(input_ids=ids, labels=ids).loss.backward()
        elif case == "LoRA-SB":
            prepare(made, LoraSbConfig(r=16, init_lr=1e-4, init_num_samples=4, target_modules=names), [{"input_ids": ids, "labels": ids}])
        else:
            information = fisher(made, names, rows, batch_size=4), fisher(made, names, rows[::-1], batch_size=4)
            fila_init(get_peft_model(made, LoraConfig(r=16, lora_alpha=32, target_modules=names)), *information)  # type: ignore[arg-type]
    return {"model": sum(4 * p.numel() for p in made.parameters()), "kept": 4 * kept * sum(numbers), "largest": 4 * max(numbers), "peak": seen.bytes,
            "seconds": seen.seconds}  # fmt: skip


def starts(sizes: list[str]) -> list[str]:
    lines = [
        "## Starting from gradients", "",
        "Rank 16, all linear layers, one batch of 4 rows and 32 tokens, float32 on the CPU, MB. \"Kept\" is the result: sums of gradients (FILA: of both "
        "sets), and FILA's copy of the weights that it changes. \"Beside\" is the peak over what was there before, less that; in it are activations, one "
        "decomposition in float64, and weight gradients: all of them in a plain backward, one at a time in the others.", "",
        "| model | start | model | kept | beside | largest weight gradient | all weight gradients | seconds |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for size in sizes:
        for case in CASES:
            found = child(case, size)
            beside = found["peak"] - found["kept"]
            cells = [f"{value / 1e6:.1f}" for value in (found["model"], found["kept"], beside, found["largest"], found["model"])]
            lines.append(f"| {size} | {case} | " + " | ".join(cells) + f" | {found['seconds']:.1f} |")
            print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def pruned_training(case: str, size: str) -> dict[str, float]:
    """What three steps of a LoRA take, on the whole model or a pruned one."""
    made: Any = model(size)
    if case == "pruned":
        plan = LoRAM(strategy="random", mlp_ratio=0.65, kv_ratio=0.5, skip_first=1, skip_last=1).plan(made)
        made = prune(made, plan)
    ids = torch.randint(3, made.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    tuned: Any = get_peft_model(made, LoraConfig(r=8, target_modules=linear_targets(made)[0])).train()
    optimizer, seconds = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad]), []
    with Resident() as seen:
        for _ in range(3):
            started = time.perf_counter()
            tuned(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    weights = sum(4 * p.numel() for p in made.parameters())
    return {"weights": weights, "peak": seen.bytes, "seconds": statistics.median(seconds)}


def loram(size: str) -> list[str]:
    lines = [
        "## Training on a pruned model", "",
        f"LoRA of rank 8 on all linear layers of the {size} model, whole and with 65 % of the hidden units and half of the heads pruned (not in the first and "
        "last block), 2 rows of 128 tokens, float32, MB. \"Training\" is activations, gradients and the optimizer's state: the peak over the weights.", "",
        "| model | weights | training | together | over whole | seconds a step |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    whole = 0.0
    for case in ("whole", "pruned"):
        found = child(case, size)
        together = found["weights"] + found["peak"]
        whole = whole or together
        cells = [f"{value / 1e6:.0f}" for value in (found["weights"], found["peak"], together)]
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {together / whole:.2f} | {found['seconds']:.2f} |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def child(case: str, size: str) -> dict[str, float]:
    """A case measured in a process of its own."""
    ran = subprocess.run([sys.executable, __file__, "--case", case, "--size", size], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{case} on {size}: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small widths and the embedded model alone")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.case:
        print(json.dumps((starting if options.case in CASES else pruned_training)(options.case, options.size)))
        return
    repeats = 3 if options.quick else options.repeats
    head = [
        "# Adapters", "", f"    python benchmarks/adapters.py{' --quick' if options.quick else ''}", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; load average {os.getloadavg()[0]:.1f} before.", "",
    ]  # fmt: skip
    parts = [
        speed([128, 256] if options.quick else [256, 512, 1024, 2048], repeats), stored(), starts(["embedded"] if options.quick else ["embedded", "162M"]),
        loram("embedded" if options.quick else "162M"),
    ]  # fmt: skip
    text = "\n".join([*head, *(line for part in parts for line in part)])
    write_whole(options.out, text)
    print(text)


if __name__ == "__main__":
    main()

"""Compressing a checkpoint from disk: memory, time a layer, and what a kill -9 costs.

    python benchmarks/streaming.py [--layers 4 22] [--methods slicegpt lord] [--folder /tmp/stream]

The model has TinyLlama's sizes (hidden 2048, intermediate 5632, 32 heads, 4 key-value heads, vocabulary 32000; 1.1 billion parameters with
22 layers) and random weights, written layer by layer as bfloat16 shards. Calibration: 16 rows of 512 random tokens. Every compression runs in a
process of its own: its peak is ``ru_maxrss`` of that process, and beside it the most that sampling its resident set ten times a second has seen.
CPU seconds are those of all threads: where other work shares the machine, they say more than the clock. One run is killed by SIGKILL in the
middle of a layer and started again; its files must be those of the run that nobody killed.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results" / "streaming.md"
METHODS = {
    "slicegpt": ("SliceGPT", {"sparsity": 0.25, "nsamples": 16, "seqlen": 512}),
    "lord": ("LoRD", {"rank": 0.5, "nsamples": 16, "seqlen": 512}),
}
HEADER = "| method | layers | parameters | checkpoint | seconds a layer | slowest layer | CPU seconds a layer | whole run | peak RSS | sampled |"
GIB = 2**30


def make(folder: Path, layers: int) -> None:
    """A random Llama in shards; of its weights one layer at a time is in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config: Any = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        max_position_embeddings=2048, rms_norm_eps=1e-5, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()

    def part(index: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{index:05d}-of-{layers + 2:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    places: dict[str, str] = {}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    part(1, {"model.embed_tokens.weight": matrix(32000, 2048)})
    for layer in range(layers):
        one, stem = torch.ones(2048, dtype=torch.bfloat16), f"model.layers.{layer}"
        shapes = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (256, 2048), "self_attn.v_proj": (256, 2048), "self_attn.o_proj": (2048, 2048)}
        shapes |= {"mlp.gate_proj": (5632, 2048), "mlp.up_proj": (5632, 2048), "mlp.down_proj": (2048, 5632)}
        norms = {f"{stem}.{name}.weight": one.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        part(layer + 2, {f"{stem}.{name}.weight": matrix(*shape) for name, shape in shapes.items()} | norms)
    part(layers + 2, {"model.norm.weight": torch.ones(2048, dtype=torch.bfloat16), "lm_head.weight": matrix(32000, 2048)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def child(source: str, method: str, out: str) -> None:
    """One compression; a line of JSON for each step, and one for the whole."""
    import torch

    from echelon import compress

    def tell(**entry: Any) -> None:
        print(json.dumps(entry | {"at": time.perf_counter() - started, "busy": time.process_time()}), flush=True)

    name, knobs = METHODS[method]
    rows = torch.randint(0, 32000, (16, 512), generator=torch.Generator().manual_seed(1)).tolist()
    started = time.perf_counter()
    tell(imported=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    report = compress.compress_checkpoint(source, getattr(compress, name)(**knobs), out, rows, on_progress=lambda entry: tell(**entry))
    tell(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, parameters=report.parameters_after, before=report.parameters_before)


def run(source: Path, method: str, out: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Start a child and watch it; kill it two seconds after it has done ``kill_at`` blocks, if given."""
    words = [sys.executable, __file__, "--child", str(source), method, str(out)]
    log = out.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    watched, sampled, killing = psutil.Process(process.pid), 0, 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            sampled = max(sampled, watched.memory_info().rss)
        if kill_at is not None and f'"done": {kill_at},' in log.read_text():
            killing = killing or time.monotonic() + 2
            if time.monotonic() > killing:
                process.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    told = [json.loads(line) for line in log.read_text().splitlines()]
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"the child ended with {process.returncode}")
    return {"told": told, "sampled": sampled, **(told[-1] if kill_at is None else {})}


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def row(method: str, layers: int, made: dict[str, Any], bytes_before: int, bytes_after: int) -> str:
    steps = [entry for entry in made["told"] if "done" in entry][: layers + 1]
    each, busy = ([after[what] - before[what] for before, after in itertools.pairwise(steps)] for what in ("at", "busy"))
    size = f"{bytes_before / GIB:.2f} -> {bytes_after / GIB:.2f} GiB"
    parameters = f"{made['before'] / 1e6:,.0f} -> {made['parameters'] / 1e6:,.0f} M"
    seconds = f"{statistics.median(each):.1f} | {max(each):.1f} | {statistics.median(busy):.1f} | {made['at'] / 60:.1f} min"
    return f"| {method} | {layers} | {parameters} | {size} | {seconds} | {made['peak'] / GIB:.2f} GiB | {made['sampled'] / GIB:.2f} GiB |"


def stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 22])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/stream"))
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        return child(*given.child)
    given.folder.mkdir(parents=True)
    busy = os.getloadavg()
    try:
        rows, whole, killed = [], {}, ""
        for layers in given.layers:
            source = given.folder / f"llama-{layers}"
            subprocess.run([sys.executable, "-c", f"import streaming, pathlib; streaming.make(pathlib.Path({str(source)!r}), {layers})"],
                           check=True, cwd=Path(__file__).parent)  # fmt: skip
            for method in given.methods:
                out = given.folder / f"{method}-{layers}"
                made = run(source, method, out)
                rows.append(row(method, layers, made, stored(source), stored(out)))
                print(HEADER if len(rows) == 1 else "", rows[-1], sep="\n", flush=True)
                whole[method, layers] = hashes(out), made
                shutil.rmtree(out)
            if layers == given.layers[0] and not given.no_kill:
                method, out = given.methods[0], given.folder / "killed"
                run(source, method, out, kill_at=layers // 2)
                assert not out.exists()
                again = run(source, method, out)
                same = hashes(out) == whole[method, layers][0]
                first = next(entry for entry in again["told"] if "done" in entry)
                killed = (
                    f"{method}, {layers} layers, killed in layer {layers // 2 + 1} by SIGKILL and started again: layer {first['done']} was done "
                    f"{first['at']:.1f} s after the restart; peak {again['peak'] / GIB:.2f} GiB; shards the same as without the kill, byte for byte: "
                    f"{'yes' if same else 'NO'}."
                )
                print(killed, flush=True)
                shutil.rmtree(out)
            shutil.rmtree(source)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    import torch
    import transformers

    imported = next(iter(whole.values()))[1]["told"][0]["imported"]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    load = f"load average {busy[0]:.1f} before, {os.getloadavg()[1]:.1f} after (of {os.cpu_count()} cores)"
    about = f"{platform.machine()}, {torch.get_num_threads()} threads, {versions}, {load}"
    knobs = "; ".join(f"{name}: {', '.join(f'{k}={v}' for k, v in METHODS[name][1].items())}" for name in given.methods)
    text = [
        "# Compressing from disk", "", f"    python benchmarks/streaming.py {' '.join(sys.argv[1:])}".rstrip(), "",
        f"{about}. Random Llama, hidden 2048, intermediate 5632, bfloat16; {knobs}. Importing alone takes {imported / GIB:.2f} GiB of the peak.",
        "", HEADER, "|---" * (HEADER.count("|") - 1) + "|", *rows, "", killed, "",
    ]  # fmt: skip
    given.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()

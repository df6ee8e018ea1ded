"""What two gloo processes do in `tests/train/test_distributed.py`; torchrun starts this file with a folder for its results."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

import small_models
import tiny
from echelon.errors import UserError
from echelon.linalg.projection import Projector
from echelon.train.language import Training, fit
from echelon.train.layers import LowRank
from echelon.train.layerwise import step_in_backward
from echelon.train.optimizers import AdamW, GaLore

METHODS = {
    "adamw": AdamW(lr=0.01, weight_decay=0.1),
    "galore": GaLore(lr=0.01, rank=4, update_proj_gap=2),
    "low_rank": LowRank(lr=0.01, rank=4, refactor_every=2, reset_every=3),
}
SHARDED = {
    "adamw": (torch.float32, METHODS["adamw"]),
    "galore": (torch.float32, METHODS["galore"]),
    "adafactor": (torch.float32, GaLore(lr=0.01, rank=4, update_proj_gap=2, base="adafactor")),
    "eight_bits": (torch.float32, AdamW(lr=0.01, state_bits=8)),
    "master": (torch.bfloat16, AdamW(lr=0.01, rounding="master", state_bits=16)),
}
STEPS = 5


def training(rows, **more):
    """A step reads four rows in all."""
    return Training(steps=STEPS, batch_size=rows, seqlen=12, save_every=2, **more)


def texts():
    return [" ".join(tiny.WORDS[n] for n in row) for row in small_models.data("llama", rows=10)]


def batch(step):
    return torch.tensor(small_models.data("llama", rows=4, length=10, seed=step))


def train(model, optimizer, ids_of, first=0, steps=STEPS):
    """Losses of plain steps, clipped."""
    found = []
    for step in range(first, first + steps):
        ids = ids_of(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def sharded(name, out):
    """Train in shards, store all after three steps, go on; weights at the end."""
    rank = dist.get_rank()
    dtype, method = SHARDED[name]
    model = small_models.model("llama", dtype)
    shard(model)
    optimizer = method.optimizer(model)
    train(model, optimizer, lambda step: batch(step)[2 * rank : 2 * rank + 2], steps=3)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    local = optimizer.state_bytes()
    if rank == 0:
        torch.save({"model": weights, "optimizer": state}, out / f"{name}.pt")
    train(model, optimizer, lambda step: batch(step)[2 * rank : 2 * rank + 2], first=3, steps=2)
    weights, _ = get_state_dict(model, [], options=options)
    if rank == 0:
        torch.save(weights, out / f"{name}_end.pt")
    return local


def refreshes(out):
    """Which process chooses directions, and whether all have the same ones."""
    chosen, fit_ = [], Projector.fit
    Projector.fit = lambda self, gradient, state, seed=0: (chosen.append(int(state["index"])), fit_(self, gradient, state, seed))[1]
    model = small_models.model("llama")
    optimizer = METHODS["galore"].optimizer(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    Projector.fit = fit_
    bases = torch.cat([state["right" if "right" in state else "left"].flatten() for state in optimizer.state.values() if {"right", "left"} & state.keys()])
    other = bases.clone()
    dist.broadcast(other, 0)
    return {"chosen": chosen, "same": torch.equal(bases, other), "targets": len(optimizer.param_groups[0]["params"])}


def refused(out):
    said = []
    model = small_models.model("llama")
    optimizer = METHODS["adamw"].optimizer(model)
    try:
        step_in_backward(optimizer)
    except UserError as error:
        said.append(str(error))
    shard(model)
    optimizer = METHODS["adamw"].optimizer(model)
    before = [p.to_local().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 0:  # the other process's shard is in order
        model.model.layers[0].mlp.up_proj.weight.grad.to_local()[0, 0] = float("nan")
    try:
        optimizer.step()
    except ValueError as error:
        said.append(str(error))
    return [*said, all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))]


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    told = {}
    for name, method in METHODS.items():
        fit(small_models.model("llama"), tiny.tokenizer(), texts(), out / name, method, training(2, accumulate=2), held_out=texts()[:4])
    broken = small_models.model("gpt2")

    def stop(entry):
        if entry["step"] == 3:
            raise InterruptedError

    try:
        fit(broken, tiny.tokenizer(), texts(), out / "broken", METHODS["galore"], training(2), on_step=stop)
    except InterruptedError:
        dist.barrier()
    fit(small_models.model("gpt2"), tiny.tokenizer(), texts(), out / "broken", METHODS["galore"], training(2))
    fit(small_models.model("gpt2"), tiny.tokenizer(), texts(), out / "unbroken", METHODS["galore"], training(2))
    in_shards = {"accumulate": 2, "fsdp": True}
    for name in ("adamw", "galore"):
        model = small_models.model("qwen2")  # with tied embeddings
        fit(model, tiny.tokenizer(), texts(), out / f"fsdp_{name}", METHODS[name], training(4, **in_shards), held_out=texts()[:4])
    try:
        fit(small_models.model("qwen2"), tiny.tokenizer(), texts(), out / "fsdp_broken", METHODS["galore"], training(4, **in_shards), on_step=stop)
    except InterruptedError:
        dist.barrier()
    fit(small_models.model("qwen2"), tiny.tokenizer(), texts(), out / "fsdp_broken", METHODS["galore"], training(4, **in_shards))
    told["bytes"] = {name: sharded(name, out) for name in SHARDED}
    told |= {"refreshes": refreshes(out), "refused": refused(out)}
    (out / f"told-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # all is written; torch's own threads have been seen to abort the process when the interpreter ends

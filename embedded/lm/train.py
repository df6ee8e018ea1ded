"""Train the language model that ships with Echelon, from text to a Hugging Face folder.

    ECHELON_DATA=... python embedded/lm/train.py --work RUN_DIR [--config embedded/lm/config.yaml]

Public-domain books and the WikiText-2 head, an own byte-level BPE, a small Llama, Muon for the matrices and AdamW for the
rest, constant rate then linear decay. Kill it at any moment and run the same command: it goes on from its last checkpoint and
sees the same batches. ``--tokens`` may be changed while the rate is still constant. Nothing is ever pickled.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>"]


def read_works(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def read_wikitext(path: Path) -> list[str]:
    """Undo the word-level spacing of WikiText and drop every sentence with an unknown word; one text per article."""
    articles: list[list[str]] = [[]]
    for line in path.open(encoding="utf-8"):
        line = line.strip()
        if re.fullmatch(r"= [^=].* =", line):
            articles.append([])
        elif line and not line.startswith("="):
            kept = [s for s in re.split(r"(?<= [.?!]) ", line) if "<unk>" not in s]
            articles[-1].append(" ".join(kept))
    return ["\n\n".join(detokenize(p) for p in article if p) for article in articles if any(article)]


def detokenize(text: str) -> str:
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    text = re.sub(r"' ([^']*) '", r"'\1'", text)
    text = re.sub(r" ([.,;:?!%)\]]|'s\b|'t\b|n't\b|'re\b|'ve\b|'ll\b|'d\b|'m\b)", r"\1", text)
    return re.sub(r"([(\[$£]) ", r"\1", text).replace("  ", " ")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream ``<s> text </s> <s> text </s> ...``."""
    pieces = []
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        pieces.append(np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(pieces)


def orthogonalize(update: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack, by five quintic Newton-Schulz steps in bf16 (Muon)."""
    x = update.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised, for 2-D parameters; parameters of one shape are handled as one stack."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def schedule(tokens: int, config: dict) -> float:
    """Share of the peak rate: linear warm-up, flat, linear to zero over the last ``decay`` share of the tokens."""
    warm = tokens / config["warmup_tokens"]
    cool = (config["tokens"] - tokens) / (config["decay"] * config["tokens"])
    return max(0.0, min(1.0, warm, cool))


def read_batch(stream: np.ndarray, first: int, rows: int, window: int, seed: int) -> np.ndarray:
    """Rows ``first .. first + rows`` of an endless walk over the stream: each epoch in its own order, with its own window borders."""
    per_epoch = (len(stream) - 1) // window - 1
    batch = []
    for epoch, k in (divmod(i, per_epoch) for i in range(first, first + rows)):
        start = epoch_order(per_epoch, epoch, seed)[k] * window + epoch * 97 % window
        batch.append(stream[start : start + window + 1])
    return np.stack(batch).astype(np.int64)


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@torch.no_grad()
def held_out(model, stream: np.ndarray, window: int, limit: int | None = None) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) over contiguous windows, and the number of tokens it was summed over."""
    count = (len(stream) - 1) // window if limit is None else min(limit, (len(stream) - 1) // window)
    total = 0.0
    for start in range(0, count, 16):
        rows = np.stack([stream[i * window : i * window + window + 1] for i in range(start, min(start + 16, count))])
        batch = torch.from_numpy(rows.astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total, count * window


def save_checkpoint(folder: Path, model, optimizers, seen: int, seconds: float) -> None:
    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"model.{n}": p.detach() for p, n in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optim.{names[p]}.{k}": torch.as_tensor(v) for k, v in state.items()}
    aside = folder / "checkpoint.part"
    save_file(tensors, aside, metadata={"seen": str(seen), "seconds": str(seconds)})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(folder / "checkpoint.safetensors")


def load_checkpoint(path: Path, model, optimizers) -> tuple[int, float]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"model.{name}"])
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            name = next(n for n, q in parameters.items() if q is p)
            prefix = f"optim.{name}."
            optimizer.state[p] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return int(meta["seen"]), float(meta["seconds"])


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here / "config.yaml")
    parser.add_argument("--work", type=Path, required=True, help="folder for the token stream, checkpoint and curve")
    parser.add_argument("--tokens", type=int, help="train on this many tokens in place of the config's")
    parser.add_argument("--out", type=Path, help="write the finished model here")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    if args.tokens:
        config["tokens"] = args.tokens
    data = Path(os.environ["ECHELON_DATA"])
    args.work.mkdir(parents=True, exist_ok=True)

    if not (args.work / "train.npy").exists():
        books = [data / p for p in config["books"]]
        texts = [t for path in books for t in read_works(path)] + read_wikitext(data / config["wikitext"])
        tokenizer = train_tokenizer(texts, config["vocab_size"])
        tokenizer.save_pretrained(args.work / "tokenizer")
        works = read_works(data / config["held_out"])
        hashes = {p.relative_to(data).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
                  for p in [*books, data / config["wikitext"], data / config["held_out"]]}
        (args.work / "data.json").write_text(json.dumps(
            {"sha256": hashes, "held_out_bytes": sum(len(w.encode()) for w in works)}, indent=2) + "\n")
        np.save(args.work / "valid.npy", encode(tokenizer, works))
        np.save(args.work / "train.npy", encode(tokenizer, texts))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    train, valid = np.load(args.work / "train.npy"), np.load(args.work / "valid.npy")

    torch.manual_seed(config["seed"])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=config["vocab_size"], bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=True, **config["model"]))
    print(f"{model.num_parameters():,} parameters, {len(train):,} training tokens", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [Muon(matrices, lr=config["muon_lr"], weight_decay=config["weight_decay"]),
                  torch.optim.AdamW(rest, lr=config["adam_lr"], betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [config["muon_lr"], config["adam_lr"]]
    seen, seconds = 0, 0.0
    if (args.work / "checkpoint.safetensors").exists():
        seen, seconds = load_checkpoint(args.work / "checkpoint.safetensors", model, optimizers)
        print(f"resumed at {seen:,} tokens", flush=True)

    @torch.compile(dynamic=False)
    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    step_tokens, parts = config["batch_tokens"], config["accumulate"]
    curve = args.work / "curve.csv"
    if not curve.exists():
        curve.write_text("tokens,seconds,train_loss,held_out_loss\n")
    started, last_save, losses = time.monotonic() - seconds, time.monotonic(), []
    while seen < config["tokens"]:
        window = config["window"] if seen < config["long_from"] * config["tokens"] else config["long_window"]
        batch = torch.from_numpy(read_batch(train, seen // window, step_tokens // window, window, config["seed"]))
        for part in batch.chunk(parts):
            loss = loss_of(part) / parts
            loss.backward()
            losses.append(loss.item() * parts)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        share = schedule(seen, config)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        seen += step_tokens
        now = time.monotonic()
        if (seen // step_tokens) % config["log_steps"] == 0:
            checked, count = held_out(model, valid, 256, limit=64)
            line = f"{seen},{now - started:.0f},{np.mean(losses):.4f},{checked / count:.4f}"
            with curve.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
            losses = []
        if now - last_save > config["save_seconds"]:
            save_checkpoint(args.work, model, optimizers, seen, now - started)
            last_save = now
    save_checkpoint(args.work, model, optimizers, seen, time.monotonic() - started)

    model = model.to(torch.bfloat16)
    out = args.out or args.work / "model"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    bytes_held_out = json.loads((args.work / "data.json").read_text())["held_out_bytes"]
    result = {"parameters": model.num_parameters(), "tokens_seen": seen, "seconds": round(time.monotonic() - started)}
    for size in (256, 512):
        total, count = held_out(model, valid, size)
        nats = total / count
        result[f"held_out_{size}"] = {
            "nats_per_token": nats, "perplexity_per_token": math.exp(nats),
            "bits_per_byte": nats / math.log(2) * len(valid) / bytes_held_out}
    (args.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

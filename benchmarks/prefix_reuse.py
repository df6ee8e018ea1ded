"""Scoring prompts that begin alike: in batches that read what they share once, in batches that do not, and one prompt at a time.

    python benchmarks/prefix_reuse.py [--repeats 2] [--sample 60] [--device cpu] [--quick]

A random Llama of 55 M parameters with the embedded tokenizer answers three rounds of questions on 20 queries: all ordered pairs of 6 candidates
(PRP, allpair), 12 pairs in both orders from the lowest level of a heap over 100 (PRP, heapsort), and 2 of the sets of 20 that a setwise heap over
100 begins with. Passages have 100 tokens. Without sharing, prompts are measured on a sample and scaled: in batches, one at a time with the engine
(which takes logits after the last token only), and as a plain call of the model for each. All sides run in this process and take turns.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
import transformers

from echelon.data.files import write_whole
from echelon.data.passages import passages
from echelon.llm import LocalEngine, Prompt, load_template
from echelon.models import LoadedModel, load

RESULTS = Path(__file__).parent / "results" / "prefix_reuse.md"
Asked = list[tuple[Prompt, list[str]]]


def random_llama(tokenizer: transformers.PreTrainedTokenizerBase, quick: bool, device: str) -> LoadedModel:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64 if quick else 512, num_hidden_layers=2 if quick else 16, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=128 if quick else 1536, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LoadedModel(transformers.LlamaForCausalLM(config).eval().to(device), tokenizer)


def rounds(engine: LocalEngine, queries: int, quick: bool) -> Iterator[tuple[str, Asked]]:
    """Names and prompts of the three rounds."""
    words = " ".join(passage.text for passage in passages()).split()
    chance = random.Random(0)

    def text(length: int) -> str:
        begin = chance.randrange(len(words) - length)
        return " ".join(words[begin : begin + length])

    few, many = (3, 9) if quick else (6, 100)
    pool = [(text(8), [text(120) for _ in range(many)]) for _ in range(queries)]

    def asked(name: str, sets: list[tuple[int, ...]]) -> Asked:
        template = load_template(name)
        made = []
        for query, docs in pool:
            for places in sets:
                prompt = template.render(engine, query, [docs[place] for place in places], max_passage_tokens=100)
                made.append((prompt, template.choices(len(places))))
        return made

    yield f"PRP, all pairs of {few}", asked("prp", [(a, b) for a in range(few) for b in range(few) if a != b])
    parents = range(many // 4, many // 4 + 1 + many // 9)
    pairs = [pair for parent in parents for pair in ((parent, 2 * parent + 1), (2 * parent + 1, parent))]
    yield f"PRP, heap of {many}", asked("prp", pairs)
    width = 3 if quick else 20
    yield f"setwise, sets of {width}", asked("setwise", [tuple(range(begin, begin + width)) for begin in (0, width)])


class Peak:
    """Resident memory beyond what there was, sampled; on a CUDA device what was allocated there."""

    def __init__(self, device: str):
        self.cuda, self.most, self.over = device.startswith("cuda"), 0, threading.Event()
        self.process = psutil.Process()

    def __enter__(self) -> "Peak":
        self.before = self.process.memory_info().rss
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.mib = max(0, (torch.cuda.max_memory_allocated() if self.cuda else self.most) - self.before) / 2**20


def measured(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds, and MiB at most."""
    with Peak(device) as peak:
        start = time.perf_counter()
        work()
        if peak.cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
    return taken, peak.mib


@torch.inference_mode()
def plainly(loaded: LoadedModel, asked: Asked, engine: LocalEngine) -> None:
    """One call of the model for each prompt, and its logits at the last token."""
    for prompt, _ in asked:
        ids = loaded.tokenizer(engine.prompt_text(prompt), return_tensors="pt").input_ids.to(loaded.model.device)
        loaded.model(input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1).cpu()


def counted(engine: LocalEngine, asked: Asked) -> int:
    """Tokens forwarded, padding included."""
    tokens: list[int] = []
    hook = engine.network.register_forward_pre_hook(lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True)
    engine.score_choices([prompt for prompt, _ in asked], [choices for _, choices in asked])
    hook.remove()
    return sum(tokens)


def compared(loaded: LoadedModel, asked: Asked, args: argparse.Namespace) -> list[str]:
    """Cells of one row."""
    sharing, apart = (LocalEngine(loaded, batch_tokens=args.batch_tokens, prefix_cache=share) for share in (True, False))
    few = random.Random(1).sample(asked, min(args.sample, len(asked)))
    prompts, choices = [list(part) for part in zip(*asked, strict=True)]
    scale = len(asked) / len(few)
    sides: dict[str, tuple[Callable[[], object], float]] = {
        "sharing": (lambda: sharing.score_choices(prompts, choices), 1.0),
        "batches": (lambda: apart.score_choices([prompt for prompt, _ in few], [texts for _, texts in few]), scale),
        "one at a time": (lambda: [apart.score_choices([prompt], [texts]) for prompt, texts in few], scale),
        "plain calls": (lambda: plainly(loaded, few, apart), scale),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory = 0.0
    tokens = [counted(sharing, asked), counted(apart, few) * scale]  # which warms both up too
    for _ in range(args.repeats):
        for name, (work, times) in sides.items():
            taken, mib = measured(work, args.device)
            seconds[name].append(taken * times)
            memory = max(memory, mib) if name == "sharing" else memory
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [statistics.median(b / a for a, b in zip(seconds["sharing"], seconds[name], strict=True)) for name in list(sides)[1:]]
    return [
        str(len(asked)), f"{tokens[1] / len(asked):.0f}", f"{tokens[0] / tokens[1]:.2f}", *(f"{value:.1f}" for value in median.values()),
        *(f"{ratio:.2f}" for ratio in ratios), f"{memory:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sample", type=int, default=60, help="prompts on which the sides that do not share are measured")
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few prompts, to see that it runs; nothing is written")
    args = parser.parse_args()
    loaded = random_llama(load("embedded").tokenizer, args.quick, args.device)
    size = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()}, {torch.get_num_threads()} threads"
    lines = [
        "# Prompts that begin alike", "", f"    python benchmarks/prefix_reuse.py --repeats {args.repeats} --sample {args.sample} --device {args.device}", "",
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}; {size:.0f} M parameters, {loaded.model.dtype}, "
        f"batches of {args.batch_tokens} tokens; medians of {args.repeats}, taken in turn; load average {os.getloadavg()[0]:.1f} before.", "",
        "| round | prompts | tokens a prompt | share of tokens forwarded | s sharing | s in batches | s one at a time | s plain calls | batches / sharing "
        "| one at a time / sharing | plain / sharing | MiB sharing |", "|---|" + "---|" * 11,
    ]  # fmt: skip
    for name, asked in rounds(LocalEngine(loaded), 3 if args.quick else 20, args.quick):
        lines.append(f"| {name} | " + " | ".join(compared(loaded, asked, args)) + " |")
        print(lines[-1], file=sys.stderr)
    if not args.quick:
        write_whole(RESULTS, "\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

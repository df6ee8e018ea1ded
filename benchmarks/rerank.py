"""Reranking: what strategies and executor cost beside the model, what asking many queries at once saves, and cross-encoders in batches of all queries.

    python benchmarks/rerank.py [--repeats 3] [--prompts 1000] [--sample 40] [--device cpu] [--quick]

1. Every strategy on 200 queries of 100 candidates with a judge that knows the answers and takes no time.
2. PRP (heapsort) and setwise ranking by likelihood on 20 queries of 100 candidates, by a random Llama of 64 M parameters with the embedded tokenizer: the first
   ``--prompts`` of them through the executor, with what prompts begin with in common read once, against the same prompts one at a time (a sample, scaled;
   what the answers of one prompt begin with in common is read once there too).
3. A random cross-encoder of MiniLM's size on 20 queries of 50 passages, against sentence-transformers' ``predict`` on all pairs and query by query.

All sides run in this process and take turns.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from prefix_reuse import measured

from echelon.data.documents import Doc
from echelon.data.files import write_whole
from echelon.data.passages import passages
from echelon.llm import LocalEngine
from echelon.models import LoadedModel, load
from echelon.rerank import PRP, Budget, CrossEncoder, Oracle, RankR1, Request, Reranker, Strategy, execute
from echelon.rerank.strategies.listwise import Knockout, SettlingPasses, Windows
from echelon.rerank.strategies.pairwise import AllPairs, PairHeap, PairPasses
from echelon.rerank.strategies.pointwise import Points
from echelon.rerank.strategies.setwise import SetHeap, SetPasses

RESULTS = Path(__file__).parent / "results" / "rerank.md"
STRATEGIES: dict[str, Strategy] = {
    "pointwise": Points(), "all pairs": AllPairs(), "pair heap": PairHeap(), "pair passes": PairPasses(), "set heap of 20": SetHeap(),
    "set heap of 3": SetHeap(num_child=2), "set passes of 20": SetPasses(), "windows": Windows(), "whole list": Windows(None),
    "settling passes": SettlingPasses(), "knockout": Knockout(),
}  # fmt: skip


def told(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def overhead(repeats: int, quick: bool) -> list[str]:
    queries, n = (20, 30) if quick else (200, 100)
    chance = random.Random(0)
    qrels = {f"q{q}": {f"d{i}": grade for i, grade in enumerate(chance.sample(range(n), n))} for q in range(queries)}
    requests = [Request.of(f"query {qid}", [Doc(name, f"{name} of {qid}") for name in qrels[qid]], qid) for qid in qrels]
    lines = [
        f"## Strategies and executor alone, {queries} queries of {n} candidates", "",
        "| strategy | questions a query | prompts a query | rounds | seconds (want below 1) | microseconds a question |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, strategy in STRATEGIES.items():
        seconds, stats = [], None
        for _ in range(repeats):
            oracle = Oracle(qrels)
            start = time.perf_counter()
            _, stats, _ = execute(oracle, strategy, requests)
            seconds.append(time.perf_counter() - start)
        assert stats is not None
        each = 1e6 * statistics.median(seconds) / stats.calls
        lines.append(f"| {name} | {stats.calls / queries:.1f} | {stats.prompts / queries:.1f} | {stats.rounds} | {told(seconds)} | {each:.2f} |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def random_llama(quick: bool, device: str) -> LoadedModel:
    tokenizer = load("embedded").tokenizer
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64 if quick else 640, num_hidden_layers=2 if quick else 13, num_attention_heads=8 if quick else 10,
        num_key_value_heads=4 if quick else 5, intermediate_size=128 if quick else 1728, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LoadedModel(transformers.LlamaForCausalLM(config).eval().to(device), tokenizer)


def asked_together(args: argparse.Namespace) -> list[str]:
    loaded = random_llama(args.quick, args.device)
    requests = texts(3 if args.quick else 20, 12 if args.quick else 100, 60)
    size = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    lines = [
        f"## Questions of {len(requests)} queries at once, {size:.0f} M parameters on {args.device}", "",
        "| method | prompts | tokens a prompt | s together | s one at a time | ratio (want at least 3) | MiB together |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    methods: dict[str, tuple[Callable[[LocalEngine], Reranker], int]] = {
        "PRP, heapsort": (lambda engine: PRP(engine, max_passage_tokens=60, batch_size=256), args.prompts),
        "setwise, likelihood": (lambda engine: RankR1(engine, reasoning=False, scoring="likelihood", max_passage_tokens=60), args.prompts // 10),
    }
    for name, (make, most) in methods.items():
        through, alone, peak = [], [], 0.0
        for _ in range(1 if args.quick else args.repeats):
            reranker = make(LocalEngine(loaded))
            found: dict[str, Any] = {}
            taken, mib = measured(lambda: found.update(made=reranker.rerank(requests, budget=Budget(prompts=most), trace=True)), args.device)  # noqa: B023
            through.append(taken)
            judge, made = reranker.judge, found["made"]
            questions = [judgement.question for judgement in made.trace if not judgement.known]
            few = random.Random(1).sample(questions, min(args.sample, len(questions)))
            taken, _ = measured(lambda: [judge.answer([question]) for question in few], args.device)  # noqa: B023
            alone.append(taken * len(questions) / len(few))
            peak = max(peak, mib)
        ratio = statistics.median(b / a for a, b in zip(through, alone, strict=True))
        stats = made.stats
        cells = [f"{stats.prompts}", f"{stats.prompt_tokens / stats.prompts:.0f}", told(through), told(alone), f"{ratio:.2f}", f"{peak:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def texts(queries: int, candidates: int, words: int) -> list[Request]:
    """Queries and candidates of random stretches of the passages that ship, of unequal length."""
    pool = " ".join(passage.text for passage in passages()).split()
    chance = random.Random(0)

    def text(most: int) -> str:
        length = chance.randint(most // 2, most)
        begin = chance.randrange(len(pool) - length)
        return " ".join(pool[begin : begin + length])

    return [Request.of(text(10), [text(words) for _ in range(candidates)], f"q{q}") for q in range(queries)]


def cross_encoders(args: argparse.Namespace) -> list[str]:
    import sentence_transformers

    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=32 if args.quick else 384, num_hidden_layers=2 if args.quick else 6, num_attention_heads=4 if args.quick else 12,
        intermediate_size=64 if args.quick else 1536, num_labels=1, pad_token_id=2,
    )  # fmt: skip
    tokenizer = load("embedded").tokenizer
    tokenizer.padding_side = "right"
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = sentence_transformers.CrossEncoder(folder, max_length=256, device=args.device)
    requests = texts(*((4, 10) if args.quick else (20, 50)), 80)
    pairs = [(request.query, doc.text) for request in requests for doc in request.docs]

    def by_query() -> None:
        for request in requests:
            model.predict([(request.query, doc.text) for doc in request.docs], show_progress_bar=False)

    sides: dict[str, Callable[[], object]] = {
        "echelon": lambda: CrossEncoder(model).rerank(requests), "predict on all pairs": lambda: model.predict(pairs, show_progress_bar=False),
        "predict query by query": by_query,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + (1 if args.quick else args.repeats)):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            seconds[name] += [time.perf_counter() - start] if number else []
    lines = [
        f"## Cross-encoders, {len(requests)} queries, {len(pairs)} pairs", "", "| side | seconds | times echelon's (want at least 1) |", "|---|---|---|",
    ]  # fmt: skip
    for name, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["echelon"], values, strict=True))
        lines.append(f"| {name} | {told(values)} | {ratio:.2f} |")
        print(lines[-1], file=sys.stderr)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1000, help="prompts of PRP, and ten times as many as of setwise ranking")
    parser.add_argument("--sample", type=int, default=40, help="prompts that are asked one at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models and few queries, to see that it runs; nothing is written")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()}, {torch.get_num_threads()} threads"
    lines = [
        "# Reranking", "",
        f"    python benchmarks/rerank.py --repeats {args.repeats} --prompts {args.prompts} --sample {args.sample} --device {args.device}", "",
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}; medians of {args.repeats} (fastest to slowest), taken in turn; "
        f"load average {os.getloadavg()[0]:.1f} before.", "",
    ]  # fmt: skip
    lines += overhead(1 if args.quick else args.repeats, args.quick) + asked_together(args) + cross_encoders(args)
    if not args.quick:
        write_whole(RESULTS, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""ICR: latency and memory beside what else one model can do with the same candidates.

    python benchmarks/icr.py [--documents 100] [--words 100] [--queries 2] [--repeats 3] [--quick]

A Llama of random weights ranks passages for a query by attention (two forward passes; also by the middle half of its layers, and without calibration), by
windows that it writes an order for (RankGPT, 20 passages, half of them further each time) and by writing one order of all. A random model writes until its
answer has the length of a complete ranking, as a good one would. Each measurement has a process of its own, and the sides take turns.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from echelon.data.documents import Doc
from echelon.data.files import write_whole
from echelon.data.passages import passages
from echelon.models import LoadedModel, load
from echelon.rerank import ICR, FullRank
from echelon.rerank.base import Request, Reranker

RESULTS = Path(__file__).parent / "results" / "icr.md"
SHAPES = {
    False: {"hidden_size": 640, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 5, "intermediate_size": 1728},
    True: {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352},
}


def random_llama(quick: bool) -> LoadedModel:
    """About 62 M parameters, with the embedded model's tokenizer."""
    tokenizer = load("embedded").tokenizer
    config = transformers.LlamaConfig(
        vocab_size=8192, max_position_embeddings=65536, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=True, **SHAPES[quick]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    return LoadedModel(model.to("cuda") if torch.cuda.is_available() else model, tokenizer)  # type: ignore[arg-type]


def sides(model: LoadedModel, words: int, window: int) -> dict[str, Reranker]:
    return {
        "icr": ICR(model, max_doc_words=words),
        "icr, middle half": ICR(model, max_doc_words=words, layers="middle"),
        "icr, no calibration": ICR(model, max_doc_words=words, calibration_query=None),
        "sliding windows": FullRank(model, strategy="sliding", prompt="rankgpt", window_size=window, stride=window // 2, max_passage_tokens=4 * words),
        "one list": FullRank(model, max_passage_tokens=4 * words),
    }


def requests(documents: int, words: int, queries: int) -> list[Request]:
    text = " ".join(passage.text for passage in passages("test")).split()
    made = []
    for query in range(queries):
        starts = [(query * 977 + i * words) % (len(text) - words) for i in range(documents)]
        docs = [Doc(str(i), " ".join(text[start : start + words])) for i, start in enumerate(starts)]
        made.append(Request.of(" ".join(text[query * 31 : query * 31 + 8]), docs, str(query)))
    return made


def peak() -> float:
    """Most memory so far, in MiB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One side, in this process."""
    transformers.logging.set_verbosity_error()
    reranker = sides(random_llama(args.quick), args.words, args.window)[args.side]
    reranker.rerank(requests(min(4, args.documents), args.words, 1))  # warm up
    before, work = peak(), requests(args.documents, args.words, args.queries)
    start = time.perf_counter()
    stats = reranker.rerank(work, depth=args.documents).stats
    seconds = (time.perf_counter() - start) / args.queries
    count = args.queries
    return {
        "seconds": seconds, "memory": peak() - before, "prompts": stats.prompts / count, "read": stats.prompt_tokens / count,
        "written": stats.generated_tokens / count,
    }  # fmt: skip


def told(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a small model and 12 passages of 20 words in windows of 4, for a look; writes no file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.documents, args.words, args.queries, args.repeats, args.window = 12, 20, 1, 1, 4
    if args.side:
        print(json.dumps(measure(args)))
        return
    model = random_llama(args.quick).model
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for side in sides(LoadedModel(None, None), args.words, args.window):  # type: ignore[arg-type]
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True, capture_output=True, text=True)
            found.setdefault(side, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(side, found[side][-1], file=sys.stderr)
    tokens, config = found["icr, no calibration"][0]["read"], model.config
    maps = 4 * config.num_hidden_layers * config.num_attention_heads * tokens**2 / 2**30
    lines = [
        "# ICR", "", f"    python benchmarks/icr.py {' '.join(sys.argv[1:])}".rstrip(), "",
        f"{args.documents} passages of {args.words} words, {args.queries} queries; random Llama of {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{model.dtype}; {torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; a query's seconds and memory beyond that of the model, median of "
        f"{args.repeats} (least to most), taken in turn; load average {os.getloadavg()[0]:.1f} behind.", "",
        "| | seconds | of sliding windows | MiB | prompts | tokens read | tokens written |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for side, runs in found.items():
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs, found["sliding windows"], strict=True))
        first = runs[0]
        lines.append(f"| {side} | {told([run['seconds'] for run in runs])} | {ratio:.2f} | {told([run['memory'] for run in runs])} | {first['prompts']:.0f} | "
                     f"{first['read']:.0f} | {first['written']:.0f} |")  # fmt: skip
    lines += ["", f"The attention maps of all heads and layers together, as `output_attentions` returns them, would be {maps:.3g} GiB."]
    if not args.quick:
        write_whole(RESULTS, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

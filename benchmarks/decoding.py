"""Decoding: what the session costs beside ``model.generate``, and what keeping the prompt's keys and values saves a search.

    python benchmarks/decoding.py [--model embedded] [--repeats 5]

Both sides of a pair run in this process and take turns. The search is RankGen's segment beam (prompt of 256 tokens, 2 beams, 10 samples,
20 tokens a round) on one prompt; the re-prefilling one forwards every text from its first token in each round, as a loop over
``model.generate`` does, and draws the same noise, so that both must write the same tokens.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from echelon.data.files import write_whole
from echelon.data.passages import passages
from echelon.generate import DecodeSession, Greedy, Nucleus, RankGen, SegmentBeam
from echelon.models import LoadedModel, load
from echelon.score import RankGenScorer

RESULTS = Path(__file__).parent / "results" / "decoding.md"


class Forgetful(DecodeSession):
    """A session that loses its keys and values whenever rows are forked."""

    def fork(self, times: int | Sequence[int]) -> None:
        super().fork(times)
        self._logits = None
        self._blocks = [self._open(block.encoder, len(block.mask)) for block in self._blocks]
        for row in self.items:
            row.pending = list(row.ids)


def prompts(loaded: LoadedModel, count: int, tokens: int) -> list[list[int]]:
    ids = loaded.tokenizer(" ".join(passage.text for passage in passages("test"))).input_ids
    return [list(ids[tokens * i : tokens * (i + 1)]) for i in range(count)]


def search(session_class: type[DecodeSession], loaded: LoadedModel, prompt: list[int], tokens: int) -> tuple[float, list[int], DecodeSession]:
    decoder = RankGen(beam_size=2, num_samples=10, segment_tokens=20)
    session = session_class(loaded.model, loaded.tokenizer, sampler=decoder.sampler, seed=1)
    start = time.perf_counter()
    session.prefill([prompt], room=tokens)
    found = SegmentBeam(RankGenScorer(), 2, 10, 20).run(session, tokens)
    return time.perf_counter() - start, found[0][0].token_ids, session


def of_transformers(loaded: LoadedModel, rows: list[list[int]], tokens: int, **sampling: Any) -> float:
    ids = torch.tensor(rows)
    start = time.perf_counter()
    with torch.random.fork_rng():
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **sampling)
    return time.perf_counter() - start


def of_session(decoder: Any, loaded: LoadedModel, rows: list[list[int]], tokens: int) -> float:
    """All rows write all tokens, as the other side is made to: an end of text is only one more token."""
    session = decoder.open(loaded.model, None, eos_token_ids=[])
    start = time.perf_counter()
    session.prefill(rows, room=tokens)
    session.extend(tokens)
    return time.perf_counter() - start


def in_turn(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, A B A B ..., after one round that warms up."""
    made: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, side in sides.items():
            seconds = side()
            if number:
                made[name].append(seconds)
    return made


def told(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def imports(repeats: int) -> list[float]:
    """Seconds of ``import echelon`` in a fresh interpreter, less those of an empty one."""
    made = []
    for _ in range(repeats):
        pair = []
        for code in ("pass", "import echelon"):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            pair.append(time.perf_counter() - start)
        made.append(pair[1] - pair[0])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    loaded = load(args.model)
    transformers.logging.set_verbosity_error()
    lines = [
        "# Decoding", "", f"    python benchmarks/decoding.py --model {args.model} --repeats {args.repeats}", "",
        f"{args.model} ({loaded.model.num_parameters() / 1e6:.1f} M parameters, {loaded.model.dtype}); {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}; median seconds of "
        f"{args.repeats} (fastest to slowest), taken in turn; load average {os.getloadavg()[0]:.1f} before.", "",
        "| what | model.generate | session | ratio (want at most 1.15) |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, decoder, sampling in (
        ("greedy", Greedy(), {"do_sample": False}),
        ("nucleus 0.9", Nucleus(top_p=0.9), {"do_sample": True, "top_p": 0.9, "top_k": 0}),
    ):
        for batch, length, tokens in ((8, 64, 128), (32, 64, 128)):
            rows = prompts(loaded, batch, length)
            made = in_turn(
                {"theirs": lambda r=rows, t=tokens, s=sampling: of_transformers(loaded, r, t, **s),
                 "ours": lambda r=rows, t=tokens, d=decoder: of_session(d, loaded, r, t)}, args.repeats,
            )  # fmt: skip
            ratio = statistics.median(a / b for a, b in zip(made["ours"], made["theirs"], strict=True))
            lines.append(f"| {name}, batch {batch}, {length} + {tokens} tokens | {told(made['theirs'])} | {told(made['ours'])} | {ratio:.2f} |")
            print(lines[-1], file=sys.stderr)
    lines += ["", "| segment beam: prompt | re-prefilling | cache kept | tokens/s ratio (want at least 2 at 256) | same tokens | prefixes / suffixes encoded |"]
    lines += ["|---|---|---|---|---|---|"]
    limit = loaded.model.config.max_position_embeddings
    for length in (64, 256):
        prompt, tokens = prompts(loaded, 1, length)[0], min(115, limit - length)
        runs = {"without": [], "with": []}  # type: ignore[var-annotated]
        for number in range(args.repeats + 1):
            for name, kind in (("without", Forgetful), ("with", DecodeSession)):
                result = search(kind, loaded, prompt, tokens)
                if number:
                    runs[name].append(result)
        seconds = {name: [run[0] for run in made] for name, made in runs.items()}
        ratio = statistics.median(a / b for a, b in zip(seconds["without"], seconds["with"], strict=True))
        same = all(run[1] == runs["with"][0][1] for made in runs.values() for run in made)
        scorer = RankGenScorer()
        session = RankGen(beam_size=2, num_samples=10).open(loaded.model, loaded.tokenizer, seed=1)
        session.prefill([prompt], room=tokens)
        SegmentBeam(scorer, 2, 10, 20).run(session, tokens)
        lines.append(
            f"| {length} tokens, {tokens} new | {told(seconds['without'])} | {told(seconds['with'])} | {ratio:.2f} | {'yes' if same else 'NO'} | "
            f"{scorer.counts['prefix']} / {scorer.counts['suffix']} |"
        )
        print(lines[-1], file=sys.stderr)
    found = imports(args.repeats)
    lines += ["", f"`import echelon` adds {told(found)} s to an empty interpreter (want below 0.3)."]
    write_whole(RESULTS, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""The index on disk against indexes in memory: documents a second, peak memory, and how long a search takes while another process appends.

    python benchmarks/index.py [--quick] [--documents 100000]

Documents are 40 to 120 words drawn by Zipf's law from 100,000; queries are six such words; vectors are random, of length 384. Every index is made and searched
in a process of its own, whose peak is ``ru_maxrss``. Searches go one at a time. While they run a second time, another process adds documents to the index on
disk, a hundred to a commit, as fast as it can. "disk" is the index that `echelon index` makes, "lance, words" is LanceDB's own full-text search.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "index.md"
STORED = ("disk, words", "disk, words and vectors", "lance, words")
DIM, VOCABULARY, SEARCHES = 384, 100_000, 300
HEADER = "| index | searched by | documents a second | size on disk | peak memory | p50 | p99 | p50 while appending | p99 while appending |"


def texts(count: int, low: int, high: int, seed: int) -> list[str]:
    draw, words = np.random.default_rng(seed), np.array([f"word{number}" for number in range(VOCABULARY)])
    shares = 1 / np.arange(1, VOCABULARY + 1)
    lengths = draw.integers(low, high, count)
    flat = words[draw.choice(VOCABULARY, int(lengths.sum()), p=shares / shares.sum())]
    return [" ".join(part) for part in np.split(flat, np.cumsum(lengths)[:-1])]


def vectors(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def write_corpus(path: Path, count: int) -> None:
    with open(path, "w") as file:
        for start in range(0, count, 5000):
            part = texts(min(5000, count - start), 40, 120, start)
            file.writelines(json.dumps({"_id": f"d{start + place}", "text": text}) + "\n" for place, text in enumerate(part))


class Space:
    """What an encoder tells of itself; its vectors are drawn, since no encoder is measured here."""

    dim, similarity, fingerprint = DIM, "cosine", "random"


def timed(search: Callable[[Any], Any], queries: list[Any]) -> dict[str, float]:
    taken = []
    for query in queries:
        started = time.perf_counter()
        search(query)
        taken.append(1000 * (time.perf_counter() - started))
    return {"p50": float(np.percentile(taken, 50)), "p99": float(np.percentile(taken, 99))}


def make(kind: str, corpus: str, folder: str) -> tuple[Any, int]:
    """Index all documents; returns what answers a query, by its kind of search, and their number."""
    from echelon.data.documents import read_corpus
    from echelon.retrieve import BM25Index, DiskIndex, LanceIndex, Tokens, VectorIndex, ingest
    from echelon.retrieve import Space as IndexSpace

    space = IndexSpace(Space.dim, "cosine", Space.fingerprint)
    if kind in STORED:
        index: Any = LanceIndex(folder, tokens=Tokens()) if kind == "lance, words" else DiskIndex(folder, space if "vectors" in kind else None)
        with index:
            ingest(index, corpus, (lambda docs: vectors(len(docs), int(docs[0].id[1:]))) if "vectors" in kind else None, batch_size=5000)
        return index, len(index)
    docs = list(read_corpus(corpus))
    if kind == "bm25s in memory":
        index = BM25Index()
        index.add(docs)
    elif kind == "vectors in memory":
        index = VectorIndex(space)
        index.add(docs, vectors(len(docs), 0))
    else:
        import faiss

        index = faiss.IndexFlatIP(DIM)
        rows = vectors(len(docs), 0)
        index.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        return index, len(docs)
    index.commit()
    return index, len(docs)


def searches(kind: str, index: Any) -> dict[str, dict[str, float]]:
    found = {}
    queries = texts(SEARCHES, 6, 7, 1)
    if kind == "faiss in memory":
        return {"vectors": timed(lambda row: index.search(row[None], 10), list(vectors(SEARCHES, 1)))}
    if "texts" in index.searches:
        found["texts"] = timed(lambda query: index.search([query], 10), queries)
    if "vectors" in index.searches:
        found["vectors"] = timed(lambda row: index.search(row[None], 10), list(vectors(SEARCHES, 1)))
    return found


def child(kind: str, corpus: str, folder: str) -> None:
    started = time.perf_counter()
    index, count = make(kind, corpus, folder)
    told: dict[str, Any] = {"rate": count / (time.perf_counter() - started), "making": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if kind not in STORED:
        told["quiet"] = searches(kind, index)
    print(json.dumps(told | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def search_child(kind: str, folder: str) -> None:
    from echelon.retrieve import open_index

    with open_index(folder) as index:
        searches(kind, index)  # what is read for the first time is not measured
        print(json.dumps({"found": searches(kind, index), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def append_child(folder: str) -> None:
    """Add documents until standard input closes."""
    import selectors

    from echelon.data.documents import Doc
    from echelon.retrieve import open_index

    ears = selectors.DefaultSelector()
    ears.register(sys.stdin, selectors.EVENT_READ)
    with open_index(folder) as index:
        count = 0
        while not ears.select(timeout=0):
            docs = [Doc(f"new{count + place}", text) for place, text in enumerate(texts(100, 40, 120, 10**6 + count))]
            index.add(docs, vectors(100, count) if index.space is not None else None)
            index.commit()
            count += 100
            if count == 100:
                print("begun", flush=True)
        print(count)


def run(*words: str) -> dict[str, Any]:
    return json.loads(subprocess.run([sys.executable, "-W", "ignore", __file__, *words], check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(kind: str, corpus: Path, folder: Path) -> list[str]:
    made = run("--child", kind, str(corpus), str(folder))
    quiet, busy, size, appended = made.get("quiet", {}), {}, "", 0
    if kind in STORED:
        size = f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 2**20:,.0f} MiB"
        found = run("--search", kind, str(folder))
        quiet = found["found"]
        words = [sys.executable, "-W", "ignore", __file__, "--append", str(folder)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as appending:
            assert appending.stdin and appending.stdout
            appending.stdout.readline()
            busy = run("--search", kind, str(folder))["found"]
            appending.stdin.close()
            appended = int(appending.stdout.read())
        made["peak"] = max(made["peak"], found["peak"])
        print(f"{kind}: {appended} documents were appended meanwhile", file=sys.stderr)
    rows = []
    for by, times in quiet.items():
        while_appending = [f"{busy[by][name]:.2f} ms" for name in ("p50", "p99")] if by in busy else ["", ""]
        alone = [f"{times[name]:.2f} ms" for name in ("p50", "p99")]
        rows.append("| " + " | ".join([kind, by, f"{made['rate']:,.0f}", size, f"{made['peak'] / 2**10:,.0f} MiB", *alone, *while_appending]) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="3,000 documents, and nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name, count in (("--child", 3), ("--search", 2), ("--append", 1)):
        parser.add_argument(name, nargs=count, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for role, words in ((child, given.child), (search_child, given.search), (append_child, given.append)):
        if words:
            return role(*words)
    count, load = 3000 if given.quick else given.documents, os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp())
    try:
        write_corpus(folder / "corpus.jsonl", count)
        rows = []
        for number, kind in enumerate((*STORED, "bm25s in memory", "vectors in memory", "faiss in memory")):
            rows += measure(kind, folder / "corpus.jsonl", folder / str(number))
            print(*([HEADER] if not number else []), *rows[-2 if "and" in kind else -1 :], sep="\n", flush=True)
    finally:
        shutil.rmtree(folder)
    if given.quick:
        return
    busy = f"load average {load:.1f} before, {os.getloadavg()[1]:.1f} after (of {os.cpu_count()} cores)"
    about = f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, {busy}"
    lines = ["# Indexes", "", f"    python benchmarks/index.py {' '.join(sys.argv[1:])}".rstrip(), "",
             f"{about}. {count:,} documents; {SEARCHES} searches for ten documents each, one at a time.", "",
             HEADER, "|---" * (HEADER.count("|") - 1) + "|", *rows, ""]  # fmt: skip
    given.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()

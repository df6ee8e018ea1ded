"""``echelon rerank``: order the documents of a run anew by any method."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.cli.options import parse
from echelon.cli.progress import progress
from echelon.errors import UserError


@dataclass
class Options:
    """Which run to rank anew, from what, and what it may cost.

    Attributes:
        run: the first stage's run, in TREC's columns.
        corpus: its documents: a .jsonl, a .tsv, or a folder with one.
        index: the index that holds them, in place of the corpus.
        queries: their texts: a .jsonl, a .tsv, or a folder with one.
        model: the model, in place of the method's own: `embedded`, a folder, a hub id, or a server (`http://host:port/v1#model`).
        out: where the new run goes; it appears whole.
        depth: documents of each query that are ranked; the others follow.
        cache: file of answers that were given before; a run that was killed goes on from it.
        max_prompts: prompts that may be sent; queries that cannot be finished keep the best order found.
        dry_run: say what it would cost, and do nothing.
        json: print JSON.
    """

    run: str | None = None
    corpus: str | None = None
    index: str | None = None
    queries: str | None = None
    model: str | None = None
    out: str | None = None
    depth: int = 100
    cache: str | None = None
    max_prompts: int | None = None
    dry_run: bool = False
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, reranker, _ = parse("rerank", "Order the documents of a run anew.", Options, "reranker", arguments, default_method="prp")
    wanted = {"run": "the run to rank anew", "queries": "the queries"}
    if (options.corpus is None) == (options.index is None):
        raise UserError("give the documents by --corpus or by --index" + (", not by both" if options.corpus else ""))
    for name, what in wanted.items() if options.dry_run else [*wanted.items(), ("out", "a file for the new run")]:
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing; give {what}")
    if options.out is not None and not options.dry_run:
        _check_writable(Path(options.out))
    from echelon.rerank.base import Budget

    budget = Budget(prompts=options.max_prompts)
    if options.model is not None:
        reranker = dataclasses.replace(reranker, model=options.model)
    requests = _requests(options)
    if options.dry_run:
        forecast = reranker.estimate(requests, depth=options.depth)
        told = {"method": reranker.method_name, "queries": len(requests), **dataclasses.asdict(forecast)}
        print(json.dumps(told, indent=2) if options.json else _forecast_line(told))
        return 0
    with progress() as bar:
        task = bar.add_task(f"ranking by {reranker.method_name}", total=len(requests))
        made = reranker.rerank(
            requests, depth=options.depth, cache=options.cache, budget=budget, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    from echelon.data.runs import write_run

    template = getattr(reranker.judge, "template", None)
    write_run(options.out, made.runs, tag="-".join(["echelon", reranker.method_name, *([template.hash[:8]] if template else [])]))
    told = {"out": options.out, "method": reranker.method_name, **dataclasses.asdict(made.stats)}
    print(json.dumps(told, indent=2) if options.json else _stats_lines(told))
    return 0


def _requests(options: Options) -> list[Any]:
    """The run's queries and documents; of the corpus only what the run names is kept."""
    from echelon.data.documents import read_corpus, read_queries
    from echelon.data.runs import read_run
    from echelon.rerank.base import requests_of

    found = read_run(str(options.run))
    queries = read_queries(str(options.queries))
    names = {name for scores in found.values() for name in scores}
    if options.index is not None:
        from echelon.retrieve.opening import open_index

        with open_index(options.index) as index:
            docs = {doc.id: doc for doc in index.documents(sorted(names))}
    else:
        docs = {doc.id: doc for doc in read_corpus(str(options.corpus)) if doc.id in names}
    return requests_of(found, queries, docs)


def _check_writable(path: Path) -> None:
    """Before hours of work, not after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out is {str(path)!r}, which cannot be written to; give the name of a file")


def _forecast_line(told: dict[str, Any]) -> str:
    tokens = f", {told['prompt_tokens']:,} tokens read and at most {told['generated_tokens']:,} written" if told["prompt_tokens"] else ""
    return f"{told['method']} on {told['queries']} queries: about {told['prompts']:,} prompts in {told['rounds']:,} rounds{tokens}"


def _stats_lines(told: dict[str, Any]) -> str:
    failures = ", ".join(f"{times:,} {status}" for status, times in sorted(told["failures"].items())) or "none"
    tokens = f", with {told['prompt_tokens']:,} tokens read and {told['generated_tokens']:,} written" if told["prompt_tokens"] else ""
    lines = [
        f"{told['out']}: {told['queries']} queries ranked by {told['method']} in {told['seconds']:.1f} s",
        f"questions: {told['calls']:,} in {told['rounds']:,} rounds, {told['cache_hits']:,} of them answered from the cache",
        f"prompts: {told['prompts']:,}{tokens}",
        f"answers not read completely: {failures}",
    ]
    if told["stopped"]:
        lines.append(f"cut short by --max_prompts: {told['stopped']} queries")
    return "\n".join(lines)

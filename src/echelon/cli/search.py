"""``echelon search``: find documents in an index."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from echelon.cli.options import parse
from echelon.errors import UserError


@dataclass
class Options:
    """Where to search, for what, and how much to show.

    Attributes:
        index: the index that `echelon index` made: a folder, s3://bucket/path, or http://host:6333/collection of a Qdrant server.
        queries: file of many queries, in place of the one on the command line: JSON lines with _id and text, or lines of id, tab, text.
        run: write what was found there, as a TREC run.
        k: documents for each query.
        filter: what documents must be like, such as "year >= 1990 and lang = 'en'".
        json: print JSON.
    """

    index: str | None = None
    queries: str | None = None
    run: str | None = None
    k: int = 10
    filter: str | None = None
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, retriever, words = parse(
        "search", "Find documents in an index.", Options, "retriever", arguments, positional=("query", "what to look for; quote it"), default_method="bm25"
    )
    if options.index is None:
        raise UserError("--index is missing; give the folder that `echelon index` made")
    if bool(words) == (options.queries is not None):
        raise UserError("give a query, after the options, or a file of them by --queries")
    from echelon.data.documents import read_queries
    from echelon.data.runs import sorted_docs, write_run
    from echelon.retrieve.chunking import chunk_id
    from echelon.retrieve.opening import open_index

    queries = read_queries(options.queries) if options.queries is not None else {"1": " ".join(words)}
    with open_index(options.index) as index:
        found = retriever.over(index).search(queries, options.k, options.filter)
        if options.run is not None:
            write_run(options.run, found, retriever.method_name)
            told = {"run": options.run, "queries": len(found), "documents": sum(map(len, found.values()))}
            print(json.dumps(told) if options.json else f"{options.run}: {told['documents']} documents for {told['queries']} queries")
        elif options.queries is not None and options.json:
            print(json.dumps(found))
        elif options.queries is not None:
            for qid, scores in found.items():
                for rank, name in enumerate(sorted_docs(scores), 1):
                    print(f"{qid} Q0 {name} {rank} {scores[name]!r} {retriever.method_name}")
        else:
            names = sorted_docs(found["1"])
            there = index.existing(names)
            docs = index.documents([name if name in there else chunk_id(name, 0) for name in names])  # of a document in pieces there is its beginning
            hits = [(name, found["1"][name], doc) for name, doc in zip(names, docs, strict=True)]
            if options.json:
                print(json.dumps([{"id": name, "score": score, "title": doc.title, "text": doc.text, "meta": dict(doc.meta)} for name, score, doc in hits]))
            for rank, (name, score, doc) in enumerate(hits if not options.json else (), 1):
                shown = " ".join(doc.content.split())
                print(f"{rank:3}  {score:8.4f}  {name}  {shown[:100]}{'...' if len(shown) > 100 else ''}")
    return 0

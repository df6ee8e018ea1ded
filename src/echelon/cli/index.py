"""``echelon index``: make a corpus searchable, add to it, and take away from it."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.cli.options import parse
from echelon.cli.progress import progress
from echelon.errors import UserError


@dataclass
class Options:
    """What to index or change, and where.

    Attributes:
        out: the index: a folder; or s3://bucket/path, or http://host:6333/collection of a Qdrant server.
        corpus: documents for a new index: JSON lines with _id, title, text, or lines of id, tab, text, or a folder with corpus.jsonl. After an interruption
            the same command goes on where it was.
        add: more documents for an index that is there.
        upsert: documents that are added, or replaced where they are there already.
        delete: ids to take away, with commas between, or a file with one a line; with a document its chunks go.
        chunks: cut documents into pieces that the encoder can read, `plain` ones of paragraphs and sentences or those of `vi-legal` statutes. What is found
            are pieces, ID#0 and so on; the method vietnamese_legal finds their documents. To be given with --add and --upsert too.
        max_chunk_tokens: tokens of a piece, at most; no more than the encoder reads.
        overlap: tokens that pieces share where one sentence is too long for a piece.
        encoder: makes vectors for dense search: `embedded` (MiniLM), `rankgen`, a folder or a hub id; without it words alone are indexed.
        engine: encode `inline`, batch by batch, or all beforehand by a `pool` of processes or on a `ray` cluster.
        vectors: folder where pool and ray put the vectors, and leave them; by default one beside the index, which goes in the end.
        backend: what holds the index: disk (LanceDB and tantivy), lance, tantivy or qdrant; by default what fits the address.
        recall: of search by vectors: `exact`, or from 10,000 documents on `balanced` or `fast`, which look at an eighth or a thirty-second of them.
        stopwords: none, or english to leave out the 33 most frequent words.
        stemmer: none, or the language whose endings are cut off words.
        json: print the counts as JSON.
    """

    out: str | None = None
    corpus: str | None = None
    add: str | None = None
    upsert: str | None = None
    delete: str | None = None
    chunks: str | None = None
    max_chunk_tokens: int = 256
    overlap: int = 32
    encoder: str | None = None
    engine: str = "inline"
    vectors: str | None = None
    backend: str | None = None
    recall: str = "exact"
    stopwords: str | None = None
    stemmer: str | None = None
    json: bool = False


def run(arguments: Sequence[str]) -> int:
    options, _, _ = parse("index", "Make a corpus searchable, add to it, and take away from it.", Options, "", arguments)
    actions = [name for name in ("corpus", "add", "upsert", "delete") if getattr(options, name) is not None]
    if options.out is None:
        raise UserError("--out is missing; give a folder for the index")
    if len(actions) != 1:
        raise UserError(f"give one of --corpus, --add, --upsert and --delete; there is {' and '.join('--' + name for name in actions) or 'none'}")
    if options.engine not in ("inline", "pool", "ray"):
        raise UserError(f"engine is {options.engine!r}; it must be one of inline, pool, ray")
    told = _delete(options) if options.delete is not None else _put(options, actions[0])
    if options.json:
        print(json.dumps({"out": options.out, **told}))
    else:
        print(f"{options.out}: {told['documents']} documents ({', '.join(f'{count} {name}' for name, count in told.items() if name != 'documents')})")
    return 0


def _delete(options: Options) -> dict[str, int]:
    from echelon.data.files import read_text
    from echelon.retrieve.chunking import stored_chunks

    assert options.delete is not None and options.out is not None
    ids = read_text(options.delete).split("\n") if Path(options.delete).is_file() else options.delete.split(",")
    names = [name.strip() for name in ids if name.strip()]
    with _opened(options.out) as index:
        deleted = index.delete([*names, *stored_chunks(index, dict.fromkeys(names, 0))])
        index.commit()
        return {"documents": len(index), "deleted": deleted}


def _opened(where: str) -> Any:
    from echelon.retrieve.opening import open_index

    index = open_index(where)
    if "persistent" not in index.capabilities:
        raise UserError(f"{where} was saved from memory, and is not changed in its place; index its documents anew")
    return index


def _put(options: Options, action: str) -> dict[str, int]:
    from echelon.data.documents import read_corpus
    from echelon.retrieve.base import Space
    from echelon.retrieve.chunking import PRESETS, stored_chunks
    from echelon.retrieve.ingestion import check_begun, encode_ahead, ingest
    from echelon.retrieve.opening import encoder_of, make_index
    from echelon.retrieve.tokens import Tokens

    corpus: str = getattr(options, action)
    next(read_corpus(corpus))  # nothing is made for a corpus that cannot be read
    if options.chunks not in (None, *PRESETS):
        raise UserError(f"chunks is {options.chunks!r}; it must be one of {', '.join(PRESETS)}")
    encoder = None
    if options.encoder is not None:
        from echelon.retrieve.encoders import resolve_encoder

        encoder = resolve_encoder(options.encoder)
    given = {name: value for name in ("stopwords", "stemmer") if (value := getattr(options, name)) is not None}
    if action == "corpus":
        index = make_index(str(options.out), backend=options.backend, encoder=encoder, tokens=Tokens(**given) if given else None, recall=options.recall)  # type: ignore[arg-type]
    else:
        index = _opened(str(options.out))
        for name in given:
            if given[name] != getattr(getattr(index, "tokens", None), name, None):
                raise UserError(f"--{name} is {given[name]!r}, but {index.place} was made with another; leave it out")
    with index, progress() as bar, contextlib.ExitStack() as later:
        if index.space is not None:
            encoder = encoder or encoder_of(index)
            index.space.require(Space.of(encoder), index.place)
        elif encoder is not None:
            raise UserError(f"{index.place} was made without vectors; leave out --encoder")
        counts: dict[str, int] = {}
        if options.chunks is not None:
            if encoder is None:
                raise UserError("--encoder is missing; --chunks cuts documents into what an encoder can read")
            folder = later.enter_context(tempfile.TemporaryDirectory())
            corpus, counts = _cut(corpus, folder, encoder, options)
        if action == "corpus":
            check_begun(index, corpus)
        task = bar.add_task(f"indexing {corpus}", total=None)
        before = len(index)
        encode = encoder.encode_documents if encoder is not None else None
        vectors, ahead = Path(options.vectors or f"{options.out}.vectors"), encoder is not None and options.engine != "inline"
        if ahead:
            if options.vectors is None and "://" in str(options.out):
                raise UserError(f"--vectors is missing; --engine {options.engine} needs a folder for the vectors, on storage that all machines see")
            encoding = bar.add_task("encoding", total=None)
            encode = encode_ahead(corpus, encoder, vectors, options.engine, lambda entry: bar.update(encoding, completed=entry["done"], total=entry["of"]))
        put = ingest(
            index, corpus, encode, replace=action == "upsert", batch_size=2000 if encoder is None else 256,
            on_progress=lambda entry: bar.update(task, completed=entry["done"]),
        )  # fmt: skip
        if options.chunks is not None and action == "upsert":  # a document may have become shorter
            index.delete(stored_chunks(index, counts))
            index.commit()
        if ahead and options.vectors is None:
            shutil.rmtree(vectors)
        return {"documents": len(index), "read": put, "new": len(index) - before}


def _cut(corpus: str, folder: str, encoder: Any, options: Options) -> tuple[str, dict[str, int]]:
    """A file with the chunks of a corpus, and how many each document has."""
    from echelon.data.documents import read_corpus
    from echelon.retrieve.chunking import Chunker
    from echelon.retrieve.vietnamese_legal import VietnameseLegal

    size = {"max_chunk_tokens": min(options.max_chunk_tokens, encoder.longest("document")), "overlap": options.overlap, "split_levels": options.chunks}
    cut = VietnameseLegal(encoder, **size).chunks if options.chunks == "vi-legal" else Chunker(encoder, **size).documents
    counts, made = {}, f"{folder}/corpus.jsonl"
    with open(made, "w", encoding="utf-8") as file:
        for doc in read_corpus(corpus):
            pieces = list(cut([doc]))
            counts[doc.id] = len(pieces)
            file.writelines(json.dumps({"_id": piece.id, "title": piece.title, "text": piece.text, **piece.meta}) + "\n" for piece in pieces)
    return made, counts

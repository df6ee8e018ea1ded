"""Vectors of a whole collection, shard by shard, in a folder that survives whatever ends the work.

A shard is one Parquet file: one rename makes it appear whole (two files could not be renamed together), readers may take ids without vectors, and Lance,
DuckDB, Ray, Spark and pandas read it as it is.
"""

import hashlib
import itertools
import json
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from echelon.data.documents import Doc, read_corpus
from echelon.data.files import locked, read_text, write_whole
from echelon.data.lines import check_id
from echelon.errors import UserError
from echelon.retrieve.base import Index, Space
from echelon.retrieve.shards import Engine, Shard, Storage, metadata, restored, work

MANIFEST = "vectors.json"
SPOOL = ".documents"


def encode_corpus(
    docs: Iterable[Doc] | str | os.PathLike[str], encoder: Any, out: str | os.PathLike[str], shards: int = 8, *, engine: Engine = "pool",
    workers: int | None = None, dtype: Storage = "float32", on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> "EncodedCorpus":  # fmt: skip
    """Encode documents into a folder, in as many pieces as ``shards`` says, several at a time.

    Started again after any end, also ``kill -9``, it does what is left: a finished shard of the same documents and the same encoder is kept, all else is made
    anew. Of equal texts only the first is encoded. Collections may be larger than memory, which holds their ids and one hash each.

    Args:
        docs: documents, or the path of a collection (see :func:`echelon.data.documents.read_corpus`).
        encoder: an encoder, or what :func:`echelon.retrieve.encoders.resolve_encoder` makes one of.
        out: the folder; for more than one machine, on storage that all of them see.
        shards: number of pieces.
        engine: ``pool`` for processes on this machine, ``ray`` for Ray Data on whatever cluster ``ray.init()`` finds, or this machine. A script that starts
            processes needs ``if __name__ == "__main__":``, as always.
        workers: how many at a time; by default one for each GPU, or else for each two processors. With one there is no pool: the work is done right here.
        dtype: how vectors are stored. ``float16`` and ``int8`` store the direction in short numbers (of ``int8``, 1/127 of the largest each) and the length
            in full.
        on_progress: is told ``step``, ``done`` and ``of`` after each shard.

    Raises:
        ValueError: if a setting is out of range.
        UserError: if there are no documents, an id comes twice or is unfit, the folder cannot be written to or another process works in it, or a worker dies.
    """
    for name, value, legal in (("engine", engine, get_args(Engine)), ("dtype", dtype, get_args(Storage))):
        if value not in legal:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(legal)}")
    for name, number in (("shards", shards), ("workers", 1 if workers is None else workers)):
        if number < 1:
            raise ValueError(f"{name} is {number!r}; it must be at least 1")
    if not hasattr(encoder, "encode_documents"):
        from echelon.retrieve.encoders import resolve_encoder

        encoder = resolve_encoder(encoder)
    out = Path(out).absolute()
    with locked(out, f"another process is encoding into {out}; wait for it, or give another folder"):
        for left_by_the_killed in out.glob(".shard-*"):
            left_by_the_killed.unlink()
        spool = out / SPOOL
        starts = _spool(read_corpus(docs) if isinstance(docs, str | os.PathLike) else docs, spool)
        total = len(starts) - 1
        bounds = [starts[i * total // shards] for i in range(shards + 1)] if shards < total else list(starts)
        plan = [_shard(number, spool, *bytes_, encoder.fingerprint, dtype, out) for number, bytes_ in enumerate(itertools.pairwise(bounds))]
        left = [shard for shard in plan if metadata(shard.target).get("digest") != shard.digest]
        tell = on_progress or (lambda entry: None)
        tell({"step": "encoding", "done": len(plan) - len(left), "of": len(plan)})
        for done, _ in enumerate(work(left, encoder, engine, workers), len(plan) - len(left) + 1):
            tell({"step": "encoding", "done": done, "of": len(plan)})
        for stale in set(out.glob("shard-*.parquet")) - {Path(shard.target) for shard in plan}:
            stale.unlink()
        told = {"documents": total, "dim": encoder.dim, "similarity": encoder.similarity, "fingerprint": encoder.fingerprint, "dtype": dtype}
        write_whole(out / MANIFEST, json.dumps({**told, "shards": [shard.digest for shard in plan]}, indent=2) + "\n")
        spool.unlink()
    made = EncodedCorpus(out)
    if made.truncated:
        warnings.warn(f"{made.truncated} of {total} documents are longer than their encoder reads; their ends were not encoded", stacklevel=2)
    return made


class EncodedCorpus:
    """Vectors that :func:`encode_corpus` made, in the order of the documents.

    Args:
        folder: where they are.

    Attributes:
        dim: width of the vectors.
        similarity: what they are to be compared by.
        fingerprint: of the encoder.
        truncated: texts whose end was not encoded.

    Raises:
        UserError: if the folder holds no such vectors, or not all of them.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"{self.folder} holds no {MANIFEST}; encode the documents into it first, to the end")
        try:
            told = json.loads(read_text(self.folder / MANIFEST))
            self._count, self.dim, self.similarity, self.fingerprint = (told[name] for name in ("documents", "dim", "similarity", "fingerprint"))
            self._files = [self.folder / _name(number) for number in range(len(told["shards"]))]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / MANIFEST} cannot be read; delete it and encode again") from error
        told_by_files = [metadata(file) for file in self._files]
        for file, found, digest in zip(self._files, told_by_files, told["shards"], strict=True):
            if found.get("digest") != digest:
                raise UserError(f"{file} is missing, damaged or of other documents; encode again, which makes what is missing")
        self.truncated = sum(int(found["truncated"]) for found in told_by_files)

    def __len__(self) -> int:
        return self._count

    def ids(self) -> list[str]:
        """Document ids in the order of the documents."""
        import pyarrow.parquet as parquet

        return [name for file in self._files for name in parquet.read_table(file, columns=["id"])["id"].to_pylist()]

    def batches(self, size: int = 4096) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids and float32 vectors (n, dim), at most ``size`` documents at a time, in the order of the documents."""
        import pyarrow.parquet as parquet

        kept = dict.fromkeys(self._repeated(), np.zeros(0, np.float32))
        for file in self._files:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=size):
                own = np.asarray(batch["vector"].is_valid())
                made = np.zeros((len(batch), self.dim), np.float32)
                made[own] = restored(batch.filter(batch["vector"].is_valid()), self.dim)
                for row, key in enumerate(batch["text_hash"].to_pylist()):
                    if key in kept:
                        if own[row]:
                            kept[key] = made[row].copy()
                        made[row] = kept[key]
                yield batch["id"].to_pylist(), made

    def load_into(self, index: Index, docs: Iterable[Doc] | str | os.PathLike[str]) -> None:
        """Put the documents and their vectors into an index, in one commit.

        Args:
            index: one that holds vectors.
            docs: the documents that were encoded, in the same order.

        Raises:
            UserError: if the index is for another encoder, or the documents are others.
        """
        if index.space is not None:
            index.space.require(Space(self.dim, self.similarity, self.fingerprint), index.place)
        source = iter(read_corpus(docs) if isinstance(docs, str | os.PathLike) else docs)
        for ids, vectors in self.batches():
            block = list(itertools.islice(source, len(ids)))
            if [doc.id for doc in block] != ids:
                raise UserError(f"the documents are not those that {self.folder} holds vectors of; encode them first")
            index.add(block, vectors)
        if next(source, None) is not None:
            raise UserError(f"there are more documents than {self.folder} holds vectors of; encode them first")
        index.commit()

    def _repeated(self) -> set[str]:
        """Hashes of texts that come more than once: all that is held in memory while vectors are read."""
        import pyarrow.parquet as parquet

        seen: set[str] = set()
        twice: set[str] = set()
        for file in self._files:
            for key in parquet.read_table(file, columns=["text_hash"])["text_hash"].to_pylist():
                (twice if key in seen else seen).add(key)
        return twice


def _spool(docs: Iterable[Doc], file: Path) -> "array[int]":
    """Write documents as lines, and say where each begins and where the last ends."""
    starts, ids, seen = array("Q", [0]), set(), set()
    with open(file, "wb") as lines:
        for doc in docs:
            if check_id(doc.id, "document", "the documents") in ids:
                raise UserError(f"the document {doc.id!r} is there twice; ids must differ")
            ids.add(doc.id)
            text_hash = hashlib.sha256(doc.content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
            told = {"id": doc.id, "hash": text_hash} | ({} if text_hash in seen else {"title": doc.title, "text": doc.text})
            seen.add(text_hash)
            starts.append(starts[-1] + lines.write(json.dumps(told).encode() + b"\n"))
    if not ids:
        raise UserError("there are no documents to encode")
    return starts


def _shard(number: int, spool: Path, start: int, stop: int, fingerprint: str, dtype: Storage, out: Path) -> Shard:
    made = hashlib.sha256(f"{fingerprint}\0{dtype}\0".encode())
    with open(spool, "rb") as file:
        file.seek(start)
        for at in range(start, stop, 1 << 20):
            made.update(file.read(min(1 << 20, stop - at)))
    return Shard(number, str(spool), start, stop, made.hexdigest()[:32], str(out / _name(number)), dtype)


def _name(number: int) -> str:
    return f"shard-{number:05}.parquet"

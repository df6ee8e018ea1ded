"""One shard of a collection's vectors, and who makes them: this process, a pool of processes, or Ray. All of them call one function."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from echelon.data.documents import Doc
from echelon.data.files import file_whole
from echelon.errors import UserError

Storage = Literal["float32", "float16", "int8"]
Engine = Literal["pool", "ray"]
BLOCK = 1024  # documents that are encoded, and written, at a time


@dataclass(frozen=True)
class Shard:
    """One piece of work: the lines of a file of documents from one byte to another, and where their vectors go.

    Attributes:
        number: its place.
        documents: the file; each line is an object with ``id``, ``hash``, ``title`` and ``text``, the last two absent where the text stood before.
        start: first byte.
        stop: byte behind the last.
        digest: of these bytes, the encoder and how vectors are stored: what a finished shard is known by.
        target: file for the vectors.
        dtype: how they are stored.
    """

    number: int
    documents: str
    start: int
    stop: int
    digest: str
    target: str
    dtype: Storage


def encode_shard(shard: Shard, encoder: Any) -> None:
    """Encode one shard; its file appears whole when it is done. All engines call this.

    Raises:
        ValueError: if the encoder gives something else than a finite vector for each document.
        UserError: if the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    fields = [("id", pa.string()), ("text_hash", pa.string()), ("vector", pa.list_(_arrow_type(shard.dtype), encoder.dim)), ("norm", pa.float32())]
    schema = pa.schema(fields)
    before = _cut_by(encoder)
    with file_whole(shard.target) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* are longer than the .* tokens")  # told once, of all shards together
        with parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
            for rows in _blocks(_lines(shard)):
                writer.write_table(_table(rows, encoder, shard.dtype, schema))
            writer.add_key_value_metadata({"digest": shard.digest, "truncated": str(_cut_by(encoder) - before)})


def work(shards: Sequence[Shard], encoder: Any, engine: Engine, workers: int | None) -> Iterator[int]:
    """Encode shards and yield the number of each when it is done.

    Raises:
        UserError: if a worker dies, or Ray is not installed.
    """
    if engine == "ray" and shards:
        yield from _by_ray(shards, encoder, workers)
        return
    gpus = [] if workers == 1 else _gpus()
    count = min(workers or len(gpus) or max(1, (os.cpu_count() or 1) // 2), len(shards))
    if count > 1:
        yield from _by_pool(shards, encoder, count, gpus)
        return
    for shard in shards:
        encode_shard(shard, encoder)
        yield shard.number


def restored(batch: Any, dim: int) -> np.ndarray:
    """Float32 vectors from how they are stored: of short numbers only the direction counts, the length is told in full."""
    raw = batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    if raw.dtype == np.float32:
        return raw
    made, norms = raw.astype(np.float32), batch["norm"].to_numpy()[:, None]
    return made * (norms / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), np.finfo(np.float32).tiny))


def metadata(file: str | os.PathLike[str]) -> dict[str, str]:
    """What a finished shard says of itself; nothing where there is none, or a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return {key.decode(): value.decode() for key, value in (parquet.read_metadata(file).metadata or {}).items()}
    except (OSError, ValueError, pa.ArrowException):
        return {}


def _by_pool(shards: Sequence[Shard], encoder: Any, count: int, gpus: Sequence[str]) -> Iterator[int]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a fork of a process whose torch has threads may hang
    turns = context.Queue()
    for number in range(count):
        turns.put(gpus[number % len(gpus)] if gpus else None)
    pool = ProcessPoolExecutor(count, context, _start, (encoder, max(1, (os.cpu_count() or 1) // count), turns))
    try:
        for future in as_completed([pool.submit(_encode, shard) for shard in shards]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died, maybe for want of memory; what is finished is kept: go on with fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Any = None
"""In a worker: the encoder, which keeps its model from one shard to the next."""


def _start(encoder: Any, threads: int, turns: Any) -> None:
    import multiprocessing
    import threading

    global _encoder
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    gpu = turns.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    _encoder = encoder


def _end_with(parent: Any) -> None:
    """A worker whose parent was killed must not go on writing."""
    parent.join()
    os._exit(1)


def _encode(shard: Shard) -> int:
    encode_shard(shard, _encoder)
    return shard.number


def _gpus() -> list[str]:
    """Names of the GPUs that workers may be given, if the encoder, which is loaded here, is torch's."""
    count = sys.modules["torch"].cuda.device_count() if "torch" in sys.modules else 0
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return told.split(",")[:count] if told else [str(number) for number in range(count)]


class _RayWorker:
    """What Ray starts on each of its machines: one for each worker, with its own copy of the encoder."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        for told in rows["shard"]:
            encode_shard(Shard(**json.loads(told)), self.encoder)
        return {"number": rows["number"]}


def _by_ray(shards: Sequence[Shard], encoder: Any, workers: int | None) -> Iterator[int]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError('engine is ray, which is not installed; install it with: pip install "echelon[ray]"') from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = min(workers or gpus or max(1, int(ray.cluster_resources()["CPU"]) // 2), len(shards))
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"number": shard.number, "shard": json.dumps(asdict(shard))} for shard in shards]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker, fn_constructor_args=(encoder,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=count), num_gpus=1 if gpus else None
        )
        for row in done.iter_rows():
            yield int(row["number"])
    finally:
        if ours:
            ray.shutdown()


def _cut_by(encoder: Any) -> int:
    """Documents that an encoder has cut so far, if it counts them."""
    return getattr(encoder, "truncated", {}).get("document", 0)


def _lines(shard: Shard) -> Iterator[dict[str, str]]:
    with open(shard.documents, "rb") as file:
        file.seek(shard.start)
        while file.tell() < shard.stop:
            yield json.loads(file.readline())


def _blocks(rows: Iterable[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    block: list[dict[str, str]] = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK:
            yield block
            block = []
    if block:
        yield block


def _arrow_type(dtype: Storage) -> Any:
    import pyarrow as pa

    return {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]


def _table(rows: list[dict[str, str]], encoder: Any, dtype: Storage, schema: Any) -> Any:
    import pyarrow as pa

    new = [i for i, row in enumerate(rows) if "text" in row]
    docs = [Doc(rows[i]["id"], rows[i]["text"], rows[i]["title"]) for i in new]
    vectors = np.asarray(encoder.encode_documents(docs), np.float32) if docs else np.zeros((0, encoder.dim), np.float32)
    if vectors.shape != (len(new), encoder.dim) or not np.isfinite(vectors).all():
        raise ValueError(f"the encoder gave vectors of shape {vectors.shape} for {len(new)} documents; they must be {encoder.dim} finite numbers each")
    norms = np.linalg.norm(vectors, axis=1)
    if dtype != "float32":
        largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        vectors = (vectors / largest).astype(np.float16) if dtype == "float16" else np.round(vectors / largest * 127).astype(np.int8)
    at = np.full(len(rows), -1)
    at[new] = np.arange(len(new))
    taken = pa.array(at, mask=at < 0)
    packed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), _arrow_type(dtype)), encoder.dim)
    columns = [pa.array([row["id"] for row in rows]), pa.array([row["hash"] for row in rows]), packed.take(taken), pa.array(norms, pa.float32()).take(taken)]
    return pa.Table.from_arrays(columns, schema=schema)

"""From where an index lies to the index."""

import contextlib
from pathlib import Path
from typing import Any, Literal, get_args

from echelon.data.files import read_text
from echelon.errors import UserError
from echelon.retrieve.base import Encoder, Index, Recall, Space
from echelon.retrieve.stored import manifest
from echelon.retrieve.tokens import Tokens

Backend = Literal["disk", "lance", "tantivy", "qdrant"]


def open_index(where: str | Path) -> Index:
    """Open an index that is there: a folder, a LanceDB table on object storage (``s3://bucket/path``), or a Qdrant collection (``http://host:6333/name``).

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    backend = _backend_of(str(where))
    if backend == "lance":
        from echelon.retrieve.lance import LanceIndex

        return LanceIndex.load(where)
    if backend == "qdrant":
        from echelon.retrieve.qdrant import QdrantIndex

        return QdrantIndex.load(*_collection(str(where)))
    if backend == "tantivy":
        from echelon.retrieve.tantivy import TantivyIndex

        return TantivyIndex.load(where)
    if backend == "memory":
        from echelon.retrieve.memory import BM25Index, VectorIndex

        return VectorIndex.load(where) if "space" in (manifest(where) or {}) else BM25Index.load(where)
    from echelon.retrieve.disk import DiskIndex

    return DiskIndex.load(where)


def make_index(
    where: str | Path, *, backend: str | None = None, encoder: Encoder | None = None, tokens: Tokens | None = None, recall: Recall = "exact"
) -> Index:  # fmt: skip
    """A new, empty index; or one that is there already, if it was made the same way.

    Args:
        where: folder or address, as for :func:`open_index`.
        backend: what holds it; by the address if not given: Qdrant for ``http://``, LanceDB for other addresses, and for folders ``disk``, which is LanceDB
            and tantivy together.
        encoder: what will make the vectors; without one there are none, and search is by words alone.
        tokens: from texts to words.
        recall: how much of what is near a vector search must find, where LanceDB holds it: all of it (`exact`), or what partitions hold that are likely to
            (`balanced`, `fast`).

    Raises:
        UserError: if the back end is unknown, does not fit the address or the encoder, or something else is there.
    """
    if backend not in (None, *get_args(Backend)):
        raise UserError(f"backend is {backend!r}; it must be one of {', '.join(get_args(Backend))}")
    scheme = str(where).partition("://")[0] if "://" in str(where) else ""
    backend = backend or ("qdrant" if scheme in ("http", "https") else "lance" if scheme else "disk")
    if scheme and backend != ("qdrant" if scheme in ("http", "https") else "lance"):
        raise UserError(f"an index of the kind {backend} cannot lie at {where}; give a folder")
    space = Space.of(encoder) if encoder is not None else None
    settings = None
    with contextlib.suppress(AttributeError, ValueError):  # of encoders that were made from an object there is nothing to write down
        settings = encoder.settings if encoder is not None else None  # type: ignore[attr-defined]
    if recall != "exact" and (space is None or backend not in ("lance", "disk")):
        raise UserError(f"recall is {recall!r}; that is for vectors in LanceDB (backend disk or lance, with an encoder)")
    if backend == "lance":
        from echelon.retrieve.lance import LanceIndex

        made = LanceIndex(where, space, tokens, encoder=settings, recall=recall)
        return made if made.version or tokens else LanceIndex(where, space, Tokens(), encoder=settings, recall=recall)
    if backend == "qdrant":
        from echelon.retrieve.qdrant import QdrantIndex

        if space is None:
            raise UserError("a Qdrant index holds vectors; give an encoder")
        return QdrantIndex(*_collection(str(where)), space, encoder=settings)
    if backend == "tantivy":
        from echelon.retrieve.tantivy import TantivyIndex

        if space is not None:
            raise UserError("a tantivy index holds no vectors; leave out the encoder, or use the back end disk")
        return TantivyIndex(where, tokens)
    from echelon.retrieve.disk import DiskIndex

    return DiskIndex(where, space, tokens, encoder=settings, recall=recall)


def _backend_of(where: str) -> str:
    if where.startswith(("http://", "https://")):
        return "qdrant"
    if "://" in where:
        return "lance"
    folder = Path(where)
    told = manifest(folder)
    if told is not None:
        return str(told["backend"])
    if (folder / "documents.lance").is_dir():
        return "lance"
    if (folder / "meta.json").is_file() and "collections" in read_text(folder / "meta.json"):
        return "qdrant"
    raise UserError(f"{where} holds no index; `echelon index --corpus F --out {where}` makes one")


def _collection(where: str) -> tuple[str, str]:
    """Server and collection of a URL; a folder has one collection."""
    if "://" not in where:
        return where, "documents"
    scheme, _, rest = where.partition("://")
    host, _, name = rest.strip("/").partition("/")
    return f"{scheme}://{host}", name or "documents"


def encoder_of(index: Index) -> Any:
    """The encoder that an index was made with.

    Raises:
        UserError: if the index does not know it.
    """
    from echelon.retrieve.encoders import resolve_encoder

    if index.encoder is None:
        raise UserError(f"{index.place} does not know its encoder; name it")
    return resolve_encoder(index.encoder)

"""Documents, vectors and words in a LanceDB table: on this machine's disk, or on object storage under the same interface."""

import contextlib
import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve.base import NOTHING, Capability, Content, Hits, Index, Recall, Space, Vectors, ranked_with_ties
from echelon.retrieve.filters import Filter, as_sql
from echelon.retrieve.stored import WriterLock, meta_to_json
from echelon.retrieve.tokens import Tokens, needed

TABLE = "documents"
SMALL = 20_000  # rows up to which word weights are brought up to date by every commit
STALE = 0.05  # share of rows that are new since, up to which they are left as they are in larger tables
TIDY = 64  # commits between two clean-ups
KEPT = datetime.timedelta(minutes=10)  # how long versions stay that somebody may still be reading
PROBED: dict[Recall, int] = {"balanced": 8, "fast": 32}  # one of so many partitions is searched
CELLS = "vector_idx_"
CELLS_FROM = 10_000  # rows from which on vectors are put into partitions
GROWN = 4  # times as many rows as partitions were made for, and they are made anew


def capable(recall: Recall) -> frozenset[Capability]:
    """What an index that finds so much of what is near can do.

    Raises:
        UserError: if there is no such recall.
    """
    if recall not in get_args(Recall):
        raise UserError(f"recall is {recall!r}; it must be one of {', '.join(get_args(Recall))}")
    always: frozenset[Capability] = frozenset({"incremental_add", "delete", "filter", "persistent", "returns_vectors", "concurrent_readers"})
    return always | {"exact"} if recall == "exact" else always


class LanceIndex(Index):
    """A LanceDB table with the documents' text and meta, their vectors where a ``space`` is given, and their words where ``tokens`` are.

    Search by vectors is exact and reads from disk what it needs; or, with another ``recall`` and from 10,000 documents on, reads only some of the partitions
    in which like vectors lie: one in eight (`balanced`) or in thirty-two (`fast`), more where a filter leaves too few.

    Search by texts is BM25 with k1 = 1.2 and b = 0.75, which Lance fixes; in tables of more than 20,000 documents the newest, up to one in twenty, are weighed
    by what was there before them. A commit is atomic, but one that both deletes and puts is two.

    On disk a lock keeps other writers away. Object storage has no locks: a commit is refused if the table has changed since this writer opened it, which two
    commits at the same moment can slip by; have one writer at a time.

    Args:
        uri: folder, or ``s3://bucket/path`` and the like, of an index that is there or where a new one shall be.
        space: of the vectors, for a new index; for one that is there it must fit.
        tokens: from texts to words, for a new index; None for one without search by texts.
        encoder: settings of the encoder, kept for those who open it.
        recall: how much of what is near a vector search must find, for a new index.
        index_params: what LanceDB's ``IvfFlat`` is told in place of its defaults, such as ``num_partitions``.
        storage_options: keys, endpoint and region of the storage, as LanceDB calls them; by default the environment tells them.
    """

    def __init__(
        self, uri: str | Path, space: Space | None = None, tokens: Tokens | None = None, *, encoder: Any = None, recall: Recall = "exact",
        index_params: dict[str, Any] | None = None, storage_options: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__()
        lancedb = needed("lancedb")
        self.place = str(uri)
        self._lock_file = None if "://" in self.place else WriterLock(self.place)
        self._opened: Any = None
        self._version: int | None = None  # of the table, as this writer left it
        self._commits = 0
        self._take(space, tokens, encoder, recall, index_params or {})
        with self._told("open"):
            self._database = lancedb.connect(self.place, storage_options=storage_options, read_consistency_interval=datetime.timedelta(0))
            self._adopt()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Make one line of what LanceDB complains about."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            inner = re.findall(r'message: "([^"]+)"', str(error))
            raise UserError(f"cannot {what} {self.place}: {inner[-1] if inner else ' '.join(str(error).split())[:300]}") from error

    def _take(self, space: Space | None, tokens: Tokens | None, encoder: Any, recall: Recall, index_params: dict[str, Any]) -> None:
        held: set[Content] = {"vectors"} if space else set()
        self.searches = frozenset(held | {"texts"} if tokens else held)
        self.space, self.tokens, self.encoder, self.recall, self.index_params = space, tokens, encoder, recall, index_params
        self.capabilities = capable(recall) | {"distributed"}

    def _adopt(self) -> None:
        """Open the table, once there is one, and take its settings, which must fit those that were asked for."""
        try:
            table = self._database.open_table(TABLE)
        except ValueError as error:
            if "was not found" in str(error):
                return
            raise
        told = json.loads((table.schema.metadata or {}).get(b"echelon", b"{}"))
        if told.get("format") != 1:
            raise UserError(f"{self.place} has the format {told.get('format')!r}; this version of echelon reads 1")
        stored = Space(**told["space"]) if told["space"] else None
        if self.space is not None:
            if stored is None:
                raise UserError(f"{self.place} was made without vectors")
            stored.require(self.space, self.place)
        if self.tokens is not None and told["tokens"] != self.tokens.as_json():
            raise UserError(f"{self.place} was made with {told['tokens']}, not with {self.tokens.as_json()}")
        self._take(stored, Tokens(**told["tokens"]) if told["tokens"] else None, told["encoder"], told.get("recall", "exact"), told.get("index_params", {}))
        self._opened = table

    @property
    def _table(self) -> Any:
        if self._opened is None:
            self._adopt()
        return self._opened

    @classmethod
    def load(cls, uri: str | Path, space: Space | None = None, **options: Any) -> Self:
        """Open an index.

        Raises:
            UserError: if there is none, or its vectors are not of this space.
        """
        made = cls(uri, space, **options)
        if made._table is None:
            raise UserError(f"{uri} holds no index; `echelon index --corpus F --out {uri}` makes one")
        return made

    def __len__(self) -> int:
        return self._table.count_rows() if self._table is not None else 0

    @property
    def version(self) -> int:
        """Grows with every change; 0 before the first."""
        return self._table.version if self._table is not None else 0

    def close(self) -> None:
        super().close()
        self._version = None
        if self._lock_file is not None:
            self._lock_file.release()

    def _open_for_writing(self) -> None:
        if self._lock_file is not None:
            self._lock_file.take()
        if self._version is None:
            self._version = self.version
        elif self._version != self.version:
            raise UserError(f"{self.place} has been changed by another writer in the meantime; open it again, and have one writer at a time")

    def _schema(self) -> Any:
        arrow = needed("pyarrow")
        fields = [arrow.field("id", arrow.string(), nullable=False), arrow.field("title", arrow.string()), arrow.field("text", arrow.string())]
        fields.append(arrow.field("meta", arrow.json_()))
        if self.tokens is not None:
            fields.append(arrow.field("words", arrow.string()))
        if self.space is not None:
            fields.append(arrow.field("vector", arrow.list_(arrow.float32(), self.space.dim)))
        space, tokens = asdict(self.space) if self.space else None, self.tokens.as_json() if self.tokens else None
        told = {"format": 1, "space": space, "tokens": tokens, "encoder": self.encoder, "recall": self.recall, "index_params": self.index_params}
        return arrow.schema(fields, metadata={"echelon": json.dumps(told)})

    def _rows(self, docs: list[Doc], vectors: Vectors | None) -> Any:
        arrow = needed("pyarrow")
        columns: dict[str, Any] = {"id": [doc.id for doc in docs], "title": [doc.title for doc in docs], "text": [doc.text for doc in docs]}
        columns["meta"] = arrow.array([meta_to_json(doc) for doc in docs], type=arrow.json_())
        if self.tokens is not None:
            columns["words"] = [" ".join(self.tokens(doc.content)) for doc in docs]
        if self.space is not None:
            assert vectors is not None
            columns["vector"] = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.ravel()), self.space.dim)
        return arrow.table(columns, schema=self._schema())

    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        with self._told("write"):
            try:
                self._put(docs, vectors, removed)
                self._tidy()
            finally:
                self._version = self.version

    def _put(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        if self._table is None:
            self._opened = table = self._database.create_table(TABLE, self._rows(docs, vectors))
            table.create_index("id", config=needed("lancedb.index").BTree(), name="id_idx")
            return
        replaced = self._existing([doc.id for doc in docs])
        for part in _parts([name for name in removed if name not in replaced]):
            self._table.delete(f"id IN ({part})")
        if replaced:
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(self._rows(docs, vectors))
        elif docs:
            self._table.add(self._rows(docs, vectors))

    def _tidy(self) -> None:
        """Index new words and vectors once they are many, and now and then drop old versions and join small files."""
        self._commits += 1
        table, count, held = self._table, len(self), [index.name for index in self._table.list_indices()]
        behind = max((table.index_stats(name).num_unindexed_rows for name in held if name != "id_idx"), default=0)
        if self.tokens is not None and count and "words_idx" not in held:
            plain = {"stem": False, "remove_stop_words": False, "ascii_folding": False, "lower_case": False, "max_token_length": None}
            config = needed("lancedb.index").FTS(base_tokenizer="whitespace", with_position=False, **plain)
            table.create_index("words", config=config, name="words_idx")
        if self.space is not None and self.recall != "exact" and count >= max(CELLS_FROM, GROWN * self._cells(held)[1]):
            config = needed("lancedb.index").IvfFlat(**{"distance_type": self.space.similarity, "num_partitions": math.isqrt(count), **self.index_params})
            table.create_index("vector", config=config, name=f"{CELLS}{config.num_partitions}_{count}")
            for name in held:
                if name.startswith(CELLS):
                    table.drop_index(name)
        if self._commits % TIDY == 0 or (behind and (count < SMALL or behind > STALE * count)):
            table.optimize(cleanup_older_than=KEPT)

    def _cells(self, held: Sequence[str] | None = None) -> tuple[int, int]:
        """Partitions of the vectors, and the documents that there were when they were made; zeros where there are none."""
        names = [index.name for index in self._table.list_indices()] if held is None else held
        made = [name.removeprefix(CELLS).split("_") for name in names if name.startswith(CELLS)]
        return max(((int(partitions), int(count)) for partitions, count in made), key=itemgetter(1), default=(0, 0))

    def _existing(self, ids: list[str]) -> set[str]:
        return set(self._read(ids, ["id"], lambda row: None))

    def _documents(self, ids: Sequence[str]) -> Mapping[str, Doc]:
        return self._read(ids, ["id", "title", "text", "meta"], lambda row: Doc(row["id"], row["text"], row["title"], json.loads(row["meta"])))

    def _vectors(self, ids: Sequence[str]) -> Mapping[str, Any]:
        return self._read(ids, ["id", "vector"], lambda row: np.array(row["vector"], dtype=np.float32))

    def _read(self, ids: Sequence[str], columns: list[str], made: Any) -> dict[str, Any]:
        found = {}
        with self._told("read"):
            for part in _parts(list(dict.fromkeys(ids))) if self._table is not None else ():
                for row in self._table.search().where(f"id IN ({part})").limit(len(ids)).select(columns).to_arrow().to_pylist():
                    found[row["id"]] = made(row)
        return found

    def _search_texts(self, queries: list[str], k: int, filter: Filter | None) -> list[Hits]:
        assert self.tokens is not None
        return [self._best(" ".join(words), "_score", k, filter) if (words := self.tokens(query)) else NOTHING for query in queries]

    def _search_vectors(self, queries: Vectors, k: int, filter: Filter | None) -> list[Hits]:
        cells = self._cells()[0] if self.recall != "exact" and self._table is not None else 0
        return [self._best(query, "_distance", k, filter, cells) for query in queries]

    def _best(self, query: Any, column: str, k: int, filter: Filter | None, cells: int = 0) -> Hits:
        if self._table is None:
            return NOTHING

        def fetch(limit: int) -> tuple[list[str], list[float]]:
            if column == "_score":
                asked = self._table.search(query, query_type="fts", fts_columns="words")
            else:
                asked = self._table.search(query, vector_column_name="vector").distance_type(self.space.similarity)  # type: ignore[union-attr]
                asked = asked.minimum_nprobes(-(-cells // PROBED[self.recall])).maximum_nprobes(cells) if cells else asked.bypass_vector_index()
            asked = asked.limit(limit).select(["id", column])
            rows = (asked.where(as_sql(filter, "meta"), prefilter=True) if filter is not None else asked).to_arrow()
            values = rows[column].to_pylist()  # the distance is 1 - similarity, for both of them
            return rows["id"].to_pylist(), values if column == "_score" else [1 - value for value in values]

        with self._told("search"):
            return ranked_with_ties(fetch, k)


def _parts(ids: list[str]) -> list[str]:
    """Ids as lists in SQL."""
    quoted = ["'" + name.replace("'", "''") + "'" for name in ids]
    return [", ".join(quoted[start : start + 1000]) for start in range(0, len(quoted), 1000)]

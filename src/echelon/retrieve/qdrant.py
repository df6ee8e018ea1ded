"""Vectors in Qdrant: a server, cluster or cloud by its URL, or the client's own local stand-in, through the same calls."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve.base import Capability, Hits, Index, Space, Vectors, ranked_with_ties
from echelon.retrieve.filters import Condition, Filter, filterable
from echelon.retrieve.stored import doc_from_json, doc_to_json
from echelon.retrieve.tokens import needed

NAMESPACE = uuid.UUID("6f0f5a7e-27f0-4d0e-9d5c-0e4f1f8d9c1b")  # document ids become UUIDs under it; Qdrant takes no other texts
BATCH = 256
DISTANCES = {"cosine": "Cosine", "dot": "Dot"}


class QdrantIndex(Index):
    """A Qdrant collection, searched exactly.

    A folder is for small collections and tests: the client then searches by brute force in its own process, keeps all in memory, and lets one process at a
    time open it, to read too. Commits go in batches of 256 points and are not atomic together. Under cosine Qdrant keeps vectors at length 1, and gives them
    back so. It compares texts only for equality.

    Args:
        where: URL of a server, such as ``http://localhost:6333``, or a folder.
        collection: name of the collection.
        space: of the vectors, for a new collection; for one that is there it must fit.
        encoder: settings of the encoder, kept for those who open it.
        api_key: of the server.
    """

    capabilities: frozenset[Capability] = frozenset(
        {"incremental_add", "delete", "filter", "persistent", "exact", "returns_vectors", "distributed"}
    )
    searches = frozenset({"vectors"})  # type: ignore[assignment]
    space: Space

    def __init__(
        self, where: str | Path, collection: str = "documents", space: Space | None = None, *, encoder: Any = None, api_key: str | None = None
    ):
        super().__init__()
        self._module = needed("qdrant_client", "qdrant")
        self._models = self._module.models
        self.collection, self.place = collection, f"{where}/{collection}"
        self._parameters = self._models.SearchParams(exact=True) if "://" in str(where) else None  # the local client knows no other search
        try:
            remote = {"url": str(where), "api_key": api_key, "check_compatibility": False}
            self._client = self._module.QdrantClient(**remote) if "://" in str(where) else self._module.QdrantClient(path=str(where))
            told = self._client.get_collection(collection).config if self._client.collection_exists(collection) else None
        except RuntimeError as error:
            raise UserError(f"{where} is open in another process already; Qdrant's folders take one at a time, a server takes many") from error
        except (OSError, ValueError, self._module.http.exceptions.ApiException) as error:
            raise UserError(f"cannot open {where}: {' '.join(str(error).split())}") from error
        if told is None:
            if space is None:
                self._client.close()
                raise UserError(f"{where} has no collection {collection!r}; `echelon index --corpus F --encoder E --out {where}/{collection}` makes one")
            parameters = self._models.VectorParams(size=space.dim, distance=self._models.Distance(DISTANCES[space.similarity]))
            written = {"format": 1, "space": asdict(space), "encoder": encoder}
            self._client.create_collection(collection, vectors_config=parameters, metadata={"echelon": written})
            self.space, self.encoder = space, encoder
        else:
            mine = (told.metadata or {}).get("echelon")
            if mine is None or mine["format"] != 1:
                self._client.close()
                raise UserError(f"{self.place} is no collection that echelon can read")
            self.space, self.encoder = Space(**mine["space"]), mine["encoder"]
            if space is not None:
                self.space.require(space, self.place)

    @classmethod
    def load(cls, where: str | Path, collection: str = "documents", space: Space | None = None, **options: Any) -> Self:
        """Open a collection.

        Raises:
            UserError: if there is none, or its vectors are not of this space.
        """
        made = cls(where, collection, **options)
        if space is not None:
            made.space.require(space, made.place)
        return made

    def __len__(self) -> int:
        return self._client.count(self.collection, exact=True).count

    def close(self) -> None:
        super().close()
        self._client.close()

    def _points(self, ids: Sequence[str], *, vectors: bool = False, body: bool = False) -> list[Any]:
        keys = [point_id(name) for name in dict.fromkeys(ids)]
        payload = ["id", "body"] if body else ["id"]
        parts = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
        return [point for part in parts for point in self._client.retrieve(self.collection, part, with_payload=payload, with_vectors=vectors)]

    def _existing(self, ids: list[str]) -> set[str]:
        return {point.payload["id"] for point in self._points(ids)}

    def _documents(self, ids: Sequence[str]) -> Mapping[str, Doc]:
        return {point.payload["id"]: doc_from_json(point.payload["body"]) for point in self._points(ids, body=True)}

    def _vectors(self, ids: Sequence[str]) -> Mapping[str, Any]:
        return {point.payload["id"]: np.array(point.vector, dtype=np.float32) for point in self._points(ids, vectors=True)}

    def _write(self, docs: list[Doc], vectors: Vectors | None, removed: list[str]) -> None:
        if removed:
            self._client.delete(self.collection, self._models.PointIdsList(points=[point_id(name) for name in removed]), wait=True)
        for start in range(0, len(docs), BATCH):
            assert vectors is not None
            points = []
            for doc, row in zip(docs[start : start + BATCH], vectors[start : start + BATCH], strict=True):
                payload = {"id": doc.id, "body": doc_to_json(doc), "meta": filterable(doc.meta)}
                points.append(self._models.PointStruct(id=point_id(doc.id), vector=row.tolist(), payload=payload))
            self._client.upsert(self.collection, points, wait=True)

    def _search_vectors(self, queries: Vectors, k: int, filter: Filter | None) -> list[Hits]:
        wanted = self._models.Filter(must=[self._condition(condition) for condition in filter.conditions]) if filter is not None else None

        def best(query: np.ndarray) -> Hits:
            def fetch(limit: int) -> tuple[list[str], list[float]]:
                points = self._client.query_points(
                    self.collection, query=query.tolist(), query_filter=wanted, search_params=self._parameters, limit=limit, with_payload=["id"]
                ).points  # fmt: skip
                return [point.payload["id"] for point in points], [float(np.float32(point.score)) for point in points]

            return ranked_with_ties(fetch, k)

        return [best(query) for query in queries]

    def _condition(self, condition: Condition) -> Any:
        models, key = self._models, f"meta.{condition.field}"

        def equal(value: Any) -> Any:
            if isinstance(value, bool | str):
                return models.FieldCondition(key=key, match=models.MatchValue(value=value))
            return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))

        value = condition.values[0]
        if condition.operator in ("=", "in"):
            return models.Filter(should=[equal(each) for each in condition.values])
        if condition.operator == "!=" and isinstance(value, bool):
            return equal(not value)
        if isinstance(value, str):
            raise UserError(f"{condition.field} {condition.operator} {json.dumps(value)}: Qdrant compares texts only by = and in")
        if condition.operator == "!=":
            return models.Filter(should=[models.FieldCondition(key=key, range=models.Range(**{side: value})) for side in ("lt", "gt")])
        side = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[condition.operator]
        return models.FieldCondition(key=key, range=models.Range(**{side: value}))


def point_id(name: str) -> str:
    return str(uuid.uuid5(NAMESPACE, name))

"""A small collection, an encoder without weights, and every kind of index, made and opened again in one way."""

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from echelon.data.documents import Doc
from echelon.retrieve import BM25Index, DiskIndex, LanceIndex, QdrantIndex, Space, TantivyIndex, Tokens, VectorIndex


class HashingEncoder:
    """A text is the sum of one random vector for each of its words."""

    def __init__(self, dim=16, fingerprint="hashing"):
        self.dim, self.similarity, self.fingerprint = dim, "cosine", fingerprint

    def encode_queries(self, queries):
        return np.array([self._vector(query) for query in queries], dtype=np.float32).reshape(len(queries), self.dim)

    def encode_documents(self, documents):
        return self.encode_queries([doc.content for doc in documents])

    def lengths(self, texts, side):
        return [len(text.split()) for text in texts]

    def longest(self, side):
        return 512

    def _vector(self, text):
        total = np.full(self.dim, 0.01)
        for word in text.lower().split():
            total += np.random.default_rng(int.from_bytes(hashlib.sha256(word.encode()).digest()[:8])).normal(size=self.dim)
        return total


WORDS = "river stone light wind road house garden winter bread music paper glass horse island letter".split()


def documents(count=40, seed=0):
    """Short documents with different words, lengths and meta."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        text = " ".join(draw.choice(WORDS, size=int(draw.integers(3, 30)))) + f" only{number}"
        meta = {"year": 1980 + number, "lang": ("en", "fr", "de")[number % 3], "draft": number % 4 == 0, "weight": number / 8, "tags": ["a", "b"]}
        made.append(Doc(f"d{number:02}", text, f"Title {draw.choice(WORDS)}", meta))
    return made


QUERIES = ["river stone light", "garden", "music paper music", "wind road house winter", "only7 glass", "title horse"]


def naming(doc):
    """A query that fits one of them best, by words as by vectors."""
    return f"{doc.content} {doc.text.split()[-1]} {doc.text.split()[-1]}"


def brute_force_bm25(docs, query, k, k1=1.2, b=0.75):
    """Lucene's formula, term by term."""
    words = {doc.id: re.findall(r"\w+", doc.content.lower()) for doc in docs}
    mean = sum(map(len, words.values())) / len(docs)
    scores = {}
    for name, mine in words.items():
        count = Counter(mine)
        for word in re.findall(r"\w+", query.lower()):
            if count[word]:
                holders = sum(word in other for other in words.values())
                rarity = math.log(1 + (len(docs) - holders + 0.5) / (holders + 0.5))
                scores[name] = scores.get(name, 0) + rarity * count[word] / (count[word] + k1 * (1 - b + b * len(mine) / mean))
    return sorted(scores, key=lambda name: (-round(scores[name], 6), name))[:k]


def brute_force_cosine(docs, query, k, encoder):
    rows = encoder.encode_documents(docs).astype(np.float64)
    asked = encoder.encode_queries([query])[0].astype(np.float64)
    scores = rows @ asked / np.linalg.norm(rows, axis=1) / np.linalg.norm(asked)
    return [docs[place].id for place in sorted(range(len(docs)), key=lambda place: (-round(scores[place], 6), docs[place].id))[:k]]


@dataclass
class Store:
    """An index of one kind, searched in one way."""

    kind: str
    by: str
    place: str
    options: dict = field(default_factory=dict)
    encoder: HashingEncoder = field(default_factory=HashingEncoder)

    @property
    def rounding(self):
        """By how much a score may differ from one search to the next: Qdrant's local client takes products in whatever way memory happens to lie."""
        return 1e-6 if self.kind == "qdrant" else 0

    def make(self):
        space = Space.of(self.encoder)
        return {
            "vectors": lambda: VectorIndex(space), "bm25": BM25Index, "tantivy": lambda: TantivyIndex(self.place),
            "lance": lambda: LanceIndex(self.place, space, Tokens(), storage_options=self.options or None),
            "disk": lambda: DiskIndex(self.place, space), "qdrant": lambda: QdrantIndex(self.place, "documents", space),
        }[self.kind]()  # fmt: skip

    def reopen(self, index):
        """The index as another program finds it."""
        if self.kind in ("vectors", "bm25"):
            index.save(self.place)
            return type(index).load(self.place)
        index.close()
        return type(index).load(self.place, **({"storage_options": self.options} if self.options else {}))

    def vectors(self, index, docs):
        return self.encoder.encode_documents(docs) if index.space is not None else None

    def add(self, index, docs, commit=True):
        index.add(docs, self.vectors(index, docs))
        if commit:
            index.commit()

    def upsert(self, index, docs):
        index.upsert(docs, self.vectors(index, docs))
        index.commit()

    def search(self, index, queries, k=10, filter=None):
        return index.search(self.encoder.encode_queries(queries) if self.by == "vectors" else list(queries), k, filter)

    def ids(self, index, query, k=10, filter=None):
        return list(self.search(index, [query], k, filter)[0].ids)

    def expected(self, docs, query, k=10):
        return brute_force_cosine(docs, query, k, self.encoder) if self.by == "vectors" else brute_force_bm25(docs, query, k)


KINDS = [("vectors", "vectors"), ("bm25", "texts"), ("lance", "vectors"), ("lance", "texts"), ("tantivy", "texts"), ("disk", "vectors"), ("disk", "texts"),
         ("qdrant", "vectors")]  # fmt: skip

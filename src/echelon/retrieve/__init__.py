"""Finding documents: indexes, encoders, retrievers and fusion."""

import importlib
from typing import Any

_LAZY = {
    "Capability": "base", "Encoder": "base", "Hits": "base", "Index": "base", "RetrievalMethod": "base", "Retriever": "base", "Space": "base",
    "Filter": "filters", "Tokens": "tokens", "BM25Index": "memory", "VectorIndex": "memory", "LanceIndex": "lance", "TantivyIndex": "tantivy",
    "QdrantIndex": "qdrant", "DiskIndex": "disk", "open_index": "opening", "make_index": "opening", "encoder_of": "opening", "ingest": "ingestion",
    "BM25": "bm25", "TextRetriever": "bm25", "Dense": "dense", "DenseRetriever": "dense", "Hybrid": "hybrid", "FusedRetriever": "hybrid",
    "VietnameseLegal": "vietnamese_legal", "fuse": "fusion", "collapse": "fusion",
    "resolve_encoder": "encoders", "SentenceEncoder": "encoders", "PooledEncoder": "encoders", "ContinuationEncoder": "encoders",
    "encode_corpus": "corpus", "EncodedCorpus": "corpus", "CachedEncoder": "vector_cache",
    "Chunk": "chunking", "Chunker": "chunking", "rejoin": "chunking", "near_duplicates": "chunking",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.retrieve.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.retrieve' has no attribute {name!r}")

"""Writing text: one decoding session, the decoders over it, and inference-time search."""

import importlib
from typing import Any

_LAZY = {
    "Candidate": "base", "Decoder": "base", "GenerationResult": "base", "generate": "base",
    "DecodeSession": "session", "Event": "session", "Stats": "session", "Sampler": "sampling",
    "Greedy": "greedy", "Beam": "beam",
    "Ancestral": "truncation", "TopK": "truncation", "Nucleus": "truncation", "Typical": "truncation", "Eta": "truncation", "MinP": "truncation",
    "ContrastiveSearch": "contrastive_search", "ContrastiveDecoding": "contrastive_decoding",
    "Momentum": "momentum", "MomentumProcessor": "momentum", "CitationBlocker": "citations", "Citations": "citations",
    "BestOfN": "search", "SegmentBeam": "search", "RankGen": "rankgen", "RankGenRerank": "rankgen",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.generate.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.generate' has no attribute {name!r}")

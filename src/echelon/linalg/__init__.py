"""Factorisations, selections, rank rules and quantisers: pure functions on tensors, float64 inside, no modules and no models."""

import importlib
from typing import Any

_LAZY = {
    "Factors": "lowrank", "balance": "lowrank", "eig_basis": "lowrank", "error_svd": "lowrank", "output_pca": "lowrank",
    "product_svd": "lowrank", "spectrum": "lowrank", "svd": "lowrank", "weighted_svd": "lowrank",
    "Selection": "selection", "nystrom": "selection", "ridge_leverage": "selection", "rope_pairs": "selection", "select_columns": "selection",
    "SparseCode": "dictionary", "snmf": "dictionary", "sparse_code": "dictionary",
    "POLICIES": "ranks", "allocate": "ranks", "block_sparsity": "ranks", "break_even": "ranks", "normalise_spectrum": "ranks",
    "reduction_threshold": "ranks",
    "Basis": "bases", "seed_of": "bases",
    "Grid": "rounding", "gptq": "rounding", "learned_rounding": "rounding",
    "Quantized": "quantize", "pack": "quantize", "quantize_activations": "quantize", "rtn": "quantize", "unpack": "quantize",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"echelon.linalg.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'echelon.linalg' has no attribute {name!r}")

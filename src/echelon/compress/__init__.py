"""Making a trained model smaller: compressors, the modules they leave behind, and how such models are saved, loaded, trained and merged."""

import importlib
from typing import Any

_LAZY = {
    "Compressed": "base", "Compressor": "base", "Job": "base", "Layer": "linear", "LinearCompressor": "linear", "LowRankCompressor": "linear",
    "Report": "report", "linear_targets": ".models.targets", "LowRankLinear": ".models.modules", "EchelonConfig": ".models.reload",
    "from_config": ".models.reload",
    "compress_checkpoint": "streaming", "save": "export", "merge_to_dense": "export", "size": "budget", "solve": "budget",
    "lora_config": "lora", "lora_targets": "lora", "load_lora": "lora", "merge_lora": "lora",
    "Distillation": "distill", "FeatureDistiller": "distill", "DistillationTrainer": "distill_trainer",
    "PELA": "pela", "WeightPerturbation": "pela", "DSFormer": "dsformer", "STFCallback": "dsformer",
    "PackedLinear": "packed", "QuantizedLinear": "packed", "PrunedLinear": "packed", "RTN": "rtn", "Pruning": "pruning",
    "Compensator": "compensator", "Compensated": "compensator", "CompensationReport": "compensator", "LoRC": "lorc", "EoRA": "eora", "ActS": "eora",
    "weight_of": "compensator", "Sensitivity": "sensitivity",
    "recover": "recovery", "select_trainable": "recovery", "low_rank_parameters": "recovery",
    "WeLore": "welore", "Greenformers": "greenformers", "auto_fact": "greenformers",
    "low_rank_from_config": "low_rank_transformer", "add_linformer": "linformer",
    "SVD": "svd", "LoRD": "lord", "FeatureMimic": "feature_mimic", "SliceGPT": "slicegpt", "MoDeGPT": "modegpt",
}  # fmt: skip
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'echelon.compress' has no attribute {name!r}")

"""Adapters as tuners of PEFT: importing this package makes ``get_peft_model`` and ``PeftModel.from_pretrained`` know them.

::

    from peft import get_peft_model
    from echelon.adapt import DyLoraConfig

    model = get_peft_model(model, DyLoraConfig(r=8, target_modules="all-linear"))
    ...
    model.save_pretrained("adapter")  # for people who have echelon
    model.save_lora("lora")           # the same function for those who have PEFT alone
"""

from echelon.adapt.callbacks import AdapterCallback
from echelon.adapt.config import DeltaConfig
from echelon.adapt.dylora import DyLoraConfig, DyLoraModel, rank_report
from echelon.adapt.linear import DeltaLinear, LoraFactors
from echelon.adapt.lora_sb import LoraSbConfig, LoraSbModel, prepare
from echelon.adapt.model import DeltaModel
from echelon.adapt.registration import load_adapter, register

__all__ = [
    "AdapterCallback", "DeltaConfig", "DeltaLinear", "DeltaModel", "DyLoraConfig", "DyLoraModel", "LoraFactors", "LoraSbConfig", "LoraSbModel", "load_adapter",
    "prepare", "rank_report", "register",
]  # fmt: skip

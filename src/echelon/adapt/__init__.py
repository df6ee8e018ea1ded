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
from echelon.adapt.increlora import IncreLoraConfig, IncreLoraModel
from echelon.adapt.linear import DeltaLinear, LoraFactors
from echelon.adapt.lora_sb import LoraSbConfig, LoraSbModel, prepare
from echelon.adapt.loram import LoRAM
from echelon.adapt.model import DeltaModel
from echelon.adapt.nola import NolaConfig, NolaModel
from echelon.adapt.prune_plan import PrunePlan, prune, prune_folder
from echelon.adapt.randlora import RandLoraConfig, RandLoraModel, convert_randlora
from echelon.adapt.recovered import evaluate_gap, recover
from echelon.adapt.registration import load_adapter, register

__all__ = [
    "AdapterCallback", "DeltaConfig", "DeltaLinear", "DeltaModel", "DyLoraConfig", "DyLoraModel", "IncreLoraConfig", "IncreLoraModel", "LoRAM",
    "LoraFactors", "LoraSbConfig", "LoraSbModel", "NolaConfig", "NolaModel", "PrunePlan", "RandLoraConfig", "RandLoraModel", "convert_randlora",
    "evaluate_gap", "load_adapter", "prepare", "prune", "prune_folder", "rank_report", "recover", "register",
]  # fmt: skip

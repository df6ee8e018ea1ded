"""Makes PEFT know the tuners of this package, which it has no public way for.

PEFT looks tuners up by the members of an enumeration. A member is added to it in place, in a namespace of our own (``ECHELON_NOLA``), so that nothing clashes
when PEFT ships a method of the same name. PEFT derives the prefix of parameters from the type's name in places, so the two always agree.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
from packaging.version import Version
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from echelon.errors import UserError
from echelon.registry import suggest

OLDEST_PEFT = "0.21"  # from there on checkpoints are made by visiting tuner layers


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enumeration for a tuner of this name, added if it is not there."""
    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_, member.__objclass__ = value, value, PeftType  # type: ignore[attr-defined]
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
        PeftType._member_names_.append(value)
        type.__setattr__(PeftType, value, member)  # the enumeration's own refuses
    return PeftType(value)


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make ``get_peft_model`` and ``PeftModel.from_pretrained`` know a tuner.

    Registering a class again, as reloading its module does, puts the new one in place of the old.

    Args:
        name: lower case, beginning with ``echelon_``; parameters begin with it too.
        config_cls: the config that users hold.
        model_cls: the tuner.

    Raises:
        ImportError: if PEFT is older than these tuners can work with.
    """
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(f"echelon.adapt needs peft {OLDEST_PEFT} or newer; {peft.__version__} is installed")
    member = peft_type(name)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        warnings.warn(f"PEFT already has a method {member.value} from {known.__module__}; echelon leaves it in place", stacklevel=2)
        return
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], **arguments: Any) -> PeftModel:
    """``PeftModel.from_pretrained``, which says what is wrong where an adapter's type is unknown.

    Args:
        model: the base model.
        path: a folder, or a hub id.
        arguments: of ``PeftModel.from_pretrained``.

    Raises:
        UserError: if the folder holds no adapter, or one of a type that neither PEFT nor this version of echelon has.
    """
    file = Path(path) / "adapter_config.json"
    if Path(path).is_dir():
        try:
            said = json.loads(file.read_text(encoding="utf-8"))["peft_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot load adapter {str(path)!r}: it has no adapter_config.json with a peft_type") from error
        if said not in PEFT_TYPE_TO_CONFIG_MAPPING:
            legal = [member.value for member in PEFT_TYPE_TO_CONFIG_MAPPING]
            raise UserError(f"cannot load adapter {str(path)!r}: its type {said!r} is unknown{suggest(str(said), legal)}; is it from a newer echelon?")
    return PeftModel.from_pretrained(model, os.fspath(path), **arguments)

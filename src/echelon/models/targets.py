"""Which linear layers of a model a method means: those inside the blocks, a part of them, or names as in PEFT."""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.models.modules import is_linear
from echelon.registry import suggest

Targets = str | Sequence[str] | None


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the chain of blocks: the longest outermost list of modules of one class; empty if there is none.

    An encoder-decoder has two chains that feed each other; it counts as having none.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and len({type(child) for child in module}) == 1:
            found.append((name, module))
    if not found:
        return []
    name, chain = max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [(f"{name}.{i}", child) for i, child in enumerate(chain)]


def linear_targets(
    model: nn.Module, target_modules: Targets = None, convolutions: bool = False
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """Names of the linear layers that are meant, in the model's order, and of those that are meant but cannot be taken, with the reason.

    Args:
        model: the model.
        target_modules: None or ``all-linear`` for those inside the blocks (never a head); ``attention`` or ``mlp`` for a part of these;
            ``linear`` for all but the head, also outside the blocks, and ``all`` for convolutions beside them;
            otherwise as in PEFT: a string is a regular expression for whole names, a list holds names or ends of names.
        convolutions: whether a target may be a convolution.

    Raises:
        ValueError: if a target matches nothing, or the model keeps its experts in three-dimensional tensors.
    """
    chain = [name for name, _ in blocks(model)]
    inner: set[str] = set()  # parts of a module that is a linear layer to the outside, such as the two factors
    known: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") or isinstance(module, Conv1D) or (convolutions and hasattr(module, "in_channels")):
            inner |= {f"{name}.{child}" for child, _ in module.named_modules() if child}
            if name not in inner:
                known[name] = module
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    in_blocks = [n for n in known if (any(n.startswith(block + ".") for block in chain) if chain else known[n] is not head)]
    if target_modules in ("linear", "all"):
        _refuse_experts(model)
        wanted = [n for n in known if known[n] is not head and (target_modules == "all" or not hasattr(known[n], "in_channels"))]
    elif target_modules is None or target_modules in ("all-linear", "attention", "mlp"):
        _refuse_experts(model)
        in_blocks = [n for n in in_blocks if not hasattr(known[n], "in_channels")]
        wanted = [n for n in in_blocks if target_modules not in ("attention", "mlp") or in_attention(n) == (target_modules == "attention")]
        if not wanted:
            raise ValueError(f"the model has no linear layers that {target_modules or 'all-linear'} stands for")
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        wanted = []
        for pattern in patterns:
            matched = [n for n in known if matches(n, pattern, isinstance(target_modules, str))]
            if not matched:
                ends = sorted({n.rpartition(".")[2] for n in known})
                raise ValueError(f"target_modules: {pattern!r} matches no linear layer{suggest(pattern, ends)}; there are {', '.join(ends)}")
            wanted += matched
    shared: dict[int, int] = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            shared[id(tensor)] = shared.get(id(tensor), 0) + 1
    names, skipped = [], {}
    for name in dict.fromkeys(n for n in known if n in set(wanted)):
        if not (is_linear(known[name]) or isinstance(known[name], nn.Conv1d | nn.Conv2d | nn.Conv3d)):
            skipped[name] = f"it is a {type(known[name]).__name__} already"
        elif shared[id(known[name].weight)] > 1:
            skipped[name] = "its weight is tied to another module's"
        else:
            names.append(name)
    return names, skipped


def matches(name: str, pattern: str, regular: bool) -> bool:
    return re.fullmatch(pattern, name) is not None if regular else name == pattern or name.endswith("." + pattern)


def in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _refuse_experts(model: nn.Module) -> None:
    for block, module in blocks(model):
        for name, part in module.named_modules():
            if not isinstance(part, nn.modules.conv._ConvNd) and any(p.ndim == 3 and p.shape[0] > 1 for p in part._parameters.values() if p is not None):
                raise ValueError(f"{block}.{name} holds its experts in three-dimensional tensors; mixtures of experts are not supported (name target_modules)")

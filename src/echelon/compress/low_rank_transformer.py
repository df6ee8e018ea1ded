"""The Low-Rank Transformer: factored layers by design, to be trained from scratch.

Source: "Lightweight and Efficient End-to-End Speech Recognition Using Low-Rank Transformer", ICASSP 2020, and "Greenformers", arXiv 2108.10808.
Differs from them: any architecture of transformers can be made so, and not one of its own.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from echelon.compress.greenformers import Greenformers
from echelon.models.targets import Targets


def low_rank_from_config(
    config: PreTrainedConfig, rank: int | float = 100, auto_class: Any = AutoModelForCausalLM, *, target_modules: Targets = "all-linear", seed: int = 0
) -> PreTrainedModel:  # fmt: skip
    """A new model in which every projection of attention and feed-forward is two random factors of one rank.

    Factors are drawn as ``nn.Linear`` draws its weight, everything else as the architecture does. It saves, loads and trains as any model does.

    Args:
        config: of the architecture, which must not be compressed already.
        rank: of every layer: a whole number, or a share in (0, 1) of its break-even rank. Layers that would not get smaller stay dense, with a warning.
        auto_class: builds the dense model from the config, such as ``AutoModelForMaskedLM``.
        target_modules: layers to factor, see :func:`echelon.compress.linear_targets`.
        seed: of all values.

    Raises:
        ValueError: if the rank is out of range or no layer is meant.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(config)
    return Greenformers(rank=rank, solver="random", target_modules=target_modules).compress(model, seed=seed).model

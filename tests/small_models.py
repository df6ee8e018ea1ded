"""Tiny random models of every family that compressors must run on, fresh each time since compressors edit in place."""

import functools

import torch
import transformers

import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WIDE = SIZES | {"max_position_embeddings": 128}
GROUPED = {"num_key_value_heads": 2}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SPECIAL, **WIDE, **GROUPED))


def _mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**tiny.SPECIAL, **WIDE, **GROUPED, sliding_window=8))


def _qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**tiny.SPECIAL, **WIDE, **GROUPED, tie_word_embeddings=True))


def _qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**tiny.SPECIAL, **WIDE, **GROUPED, head_dim=16))


def _phi():
    return transformers.PhiForCausalLM(transformers.PhiConfig(**tiny.SPECIAL, **WIDE, partial_rotary_factor=0.5))


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=tiny.VOCAB, pad_token_id=0, **WIDE))


def _vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5))


FAMILIES = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "gpt2": tiny.FAMILIES["gpt2"], "opt": tiny.FAMILIES["opt"],
    "gpt_neox": tiny.FAMILIES["gpt_neox"], "phi": _phi, "bert": _bert, "vit": _vit,
}  # fmt: skip
CAUSAL = [family for family in FAMILIES if family not in ("bert", "vit")]


def mixtral():
    """Its experts are three-dimensional tensors."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**tiny.SPECIAL, **WIDE, **GROUPED, num_local_experts=2))


@functools.cache
def _weights(family):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made = FAMILIES[family]()
        for parameter in made.parameters():
            # Biases and norms are random too: what forgets them must show.
            parameter.data.mul_(4.0) if parameter.ndim > 1 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made.state_dict()


def model(family, dtype=torch.float32):
    """A new model, the same one each time."""
    with torch.random.fork_rng():
        made = FAMILIES[family]().eval()
    made.load_state_dict(_weights(family))
    if hasattr(made, "generation_config") and made.generation_config is not None:
        made.generation_config.max_length = None
    return made.to(dtype)


def data(family, rows=12, length=24, seed=0):
    """Calibration data: token ids, or images for ViT."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(3)]
    return torch.randint(4, tiny.VOCAB, (rows, length), generator=generator).tolist()


def batch(family, dtype=torch.float32):
    """Inputs to compare models on, with a padded row where there is text."""
    generator = torch.Generator().manual_seed(99)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}
    ids = torch.randint(4, tiny.VOCAB, (2, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def logits(made, family):
    return made(**batch(family, made.dtype)).logits

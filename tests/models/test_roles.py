"""Every role points at the module that plays it, in every supported family."""

import pytest
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from echelon.errors import UserError
from echelon.models import layers, roles

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=4),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_inner=24),
    "opt": transformers.OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=16),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "phi": transformers.PhiConfig(**SMALL),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_is_filled_and_every_matrix_of_a_block_has_one(family):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    found = roles(model)
    assert len(layers(model)) == 2
    assert model.get_submodule(found.embed) is model.get_input_embeddings()
    model.get_submodule(found.final_norm)
    block = layers(model)[0]
    named = {*found.attention, found.attention_out, *found.mlp_in, found.mlp_out}
    assert named == {name for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert all(block.get_submodule(norm).weight.shape == (16,) for norm in found.norms)
    assert found.fused_qkv == (len(found.attention) == 1)


def test_post_norm_opt_is_told_apart():
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False
    )
    assert not roles(transformers.OPTForCausalLM(config)).pre_norm


def test_an_unknown_family_is_named():
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="'bloom' is not supported"):
        roles(model)

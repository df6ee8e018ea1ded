"""What the adapter says of a model is true of it, and its edits do not change what the model computes."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from echelon.models.families import PlainRMSNorm, adapter, matrix

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 32}
OPT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 16,
    "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "llama_biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=32, bos_token_id=1, eos_token_id=1
    ),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "opt_no_bias": lambda: transformers.OPTConfig(**OPT, enable_bias=False),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=False),
    "phi": lambda: transformers.PhiConfig(**SMALL),
}  # fmt: skip


def random_model(family):
    """Random also where initialisation leaves ones and zeros, with embeddings that are off centre."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data * 4 if parameter.ndim > 1 else parameter.data + 0.3 * torch.randn_like(parameter)
        model.get_input_embeddings().weight.data += 0.2
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(4, 50, (3, 9), generator=generator), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model):
    given = batch()
    return model(**given).logits[given["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_the_norms_changes_no_logit(family):
    model = random_model(family)
    before = logits(model)
    adapter(model).fold_norms()
    assert not any("LayerNorm" in type(m).__name__ for m in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert before.abs().max() > 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_after_folding_the_stream_is_centred_exactly_where_norms_subtract_the_mean(family):
    model = random_model(family)
    found = adapter(model)
    found.fold_norms()
    with torch.no_grad():
        states = model(**batch(), output_hidden_states=True).hidden_states[:-1]  # the last one is behind the final norm
    centred = [float(state.mean(-1).abs().max()) < 1e-5 for state in states]
    assert all(centred) if found.roles.layer_norm else not any(centred)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_folded_in_bfloat16_it_stays_near(family):
    model = random_model(family)
    before = logits(model)
    model.to(torch.bfloat16)
    adapter(model).fold_norms()
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert float((logits(model).float() - before).norm() / before.norm()) < 0.05


def test_a_tied_head_gets_a_weight_of_its_own_and_keeps_it():
    model = random_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = adapter(model)
    assert found.untie() and not found.untie()
    model.model.embed_tokens.weight.data.zero_()
    model.tie_weights()
    assert float(model.lm_head.weight.detach().abs().sum()) > 0 and model.config.tie_word_embeddings is False


def test_the_plain_norm_divides_by_the_width_it_was_made_for():
    x = np.random.default_rng(0).normal(size=(5, 6))
    expected = x / np.sqrt((x**2).sum(-1, keepdims=True) / 16 + 0.1)
    np.testing.assert_allclose(PlainRMSNorm(16, 0.1)(torch.tensor(x)).numpy(), expected, rtol=1e-12)
    assert not list(PlainRMSNorm(16, 0.1).parameters())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama_biases"])
def test_split_queries_keys_and_values_are_those_that_attention_sees(family):
    """At position 0 rotary embeddings do nothing; Qwen3 also normalises queries and keys, so there only values are compared."""
    model, seen, inputs = random_model(family), [], []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    model.set_attn_implementation("spy")
    found = adapter(model)
    block = found.blocks[1]
    block.attention_in[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([[7, 9, 11]]))
    x, shape = inputs[0][0, 0].double(), found.attention_shape
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    scale = (4**-0.5 if found.roles.positions and not found.roles.fused_qkv else 1, 1, 1)  # OPT scales the query itself
    for i, ((weight, shift), expected) in enumerate(zip(found.split_qkv(block), seen[1], strict=True)):
        if family == "qwen3" and i < 2:
            continue
        got = (weight @ x + (0 if shift is None else shift)).view(heads[i], shape.head_dim) * scale[i]
        torch.testing.assert_close(got.float(), expected[0, :, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "expected"), [("llama", 4), ("qwen3", 8), ("gpt2", 0), ("opt", 0), ("gpt_neox", 2), ("phi", 2)])
def test_rotary_dimensions_are_those_of_the_tables(family, expected):
    model = random_model(family)
    assert adapter(model).attention_shape.rotary_dims == expected
    if expected:
        tables = next(module for module in model.modules() if "RotaryEmbedding" in type(module).__name__)
        assert tables(torch.zeros(1, 1, 16), torch.zeros(1, 1))[0].shape[-1] == expected


def test_a_gpt2_matrix_is_read_the_right_way_round():
    model = random_model("gpt2")
    module, x = model.transformer.h[0].mlp.c_fc, torch.randn(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((matrix(module) @ x.double()).float() + module.bias, module(x[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (transformers.OPTConfig(**(OPT | {"do_layer_norm_before": False})), "post-norm"),
        (transformers.OPTConfig(**(OPT | {"word_embed_proj_dim": 8})), "projects its embeddings"),
        (transformers.OPTConfig(**OPT, _remove_final_layer_norm=True), "no final norm"),
        (transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True), "cross-attention"),
    ],
)
def test_a_stream_that_may_not_be_rotated_is_refused(config, told):
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=told):
        adapter(model).fold_norms()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_models_are_refused_by_name():
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(NotImplementedError, match="'bert' is not supported; supported are gpt2, "):
        adapter(bert)
    with pytest.raises(NotImplementedError, match="LlamaModel has no language-modelling head"):
        adapter(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))


def test_folding_twice_is_refused():
    model = random_model("llama")
    adapter(model).fold_norms()
    with pytest.raises(NotImplementedError, match="folded already"):
        adapter(model).fold_norms()

"""What a model attends to, against the maps that transformers' eager attention returns."""

import functools

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import small_models
import tiny
from echelon.models.attention_capture import attention_rows, capture_attention, layer_windows
from echelon.models.families import UnsupportedFamily

PLAIN = ["llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi"]
SIZES = {**tiny.SPECIAL, **small_models.WIDE, **small_models.GROUPED}


def _odd(family):
    """Attention that is more than a softmax over everything."""
    return {
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=4, sliding_window=8, attn_logit_softcapping=1.5)
        ),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**SIZES, head_dim=8, sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
        ),
    }[family]()


@functools.cache
def _weights(family):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = _odd(family)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return made.state_dict()


def model(family):
    if family in PLAIN:
        return small_models.model(family)
    with torch.random.fork_rng():
        made = _odd(family).eval()
    made.load_state_dict(_weights(family))
    return made


def ids(length=20, rows=2):
    return torch.randint(4, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def maps(made, **inputs):
    """All of a model's attention maps, by transformers' own eager attention."""
    former = made.config._attn_implementation
    made.set_attn_implementation("eager")
    found = made(**inputs, output_attentions=True).attentions
    made.set_attn_implementation(former)
    return found


@torch.no_grad()
def captured(made, inputs, **settings):
    found = {}
    with capture_attention(made, lambda layer, rows: found.__setitem__(layer, rows), **settings):
        found["logits"] = made(**inputs).logits
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*PLAIN, "mistral", "gemma2", "gpt_oss"])
def test_rows_are_those_of_eager_attention_and_the_model_computes_what_it_did(family, implementation):
    made = model(family)
    if implementation == "sdpa" and not made._supports_sdpa:
        implementation = "eager"
    made.set_attn_implementation(implementation)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0  # padded on the left
    for inputs in ({"input_ids": ids()}, {"input_ids": ids(), "attention_mask": mask}):
        expected = maps(made, **inputs)
        with torch.no_grad():
            plain = made(**inputs).logits
        found = captured(made, inputs, rows=slice(-5, None), layers=range(2))
        torch.testing.assert_close(found["logits"], plain, rtol=0, atol=0)
        for layer in range(2):
            assert found[layer].dtype == torch.float32 and found[layer].shape == (2, 4, 5, 20)
            torch.testing.assert_close(found[layer], expected[layer][:, :, -5:], atol=2e-6, rtol=1e-4)
        sums = found[0].sum(-1)
        assert (sums < 0.999).all() if family == "gpt_oss" else torch.allclose(sums, torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("family", [*PLAIN, "gpt_oss"])
def test_rows_behind_a_cache_are_counted_from_what_is_fed(family):
    made = model(family)
    expected = maps(made, input_ids=ids())
    cache = DynamicCache(config=made.config)
    with torch.no_grad():
        made(input_ids=ids()[:, :13], cache=cache)
    found = captured(made, {"input_ids": ids()[:, 13:], "cache": cache}, rows=slice(2, 5))
    full = [i for i, window in enumerate(layer_windows(made.config)) if window is None]
    assert set(found) == {*full, "logits"}
    for layer in full:
        torch.testing.assert_close(found[layer], expected[layer][:, :, 15:18], atol=2e-6, rtol=1e-4)


def test_a_windowed_layers_keys_are_the_last_ones_of_its_cache():
    made = model("mistral")
    expected = maps(made, input_ids=ids())
    cache = DynamicCache(config=made.config)
    with torch.no_grad():
        made(input_ids=ids()[:, :13], cache=cache)
    found = captured(made, {"input_ids": ids()[:, 13:], "cache": cache}, layers=[1])[1]
    assert found.shape[-1] == 14
    torch.testing.assert_close(found, expected[1][:, :, 13:, -14:], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3"])
def test_leaving_early_shows_the_same_rows_fills_the_cache_and_leaves_the_model_whole(family):
    made = model(family)
    expected, before = maps(made, input_ids=ids()), small_models.logits(made, family)
    cache, found, behind = DynamicCache(config=made.config), {}, []
    hook = made.lm_head.register_forward_hook(lambda *_: behind.append(1)) if hasattr(made, "lm_head") else None
    with torch.no_grad(), capture_attention(made, lambda layer, rows: found.__setitem__(layer, rows), layers=[0], leave=True):
        made(input_ids=ids(), cache=cache)
        behind.append(2)
    if hook is not None:
        hook.remove()
    assert not behind and list(found) == [0]
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-4)
    assert cache.layers[0].keys.shape[2] == 20
    torch.testing.assert_close(small_models.logits(made, family), before, rtol=0, atol=0)


def test_grouped_heads_are_those_of_the_model_with_its_key_heads_repeated():
    grouped = model("llama")
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 4})
    with torch.random.fork_rng():
        wide = transformers.LlamaForCausalLM(config).eval()
    state = {
        name: tensor.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32) if "k_proj" in name or "v_proj" in name else tensor
        for name, tensor in grouped.state_dict().items()
    }
    wide.load_state_dict(state)
    a, b = captured(grouped, {"input_ids": ids()}), captured(wide, {"input_ids": ids()})
    for layer in range(2):
        torch.testing.assert_close(a[layer], b[layer], atol=1e-6, rtol=1e-5)


def test_half_precision_rows_are_softmaxed_in_float32():
    made = small_models.model("llama", torch.bfloat16)
    found = captured(made, {"input_ids": ids()})
    expected = captured(small_models.model("llama"), {"input_ids": ids()})
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].sum(-1), torch.ones(2, 4, 20), atol=1e-6, rtol=0)
    assert (found[0] - expected[0]).abs().max() < 0.1


def test_masks_of_every_form_say_the_same():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :3] = False
    here, there = torch.arange(4, 9)[:, None], torch.arange(9)
    for window in (None, 3):
        seen = (there <= here) & (there > here - (window or 9)) & padding[:, None, None]
        logits = (query @ key.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~seen, -torch.inf)
        forms = {
            "whole": seen, "added": torch.zeros(2, 1, 5, 9).masked_fill(~seen, torch.finfo(torch.float32).min), "padding": padding,
        }  # fmt: skip
        for form, mask in forms.items():
            found = attention_rows(torch.nn.Identity(), query, key, mask, slice(1, 4), sliding_window=window if form == "padding" else None)
            torch.testing.assert_close(found, logits.softmax(-1)[:, :, 1:4], atol=1e-6, rtol=1e-5)


def test_gradients_flow_through_the_rows():
    made, found = model("llama"), {}
    with capture_attention(made, lambda layer, rows: found.__setitem__(layer, rows), rows=slice(-1, None)):
        made(input_ids=ids())
    found[1][..., 3].sum().backward()
    assert made.model.embed_tokens.weight.grad.abs().sum() > 0


def test_the_former_attention_is_back_behind_the_block_even_behind_an_error():
    made = model("llama")
    made.set_attn_implementation("eager")

    def fail(layer, rows):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"), capture_attention(made, fail):
        made(input_ids=ids())
    assert made.config._attn_implementation == "eager"
    assert torch.isfinite(maps(made, input_ids=ids())[0]).all()
    names = (set(AttentionInterface()), set(AttentionMaskInterface()))
    captured(made, {"input_ids": ids()})
    assert (set(AttentionInterface()), set(AttentionMaskInterface())) == names, "each block must not leave another name behind"


def test_two_models_are_watched_apart_and_one_not_twice():
    one, other = model("llama"), model("qwen2")
    seen = {"one": [], "other": []}
    with torch.no_grad(), capture_attention(one, lambda layer, _: seen["one"].append(layer)):
        with capture_attention(other, lambda layer, _: seen["other"].append(layer), layers=[1]):
            other(input_ids=ids())
        with pytest.raises(ValueError, match="is being watched already"), capture_attention(one, print):
            raise AssertionError("not reached")
        one(input_ids=ids())
    assert seen == {"one": [0, 1], "other": [1]}


def test_an_adapted_model_shows_the_rows_of_its_adapter():
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = get_peft_model(model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    found, expected = captured(made, {"input_ids": ids()}), maps(made.get_base_model(), input_ids=ids())
    torch.testing.assert_close(found[1], expected[1], atol=2e-6, rtol=1e-4)
    with made.disable_adapter():
        assert (captured(made, {"input_ids": ids()})[1] - found[1]).abs().max() > 1e-3


def test_windows_are_read_from_the_configuration():
    assert layer_windows(model("llama").config) == [None, None]
    assert layer_windows(model("mistral").config) == [8, 8]
    assert layer_windows(model("gemma2").config) == [8, None]
    assert layer_windows(transformers.GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=6)) == [None, 6]
    hybrid = transformers.Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"])
    assert layer_windows(hybrid) == [0, None]


def test_what_cannot_be_watched_is_refused():
    def refused(made, said, **settings):
        with pytest.raises((UnsupportedFamily, ValueError), match=said), capture_attention(made, print, **settings):
            raise AssertionError("not reached")

    with torch.random.fork_rng():
        bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4))
        hybrid = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(
            **SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        ))  # fmt: skip
    refused(bloom, "the attention of BloomForCausalLM cannot be watched")
    refused(tiny.model("t5"), "the attention of T5ForConditionalGeneration cannot be watched")
    refused(model("mistral"), "no layer of MistralForCausalLM looks at everything")
    refused(hybrid, "layer 0 of Qwen3NextForCausalLM has no attention rows", layers=[0, 1])
    refused(model("llama"), "layer 2 is none of LlamaForCausalLM's; it has 0 to 1", layers=[2])
    flexible = model("llama")
    flexible.config._attn_implementation = "flex_attention"
    refused(flexible, "under flex_attention; load it with attn_implementation='sdpa'")
    found = captured(hybrid.eval(), {"input_ids": ids()})
    assert set(found) == {1, "logits"}

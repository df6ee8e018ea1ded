"""Linformer attention against attention written out, and against full attention where it must be the same."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

import small_models
import tiny
from echelon.compress import Greenformers, add_linformer, from_config
from echelon.models.families import UnsupportedFamily
from echelon.models.linformer import LinformerProjection, linformer_attention
from echelon.models.reload import EchelonConfig

LENGTH = {"bert": 128, "vit": 17}


def projections(model):
    return [m for m in model.modules() if isinstance(m, LinformerProjection)]


def small_bert(**more):
    config = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, **small_models.SIZES, "max_position_embeddings": 12} | more
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**config)).eval()
    for parameter in model.parameters():  # so that attention matters
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def ids(rows=3, length=12):
    return torch.randint(4, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


class Attention(torch.nn.Module):
    """Just a place for the projection."""


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("share_kv", [True, False])
def test_it_is_softmax_of_q_ek_times_fv_without_pads(heads, share_kv):
    generator = np.random.default_rng(0)
    q, k, v = (generator.normal(size=(2, 3, 7, 5)) for _ in range(3))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    module = Attention().eval()
    module.linformer = LinformerProjection(9, 4, heads, share_kv, dtype=torch.float64)
    module.linformer.reset(torch.Generator().manual_seed(1))
    e = module.linformer.key.detach().numpy().reshape(heads, 4, 9)
    f = e if share_kv else module.linformer.value.detach().numpy().reshape(heads, 4, 9)
    expected = np.zeros((2, 7, 3, 5))
    for b in range(2):
        for h in range(3):
            keys = sum(np.outer(e[h % heads, :, t], k[b, h, t]) for t in range(7) if mask[b, t])
            values = sum(np.outer(f[h % heads, :, t], v[b, h, t]) for t in range(7) if mask[b, t])
            scores = np.exp(0.3 * q[b, h] @ keys.T)
            expected[b, :, h] = scores / scores.sum(1, keepdims=True) @ values
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    found, weights = linformer_attention(module, *tensors, torch.from_numpy(mask).bool(), scaling=0.3)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert weights.shape == (2, 3, 7, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("share", ["none", "heads", "kv", "layer"])
def test_with_identity_projections_of_full_length_it_is_full_attention(family, share):
    model = small_models.model(family)
    length = LENGTH[family]
    inputs = small_models.batch(family) if family == "vit" else {"input_ids": torch.randint(4, tiny.VOCAB, (2, length))}
    with torch.no_grad():
        expected = model(**inputs).logits
        add_linformer(model, linformer_k=length, share=share)
        assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)
        for projection in projections(model):
            for parameter in projection.parameters():
                parameter.copy_(torch.eye(length).repeat(len(parameter) // length, 1))
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("share", "count"), [("none", 2 * 2 * 4 * 5 * 12), ("heads", 2 * 2 * 5 * 12), ("kv", 2 * 5 * 12), ("layer", 5 * 12)]
)  # fmt: skip
def test_sharing_leaves_so_many_parameters_that_are_stored_once_and_all_learn(share, count, tmp_path):
    model = small_bert()
    before = sum(p.numel() for p in model.parameters())
    add_linformer(model, linformer_k=5, share=share)
    assert sum(p.numel() for p in model.parameters()) - before == count
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys() if "linformer" in key)  # noqa: SIM118
    assert stored == count
    model(ids(), labels=ids()).loss.backward()
    assert all((p.grad != 0).any() for projection in projections(model) for p in projection.parameters())


def test_a_map_that_all_layers_share_acts_in_all_of_them_also_in_a_copy():
    model = add_linformer(small_bert(), linformer_k=5, share="layer")
    twin = copy.deepcopy(model)
    (projection,) = projections(twin)
    layers = [layer.attention.self for layer in twin.bert.encoder.layer]
    assert all(layer.linformer is projection for layer in layers)
    with torch.no_grad():
        projection.key.zero_()
        # No slot sees anything: the outputs of attention are those of its output layer's bias alone, in every layer.
        for layer in layers:
            assert not layer(torch.randn(1, 4, 32))[0].any()
    assert projections(model)[0].key.any()


def test_a_short_input_is_one_padded_to_the_full_length_and_pads_say_nothing():
    model = add_linformer(small_bert(), linformer_k=6)
    short = ids(2, 7)
    padded = torch.cat([short, torch.randint(4, tiny.VOCAB, (2, 5))], 1)
    mask = torch.tensor([[1] * 7 + [0] * 5] * 2)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :7], model(short).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(padded).logits[:, :7], model(short).logits, atol=1e-2)
        with pytest.raises(ValueError, match="the input has 12 positions; this Linformer takes at most 9"):
            add_linformer(small_bert(), linformer_k=6, length=9)(padded)


@pytest.mark.parametrize("share", ["none", "layer"])
def test_it_is_saved_and_loaded_also_as_a_bare_model_and_with_low_rank_layers(share, tmp_path):
    model = add_linformer(small_bert(), linformer_k=5, share=share)
    Greenformers(rank=4).compress(model)
    with torch.no_grad():
        expected, hidden = model(ids()).logits, model.bert(ids()).last_hidden_state
    model.save_pretrained(tmp_path / "a")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    assert torch.equal(again(ids()).logits, expected)
    bare = transformers.AutoModel.from_pretrained(tmp_path / "a")
    assert torch.equal(bare(ids()).last_hidden_state, hidden)
    again.save_pretrained(tmp_path / "b")
    script = f"""
import echelon, sys, torch, transformers
model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(float((model(torch.tensor({ids().tolist()})).logits).double().sum()))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path / "b")], check=True, env=environment, capture_output=True, text=True)
    assert float(ran.stdout) == pytest.approx(float(expected.double().sum()), rel=1e-5)


def test_a_new_model_from_its_config_has_values_everywhere():
    model = add_linformer(small_bert(), linformer_k=5)
    config = copy.deepcopy(model.config)
    assert isinstance(config.quantization_config, EchelonConfig)
    fresh = from_config(config, transformers.AutoModelForMaskedLM)
    for projection in projections(fresh):
        for parameter in projection.parameters():
            assert float(parameter.detach().std()) == pytest.approx(5**-0.5, rel=0.2)
    assert fresh(ids()).logits.isfinite().all()


def test_the_seed_rules_the_projections_and_the_global_state_is_left_alone():
    state = torch.random.get_rng_state()
    models = [add_linformer(small_models.model("bert"), linformer_k=5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (torch.cat([p.flatten() for projection in projections(m) for p in projection.parameters()]) for m in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert float(first.detach().var()) == pytest.approx(1 / 5, rel=0.05)


def test_what_it_is_not_for_is_named_and_left_alone():
    for family, why in (("llama", "attends causally"), ("gpt2", "attends causally")):
        model = small_models.model(family)
        with pytest.raises(UnsupportedFamily, match=why):
            add_linformer(model, linformer_k=4)
        assert not projections(model) and model.config._attn_implementation != "linformer"
    with pytest.raises(UnsupportedFamily, match="causally"):
        add_linformer(small_bert(is_decoder=True), linformer_k=4)
    sizes = small_models.WIDE | {"vocab_size": tiny.VOCAB, "pad_token_id": 0}
    with torch.random.fork_rng():
        modern = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes))
    with pytest.raises(UnsupportedFamily, match="rotary|interface"):
        add_linformer(modern, linformer_k=4)
    for arguments, error in (
        ({"linformer_k": 0}, "linformer_k is 0"), ({"linformer_k": 13}, "linformer_k is 13; it must be from 1 to the length, 12"),
        ({"share": "all"}, "share is 'all'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            add_linformer(small_bert(), **({"linformer_k": 4} | arguments))
    with pytest.raises(ValueError, match="the attention mask has shape"):
        add_linformer(small_bert(), linformer_k=4)(ids(), attention_mask=torch.ones(3, 1, 12, 12))

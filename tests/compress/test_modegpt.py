"""What MoDeGPT promises beyond the compressor contract.

The expected values come from transformers' dense models (hooks, zeroed weights) and from numpy's factorisations of their activations.
"""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from echelon.compress import MoDeGPT, modegpt, modular
from echelon.errors import UserError
from echelon.models.families import adapter, matrix, roles

D, H, HD, INNER = 32, 4, 8, 48
WIDE = {"vocab_size": 60, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": H, "intermediate_size": INNER, "max_position_embeddings": 64}
TWO, ONE = {"num_key_value_heads": 2}, {"num_key_value_heads": 1}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**WIDE, **TWO, attention_bias=True, mlp_bias=True),
    "llama_multi_query": lambda: transformers.LlamaConfig(**WIDE, **ONE),
    "mistral": lambda: transformers.MistralConfig(**WIDE, **TWO, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**WIDE, **TWO, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE, **TWO, head_dim=16, attention_bias=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=60, n_embd=D, n_layer=2, n_head=H, n_inner=INNER, n_positions=64, bos_token_id=1, eos_token_id=1, scale_attn_by_inverse_layer_idx=True
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=60, hidden_size=D, num_hidden_layers=2, num_attention_heads=H, ffn_dim=INNER, word_embed_proj_dim=D, max_position_embeddings=64
    ),
    "opt_post_norm": lambda: transformers.OPTConfig(
        vocab_size=60, hidden_size=D, num_hidden_layers=2, num_attention_heads=H, ffn_dim=INNER, word_embed_proj_dim=16, do_layer_norm_before=False,
        max_position_embeddings=64,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WIDE),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**WIDE, use_parallel_residual=False),
    "phi": lambda: transformers.PhiConfig(**WIDE),
}  # fmt: skip
PLAIN = ["llama", "llama_multi_query", "mistral", "qwen2", "qwen3", "phi"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def dense(family, seed=5):
    """Random also where initialisation leaves ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data * 4 if parameter.ndim > 1 else parameter.data + 0.3 * torch.randn_like(parameter)
        if "opt" in family:
            for layer in model.model.decoder.layers:
                layer.fc1.bias.data += 1  # few units are dead
    model.generation_config.max_length = None
    return model


def tokens(rows=10, length=14):
    """Ids and mask, padded on both sides."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(4, 60, (rows, length), generator=generator), torch.ones(rows, length, dtype=torch.long)
    mask[0, 9:] = 0
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, given=None):
    given = given or tokens()
    return model(**given).logits[given["attention_mask"].bool()]


def squeeze(model, **knobs):
    """Compress it on the tokens, in two batches."""
    given = tokens()
    made = MoDeGPT(**{"compression_ratio": 0.5, "allocation_temperature": 1e12, "nystrom_ridge": 1e-2} | knobs)
    return made.compress(model, [{name: value[:3] for name, value in given.items()}, {name: value[3:] for name, value in given.items()}])


@torch.no_grad()
def watched(model, layer, role):
    """Float64 inputs of a module of a layer, over tokens that are no pads."""
    rows, given = [], tokens()
    module = adapter(model).blocks[layer].module.get_submodule(role)
    mask = given["attention_mask"].bool().flatten()  # OPT flattens the batch in its MLP
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(len(mask), -1)[mask].double()))
    model(**given)
    handle.remove()
    return rows[0]


def shapes(model):
    found = adapter(model).attention_shape
    return found.heads, found.kv_heads, found.head_dim, found.rotary_dims


def set_qkv(family, block, query, key, value, biases):
    """Put three matrices (heads one after the other) where the family has them."""
    parts, (heads, _, width, _) = block.attention_in, shapes(family.model)
    if len(parts) == 3:
        for part, weight, bias in zip(parts, (query, key, value), biases, strict=True):
            part.weight.data = weight.float()
            if bias is not None:
                part.bias.data = bias.float()
        return
    weight, bias = torch.stack([query, key, value]), torch.stack(biases)  # (3, heads * width, in)
    if family.roles.fused_by == "head":
        weight, bias = (x.unflatten(1, (heads, width)).transpose(0, 1).flatten(0, 2) for x in (weight, bias))
    else:
        weight, bias = weight.flatten(0, 1), bias.flatten()
    parts[0].weight.data = (weight if isinstance(parts[0], torch.nn.Linear) else weight.T).float().contiguous()
    parts[0].bias.data = bias.float()


def zero_rows(weight, bias, keep, width):
    """With everything but some dimensions of each head at zero."""
    rows = torch.zeros(len(weight) // width, width, dtype=weight.dtype)
    for head, kept in enumerate(keep):
        rows[head, kept] = 1
    return weight * rows.view(-1, 1), None if bias is None else bias * rows.view(-1)


def random_dimensions(model, kept, rotated, seed):
    """For each key head some dimensions, in pairs where they rotate."""
    generator = torch.Generator().manual_seed(seed)
    _, kv_heads, width, rotary = shapes(model)
    made = []
    for _ in range(kv_heads):
        pairs = torch.randperm(rotary // 2, generator=generator)[: rotated // 2] if rotary else torch.zeros(0, dtype=torch.long)
        rest = rotary + torch.randperm(width - rotary, generator=generator)[: kept - rotated]
        made.append(torch.cat([pairs, pairs + rotary // 2, rest]))
    return made


@every_family
@torch.no_grad()
def test_a_model_that_needs_only_half_of_each_module_is_halved_without_any_change(family):
    model = dense(family)
    found = adapter(model)
    heads, kv_heads, width, rotary = shapes(model)
    rotated = 2 * int(np.ceil(rotary / 4))
    for index, block in enumerate(found.blocks):
        (q, qb), (k, kb), (v, vb) = found.split_qkv(block)
        keep = random_dimensions(model, width // 2, rotated, index)
        k, kb = zero_rows(k, kb, keep, width)
        q, qb = zero_rows(q, qb, [kept for kept in keep for _ in range(heads // kv_heads)], width)
        mix = torch.randn(kv_heads, width, width // 2, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        v = (mix @ v.unflatten(0, (kv_heads, width))[:, : width // 2]).flatten(0, 1)  # values of each head of half rank, whatever their bias
        set_qkv(found, block, q, k, v, [qb, kb, vb])
        order = torch.randperm(INNER, generator=torch.Generator().manual_seed(index))
        for part in block.mlp_in:  # half of the units are always zero, though the next layer reads them
            (part.weight.data if isinstance(part, torch.nn.Linear) else part.weight.data.T)[order[INNER // 2 :]] = 0
            if part.bias is not None:
                part.bias.data[order[INNER // 2 :]] = 0
    before = logits(model)
    report = squeeze(model, nystrom_ridge=1e-9, solve_damp=1e-12).report
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-5)
    assert len(report.modules) == 4 and all(entry["rel_err"] < 1e-4 for entry in report.modules.values())
    assert sum(p.numel() for b in found.blocks for p in b.module.parameters() if p.ndim > 1) * 2 == sum(
        p.numel() for b in adapter(dense(family)).blocks for p in b.module.parameters() if p.ndim > 1
    )


@every_family
def test_at_ratio_0_nothing_happens(family):
    model = dense(family)
    before = logits(model)
    report = squeeze(model, compression_ratio=0.0).report
    assert torch.equal(logits(model), before) and report.parameters_after == report.parameters_before and not report.modules


@torch.no_grad()
def energies(model, layer):
    """Mean squares of queries and keys before rotation, (heads, d) each, from their very values."""
    found = adapter(model)
    block, (_, _, width, _) = found.blocks[layer], shapes(model)
    x = watched(model, layer, found.roles.attention[0])
    made = []
    for (weight, bias), side in zip(found.split_qkv(block)[:2], "qk", strict=True):
        y = (x @ weight.T + (0 if bias is None else bias)).unflatten(1, (-1, width))
        norm = getattr(block.attention, f"{side}_norm", None)
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
        made.append(y.square().mean(0).numpy())
    return made


def best_dimensions(model, layer, kept, rotated, score):
    """By going through all pairs of each key head."""
    heads, kv_heads, width, rotary = shapes(model)
    q, k = energies(model, layer)
    chosen = []
    for g in range(kv_heads):
        queries = q[g * heads // kv_heads : (g + 1) * heads // kv_heads]
        half = rotary // 2
        pairs = {
            i: sum(
                (x[i] * k[g, i] + x[i + half] * k[g, i + half]) if score == "product" else (x[i] + x[i + half]) * (k[g, i] + k[g, i + half]) for x in queries
            )
            for i in range(half)
        }
        tail = {i: sum(x[i] * k[g, i] for x in queries) for i in range(rotary, width)}
        first = sorted(sorted(pairs, key=pairs.get)[len(pairs) - rotated // 2 :])
        chosen.append([*first, *(i + half for i in first), *sorted(sorted(tail, key=tail.get)[len(tail) - (kept - rotated) :])])
    return chosen


@pytest.mark.parametrize("score", ["product", "invariant"])
@every_family
def test_without_the_dropped_dimensions_of_queries_and_keys_it_is_the_dense_model_with_these_at_zero(family, score):
    """Zeros leave the mean square over the whole head, the angles and the scale of the dense model as they are."""
    model, expected = dense(family), dense(family)
    found, (heads, kv_heads, width, rotary) = adapter(expected), shapes(expected)
    kept, rotated = width // 2, 2 * int(np.ceil(rotary / 4))
    dimensions = [best_dimensions(model, layer, kept, rotated, score) for layer in range(2)]
    for block, keep in zip(found.blocks, dimensions, strict=True):
        (q, qb), (k, kb), (v, vb) = found.split_qkv(block)
        k, kb = zero_rows(k, kb, keep, width)
        q, qb = zero_rows(q, qb, [one for one in keep for _ in range(heads // kv_heads)], width)
        set_qkv(found, block, q, k, v, [qb, kb, vb])
    before = logits(model)
    squeeze(model, modules="qk", qk_pair_score=score)
    if rotary:
        assert [block.attention.kept.tolist() for block in adapter(model).blocks] == dimensions
    assert float((logits(expected) - before).abs().max()) > 1e-4
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def root(second):
    values, vectors = np.linalg.eigh(second)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


@pytest.mark.parametrize("joint", [True, False])
@every_family
@torch.no_grad()
def test_values_and_outputs_become_the_best_product_of_their_rank(family, joint):
    """Truncated by numpy: C^1/2 times the whole map of all heads that share a value (or, if not joint, the values alone)."""
    model = dense(family)
    found, (heads, kv_heads, width, _) = adapter(model), shapes(model)
    x = watched(model, 1, found.roles.attention[0])
    half = root((x.T @ x / len(x)).numpy())
    block = found.blocks[1]
    value, out = found.split_qkv(block)[2], matrix(block.attention_out)
    constant = torch.zeros(D, dtype=torch.float64) if value[1] is None else out @ value[1].view(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()
    before = 0 if block.attention_out.bias is None else block.attention_out.bias.double()
    report = squeeze(model, modules="vo", vo_joint=joint).report
    groups, kept, lost = heads // kv_heads, width // 2, 0.0
    new = adapter(model).blocks[1].attention
    new_out = matrix(adapter(model).blocks[1].attention_out)
    assert new.projections[2].bias is None
    for g in range(kv_heads):
        v = value[0][g * width : (g + 1) * width].numpy()
        o = np.concatenate([out[:, h * width : (h + 1) * width].numpy() for h in range(g * groups, (g + 1) * groups)])
        if joint or groups == 1:
            u, s, t = np.linalg.svd(o @ v @ half)
            lost += (s[kept:] ** 2).sum()
            expected = (u[:, :kept] * s[:kept]) @ t[:kept]
        else:
            axes = np.linalg.svd(v @ half)[0][:, :kept]
            expected = o @ axes @ axes.T @ v @ half
            lost += np.square(o @ v @ half - expected).sum()
        got_v = new.projections[2].weight.double()[g * kept : (g + 1) * kept].numpy()
        got_o = np.concatenate([new_out[:, h * kept : (h + 1) * kept].numpy() for h in range(g * groups, (g + 1) * groups)])
        np.testing.assert_allclose(got_o @ got_v @ half, expected, atol=1e-5)
    entry = report.modules[next(name for name in report.modules if ".1." in name)]
    assert entry["lost"] == pytest.approx(lost, rel=1e-4) and entry["rank"] == kept
    if value[1] is not None:
        torch.testing.assert_close(adapter(model).blocks[1].attention_out.bias.double(), before + constant, rtol=0, atol=1e-6)


def test_query_heads_fitted_together_lose_no_more():
    together, apart = ([e["lost"] for e in squeeze(dense("llama"), modules="vo", vo_joint=joint).report.modules.values()] for joint in (True, False))
    assert all(a < b for a, b in zip(together, apart, strict=True))


@every_family
@torch.no_grad()
def test_hidden_units_are_kept_by_leverage_and_the_rest_is_regressed_on_them(family):
    model = dense(family)
    found = adapter(model)
    h = watched(model, 1, found.roles.mlp_out).numpy()
    down = matrix(found.blocks[1].mlp_out).numpy()
    before = [matrix(part) for part in found.blocks[1].mlp_in]
    shift = None if found.blocks[1].mlp_out.bias is None else found.blocks[1].mlp_out.bias.clone()
    entry = list(squeeze(model, modules="mlp", solve_damp=0.0).report.modules.values())[1]
    second = h.T @ h / len(h)
    leverage = np.diag(second @ np.linalg.inv(second + 1e-2 * np.diag(second).mean() * np.eye(INNER)))
    kept = np.sort(np.argsort(leverage)[INNER // 2 :])
    block = adapter(model).blocks[1]
    for part, weight in zip(block.mlp_in, before, strict=True):
        torch.testing.assert_close(matrix(part), weight[kept], rtol=0, atol=0)
    target = h @ down.T
    solution, *_ = np.linalg.lstsq(h[:, kept], target, rcond=None)
    np.testing.assert_allclose(matrix(block.mlp_out).numpy(), solution.T, atol=1e-4 * np.abs(solution).max())
    lost = np.square(h[:, kept] @ solution - target).sum(1).mean()
    assert entry["lost"] == pytest.approx(lost, rel=1e-4)
    assert lost <= np.square(h[:, kept] @ down.T[kept] - target).sum(1).mean()
    if shift is not None:
        assert torch.equal(block.mlp_out.bias, shift)


@torch.no_grad()
def test_a_block_loses_more_the_less_it_changes_the_stream():
    model, given = dense("opt"), tokens()
    model.model.decoder.layers.extend([*dense("opt", 6).model.decoder.layers, *dense("opt", 7).model.decoder.layers])
    for index, layer in enumerate(model.model.decoder.layers):
        layer.self_attn.layer_idx = index
        layer.fc2.weight.data *= 4 / (1 + index % 4)
    model.config.num_hidden_layers = 6
    streams = model(**given, output_hidden_states=True).hidden_states
    rows = [s[given["attention_mask"].bool()].double() for s in streams[:-1]]  # the last one is normed
    influence = [1 - float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(rows)]
    made = MoDeGPT(compression_ratio=0.4, allocation_temperature=0.1)
    squeeze(model, compression_ratio=0.4, allocation_temperature=0.1, modules="mlp")
    left = [layer.fc1.out_features for layer in model.model.decoder.layers]
    assert [i for i, _ in sorted(enumerate(influence), key=lambda pair: pair[1])] == [i for i, _ in sorted(enumerate(left[:5]), key=lambda pair: pair[1])]
    assert len(set(left)) > 3 and sum(left) == pytest.approx(0.6 * 6 * INNER, abs=3)
    shares = made.sparsities(torch.tensor([0.0, 0.02, 0.3, 0.5, 0.9], dtype=torch.float64))
    assert sum(shares) / 5 == pytest.approx(0.4, abs=1e-12) and max(shares) == 0.8 and shares == sorted(shares, reverse=True)
    assert MoDeGPT(allocation_temperature=1e9).sparsities(torch.rand(5).double()) == pytest.approx([0.25] * 5)


def test_rotating_and_then_selecting_is_selecting_and_then_rotating_by_gathered_angles():
    model, generator = dense("llama"), torch.Generator().manual_seed(3)
    squeeze(model, modules="qk")
    attention = model.model.layers[0].self_attn
    attention.kept = torch.tensor([[1, 3, 5, 7], [0, 3, 4, 7]])
    position = torch.tensor([[0, 1, 17, 60]])
    q, k = (torch.randn(1, heads, 4, HD, generator=generator) for heads in (4, 2))
    cos, sin = model.model.rotary_emb(q, position)
    turned = apply_rotary_pos_emb(q, k, cos, sin)
    for x, whole in zip((q, k), turned, strict=True):
        kept = attention.kept.repeat_interleave(x.shape[1] // 2, 0)[None, :, None, :].expand(1, -1, 4, -1)
        torch.testing.assert_close(attention._rotate(x.gather(-1, kept), cos, sin), whole.gather(-1, kept), rtol=0, atol=0)


@pytest.mark.parametrize(("rotary", "width", "rotated"), [(8, 4, 4), (4, 5, 3), (2, 5, 2), (0, 3, 0)])
def test_one_set_of_whole_pairs_serves_a_key_head_and_its_queries(rotary, width, rotated):
    rotated += rotated % 2
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sets = modegpt.choose(scores, width, rotated, rotary, 3)
    assert sets.shape == (2, width)
    for chosen in sets.tolist():
        first, second, rest = chosen[: rotated // 2], chosen[rotated // 2 : rotated], chosen[rotated:]
        assert [i + rotary // 2 for i in first] == second and all(i >= rotary for i in rest) and len(set(chosen)) == width


def test_sizes_follow_the_share_and_the_rounding():
    llama, opt = (adapter(dense(f)).attention_shape for f in ("llama", "opt"))
    size = MoDeGPT().sizes
    assert size(48, llama, 0.3) == modegpt.Sizes(34, 4, 4, 4) and size(48, opt, 0.3) == modegpt.Sizes(34, 5, 0, 5)
    assert size(48, llama, 0.79) == modegpt.Sizes(10, 2, 2, 2) and size(48, opt, 0.0) == modegpt.Sizes(48, 8, 0, 8)
    assert MoDeGPT(round_to=8).sizes(48, llama, 0.3) == modegpt.Sizes(32, 4, 4, 4)  # a head smaller than the step is not rounded to nothing
    assert MoDeGPT(round_to=4).sizes(50, llama, 0.2) == modegpt.Sizes(40, 4, 4, 4)
    assert MoDeGPT(modules="vo").sizes(48, llama, 0.3) == modegpt.Sizes(48, 8, 8, 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt", "gpt_neox", "phi"])
def test_the_cache_shrinks_and_all_ways_of_attending_agree(family):
    model = dense(family)
    made = squeeze(model, compression_ratio=0.4, allocation_temperature=0.05)
    heads, kv_heads, width, _ = shapes(model)
    cache, given = model(**tokens(), use_cache=True).cache, tokens()
    for layer, block in zip(cache.layers, adapter(model).blocks, strict=True):
        entry = made.report.modules[next(n for n in made.report.modules if model.get_submodule(n) is block.attention)]
        assert layer.keys.shape == (10, kv_heads, 14, entry["qk_rank"]) and layer.values.shape[-1] == entry["rank"] < width
    expected = logits(model)
    prompt = {name: value[2:] for name, value in given.items()}
    text = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True), text)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    attentions = model(**given, output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[0].shape == (10, heads, 14, 14)
    if family == "gpt2":
        for block in adapter(model).blocks:
            block.attention.reorder_and_upcast_attn = True
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


def test_flash_attention_never_meets_values_wider_than_keys():
    model = dense("mistral")
    squeeze(model, modules="qk")
    expected = logits(model)

    def padding(module, query, key, value, mask, **kwargs):  # as transformers does it; a negative pad would cut values off
        assert kwargs["sliding_window"] == 4  # which the mask does not say there
        width = value.shape[-1]
        value = torch.nn.functional.pad(value, (0, key.shape[-1] - width))
        out, weights = transformers.integrations.sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return out[..., :width], weights

    transformers.AttentionInterface.register("flash_like", padding)
    transformers.AttentionMaskInterface.register("flash_like", transformers.masking_utils.sdpa_mask)
    model.config._attn_implementation_internal = "flash_like"  # its setter would look for a kernel of this name
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_sequential_statistics_are_taken_behind_compressed_blocks():
    model, halfway = dense("llama"), dense("llama")
    squeeze(model, sequential=True, modules="mlp", solve_damp=0.0)
    squeeze(halfway, modules="mlp", solve_damp=0.0)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, halfway.model.layers[0].mlp.down_proj.weight)
    halfway.model.layers[1] = dense("llama").model.layers[1]
    h, down = watched(halfway, 1, "mlp.down_proj"), halfway.model.layers[1].mlp.down_proj
    up, new = halfway.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp
    kept = [int((up == row).all(1).nonzero()) for row in new.up_proj.weight]
    solution = torch.linalg.lstsq(h[:, kept], h @ down.weight.double().T).solution.T
    torch.testing.assert_close(new.down_proj.weight.double(), solution, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", PLAIN)
def test_uniform_gives_an_ordinary_model_of_the_family(family, tmp_path, monkeypatch):
    """The same function as the modular one that it is made of, and read by transformers alone."""
    model, before = dense(family), sum(p.numel() for p in dense(family).parameters())
    squeeze(model, uniform=True).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    _, _, width, rotary = shapes(dense(family))
    assert config["head_dim"] == width // 2 and config["intermediate_size"] == INNER // 2 and "quantization_config" not in config
    assert sum(p.numel() for p in model.parameters()) < 0.75 * before
    again = type(model).from_pretrained(tmp_path)
    assert len({type(made.model.layers[0].self_attn) for made in (again, model, dense(family))}) == 1
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    monkeypatch.setattr(modegpt, "become_plain", lambda model: None)
    other = dense(family)
    squeeze(other, uniform=True)
    assert isinstance(other.model.layers[0].self_attn, modular.ModularAttention)
    torch.testing.assert_close(logits(again), logits(other), rtol=0, atol=5e-5)
    kept = {tuple(row) for layer in other.model.layers for row in layer.self_attn.kept.tolist()}
    assert len(kept) == 1 and rotary


def test_a_process_without_echelon_reads_the_uniform_model(tmp_path):
    model = dense("llama")
    squeeze(model, uniform=True).save(tmp_path)
    code = f"""
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert not any(name.startswith("echelon") for name in sys.modules)
print(model(torch.arange(4, 20)[None]).logits.double().square().mean().item())
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(out) == pytest.approx(model(torch.arange(4, 20)[None]).logits.double().square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_hidden_sizes_alone_are_plain_in_every_family(family, tmp_path):
    model = dense(family)
    squeeze(model, uniform=True, modules="mlp").save(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert adapter(again).blocks[0].mlp_out.weight.numel() == D * INNER // 2


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_uniform_heads_are_refused_where_the_family_cannot_say_them(family):
    model = dense(family)
    before = logits(model)
    with pytest.raises(ValueError, match="head_dim of its own.*modules='mlp'"):
        squeeze(model, uniform=True)
    assert torch.equal(logits(model), before)


def test_values_whose_bias_must_stay_are_fitted_with_it():
    """Qwen2 has no output bias: the constant is one more input, and its part of the error counts."""
    model = dense("qwen2")
    found = adapter(model)
    value, out = found.split_qkv(found.blocks[0])[2], matrix(found.blocks[0].attention_out)
    x = watched(model, 0, "self_attn.q_proj")
    x = torch.cat([x, torch.ones(len(x), 1)], 1).numpy()
    squeeze(model, uniform=True)
    new = model.model.layers[0].self_attn
    assert new.v_proj.bias is not None and new.o_proj.bias is None
    for g in range(2):
        v = torch.cat([value[0], value[1][:, None]], 1)[g * HD : (g + 1) * HD].numpy()
        o = np.concatenate([out[:, h * HD : (h + 1) * HD].numpy() for h in (2 * g, 2 * g + 1)])
        u, s, t = np.linalg.svd(o @ v @ x.T, full_matrices=False)
        got_v = torch.cat([new.v_proj.weight, new.v_proj.bias[:, None]], 1).detach().double()[g * 4 : g * 4 + 4].numpy()
        got_o = np.concatenate([new.o_proj.weight[:, h * 4 : (h + 1) * 4].detach().double().numpy() for h in (2 * g, 2 * g + 1)])
        np.testing.assert_allclose(got_o @ got_v @ x.T, (u[:, :4] * s[:4]) @ t[:4], atol=1e-4)


@pytest.mark.parametrize("knobs", [{}, {"modules": "vo"}])
def test_phi_with_norms_over_its_heads_keeps_them(knobs):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**WIDE, qk_layernorm=True)).eval()
    if not knobs:
        with pytest.raises(NotImplementedError, match="modules='mlp,vo'"):
            squeeze(model)
        return
    with torch.no_grad():
        for layer in model.model.layers:  # values of rank 4 lose nothing
            layer.self_attn.v_proj.weight.data.unflatten(0, (H, HD))[:, 4:] = 0
            layer.self_attn.q_proj.weight.data *= 20
    before = logits(model)
    squeeze(model, **knobs)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_modular_model_is_not_compressed_again():
    model = dense("llama")
    squeeze(model, modules="vo")
    with pytest.raises(NotImplementedError, match="start from the uncompressed model"):
        squeeze(model)


def test_few_tokens_are_said():
    with pytest.warns(UserWarning, match="saw 14 tokens, fewer than the 48 hidden units"):
        MoDeGPT().compress(dense("llama"), tokens()["input_ids"][2:3].tolist())
    with pytest.raises(ValueError, match="saw 14 tokens"):
        MoDeGPT(strict=True).compress(dense("llama"), tokens()["input_ids"][2:3].tolist())


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"compression_ratio": 1.0}, r"compression_ratio is 1.0; it must be at least 0 and below 1"),
        ({"compression_ratio": 0.9}, r"at most max_sparsity, 0.8"),
        ({"max_sparsity": 0.0}, r"max_sparsity is 0.0; it must be in \(0, 1\]"),
        ({"allocation_temperature": 0.0}, "allocation_temperature is 0.0"),
        ({"modules": "mlp,attention"}, "modules is 'mlp,attention'; it must name one or more of mlp, qk, vo"),
        ({"modules": ""}, "modules is ''"),
        ({"nystrom_ridge": -1.0}, "nystrom_ridge is -1.0"),
        ({"solve_damp": -1.0}, "solve_damp is -1.0"),
        ({"qk_pair_score": "sum"}, "qk_pair_score is 'sum'"),
        ({"uniform": True, "modules": "mlp,vo"}, "qk and vo go together"),
        ({"round_to": 0}, "round_to is 0"),
    ],
)
def test_bad_knobs_are_named(knobs, told):
    with pytest.raises(ValueError, match=told):
        MoDeGPT(**knobs)


def test_roles_and_errors_are_those_of_the_house():
    assert issubclass(modegpt.UnsupportedFamily, UserError) and roles(dense("gpt2")).attention_dropout == "attn_dropout"

"""What SliceGPT promises beyond the compressor contract.

The expected values come from the dense model of transformers itself: hooks project its residual stream, at full width, on principal axes
that numpy's SVD finds in the activations of the calibration tokens. A sliced model must compute the same.
"""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers

from echelon.compress import SliceGPT, slicegpt
from echelon.compress.schedules import by_redundancy
from echelon.models.families import roles

WIDE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**WIDE, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(
        **WIDE, num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE, num_key_value_heads=1, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WIDE),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**WIDE, use_parallel_residual=False),
    "phi": lambda: transformers.PhiConfig(**WIDE),
}  # fmt: skip
PLAIN = ["llama", "mistral", "qwen2", "qwen3"]


def dense(family):
    """Random also where initialisation leaves ones and zeros, with embeddings that are off centre."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data * 4 if parameter.ndim > 1 else parameter.data + 0.3 * torch.randn_like(parameter)
        model.get_input_embeddings().weight.data += 0.1
    return model


def tokens(rows=8, length=14):
    """Calibration ids and mask, padded on both sides."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(4, 60, (rows, length), generator=generator), torch.ones(rows, length, dtype=torch.long)
    mask[0, 9:] = 0
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, given=None):
    given = given or tokens()
    return model(**given).logits[given["attention_mask"].bool()]


def squeeze(given):
    """The batch in two parts, for calibration."""
    return [{name: value[:3] for name, value in given.items()}, {name: value[3:] for name, value in given.items()}]


def slice_(model, **knobs):
    return SliceGPT(**knobs).compress(model, squeeze(tokens()))


@torch.no_grad()
def projected(model, widths, lost=None):
    """Logits of the dense model with its stream projected on the leading axes at every point; ``widths``: into each block, and out."""
    found, given = roles(model), tokens()
    mask, blocks, handles = given["attention_mask"].bool(), model.get_submodule(found.layers), []

    def project(x, width):
        if found.layer_norm:
            x = x - x.mean(-1, keepdim=True)
        if width == x.shape[-1]:
            return x
        rows = x[mask].double().numpy()
        axes = np.linalg.svd(rows, full_matrices=False)[2][:width]
        kept = torch.tensor(axes.T @ axes)
        if lost is not None:
            lost.append(float(((rows - rows @ kept.numpy()) ** 2).sum(-1).mean()))
        return (x.double() @ kept).to(x.dtype)

    for index, block in enumerate(blocks):
        if index == 0:
            handles.append(block.register_forward_pre_hook(lambda _, args: (project(args[0], widths[0]), *args[1:])))
        residual = []
        handles.append(block.register_forward_pre_hook(lambda _, args, residual=residual: residual.append(args[0])))
        if not found.parallel:
            handles.append(
                block.get_submodule(found.attention_out).register_forward_hook(
                    lambda _, args, out, residual=residual, width=widths[index]: project(residual[-1] + out, width) - residual[-1]
                )
            )
        handles.append(block.register_forward_hook(lambda _, args, out, width=widths[index + 1]: project(out, width)))
    made = logits(model)
    for handle in handles:
        handle.remove()
    return made


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_model_is_the_dense_one_with_its_stream_projected(family, head):
    model = dense(family)
    before, lost = logits(model), []
    expected = projected(model, [24, 24, 24, 24 if head else 32], lost)
    report = slice_(model, slice_head=head).report
    assert float((expected - before).abs().max()) > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)
    assert [cut["lost"] for cut in report.modules.values()] == pytest.approx(lost, rel=1e-4)
    assert all(cut["rank"] == 24 and 0 < cut["rel_err"] < 1 for cut in report.modules.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_may_differ_from_layer_to_layer(family):
    model = dense(family)
    expected = projected(model, [24, 32, 16, 32])
    slice_(model, schedule=[0.25, 0.0, 0.5])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


def test_a_linear_schedule_is_that_list():
    models = [dense("llama"), dense("llama")]
    slice_(models[0], schedule="linear(0.1, 0.5)", round_to=1)
    slice_(models[1], schedule=[0.1, 0.3, 0.5], round_to=1)
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert [layer.self_attn.q_proj.in_features for layer in models[0].model.layers] == [28, 22, 16]


@pytest.mark.parametrize("knobs", [{}, {"final_orientation": "random"}, {"merge_shortcuts": True}, {"slice_head": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_lost_and_nothing_grows_at_full_width(family, knobs):
    model = dense(family)
    before = logits(model)
    made = slice_(model, sparsity=0.0, **knobs)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    tied = model.get_output_embeddings().weight.numel() if family in ("qwen2", "gpt2", "opt") else 0  # the head that was tied
    assert not any("shortcut" in name for name, _ in model.named_parameters())
    assert made.report.parameters_after <= made.report.parameters_before + tied + 200  # biases that folded shifts have become


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_a_stream_that_has_few_directions_may_be_cut_to_them_exactly(family):
    """With 24 directions in the embeddings and in whatever is added, a rotation to 24 axes loses nothing."""
    model, found = dense(family), None
    found = roles(model)
    basis = torch.linalg.qr(torch.randn(32, 24, generator=torch.Generator().manual_seed(1)))[0]
    if found.layer_norm:  # the mean must be among what is lost, or be kept: here the stream is centred first
        basis = torch.linalg.qr(torch.cat([torch.ones(32, 1), basis], 1))[0][:, 1:]
    flat = basis @ basis.T
    for table in filter(None, (found.embed, found.positions)):
        model.get_submodule(table).weight.data @= flat
    for block in model.get_submodule(found.layers):
        for name in (found.attention_out, found.mlp_out):
            block.get_submodule(name).weight.data = flat @ block.get_submodule(name).weight.data
            block.get_submodule(name).bias.data @= flat
    before = logits(model)
    for knobs in ({}, {"final_orientation": "random"}, {"slice_head": True}, {"merge_shortcuts": True}):
        sliced = copy.deepcopy(model)
        slice_(sliced, **knobs)
        torch.testing.assert_close(logits(sliced), before, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_neither_turning_the_kept_axes_nor_their_signs_change_the_model(family, monkeypatch):
    models = [dense(family) for _ in range(3)]
    slice_(models[0])
    slice_(models[1], final_orientation="random")
    generator, original = torch.Generator().manual_seed(2), slicegpt.eig_basis

    def flipped(second):
        axes, values = original(second)
        return axes * (torch.randint(0, 2, (32,), generator=generator) * 2 - 1), values

    monkeypatch.setattr(slicegpt, "eig_basis", flipped)
    slice_(models[2])
    outs = [logits(model) for model in models]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(outs[2], outs[0], rtol=0, atol=1e-5)
    weights = [next(p for n, p in m.named_parameters() if n.endswith("_shortcut")) for m in models]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3) and not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_random_orientation_follows_the_seed_and_leaves_the_global_state_alone():
    models, state = [dense("llama") for _ in range(3)], torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        SliceGPT(final_orientation="random").compress(model, squeeze(tokens()), seed=seed)
    assert torch.equal(state, torch.random.get_rng_state())
    first, same, other = (model.model.embed_tokens.weight for model in models)
    assert torch.equal(first, same) and not torch.allclose(first, other, atol=1e-3)


def test_less_is_lost_the_wider_the_stream():
    errors = []
    for kept in range(4, 33, 4):
        made = slice_(dense("llama"), sparsity=1 - kept / 32, round_to=1)
        errors.append(made.report.modules.get("model.embed_tokens", {"lost": 0.0})["lost"])
    assert all(wide <= narrow for narrow, wide in itertools.pairwise(errors)) and errors[0] > 0 and errors[-1] == 0


def test_pca_on_the_normalized_stream_weighs_all_tokens_alike():
    """One loud token in the residual decides the only axis; normalised, the many quiet ones do."""
    for choice, axis in (("residual", 0), ("normalized", 1)):
        points = slicegpt.Points(3, False, choice == "normalized", False, torch.Generator())
        stream = torch.tensor([[[100.0, 0, 0], *[[0, 1.0, 0]] * 9]])
        assert int(points.choose("x", [stream], [None], 1, None).abs().argmax()) == axis


@pytest.mark.parametrize("family", PLAIN)
def test_one_rotation_gives_an_ordinary_model_of_the_family(family, tmp_path):
    model = dense(family)
    cls, heads = type(model), 16 if family == "qwen3" else 8
    made = SliceGPT(merge_shortcuts=True).compress(model, squeeze(tokens()))
    made.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"]) == (24, heads) and "quantization_config" not in config
    fresh = cls(cls.config_class.from_pretrained(tmp_path))
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {name: value.shape for name, value in model.state_dict().items()}
    assert [type(module) for module in fresh.modules()] == [type(module) for module in model.modules()]
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert model.model.norm.weight.tolist() == pytest.approx([(32 / 24) ** 0.5] * 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rotation_is_the_dense_model_projected_everywhere_on_the_pooled_axes(family):
    model = dense(family)
    found, given, rows, handles = roles(model), tokens(), [], []
    mask, full = given["attention_mask"].bool(), copy.deepcopy(model)
    norms = [block.get_submodule(name) for block in full.get_submodule(found.layers) for name in found.norms[: 1 if found.parallel else 2]]

    def centred(x):
        return x - x.mean(-1, keepdim=True) if found.layer_norm else x

    for norm in [*norms, full.get_submodule(found.final_norm)]:
        handles.append(norm.register_forward_pre_hook(lambda _, args: rows.append(centred(args[0]).reshape(8, 14, 32)[mask])))
    logits(full)
    for handle in handles:
        handle.remove()
    kept = torch.tensor(np.linalg.svd(torch.cat(rows).double().numpy(), full_matrices=False)[2][:24]).float()
    project = kept.T @ kept
    blocks = full.get_submodule(found.layers)
    blocks[0].register_forward_pre_hook(lambda _, args: (centred(args[0]) @ project, *args[1:]))
    for block in blocks:
        for name in (found.attention_out, found.mlp_out):
            block.get_submodule(name).register_forward_hook(lambda _, args, out: centred(out) @ project)
    expected = logits(full)
    slice_(model, merge_shortcuts=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=3e-5)
    assert not any("shortcut" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("knobs", [{}, {"slice_head": True, "final_orientation": "random"}, {"merge_shortcuts": True}, {"schedule": [0.5, 0.0, 0.25]}])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_gives_the_same_logits_and_texts(family, knobs, tmp_path):
    model = dense(family)
    slice_(model, **knobs)
    model.save_pretrained(tmp_path)
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert torch.equal(logits(again), logits(model))
    prompt, greedy = tokens()["input_ids"][2:4], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    again.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    written = again.generate(prompt, **greedy)
    assert torch.equal(written, model.generate(prompt, **greedy))
    with torch.no_grad():
        for length in range(14, 20):  # greedy, without a cache
            assert torch.equal(again(written[:, :length]).logits[:, -1].argmax(-1), written[:, length])


def test_a_process_that_does_not_know_echelon_fails_loudly(tmp_path):
    """Even at full width, where all matrices have the shapes of the dense model."""
    slice_(dense("llama"), sparsity=0.0).model.save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""})
    assert run.returncode == 1 and "size mismatch" in run.stderr + run.stdout, run.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_bfloat16_is_as_near_as_the_dtype_allows(family, tmp_path):
    exact = dense(family)
    dense(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    dense_error = float((logits(half).float() - logits(exact)).norm())
    slice_(exact)
    slice_(half)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    assert float((logits(half).float() - logits(exact)).norm()) < 4 * dense_error
    half.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(half))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_lora_recovers_what_was_lost_leaves_the_shortcuts_alone_and_merges(family):
    teacher, model = dense(family), dense(family)
    slice_(model, sparsity=0.5)
    target, before = logits(teacher), float((logits(model) - logits(teacher)).square().mean())
    shortcuts = {name: value.clone() for name, value in model.named_parameters() if name.endswith("_shortcut")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trainable = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    assert shortcuts and all("lora_" in name for name, _ in trainable)
    optimizer = torch.optim.Adam([p for _, p in trainable], lr=5e-3)
    given = tokens()
    for _ in range(60):
        loss = (adapted(**given).logits[given["attention_mask"].bool()] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * before
    tuned = logits(adapted.eval())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=0, atol=1e-4)
    assert all(torch.equal(dict(merged.named_parameters())[name], value) for name, value in shortcuts.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_hidden_states_and_a_static_cache_go_on_working(family):
    model = dense(family)
    slice_(model)
    given = tokens()
    states = model(**given, output_hidden_states=True).hidden_states
    inner = [state.shape[-1] for state in states]
    assert inner == [32 if family == "gpt2" else 24, 24, 24, 32]  # GPT-2's embeddings are padded
    plain = torch.autograd.grad(model(**given, labels=given["input_ids"]).loss, [*model.parameters()][3])[0]
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if family == "opt":
        for layer in model.model.decoder.layers:
            layer.dropout = 0.0
        model.model.decoder.dropout = 0.0
    again = torch.autograd.grad(model(**given, labels=given["input_ids"]).loss, [*model.parameters()][3])[0]
    torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-6)
    model.gradient_checkpointing_disable()
    model.eval()
    prompt, greedy = given["input_ids"][2:4], {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0, "disable_compile": True}
    assert torch.equal(model.generate(prompt, **greedy, cache_implementation="static"), model.generate(prompt, **greedy))


def test_a_headless_model_and_another_head_load_from_it(tmp_path):
    model = dense("llama")
    slice_(model)
    model.save_pretrained(tmp_path)
    bare = transformers.AutoModel.from_pretrained(tmp_path)
    given = tokens()
    with torch.no_grad():
        torch.testing.assert_close(bare(**given).last_hidden_state, model.model(**given).last_hidden_state, rtol=0, atol=1e-6)
        assert bare(**given).last_hidden_state.shape[-1] == 32


def test_the_report_counts_the_shortcuts():
    model = dense("llama")
    report = slice_(model).report
    block = 2 * (32 * 24 + 16 * 24) + 3 * 48 * 24  # queries and output, keys and values, MLP
    last = 8 * 24 + 8 * 48  # the last shortcut and the last output are 32 wide
    assert report.macs_after == 3 * (block + 2 * 24 * 24) + last + 60 * 32


def test_pads_are_not_seen():
    outs = []
    for filler in (5, 50):
        model, given = dense("llama"), tokens()
        given["input_ids"][given["attention_mask"] == 0] = filler
        SliceGPT().compress(model, squeeze(given))
        outs.append(logits(model))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)


def test_redundant_layers_lose_more_and_the_mean_is_kept():
    shares = by_redundancy([0.2, 0.9, 0.5, 0.95], 0.3)
    assert np.mean(shares) == pytest.approx(0.3) and shares[0] == pytest.approx(0.1)
    assert np.argsort(shares).tolist() == [0, 2, 1, 3]
    assert by_redundancy([0.7, 0.7], 0.3) == [0.3, 0.3]
    capped = by_redundancy([0.0] * 9 + [1.0], 0.3)
    assert max(capped) == pytest.approx(0.9) and np.mean(capped) == pytest.approx(0.3)


def test_redundancy_is_the_cosine_between_what_enters_and_what_leaves_a_block():
    model = dense("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        for parameter in model.model.layers[1].get_submodule(name).parameters():
            parameter.data.zero_()  # this block changes nothing
    slice_(model, schedule="redundancy", round_to=1)
    kept = [layer.self_attn.q_proj.in_features for layer in model.model.layers]
    assert kept[1] == min(kept) < 24 < max(kept)


def test_a_parameter_budget_is_met():
    wide = {"vocab_size": 60, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide, num_key_value_heads=1))
    with pytest.warns(UserWarning, match="fewer than the 256 axes"):
        made = SliceGPT(round_to=1).compress(model, squeeze(tokens()), parameters=0.9)
    assert made.report.parameters_after == pytest.approx(0.9 * made.report.parameters_before, rel=0.005)
    assert made.report.parameters_after == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "knobs",
    [
        {"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": float("nan")}, {"round_to": 0}, {"final_orientation": "up"}, {"pca_on": "x"},
        {"schedule": "linear(0.1)"}, {"schedule": "linear(0.1,1)"}, {"schedule": "rising"}, {"schedule": []}, {"schedule": [0.1, 1.0]},
        {"schedule": "redundancy", "merge_shortcuts": True}, {"nsamples": 0},
    ],
)  # fmt: skip
def test_knobs_out_of_range_are_named(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))} is "):
        SliceGPT(**knobs)


@pytest.mark.parametrize(
    ("knobs", "told"), [({"sparsity": 0.8}, "leaves less than 8 of 32"), ({"schedule": [0.1, 0.2]}, "has 2 numbers; this model has 3 layers")]
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(knobs, told):
    model = dense("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=told):
        slice_(model, **knobs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_post_norm_and_encoder_models_are_refused():
    opt = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    )
    with pytest.raises(NotImplementedError, match="post-norm"):
        slice_(transformers.OPTForCausalLM(opt))
    bert = transformers.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(NotImplementedError, match="does not support model_type 'bert'"):
        slice_(transformers.BertForMaskedLM(bert))


def test_a_sliced_model_is_not_sliced_again():
    model = dense("llama")
    slice_(model)
    with pytest.raises(NotImplementedError, match="folded already"):
        slice_(model)


def test_few_tokens_are_warned_of():
    with pytest.warns(UserWarning, match="saw 14 tokens, fewer than the 32 axes"):
        SliceGPT().compress(dense("llama"), [tokens()["input_ids"][2].tolist()])


def test_a_tied_model_that_would_grow_is_warned_of():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(WIDE | {"vocab_size": 900}), tie_word_embeddings=True))
    before = sum(parameter.numel() for parameter in model.parameters())
    with pytest.warns(UserWarning, match=f"grow from {before:,} to .* by a head untied from the embeddings"):
        slice_(model)
    assert sum(parameter.numel() for parameter in model.parameters()) > before

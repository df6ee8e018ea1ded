"""What LoRAM promises: a pruned model that computes what the whole one with zeros does, and an adapter that comes back exactly."""

import dataclasses
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import small_models
import tiny
from echelon.adapt import LoRAM, PrunePlan, evaluate_gap, prune, prune_folder, recover
from echelon.adapt.fitting import fit
from echelon.adapt.prune_plan import fingerprint
from echelon.calibrate.rows import training_rows
from echelon.errors import UserError
from echelon.models.families import UnsupportedFamily
from echelon.models.narrowing import Kept

# Where each family keeps its block, what reads attention's heads and the MLP's hidden units, and what writes the latter; written down by hand.
BLOCK = {
    "llama": "model.layers", "mistral": "model.layers", "qwen2": "model.layers", "qwen3": "model.layers", "phi": "model.layers", "gpt2": "transformer.h",
    "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers",
}  # fmt: skip
READERS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"), "opt": ("self_attn.out_proj", "fc2"), "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
}  # fmt: skip
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"], "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
FOUR = pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
EVERY = pytest.mark.parametrize("family", list(BLOCK))
SMALL = {"skip_first": 1, "skip_last": 0, "align_to": 1}
ROWS = small_models.data("llama", rows=6, length=12)


def whole(family):
    return small_models.model(family).double()


def plan_of(model, **knobs):
    return LoRAM(**({"strategy": "random", "mlp_ratio": 0.6, "kv_ratio": 0.5} | SMALL | knobs)).plan(model, ROWS, seed=3)


def kept_of(plan, index=1):
    return plan.kept[index].heads.tolist(), plan.kept[index].neurons.tolist()


def zeroed(family, plan):
    """The whole model, without what the plan takes away, by plain loops over heads and units."""
    model = whole(family)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    for index, block in enumerate(model.get_submodule(BLOCK[family])):
        heads, units = kept_of(plan, index)
        attention, mlp = (block.get_submodule(name) for name in READERS.get(family, ("self_attn.o_proj", "mlp.down_proj")))
        with torch.no_grad():
            for module, dead in (
                (attention, [c for c in range(config.num_attention_heads * width) if c // (width * group) not in heads]),
                (mlp, [c for c in range(mlp.weight.shape[0 if family == "gpt2" else 1]) if c not in units]),
            ):
                (module.weight.T if family == "gpt2" else module.weight)[:, dead] = 0
    return model


def logits(model, family):
    with torch.no_grad():
        return model(**small_models.batch(family)).logits


def lora_of(model, family, seed=5, **knobs):
    """A LoRA whose factors are both random, as if it had been trained."""
    with torch.random.fork_rng():
        made = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"} | knobs))).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        if ".lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


@EVERY
def test_what_is_left_computes_what_the_whole_model_with_zeros_does(family):
    plan = plan_of(whole(family))
    expected, full = zeroed(family, plan), whole(family)
    small = prune(whole(family), plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in expected.parameters())
    assert not torch.allclose(logits(full, family), logits(expected, family))
    for kind in ("sdpa", "eager"):
        small.set_attn_implementation(kind)
        expected.set_attn_implementation(kind)
        torch.testing.assert_close(logits(small, family), logits(expected, family), rtol=1e-10, atol=1e-10)
    ids = torch.tensor([small_models.data(family)[0][:6]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(small.generate(ids, **arguments), expected.generate(ids, **arguments))


@EVERY
def test_matrices_and_biases_are_slices_and_everything_else_is_untouched(family):
    plan = plan_of(whole(family))
    before, after = whole(family).state_dict(), prune(whole(family), plan).state_dict()
    smaller = [name for name in before if before[name].shape != after[name].shape]
    assert smaller and all(f"{BLOCK[family]}.1." in name for name in smaller)
    for name, old in before.items():
        if name not in smaller:
            assert torch.equal(old, after[name])
    readers = READERS.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    assert not any(name.endswith(f"{reader}.bias") for name in smaller for reader in readers)
    heads, units = kept_of(plan)
    if family == "qwen2":  # grouped, with biases: four queries of eight, two keys
        q, k = f"{BLOCK[family]}.1.self_attn.q_proj", f"{BLOCK[family]}.1.self_attn.k_proj"
        rows = torch.cat([torch.arange(16 * h, 16 * h + 16) for h in heads])
        for part in ("weight", "bias"):
            assert torch.equal(after[f"{q}.{part}"], before[f"{q}.{part}"][rows])
            assert torch.equal(after[f"{k}.{part}"], before[f"{k}.{part}"][torch.cat([torch.arange(8 * h, 8 * h + 8) for h in heads])])
    if family == "gpt2":  # one matrix, stored (in, out): queries, keys, values
        rows = torch.cat([torch.arange(32 * part + 8 * h, 32 * part + 8 * h + 8) for part in range(3) for h in heads])
        assert torch.equal(after["transformer.h.1.attn.c_attn.weight"], before["transformer.h.1.attn.c_attn.weight"][:, rows])
        assert torch.equal(after["transformer.h.1.attn.c_attn.bias"], before["transformer.h.1.attn.c_attn.bias"][rows])
        assert torch.equal(after["transformer.h.1.mlp.c_proj.weight"], before["transformer.h.1.mlp.c_proj.weight"][units])


@EVERY
def test_a_pruned_model_is_saved_loaded_and_streamed(family, tmp_path):
    model = small_models.model(family)
    model.save_pretrained(tmp_path / "base")
    plan = plan_of(model)
    plan.save(tmp_path / "plan")
    again = PrunePlan.load(tmp_path / "plan")
    assert [kept_of(again, i) for i in range(2)] == [kept_of(plan, i) for i in range(2)]
    assert all(getattr(again, f.name) == getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("kept", "masks"))
    small = prune(model, again)
    small.save_pretrained(tmp_path / "small")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(loaded, family), logits(small, family))
    streamed = prune_folder(tmp_path / "base", again)
    assert torch.equal(logits(streamed, family), logits(small, family))
    names = {name: module for name, module in loaded.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name, module in names.items():
        twin = small.get_submodule(name)
        assert (module.weight.shape, getattr(module, "in_features", 0), getattr(module, "nf", 0)) == (
            twin.weight.shape, getattr(twin, "in_features", 0), getattr(twin, "nf", 0),
        )  # fmt: skip
        assert not hasattr(module, "in_features") or (module.out_features, module.in_features) == tuple(module.weight.shape)


@FOUR
def test_the_recovered_adapter_adds_the_same_where_something_stays_and_nothing_elsewhere(family, tmp_path):
    plan = plan_of(whole(family))
    small = lora_of(prune(whole(family), plan), family)
    small.save_pretrained(tmp_path / "small")
    recover(tmp_path / "small", plan, tmp_path / "adapter")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = load_file(tmp_path / "small" / "adapter_model.safetensors")
    extra = {"base_model.model.lm_head.base_layer.weight"} if family == "llama" else set()  # PEFT saves a head that is adapted, though it was not trained
    assert trained.keys() - found.keys() == extra and not found.keys() - trained.keys()
    heads, units = kept_of(plan)
    if family in ("llama", "qwen2"):
        q, width = "base_model.model.model.layers.1.self_attn.q_proj", 16
        kept = [i for h in heads for i in range(width * h, width * h + width)]
        assert torch.equal(found[f"{q}.lora_B.weight"][kept], trained[f"{q}.lora_B.weight"])
        assert torch.equal(found[f"{q}.lora_A.weight"], trained[f"{q}.lora_A.weight"])
        dead = [i for i in range(32) if i not in kept]
        assert dead and not (found[f"{q}.lora_B.weight"] @ found[f"{q}.lora_A.weight"])[dead].any()
        down = "base_model.model.model.layers.1.mlp.down_proj"
        assert torch.equal(found[f"{down}.lora_A.weight"][:, units], trained[f"{down}.lora_A.weight"])
        product = found[f"{down}.lora_B.weight"] @ found[f"{down}.lora_A.weight"]
        assert not product[:, [i for i in range(48) if i not in units]].any() and product[:, units].all()
    for name, value in found.items():  # nothing is lost, whatever the family
        assert torch.equal(value[value != 0].sort().values, trained[name][trained[name] != 0].sort().values)
        assert ".1." in name or torch.equal(value, trained[name])
    full = PeftModel.from_pretrained(zeroed(family, plan), tmp_path / "adapter").eval()
    assert (logits(full, family) - logits(zeroed(family, plan), family)).abs().max() > 0.01
    torch.testing.assert_close(logits(full, family), logits(small, family), rtol=1e-5, atol=1e-5)
    merged = PeftModel.from_pretrained(zeroed(family, plan), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged, family), logits(full, family), rtol=1e-5, atol=1e-5)


def test_the_recovered_folder_is_stock_peft(tmp_path):
    plan = dataclasses.replace(plan_of(whole("llama")), base="someone/base", revision="abc")
    lora_of(prune(whole("llama"), plan), "llama", rank_pattern={"k_proj": 2}).save_pretrained(tmp_path / "small")
    recover(tmp_path / "small", plan, tmp_path / "adapter")
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("small", "adapter"))
    changed = {"base_model_name_or_path": "someone/base", "revision": "abc", "inference_mode": True}
    assert {k: v for k, v in after.items() if k != "target_modules"} == {k: v for k, v in (before | changed).items() if k != "target_modules"}
    assert set(after["target_modules"]) == set(before["target_modules"]) == set(TARGETS["llama"])
    assert not any(b"echelon" in file.read_bytes() or b"loram" in file.read_bytes() for file in (tmp_path / "adapter").iterdir())


def test_normal_fills_only_pruned_inputs_and_only_on_request(tmp_path):
    plan = plan_of(whole("llama"), mlp_ratio=0.9)
    lora_of(prune(whole("llama"), plan), "llama").save_pretrained(tmp_path / "small")
    state = torch.random.get_rng_state()
    for name, options in (("zero", {}), ("a", {"fill": "normal"}), ("b", {"fill": "normal"}), ("c", {"fill": "normal", "seed": 1})):
        recover(tmp_path / "small", plan, tmp_path / name, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    zero, a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("zero", "a", "b", "c"))
    differing = {name for name in zero if not torch.equal(zero[name], a[name])}
    assert differing == {f"base_model.model.model.layers.1.{part}.lora_A.weight" for part in ("self_attn.o_proj", "mlp.down_proj")}
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    units = kept_of(plan)[1]
    dead = [i for i in range(48) if i not in units]
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) and torch.equal(a[name][:, units], zero[name][:, units])
    assert a[name][:, dead].std().item() == pytest.approx(1 / 3, rel=0.3)


def test_modules_that_were_trained_as_a_whole_come_along(tmp_path):
    plan = plan_of(whole("llama"))
    small = lora_of(prune(whole("llama"), plan), "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    small.save_pretrained(tmp_path / "small")
    recover(tmp_path / "small", plan, tmp_path / "adapter")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(found["base_model.model.lm_head.weight"], whole("llama").lm_head.weight)
    assert {name for name in found if ".lora_" not in name} == {"base_model.model.lm_head.weight"}


def test_what_is_no_plain_lora_of_the_pruned_model_is_refused(tmp_path):
    plan = plan_of(whole("qwen2"))
    for number, knobs in enumerate([{"bias": "lora_only"}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}]):
        lora_of(prune(small_models.model("qwen2"), plan_of(small_models.model("qwen2"))), "qwen2", **knobs).save_pretrained(tmp_path / str(number))
        with pytest.raises(UserError, match="is no factor of a plain LoRA"):
            recover(tmp_path / str(number), plan, tmp_path / "out")
    lora_of(whole("qwen2"), "qwen2").save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="on a model pruned by this plan it has"):
        recover(tmp_path / "whole", plan, tmp_path / "out")
    with pytest.raises(UserError, match="cannot read a LoRA from"):
        recover(tmp_path / "nothing", plan, tmp_path / "out")
    (tmp_path / "whole" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read a LoRA from"):
        recover(tmp_path / "whole", plan, tmp_path / "out")
    with pytest.raises(ValueError, match="fill is 'ones'; it must be one of zero, normal"):
        recover(tmp_path / "whole", plan, tmp_path / "out", fill="ones")
    assert not (tmp_path / "out").exists()


def test_a_plan_is_for_one_model_in_any_precision(tmp_path):
    half = small_models.model("llama", torch.bfloat16)
    plan = plan_of(half)
    assert prune(small_models.model("llama", torch.bfloat16).float(), plan) is not None
    other = small_models.model("llama", torch.bfloat16)
    other.save_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError, match="load that very model, or make a new plan"):
        prune(other, plan)
    assert before.keys() == other.state_dict().keys() and all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    other.save_pretrained(tmp_path / "changed")
    prune_folder(tmp_path / "other", plan)
    with pytest.raises(UserError, match="load that very model"):
        prune_folder(tmp_path / "changed", plan)
    with pytest.raises(UserError, match="this qwen2 has"):
        prune(small_models.model("qwen2"), plan)
    with pytest.raises(UnsupportedFamily, match="compressed already"):
        prune(prune(small_models.model("llama", torch.bfloat16), plan), plan)
    with pytest.raises(UnsupportedFamily, match="compressed already"):
        plan_of(prune(small_models.model("llama", torch.bfloat16), plan))
    assert fingerprint([("a", torch.ones(2)), ("b", torch.zeros(3))]) == fingerprint([("b", torch.zeros(3)), ("a", torch.ones(2))])
    assert fingerprint([("a", torch.ones(2, 3))]) != fingerprint([("a", torch.ones(3, 2))])


def test_a_broken_plan_is_told(tmp_path):
    plan = plan_of(whole("llama"))
    with pytest.raises(UserError, match="cannot read"):
        PrunePlan.load(tmp_path / "none")
    plan.save(tmp_path / "newer")
    told = json.loads((tmp_path / "newer" / "plan.json").read_text())
    (tmp_path / "newer" / "plan.json").write_text(json.dumps(told | {"format": 9}))
    with pytest.raises(UserError, match="format 9 is newer"):
        PrunePlan.load(tmp_path / "newer")
    plan.save(tmp_path / "short")
    save_file({}, tmp_path / "short" / "plan.safetensors")
    with pytest.raises(UserError, match="cannot read a plan"):
        PrunePlan.load(tmp_path / "short")


@pytest.mark.parametrize(("heads", "units", "said"), [
    ([], [0], r"kept\[1\].heads is empty"), ([0], [], r"kept\[1\].neurons is empty"), ([2], [0], r"kept\[1\].heads must be ascending numbers in 0..1"),
    ([0], [3, 3], r"neurons must be ascending"), ([0], [4, 3], r"neurons must be ascending"), ([-1], [0], r"heads must be ascending"),
])  # fmt: skip
def test_a_block_must_keep_something_sensible(heads, units, said):
    plan = plan_of(whole("llama"))
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(plan, kept=(plan.kept[0], Kept(torch.tensor(heads), torch.tensor(units))))


def test_ratios_that_leave_nothing_and_one_shared_head():
    with pytest.raises(ValueError, match=r"kv_ratio is 0.8; of 2 key-value heads at least 1 must be left, so it must be below 0.75"):
        plan_of(whole("llama"), kv_ratio=0.8)
    with pytest.raises(ValueError, match="skip_first is 1 and skip_last 1; of 2 blocks at least one must be left"):
        plan_of(whole("llama"), skip_last=1)
    with torch.random.fork_rng():
        one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SPECIAL, **small_models.WIDE, num_key_value_heads=1)).eval()
    with pytest.raises(ValueError, match="kv_ratio is 0.5; it must be 0 for this model, whose queries all share one key-value head"):
        plan_of(one)
    plan = plan_of(one, kv_ratio=0.0)
    assert plan.kept[1].heads.tolist() == [0] and len(plan.kept[1].neurons) == round(0.4 * 48)
    assert prune(one, plan).model.layers[1].mlp.up_proj.out_features == 19
    with pytest.raises(ValueError, match="importance is 'taylor', which needs data"):
        LoRAM(**SMALL, kv_ratio=0.5).plan(whole("llama"))
    with pytest.raises(UnsupportedFamily, match="'bert' is not supported"):
        plan_of(small_models.model("bert"))


@pytest.mark.parametrize(("ratio", "align", "left"), [(0.6, 8, 24), (0.99, 16, 16), (0.1, 32, 48), (0.5, 1, 24), (0.6, 64, 48)])
def test_hidden_units_that_stay_are_a_multiple_or_all(ratio, align, left):
    plan = plan_of(whole("llama"), mlp_ratio=ratio, align_to=align)
    assert [len(one.neurons) for one in plan.kept] == [48, left] and [len(one.heads) for one in plan.kept] == [2, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("importance", ["taylor", "magnitude", "wanda"])
def test_the_least_important_go(family, importance):
    """Against autograd on the weights themselves, norms of what hooks saw, and sums over heads taken one by one."""
    model = whole(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    plan = plan_of(model, strategy="structured", importance=importance, nsamples=6)
    assert torch.equal(random, torch.random.get_rng_state()) and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    block, score = model.get_submodule(BLOCK[family])[1], {}
    seen = {}
    linear = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    for name, module in linear.items():
        module.register_forward_hook(lambda m, args, y, name=name: seen.setdefault(name, []).append(args[0].detach().flatten(0, 1)))
    for row in ROWS:
        ids = torch.tensor([row])
        (model(input_ids=ids, labels=ids).loss * (len(row) - 1)).backward()
    for name, module in linear.items():
        factor = {"taylor": module.weight.grad, "magnitude": torch.ones_like(module.weight)}.get(importance)
        if factor is None:
            norms = torch.cat(seen[name]).norm(dim=0)
            factor = norms[:, None] if isinstance(module, Conv1D) else norms
        value = (module.weight * factor).abs().detach()
        score[name] = value.T if isinstance(module, Conv1D) else value
    out, down = READERS.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    heads = {"llama": 2}.get(family, 4)

    def of_head(h):
        total = score[out][:, h * (32 // heads) : (h + 1) * (32 // heads)].sum()
        if family == "llama":
            return total + score["self_attn.q_proj"][16 * h : 16 * h + 16].sum() + sum(score[f"self_attn.{x}_proj"][8 * h : 8 * h + 8].sum() for x in "kv")
        if family == "gpt2":
            return total + sum(score["attn.c_attn"][32 * part + 8 * h : 32 * part + 8 * h + 8].sum() for part in range(3))
        return total + score["attention.query_key_value"][24 * h : 24 * h + 24].sum()

    writers = {"llama": ["mlp.gate_proj", "mlp.up_proj"], "gpt2": ["mlp.c_fc"], "gpt_neox": ["mlp.dense_h_to_4h"]}[family]
    units = score[down].sum(0) + sum(score[name].sum(1) for name in writers)
    ranked = sorted(range(heads), key=of_head, reverse=True)
    assert kept_of(plan)[0] == sorted(ranked[: heads // 2])
    assert kept_of(plan)[1] == sorted(units.topk(round(0.4 * len(units))).indices.tolist())


def test_random_choices_depend_on_the_seed_alone():
    knobs = LoRAM(strategy="random", mlp_ratio=0.5, kv_ratio=0.5, skip_first=0, skip_last=0, align_to=1)
    first, again, other = (knobs.plan(small_models.model("gpt2"), seed=seed) for seed in (0, 0, 1))
    assert [kept_of(first, i) for i in range(2)] == [kept_of(again, i) for i in range(2)] != [kept_of(other, i) for i in range(2)]
    assert kept_of(first, 0) != kept_of(first, 1)


@pytest.mark.parametrize(("strategy", "of", "left"), [("2:4", 4, 2), ("4:8", 8, 4), ("unstructured", 16, None)])
def test_single_weights_go_in_the_pattern_and_recovery_is_the_identity(strategy, of, left, tmp_path):
    model = small_models.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_of(model, strategy=strategy, importance="magnitude", mlp_ratio=0.75, kv_ratio=0.5)
    plan.save(tmp_path / "plan")
    plan = PrunePlan.load(tmp_path / "plan")
    small = prune(model, plan)
    assert small.state_dict().keys() == before.keys() and len(plan.masks) == 7
    for name, old in before.items():
        new = small.state_dict()[name]
        if name.removesuffix(".weight") not in plan.masks:
            assert torch.equal(new, old)
            continue
        assert torch.equal(new[new != 0], old[new != 0])
        for row, was in zip(new, old, strict=True):
            width = len(row) if left is None else of
            count = left or round((0.25 if "mlp" in name else 0.5) * width)
            for group, origin in zip(row.split(width), was.split(width), strict=True):
                assert torch.equal((group != 0).nonzero().flatten(), origin.abs().topk(count).indices.sort().values)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small"), "llama"), logits(small, "llama"))
    lora_of(small, "llama").save_pretrained(tmp_path / "lora")
    recover(tmp_path / "lora", plan, tmp_path / "adapter")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "adapter"))
    assert set(after) == {name for name in before if ".lora_" in name} and all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_pattern_must_fit_and_a_ratio_of_zero_masks_nothing():
    with pytest.raises(ValueError, match=r"strategy is '4:8'; .* has rows of 36, which are not made of groups of 8"):
        with torch.random.fork_rng():
            odd = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SPECIAL, **(small_models.WIDE | {"intermediate_size": 36})))
        plan_of(odd, strategy="4:8", importance="magnitude")
    plan = plan_of(small_models.model("llama"), strategy="2:4", importance="magnitude", kv_ratio=0.0)
    assert {name.split(".")[-2] for name in plan.masks} == {"mlp"}


@pytest.mark.parametrize("strategy", ["random", "2:4"])
def test_alignment_trains_all_but_the_head_and_keeps_what_was_pruned_at_zero(strategy):
    loram = LoRAM(strategy=strategy, importance="magnitude", mlp_ratio=0.5, kv_ratio=0.5, **SMALL, align_steps=8, align_lr=0.01, align_data="-", batch_size=3)
    for family, tied in (("llama", False), ("qwen2", True)):
        model = small_models.model(family)
        plan = loram.plan(model)
        small = prune(model, plan)
        before = {name: value.clone() for name, value in small.state_dict().items()}
        losses = loram.align(small, plan, ROWS)
        assert len(losses) == 8 and losses[-1] < losses[0] and all(p.requires_grad and p.grad is None for p in small.parameters())
        still = {name for name, value in small.state_dict().items() if torch.equal(value, before[name])}
        still -= {name for name in before if name.endswith("k_proj.bias")}  # the softmax takes the same from all keys
        assert still == ({"lm_head.weight", "model.embed_tokens.weight"} if tied else {"lm_head.weight"})
        for name, mask in plan.masks.items():
            assert not small.get_submodule(name).weight[~mask].any()


def text_folder(tmp_path, family="llama"):
    folder = tmp_path / "base"
    small_models.model(family).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    words = torch.randint(4, tiny.VOCAB, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(tiny.WORDS[word] for word in words))
    return str(folder), tmp_path / "text.txt"


RUN = SMALL | {"mlp_ratio": 0.5, "kv_ratio": 0.5, "seqlen": 16, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "r": 3}


def test_without_pruning_it_is_plain_lora_bit_for_bit(tmp_path):
    base, text = text_folder(tmp_path)
    LoRAM(**(RUN | {"mlp_ratio": 0.0, "kv_ratio": 0.0, "steps": 3})).train(base, text, tmp_path / "out", seed=4)
    found = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        plain = get_peft_model(model, LoraConfig(r=3, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"))
    rows = training_rows(text, tiny.tokenizer(), 16)
    fit(plain, rows, steps=3, learning_rate=0.01, batch_size=4, micro_batch_size=2, warmup=0, seed=4)
    plain.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(value.any() for value in found.values())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "pruned" / "config.json").read_text())


def test_all_stages_and_what_they_leave(tmp_path):
    base, text = text_folder(tmp_path)
    loram = LoRAM(**(RUN | {"align_steps": 2, "align_data": str(text), "steps": 12, "held_out": str(text)}))
    state, told = torch.random.get_rng_state(), []
    result = loram.train(base, text, tmp_path / "out", on_step=told.append)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [(entry["stage"], entry["step"], entry["of"]) for entry in told] == [("align", 1, 2), ("align", 2, 2), *(("train", i, 12) for i in range(1, 13))]
    assert result["steps"] == 12 and result["pruned_parameters"] < result["base_parameters"] == small_models.model("llama").num_parameters()
    assert result["loss"] < told[2]["loss"] and json.loads((tmp_path / "out" / "result.json").read_text()) == result
    plan = PrunePlan.load(tmp_path / "out" / "plan")
    assert plan.base == base and plan.strategy == "structured" and plan.ratios == {"mlp_ratio": 0.5, "kv_ratio": 0.5}
    # The losses, with everything loaded anew by transformers and PEFT.
    ids = [torch.tensor([row["input_ids"].tolist()]) for row in training_rows(text, tiny.tokenizer(), 16)]

    def loss(model):
        with torch.no_grad():
            return sum(float(model.eval()(input_ids=row, labels=row).loss) for row in ids) / len(ids)

    full, small = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out" / "pruned"))
    assert loss(full) == pytest.approx(result["loss_full"], abs=1e-4)
    assert loss(PeftModel.from_pretrained(small, tmp_path / "out" / "pruned_adapter")) == pytest.approx(result["loss_pruned_lora"], abs=1e-4)
    assert loss(PeftModel.from_pretrained(full, tmp_path / "out" / "adapter")) == pytest.approx(result["loss_full_lora"], abs=1e-4)
    with pytest.raises(UserError, match="holds a run with other knobs or data"):
        dataclasses.replace(loram, r=2).train(base, text, tmp_path / "out")


def test_a_run_goes_on_behind_the_last_finished_stage(tmp_path):
    base, text = text_folder(tmp_path)
    loram = LoRAM(**(RUN | {"align_steps": 2, "align_data": str(text), "steps": 3}))
    loram.train(base, text, tmp_path / "whole")

    def stop(entry):
        if (entry["stage"], entry["step"]) == (at, 2):
            raise KeyboardInterrupt

    for at in ("align", "train"):
        with pytest.raises(KeyboardInterrupt):
            loram.train(base, text, tmp_path / "broken", on_step=stop)
        assert not (tmp_path / "broken" / "pruned_adapter").exists()
        assert (tmp_path / "broken" / "pruned").exists() == (at == "train")
    told = []
    loram.train(base, text, tmp_path / "broken", on_step=told.append)
    assert {entry["stage"] for entry in told} == {"train"}
    whole_run, broken = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert whole_run.keys() == broken.keys() and all(torch.equal(value, whole_run[name]) for name, value in broken.items())


def test_the_gap_leaves_the_whole_model_as_it_was(tmp_path):
    plan = plan_of(small_models.model("gpt2"))
    small = lora_of(prune(small_models.model("gpt2"), plan), "gpt2")
    small.save_pretrained(tmp_path / "small")
    recover(tmp_path / "small", plan, tmp_path / "adapter")
    full = small_models.model("gpt2")
    found = evaluate_gap(full, small, tmp_path / "adapter", ROWS)
    assert set(found) == {"full", "pruned_lora", "full_lora"} and len(set(found.values())) == 3
    assert torch.equal(logits(full, "gpt2"), logits(small_models.model("gpt2"), "gpt2"))
    assert not any(".lora_" in name for name, _ in full.named_parameters())


def test_a_tied_head_gets_no_lora():
    with pytest.warns(UserWarning, match="the head is tied to the embeddings"):
        config = LoRAM().adapter_config(small_models.model("qwen2"))
    assert config.target_modules == {f"{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                                                            "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert "lm_head" in LoRAM().adapter_config(small_models.model("llama")).target_modules
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 16, 0.05, "none")


def test_steps_do_not_depend_on_how_they_are_split_and_small_ones_count_in_bfloat16():
    rows = training_rows([row[: 4 + 2 * i] for i, row in enumerate(ROWS)], None, 64)
    made = []
    for size in (1, 4):
        model = whole("llama")
        fit(model, rows, steps=3, learning_rate=0.01, batch_size=4, micro_batch_size=size, warmup=1, seed=0)
        made.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)
    model = small_models.model("llama", torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    fit(model, rows, steps=60, learning_rate=1e-4, batch_size=2, micro_batch_size=2, warmup=0)
    moved = (model.model.layers[0].mlp.up_proj.weight != before) & (before.abs() > 0.1)  # a single step is less than half a unit in the last place there
    assert moved.float().sum() > 100
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the loss is nan at step 1; lower the learning rate, 0.1"):
        fit(model, rows, steps=1, learning_rate=0.1, batch_size=2, micro_batch_size=2, warmup=0)


@pytest.mark.parametrize(("knobs", "said"), [
    ({"strategy": "3:4"}, "strategy is '3:4'; it must be one of structured, random, 2:4, 4:8, unstructured"), ({"mlp_ratio": 1.0}, r"mlp_ratio is 1.0"),
    ({"kv_ratio": -0.1}, r"kv_ratio is -0.1; it must be a number in \[0, 1\)"), ({"skip_first": -1}, "skip_first is -1"), ({"align_to": 0}, "align_to is 0"),
    ({"importance": "fisher"}, "importance is 'fisher'"), ({"recover_fill": "one"}, "recover_fill is 'one'"), ({"r": 0}, "r is 0"),
    ({"lora_dropout": 1}, "lora_dropout is 1"), ({"align_steps": 3}, "align_steps is 3 without align_data"), ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"seqlen": 1}, "seqlen is 1"), ({"steps": -1}, "steps is -1"),
])  # fmt: skip
def test_bad_knobs(knobs, said):
    with pytest.raises(ValueError, match=said):
        LoRAM(**knobs)

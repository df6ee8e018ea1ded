"""What every registered adapter owes: the interfaces of PEFT and transformers, merging, saving, export to plain LoRA, and clear errors.

``pytest tests/contracts/test_adapter.py -k dylora`` runs it for one method.
"""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PeftType, convert_to_lora, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

import small_models
import tiny
from echelon.adapt import AdapterCallback, load_adapter, prepare
from echelon.adapt.registration import register
from echelon.errors import UserError
from echelon.registry import cards, get

METHODS = [card.name for card in cards("adapter")]
TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "output.dense"], "t5": ["q", "wo"],
    "vit": ["q_proj", "o_proj", "fc1"],
}  # fmt: skip
FAMILIES = list(TARGETS)
NOT_THE_BASE_AT_FIRST = {"lora_sb"}  # it starts after an approximate first step
every_method = pytest.mark.parametrize("name", METHODS)
every_family = pytest.mark.parametrize("family", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def plain(family, dtype=torch.float32):
    return copy.deepcopy(tiny.model("t5")).to(dtype) if family == "t5" else small_models.model(family, dtype)


def inputs(family):
    batch = small_models.batch("llama" if family == "t5" else family)
    return batch | ({"decoder_input_ids": batch["input_ids"][:, :5]} if family == "t5" else {})


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Some versions of transformers ask for a newer PEFT than there is before they run code that works with it."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")


def labelled(family):
    batch = inputs(family)
    if family == "vit":
        return batch | {"labels": torch.tensor([1, 3])}
    batch.pop("decoder_input_ids", None)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def config(name, family="llama", model=None, **knobs):
    """A config, ready for this model where it starts from gradients."""
    cls = get(name, "adapter")
    fields = {field.name for field in dataclasses.fields(cls)}
    usual = {"r": 3, "init_lr": 0.003, "target_modules": TARGETS[family]}
    made = cls(**{key: value for key, value in (usual | knobs).items() if key in fields})
    if hasattr(made, "prepared") and model is not None:
        batch = labelled(family)
        prepare(model, made, [{key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.items()}])
    return made


def own(model, adapter="default"):
    return {n: p for n, p in model.named_parameters() if ".echelon_" in n and n.endswith("." + adapter)}


def shake(model, seed=0, adapter="default"):
    """Other values for all that trains, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for p in own(model, adapter).values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def wrapped(name, family="llama", dtype=torch.float32, shaken=True, **knobs):
    model = plain(family, dtype)
    made = get_peft_model(model, config(name, family, model, **knobs)).eval()
    return shake(made) if shaken else made


@torch.no_grad()
def output(model, family="llama"):
    batch = inputs(family)
    if family == "vit":
        batch = {key: value.to(next(model.parameters()).dtype) for key, value in batch.items()}
    return model(**batch).logits


def near(a, b, share):
    assert float((a.float() - b.float()).norm() / b.float().norm()) <= share


@every_family
@every_method
def test_a_fresh_adapter_leaves_the_model_as_it_was(name, family):
    base = output(plain(family), family)
    made = wrapped(name, family, shaken=False)
    if name in NOT_THE_BASE_AT_FIRST:
        assert not torch.equal(output(made, family), base)
    else:
        assert torch.equal(output(made, family), base)
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    assert trained == set(own(made)) and trained


@every_family
@every_method
def test_merging_changes_nothing_and_unmerging_brings_the_matrices_back(name, family):
    model = wrapped(name, family)
    before, loose, base = {n: p.clone() for n, p in model.named_parameters()}, output(model, family), output(plain(family), family)
    assert float((loose - base).norm() / base.norm()) > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(model, family), base)
    model.merge_adapter()
    near(output(model, family), loose, 1e-5)
    with model.disable_adapter():
        near(output(model, family), base, 1e-5)
    model.merge_adapter(safe_merge=True)
    near(output(model, family), loose, 1e-5)
    model.unmerge_adapter()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, before[n], rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain(family)) and not any(".echelon_" in n for n in merged.state_dict())
    near(output(merged, family), loose, 1e-5)


@every_method
def test_a_bfloat16_base_keeps_a_float32_adapter_and_merges_within_its_rounding(name):
    model = wrapped(name, dtype=torch.bfloat16, shaken=False)
    exact = wrapped(name, shaken=False)
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    if name not in NOT_THE_BASE_AT_FIRST:  # first values are not rounded to the base's dtype on the way
        assert all(torch.equal(p, q) for p, q in zip(own(model).values(), own(exact).values(), strict=True))
    shake(model)
    loose = output(model)
    assert loose.dtype == torch.bfloat16
    model.merge_adapter()
    near(output(model), loose, 2e-2)
    narrow = plain("llama", torch.bfloat16)
    assert {p.dtype for p in own(get_peft_model(narrow, config(name, model=narrow), autocast_adapter_dtype=False)).values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_method
def test_what_is_saved_loads_bit_for_bit(name, family, tmp_path):
    model = wrapped(name, family)
    kept = output(model, family)
    state = get_peft_model_state_dict(model)
    save_file(state, tmp_path / "own.safetensors")  # which refuses tensors that share memory
    assert not any("default" in key for key in state)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(plain(family), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(output(again, family), kept)
        assert not any(p.requires_grad for p in again.parameters())
    again = load_adapter(plain(family), tmp_path, adapter_name="other", is_trainable=True)
    assert torch.equal(output(again, family), kept)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(own(again, "other"))
    native = plain(family)
    native.load_adapter(str(tmp_path))
    assert torch.equal(output(native, family), kept)
    native.save_pretrained(tmp_path / "native")
    assert torch.equal(output(load_adapter(plain(family), tmp_path / "native"), family), kept)
    native.delete_adapter("default")
    near(output(native, family), output(plain(family), family), 0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import echelon.adapt") == 1


@every_family
@every_method
def test_a_plain_lora_of_the_same_function_needs_no_decomposition(name, family, tmp_path):
    some = {"llama": r"layers.1.self_attn.q_proj", "gpt2": "h.1.attn.c_attn", "bert": "layer.1.attention.self.query", "t5": "block.1.layer.0.SelfAttention.q"}
    pattern = {some.get(family, "layers.1.mlp.fc1"): 2}
    model = wrapped(name, family, rank_pattern=pattern, alpha_pattern=dict.fromkeys(pattern, 5.0))
    kept = output(model, family)
    model.save_lora(tmp_path / "lora")
    plain_lora = PeftModel.from_pretrained(plain(family), tmp_path / "lora")
    assert plain_lora.peft_config["default"].peft_type == PeftType.LORA
    near(output(plain_lora, family), kept, 1e-6)
    assert "echelon" not in (tmp_path / "lora" / "adapter_config.json").read_text().lower()
    assert not any("echelon" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    if max(len(layer.factors("default").A) for _, layer in model.base_model.layers()) > 16:
        return  # of full rank: a decomposition to one rank for all layers would lose some of it
    lora, tensors = convert_to_lora(model, rank=16)
    lora.fan_in_fan_out = family == "gpt2"
    lora.save_pretrained(tmp_path / "full")
    save_file(tensors, tmp_path / "full" / "adapter_model.safetensors")
    near(output(PeftModel.from_pretrained(plain(family), tmp_path / "full"), family), kept, 1e-4)


@every_method
def test_biases_and_whole_modules_that_train_are_saved_and_exported(name, tmp_path):
    model = wrapped(name, "bert", bias="lora_only", modules_to_save=["cls.predictions.transform.dense"])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and ".echelon_" not in n}
    assert {n.rpartition(".")[2] for n in trained if "base_layer" in n} == {"bias"} and any("modules_to_save" in n for n in trained)
    for p in trained.values():
        p.data += 0.1
    kept = output(model, "bert")
    model.save_pretrained(tmp_path / "own")
    model.save_lora(tmp_path / "lora")
    assert torch.equal(output(load_adapter(plain("bert"), tmp_path / "own"), "bert"), kept)
    near(output(PeftModel.from_pretrained(plain("bert"), tmp_path / "lora"), "bert"), kept, 1e-6)


def test_without_echelon_the_type_is_unknown_and_the_export_works(tmp_path):
    """In a process of its own that never imports echelon."""
    for name in METHODS:
        model = wrapped(name, "gpt2")
        model.save_pretrained(tmp_path / name)
        model.save_lora(tmp_path / f"{name}-lora")
        save_file({"logits": output(model, "gpt2")}, tmp_path / f"{name}.safetensors")
        kind = json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"]
        card = (tmp_path / name / "README.md").read_text()
        assert f"KeyError: '{kind}'" in card and "import echelon.adapt" in card
    plain("gpt2").save_pretrained(tmp_path / "base")
    save_file(inputs("gpt2"), tmp_path / "inputs.safetensors")
    code = f"""
import sys, torch, transformers
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
place = Path({str(tmp_path)!r})
batch = load_file(place / "inputs.safetensors")
for name in {METHODS!r}:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    try:
        PeftModel.from_pretrained(base, place / name)
        raise SystemExit("it loaded")
    except KeyError as error:
        assert f"KeyError: {{error}}" in (place / name / "README.md").read_text()
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, place / f"{{name}}-lora")(**batch).logits
    torch.testing.assert_close(logits, load_file(place / f"{{name}}.safetensors")["logits"], rtol=1e-5, atol=1e-5)
assert not any(module.startswith("echelon") for module in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_method
def test_two_adapters_of_different_ranks_live_side_by_side(name):
    one, two = wrapped(name), wrapped(name, r=5, seed=1, target_modules=["q_proj", "v_proj"])
    shake(two, seed=1)
    first, second, base = output(one), output(two), output(plain("llama"))
    both = wrapped(name)
    other = config(name, model=plain("llama"), r=5, seed=1, target_modules=["q_proj", "v_proj"])
    both.add_adapter("second", other)
    shake(both, seed=1, adapter="second")
    assert not any(p.requires_grad for p in own(both, "second").values())
    assert torch.equal(output(both), first)
    both.set_adapter("second")
    assert torch.equal(output(both), second)
    assert {n for n, p in both.named_parameters() if p.requires_grad} == set(own(both, "second"))
    both.base_model.set_adapter(["default", "second"])
    together = output(both)
    both.merge_adapter()
    near(output(both), together, 1e-5)
    both.unmerge_adapter()
    both.set_adapter("default")
    both.delete_adapter("second")
    near(output(both), first, 1e-5)
    assert not own(both, "second")
    both.delete_adapter("default")
    near(output(both.base_model), base, 1e-5)  # a PeftModel itself does not run without an adapter


@every_method
def test_it_is_injected_into_a_plain_model_too(name):
    model = plain("llama")
    inject_adapter_in_model(config(name, model=plain("llama")), model)
    assert torch.equal(output(shake(model)), output(wrapped(name)))
    native = plain("llama")
    native.add_adapter(config(name, model=plain("llama")))
    assert torch.equal(output(shake(native)), output(model))


@every_method
def test_gradients_are_those_of_the_exported_factors_and_checkpointing_keeps_them(name):
    def gradients(model):
        model.train()
        model.enable_input_require_grads()
        model(**labelled("llama")).loss.backward()
        return {n: p.grad for n, p in own(model).items()}

    found = gradients(wrapped(name))
    assert all(g is not None and g.any() for g in found.values())
    for reentrant in (False, True):
        model = wrapped(name)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        again = gradients(model)
        assert all(torch.allclose(found[n], again[n], rtol=1e-4, atol=1e-6) for n in found)


@every_method
def test_the_global_random_state_and_the_order_of_seeds_do_not_matter(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = plain("llama")  # its weights come from a state of their own
    ready = config(name, model=model)
    made = get_peft_model(model, ready)
    made(**labelled("llama")).loss.backward()
    made.merge_adapter()
    made.unmerge_adapter()
    made.to_lora()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, fewer = wrapped(name, shaken=False), wrapped(name, shaken=False, target_modules=["down_proj"])
    values = {n: p for n, p in made.state_dict().items() if ".echelon_" in n}
    assert all(torch.equal(p, values[n]) for model in (again, fewer) for n, p in model.state_dict().items() if n in values)


@every_method
def test_a_trainer_trains_it_and_nothing_else(name, tmp_path):
    model = wrapped(name, shaken=False, lora_dropout=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in torch.tensor(small_models.data("llama", rows=4, length=12))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=0.02, report_to=[], use_cpu=True, save_strategy="no",
        lr_scheduler_type="constant", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[AdapterCallback()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= set(own(model))


@every_method
def test_its_config_is_plain_data(name, tmp_path):
    made = config(name, r=2)
    again = pickle.loads(pickle.dumps(made))
    assert again == made and again.peft_type is made.peft_type and made.peft_type.value == f"ECHELON_{name.upper()}"
    json.dumps({key: sorted(value) if isinstance(value, set) else value for key, value in made.to_dict().items()})
    made.save_pretrained(tmp_path)
    assert type(made).from_pretrained(tmp_path).to_dict() == made.to_dict()
    assert copy.deepcopy(made) == made


def test_types_are_members_of_the_enumeration_of_peft_and_registering_twice_is_harmless():
    for name in METHODS:
        value = f"ECHELON_{name.upper()}"
        member = PeftType(value)
        assert PeftType[value] is member and getattr(PeftType, value) is member and member == value and member in list(PeftType)
        assert member.value == value and member.name == value and PeftType(member) is member and isinstance(member, PeftType)
        cls = get(name, "adapter")
        tuner = type(wrapped(name).base_model)
        register(f"echelon_{name}", cls, tuner)
        with pytest.warns(UserWarning, match="already has a method"):
            register(f"echelon_{name}", LoraConfig, tuner)
        assert isinstance(wrapped(name).peft_config["default"], cls)


@pytest.mark.parametrize(("knobs", "said"), [
    ({"r": 0}, "r is 0; it must be a whole number of at least 1"), ({"r": 2.5}, "r is 2.5"), ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"), ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must be a number in \[0, 1\)"),
    ({"bias": "some"}, "bias is 'some'; it must be one of none, all, lora_only"), ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
    ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] is -1"), ({"target_parameters": ["experts.up"]}, "not experts; use LoraConfig"),
    ({"target_modules": ".*q", "layers_to_transform": [0]}, "put the indices into the regular expression"), ({"seed": -1}, "seed is -1"),
    ({"layers_pattern": "h"}, "it needs layers_to_transform"),
])  # fmt: skip
@every_method
def test_bad_knobs_are_named(name, knobs, said):
    if not set(knobs) <= {field.name for field in dataclasses.fields(get(name, "adapter"))}:
        return
    with pytest.raises(ValueError, match=said):
        config(name, **knobs)


@pytest.mark.parametrize(("family", "knobs", "said"), [
    ("llama", {"target_modules": ["q_porj"]}, "no layer of the model is meant .did you mean 'q_proj'[?].; its linear layers end in down_proj"),
    ("llama", {"target_modules": ["embed_tokens"]}, "model.embed_tokens is a Embedding; .* adapts nn.Linear, Conv1D"),
    ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, "lm_head shares its matrix with another module .*tie_word_embeddings=False"),
    ("mixtral", {"target_modules": ["experts"]}, "experts holds its experts in three-dimensional tensors; only plain LoRA"),
])  # fmt: skip
@every_method
def test_layers_that_cannot_be_adapted_are_refused_and_the_model_stays_as_it_was(name, family, knobs, said):
    model = small_models.mixtral() if family == "mixtral" else small_models.model(family)
    before = [(n, type(module)) for n, module in model.named_modules()]
    with pytest.raises(ValueError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config(name, **knobs))
    assert [(n, type(module)) for n, module in model.named_modules()] == before


@every_method
def test_one_wrong_name_among_right_ones_is_warned_of(name):
    model = plain("llama")
    with pytest.warns(UserWarning, match="no layer is called 'v_porj' .did you mean 'v_proj'"):
        get_peft_model(model, config(name, model=model, target_modules=["q_proj", "v_porj"]))


@every_method
def test_usual_targets_and_all_linear_are_known(name):
    model = plain("llama")
    made = get_peft_model(model, config(name, model=model, target_modules=None))
    assert {key.rpartition(".")[2] for key, _ in made.base_model.layers()} == {"q_proj", "v_proj"}
    model = small_models.model("qwen2")
    made = get_peft_model(model, config(name, model=model, target_modules="all-linear"))
    assert {key.rpartition(".")[2] for key, _ in made.base_model.layers()} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@every_method
def test_another_kind_of_adapter_underneath_is_refused(name):
    model = get_peft_model(plain("llama"), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ValueError, match="already carries an adapter of another kind"):
        inject_adapter_in_model(config(name), model, adapter_name="mine")


class Packed(nn.Linear):
    """A layer whose matrix is elsewhere, as quantised layers are."""

    def __init__(self, old):
        super().__init__(old.in_features, old.out_features, bias=False)
        self.hidden = old.weight.detach().clone()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.hidden)


@every_method
def test_a_base_whose_matrix_cannot_be_replaced_runs_and_is_not_merged(name):
    model = plain("llama")
    model.model.layers[0].self_attn.q_proj = Packed(model.model.layers[0].self_attn.q_proj)
    made = shake(get_peft_model(model, config(name, model=model)).eval())
    near(output(made), output(wrapped(name)), 1e-5)
    with pytest.raises(ValueError, match="q_proj is a Packed without a dense matrix; keep the adapter beside it"):
        made.merge_adapter()


@every_method
def test_broken_values_are_not_merged(name):
    model = wrapped(name)
    next(iter(own(model).values())).data[0] = float("nan")
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="there is no adapter 'defualt' .did you mean 'default'"):
        model.to_lora("defualt")


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="it has no adapter_config.json"):
        load_adapter(plain("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ECHELON_DYLROA"}')
    with pytest.raises(UserError, match="its type 'ECHELON_DYLROA' is unknown .did you mean 'ECHELON_DYLORA'[?].; is it from a newer echelon"):
        load_adapter(plain("llama"), tmp_path)

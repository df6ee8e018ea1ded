"""What every registered compensator owes, over quantised, pruned and low-rank models: a LoRA that helps, the compressed weights untouched, clear errors."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel

import small_models
from echelon.calibrate import calibration_batches
from echelon.compress import RTN, SVD, Pruning, load_lora, save
from echelon.errors import UserError
from echelon.registry import build, cards, get

METHODS = [card.name for card in cards("compensator")]
# Settings for tiny models; a method gets those that it has a field for.
SMALL = {"r": 4, "lorc_rank": 4, "nsamples": 16, "seqlen": 24}
COMPRESSIONS = {
    "quantised": RTN(w_bits=3, group_size=16), "pruned": Pruning(pattern="2:4"), "low_rank": SVD(ratio=0.5, round_to=1),
}  # fmt: skip
FAMILIES = ("llama", "gpt2", "opt", "bert", "vit")
every_method = pytest.mark.parametrize("name", METHODS)
every_kind = pytest.mark.parametrize("kind", COMPRESSIONS)


def compensator(name, **knobs):
    cls = get(name, "compensator")
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in SMALL.items() if k in fields} | knobs)


def compressed(kind, family, dtype=torch.float32):
    return COMPRESSIONS[kind].compress(small_models.model(family, dtype)).model


def compensate(name, kind, family, dtype=torch.float32, knobs=None, **arguments):
    made, data = compensator(name, **knobs or {}), small_models.data(family)
    return made.compensate(small_models.model(family, dtype), compressed(kind, family, dtype), data if made.needs_data else None, **arguments)


def logits(tuned, family):
    return small_models.logits(tuned.get_base_model(), family)


@every_method
@every_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_it_brings_layers_nearer_and_leaves_every_stored_bit_of_the_compressed_model(name, kind, family):
    original, before = small_models.model(family), compressed(kind, family).state_dict()
    result = compensate(name, kind, family)
    base = result.model.get_base_model()
    after = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items() if ".lora_" not in key}
    assert after.keys() == before.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert logits(result.model, family).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), small_models.model(family).state_dict().values(), strict=True))
    report = result.report
    told = json.loads(report.to_json())["modules"]
    assert told and not report.skipped
    for layer, entry in told.items():
        module = base.get_submodule(layer)
        added = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert module.scaling == {"default": 1.0} and isinstance(module.lora_dropout["default"], torch.nn.Identity)
        assert entry["after"] < entry["before"]
        assert torch.linalg.matrix_rank(added.double(), rtol=1e-5) <= entry["rank"]
    factors = [p for n, p in result.model.named_parameters() if ".lora_" in n]
    assert report.parameters == sum(p.numel() for p in factors) and report.bytes == sum(p.numel() * p.element_size() for p in factors)
    assert bool(report.tokens) == compensator(name).needs_data


@every_method
@every_kind
def test_saved_and_loaded_on_the_reloaded_compressed_model_it_is_the_same(name, kind, tmp_path):
    model = compressed(kind, "llama")
    save(model, tmp_path / "model")
    result = compensate(name, kind, "llama")
    result.save(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["peft_type"] == "LORA" and told["lora_alpha"] == told["r"] == 4 and told["lora_dropout"] == 0
    assert json.loads((tmp_path / "adapter" / "compensation_report.json").read_text())["method"] == name
    expected = logits(result.model, "llama")
    assert torch.equal(logits(load_lora(type(model).from_pretrained(tmp_path / "model"), tmp_path / "adapter"), "llama"), expected)
    if kind != "low_rank":  # PEFT alone knows layers that are nn.Linear
        assert torch.equal(logits(PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "model"), tmp_path / "adapter"), "llama"), expected)
    result.save(tmp_path / "adapter")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="is no adapter"):
        result.save(tmp_path / "notes")


@every_method
def test_it_can_be_trained_on_and_only_the_adapter_learns(name):
    tuned = compensate(name, "quantised", "llama").model.train()
    ids = torch.tensor(small_models.data("llama", rows=4))
    before = {key: value.clone() for key, value in tuned.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert {key.split(".lora_")[1][0] for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])} == {"A", "B"}


@every_method
def test_it_is_reproducible_and_leaves_the_global_random_state_alone(name):
    state = torch.random.get_rng_state()
    first, second = (compensate(name, "pruned", "llama", seed=3).model.state_dict() for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@every_method
def test_bfloat16_adapters_still_help(name):
    result = compensate(name, "quantised", "llama", torch.bfloat16)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert all(told["after"] < told["before"] for told in result.report.modules.values())


@every_method
def test_a_model_that_was_not_compressed_gets_zeros(name):
    made = compensator(name)
    tuned = made.compensate(small_models.model("llama"), small_models.model("llama"), small_models.data("llama") if made.needs_data else None)
    assert torch.equal(logits(tuned.model, "llama"), small_models.logits(small_models.model("llama"), "llama"))
    assert len(tuned.report.skipped) == len(tuned.report.modules) == 14
    assert all(not p.any() for n, p in tuned.model.named_parameters() if ".lora_" in n)


@every_method
def test_layers_can_be_chosen_and_by_default_the_changed_ones_are(name):
    made, data = compensator(name), small_models.data("llama")
    half = RTN(w_bits=3, group_size=16, target_modules="mlp")
    told = made.compensate(small_models.model("llama"), half.compress(small_models.model("llama")).model, data).report.modules
    assert {layer.rpartition(".")[2] for layer in told} == {"gate_proj", "up_proj", "down_proj"} and len(told) == 6
    told = compensate(name, "pruned", "llama", knobs={"target_modules": ["q_proj"]}).report.modules
    assert {layer.rpartition(".")[2] for layer in told} == {"q_proj"}


@every_method
def test_bad_requests_are_one_clear_error_and_the_model_stays_plain(name):
    made = compensator(name)
    original, model = small_models.model("llama"), compressed("quantised", "llama")
    data = small_models.data("llama")
    keys = list(model.state_dict())
    rank = "lorc_rank" if name == "lorc" else "r"
    with pytest.raises(UserError, match="unknown knob 'no_such_knob'"):
        build(name, "compensator", {"no_such_knob": 1})
    with pytest.raises(ValueError, match=f"{rank} is 0; it must be at least 1"):
        compensator(name, **{rank: 0})
    with pytest.raises(ValueError, match=f"{rank} is 17; it must be at most 16 for .*k_proj"):
        compensator(name, **{rank: 17}).fit(original, model, data)
    with pytest.raises(ValueError, match="the same object"):
        made.fit(model, model, data)
    with pytest.raises(ValueError, match="is no transformers model"):
        made.fit(original, torch.nn.Linear(2, 2), data)
    with pytest.raises(ValueError, match=r"has no model\.layers"):
        made.fit(original, small_models.model("gpt2"), data)
    with pytest.raises(ValueError, match=r"is \(32, 32\) in the original model and \(64, 32\)"):
        made.fit(original, small_models.model("qwen3"), data)
    with pytest.raises(ValueError, match="load both in the same dtype"):
        made.fit(small_models.model("llama", torch.bfloat16), model, data)
    with pytest.raises(ValueError, match="matches no linear layer.*did you mean 'q_proj'"):
        compensator(name, target_modules=["q_prj"]).fit(original, model, data)
    if made.needs_data:
        with pytest.raises(ValueError, match="needs calibration data"):
            made.fit(original, model)
        blank = [{"input_ids": torch.zeros(2, 6, dtype=torch.long), "attention_mask": torch.zeros(2, 6, dtype=torch.long)}]
        with pytest.raises(ValueError, match="pad|none"):
            made.fit(original, model, calibration_batches(blank))
    with torch.no_grad():
        original.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj in the original model holds NaN"):
        made.fit(original, model, data)
    assert list(model.state_dict()) == keys

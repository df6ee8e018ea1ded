"""What every registered compressor owes: ten architectures, reloading anywhere, training, adapters, clear errors.

``pytest tests/contracts/test_compressor.py -k lord`` runs it for one method.
"""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

import small_models
import tiny
from echelon.compress import lora_config, merge_to_dense, size
from echelon.errors import UserError
from echelon.registry import build, cards, get

METHODS = [card.name for card in cards("compressor")]
# Settings under which tiny models are worth compressing; a method gets those that it has a field for.
SMALL = {"round_to": 1, "round_rank": 1, "nsamples": 8, "seqlen": 16, "target_modules": "all-linear"}
# What single methods need on top of that.
EXTRA: dict[str, dict] = {
    "svd": {"ratio": 0.6}, "lord": {"rank": 0.4}, "greenformers": {"target_modules": "linear", "rank": 0.6}, "welore": {"rank_reduction": 0.65},
    "dsformer": {"block_size": 16, "compression": 1.3, "nnz": 4, "init_iters": 5},
    "rtn": {"group_size": 16}, "pruning": {"sparsity": 0.3},
}  # fmt: skip
CHOOSING = {"dsformer"}
TYPES = {family: small_models.FAMILIES[family]().config.model_type for family in small_models.FAMILIES}


def compressor(name, **knobs):
    cls = get(name, "compressor")
    fields = {field.name for field in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in SMALL.items() if k in fields} | EXTRA.get(name, {}) | knobs)


def families(name):
    types = get(name, "compressor").model_types
    return [family for family in small_models.FAMILIES if types is None or TYPES[family] in types]


def compress(name, family, dtype=torch.float32, **arguments):
    made = compressor(name)
    return made.compress(small_models.model(family, dtype), small_models.data(family) if made.needs_data else None, **arguments)


def numbers(model):
    """Its parameters, with those that are stored in fewer bits."""
    return sum(p.numel() for p in model.parameters()) + sum(getattr(m, "packed_parameters", 0) for m in model.modules())


PAIRS = [(name, family) for name in METHODS for family in families(name)]
CAUSAL = [(name, family) for name, family in PAIRS if family in small_models.CAUSAL]
every_pair = pytest.mark.parametrize(("name", "family"), PAIRS)
every_method = pytest.mark.parametrize("name", METHODS)


@every_pair
def test_it_gets_smaller_and_the_report_adds_up(name, family):
    before = small_models.model(family)
    result = compress(name, family)
    report = result.report
    assert small_models.logits(result.model, family).isfinite().all()
    assert report.parameters_before == sum(p.numel() for p in before.parameters())
    assert report.parameters_after == numbers(result.model)
    for what in ("parameters", "bytes", "macs"):
        after, whole = getattr(report, f"{what}_after"), getattr(report, f"{what}_before")
        assert after < whole if what in compressor(name).shrinks else after == whole
    tables = sum(m.weight.numel() for m in before.modules() if isinstance(m, torch.nn.Embedding))
    assert report.parameters_before_without_embeddings == report.parameters_before - tables
    assert report.modules and set(report.modules) <= {n for n, _ in result.model.named_modules()}
    assert json.loads(report.to_json())["method"] == name
    assert {n for n, p in before.named_parameters() if p.dtype != torch.float32} == set()
    assert not result.model.training


@every_pair
def test_saved_reloaded_saved_again_and_without_its_head_it_is_the_same(name, family, tmp_path):
    result = compress(name, family)
    model, expected = result.model, small_models.logits(result.model, family)
    result.save(tmp_path / "a", tiny.tokenizer())
    again = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(small_models.logits(again, family), expected)
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(small_models.logits(type(model).from_pretrained(tmp_path / "b"), family), expected)
    bare = transformers.AutoModel.from_pretrained(tmp_path / "a")
    inputs = small_models.batch(family)
    with torch.no_grad():
        hidden, wanted = bare(**inputs).last_hidden_state, model.base_model(**inputs).last_hidden_state
    assert torch.equal(hidden, wanted)
    bare.save_pretrained(tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path / "c")(**inputs).last_hidden_state, wanted)
    assert json.loads((tmp_path / "a" / "compression_report.json").read_text())["parameters_after"] == result.report.parameters_after
    half = type(model).from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in again.half().float().parameters()} == {torch.float32}


@every_method
def test_another_process_reads_it_after_import_echelon_and_fails_loudly_without(name, tmp_path):
    kept = {}
    for family in families(name):
        result = compress(name, family)
        result.save(tmp_path / family)
        kept[family] = small_models.logits(result.model, family)
        torch.save(small_models.batch(family), tmp_path / f"{family}.inputs")
    script = """
import sys, torch
if sys.argv[1] == "with":
    import echelon
import transformers
for family, auto in zip(sys.argv[3::2], sys.argv[4::2]):
    folder = f"{sys.argv[2]}/{family}"
    try:
        model = getattr(transformers, auto).from_pretrained(folder)
    except Exception as error:
        torch.save(str(error), folder + ".out")
        continue
    with torch.no_grad():
        torch.save(model(**torch.load(folder + ".inputs", weights_only=True)).logits, folder + ".out")
"""
    autos = {"bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}
    arguments = [word for family in kept for word in (family, autos.get(family, "AutoModelForCausalLM"))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for how in ("with", "without"):
        subprocess.run([sys.executable, "-c", script, how, str(tmp_path), *arguments], check=True, env=environment, capture_output=True)
        for family, expected in kept.items():
            found = torch.load(tmp_path / f"{family}.out", weights_only=True)
            if how == "with":
                assert not isinstance(found, str), found
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            else:
                assert isinstance(found, str), f"{family} loaded without echelon"


@pytest.mark.parametrize(("name", "family"), CAUSAL)
def test_it_generates_the_same_with_and_without_cache(name, family):
    model = compress(name, family).model
    prompts = tiny.prompts(2)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = (ids != 0).long()
    out = [model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*out) and out[0].shape[1] > width


@every_pair
def test_it_is_reproducible_and_leaves_the_global_random_state_alone(name, family):
    state = torch.random.get_rng_state()
    first = compress(name, family, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    second = compress(name, family, seed=3)
    tensors = second.model.state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in first.model.state_dict().items())
    assert first.model.config.quantization_config.to_dict() == second.model.config.quantization_config.to_dict()


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in PAIRS if f in ("llama", "gpt2", "bert")])
def test_bfloat16_stays_and_is_close_to_float32(name, family):
    rough = compress(name, family, torch.bfloat16).model
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    # Which of two nearly equal choices a method takes may depend on the rounding of the weights; the model must then be close to itself in float32.
    fine = small_models.logits(copy.deepcopy(rough).float() if name in CHOOSING else compress(name, family).model, family)
    assert (small_models.logits(rough, family).float() - fine).norm() < 0.1 * fine.norm()


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in CAUSAL if f in ("llama", "gpt2")])
def test_the_trainer_trains_it(name, family, tmp_path):
    compress(name, family).save(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    data = [{"input_ids": ids, "labels": ids} for ids in small_models.data(family, rows=8)]
    settings = transformers.TrainingArguments(
        tmp_path / "run", max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
        activation_checkpointing=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in CAUSAL if f in ("llama", "gpt2", "opt")])
def test_it_takes_lora_and_merges_it(name, family, tmp_path):
    from peft import PeftModel, get_peft_model

    model = compress(name, family).model
    tuned = get_peft_model(model, lora_config(model, target_modules="all-linear", r=2))
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.3)
    expected = small_models.logits(tuned.base_model.model, family)
    try:
        merged = tuned.merge_and_unload()
    except ValueError as error:
        # A grid or a pattern has no place for the sum; nothing has changed, and the adapter is kept beside it.
        assert "cannot be merged" in str(error)
        assert torch.equal(small_models.logits(tuned.base_model.model, family), expected)
        tuned.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(compress(name, family).model, tmp_path / "adapter")
        assert torch.equal(small_models.logits(again.base_model.model, family), expected)
        return
    torch.testing.assert_close(small_models.logits(merged, family), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    assert torch.equal(small_models.logits(type(merged).from_pretrained(tmp_path), family), small_models.logits(merged, family))


@every_pair
def test_merged_to_dense_it_is_a_plain_model_of_the_same_function_or_refused_untouched(name, family, tmp_path):
    model = compress(name, family).model
    expected = small_models.logits(model, family)
    try:
        merge_to_dense(model)
    except ValueError as error:
        assert "has no dense form" in str(error) or "has no place for" in str(error)
        assert torch.equal(small_models.logits(model, family), expected)
        return
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(small_models.logits(plain, family), expected, rtol=1e-3, atol=1e-3)
    weights = {n for n, p in small_models.model(family).named_parameters() if p.ndim > 1}
    assert {n for n, p in plain.named_parameters() if p.ndim > 1} == weights


@pytest.mark.parametrize("share", [0.85, 0.7])
@every_method
def test_a_target_size_is_met_to_half_a_percent_or_refused(name, share):
    made = compressor(name)
    # Wide enough for one step of the rank to be less than a percent of the parameters.
    wide = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SPECIAL, **wide, max_position_embeddings=64))
    measure = made.shrinks[0]
    total = getattr(size(model), measure)
    data = small_models.data("llama", rows=8, length=64) if made.needs_data else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer tokens than inputs
        knob, whole_steps = made.budget_knob, all(isinstance(end, int) for end in made.budget_range)
        try:
            result = made.compress(model, data, **{measure: share})
        except ValueError as error:
            # Whole numbers of bits come as near as they can; what they give is met exactly.
            nearest = re.search(rf"cannot reach .* by {knob}; the nearest it gives are ([\d,]+)", str(error))
            assert whole_steps and nearest
            share = int(nearest[1].replace(",", "")) / total
            result = dataclasses.replace(made, **{knob: made.budget_range[0]}).compress(model, data, **{measure: share * (1 + 1e-6)})
    kept = numbers(model) if measure == "parameters" else sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert abs(kept - share * total) <= 0.005 * share * total
    assert result.model.config.quantization_config.provenance[-1]["knobs"][knob] != getattr(made, knob)
    with pytest.raises(ValueError, match=f"cannot reach .* by {knob}; the nearest"):
        made.compress(small_models.model("llama"), small_models.data("llama") if made.needs_data else None, **{measure: 0.001})


@every_method
def test_bad_requests_are_one_clear_error_and_change_nothing(name):
    made = compressor(name)
    model = small_models.model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = small_models.data("llama") if made.needs_data else None
    with pytest.raises(UserError, match="unknown knob 'no_such_knob'"):
        build(name, "compressor", {"no_such_knob": 1})
    with pytest.raises(ValueError, match="is no transformers model"):
        made.compress(torch.nn.Linear(2, 2), data)
    if made.needs_data:
        with pytest.raises(ValueError, match="needs calibration data"):
            made.compress(model)
        with pytest.raises(ValueError, match="need a tokenizer"):
            made.compress(model, ["w1 w2"])
        with pytest.raises(UserError, match="empty"):
            made.compress(model, [])
        blank = [{"input_ids": torch.zeros(2, 6, dtype=torch.long), "attention_mask": torch.zeros(2, 6, dtype=torch.long)}]
        with pytest.raises(ValueError, match="pad"):
            made.compress(model, blank)
    if "target_modules" in {field.name for field in dataclasses.fields(made)}:
        with pytest.raises(ValueError, match="matches no linear layer.*did you mean 'q_proj'"):
            dataclasses.replace(made, target_modules=["q_prj"]).compress(model, data)
        with pytest.raises(ValueError, match="experts.*three-dimensional"):
            made.compress(small_models.mixtral(), data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


@every_method
def test_a_weight_or_an_activation_that_is_not_finite_is_named(name):
    made = compressor(name)
    model = small_models.model("llama")
    data = small_models.data("llama") if made.needs_data else None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp"):
        made.compress(model, data)

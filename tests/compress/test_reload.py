"""Registration, the format of config.json, and checkpoints that are not whole."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import small_models
from echelon.compress import SVD, EchelonConfig, from_config
from echelon.models.reload import fold, unfold

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def compressed(family="llama", **knobs):
    return SVD(**{"ratio": 0.6, "round_to": 1} | knobs).compress(small_models.model(family))


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True)


def test_importing_echelon_imports_neither_torch_nor_transformers():
    done = python("import sys, echelon; assert not {'torch', 'transformers', 'peft'} & set(sys.modules), sorted(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers; import echelon",
        "import echelon; sys.modules.pop('echelon'); sys.modules.pop('echelon.hooks'); import echelon; import transformers",
        "import transformers.quantizers.auto; import echelon; import importlib; importlib.reload(echelon); importlib.reload(echelon.hooks)",
    ],
)  # fmt: skip
def test_the_order_and_number_of_imports_does_not_matter(imports, tmp_path):
    compressed().save(tmp_path / "m")
    code = f"import sys; {imports}; import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1])"
    code += "; print(type(m.model.layers[0].mlp.up_proj).__name__); print(sum(type(f).__name__ == '_AfterImport' for f in sys.meta_path))"
    done = python(code, tmp_path / "m")
    assert done.stdout.split() == ["LowRankLinear", "0"], done.stderr


def test_config_json_is_compact_and_unfolds_to_every_module(tmp_path):
    result = compressed()
    result.save(tmp_path)
    noted = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert noted["quant_method"] == "echelon" and noted["version"] == 1
    assert len(noted["modules"]) == 7  # two layers, seven kinds of matrices
    assert noted["modules"]["model.layers.{0-1}.mlp.up_proj"]["rank"] == result.report.modules["model.layers.0.mlp.up_proj"]["rank"]
    assert EchelonConfig(**noted).modules == result.model.config.quantization_config.modules
    assert noted["provenance"][0]["method"] == "svd" and noted["provenance"][0]["knobs"]["ratio"] == 0.6


def test_folding_is_reversible_also_for_scattered_layers_and_different_specs():
    modules = {f"model.layers.{i}.mlp.down_proj": {"kind": "lowrank", "rank": 3 if i in (1, 2, 7, 11) else 4} for i in range(12)}
    modules |= {"lm_head": {"kind": "linear"}, "model.layers.3": {"kind": "x.block"}, "h.10.a.2.b": {"kind": "linear"}}
    folded = fold(modules)
    assert "model.layers.{1-2,7,11}.mlp.down_proj" in folded and len(folded) == 5
    assert unfold(folded) == modules


def test_a_newer_format_and_an_unknown_kind_are_refused(tmp_path):
    compressed().save(tmp_path)
    path = tmp_path / "config.json"
    for change, error in (({"version": 2}, "newer echelon"), ({"modules": {"model.layers.0.mlp.up_proj": {"kind": "svd.spline"}}}, "unknown kind")):
        config = json.loads(path.read_text())
        kept = json.dumps(config)
        config["quantization_config"] |= change
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=error):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        path.write_text(kept)


def test_kinds_are_looked_for_inside_the_package_only(tmp_path):
    compressed().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"] = {"lm_head": {"kind": "os.path.join"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown kind of module 'os.path.join'"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["up.weight", "up.bias", "down.weight"])
def test_a_checkpoint_without_one_of_our_tensors_is_refused(lost, tmp_path):
    compressed("gpt2").save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"transformer.h.1.mlp.c_fc.{lost}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"no tensor transformer\.h\.1\.mlp\.c_fc\.{lost}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path):
    compressed().model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    shards[1].write_bytes(shards[1].read_bytes()[:-200])
    with pytest.raises(Exception, match="(?i)incomplete|buffer|shard|deserializ"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_methods_can_follow_each_other(tmp_path):
    model = compressed(target_modules="attention").model
    SVD(ratio=0.5, round_to=1, target_modules="mlp").compress(model)
    noted = model.config.quantization_config
    assert [entry["knobs"]["target_modules"] for entry in noted.provenance] == ["attention", "mlp"] and len(noted.modules) == 14
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(small_models.logits(again, "llama"), small_models.logits(model, "llama"))
    with pytest.warns(UserWarning, match="cannot compress 14 of its targets.* LowRankLinear already"):
        same = SVD(ratio=0.5, round_to=1).compress(again)
    assert same.report.parameters_after == same.report.parameters_before


def test_a_new_model_of_the_compressed_shape_has_weights(tmp_path):
    result = compressed()
    result.save(tmp_path)
    with torch.random.fork_rng():
        made = from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in result.model.state_dict().items()}
    assert 0.01 < made.model.layers[0].mlp.up_proj.down.weight.std() < 0.04  # initializer_range is 0.02
    made.save_pretrained(tmp_path / "b")
    assert torch.equal(small_models.logits(type(made).from_pretrained(tmp_path / "b"), "llama"), small_models.logits(made.eval(), "llama"))
    with pytest.raises(ValueError, match="no quantization_config of echelon"):
        from_config(small_models.model("llama").config)


def test_another_head_finds_the_same_modules(tmp_path):
    result = compressed()
    result.save(tmp_path)
    made = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(made.model.layers[1].mlp.down_proj.up.weight, result.model.model.layers[1].mlp.down_proj.up.weight)
    assert made.model.layers[1].mlp.down_proj.weight.dtype == torch.float32


def test_device_map_and_offloading_work(tmp_path):
    result = compressed()
    result.save(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(small_models.logits(made, "llama"), small_models.logits(result.model, "llama"))


def test_tensor_parallelism_and_compressing_on_the_fly_are_refused(tmp_path):
    result = compressed()
    result.save(tmp_path / "a")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    config.distributed_config = object()
    with pytest.raises(ValueError, match="tensor parallelism"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a", config=config)
    small_models.model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="echelon compress"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=EchelonConfig())

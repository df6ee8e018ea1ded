"""Saving is all or nothing, and merging gives back plain models."""

import errno
import json

import pytest
import safetensors.torch
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import small_models
import tiny
from echelon.compress import SVD, LoRD, merge_to_dense, save
from echelon.errors import UserError


def compressed(family="llama"):
    return SVD(ratio=0.6, round_to=1).compress(small_models.model(family))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_in_the_middle_leaves_what_was_there(there, error, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if there:
        small_models.model("llama").save_pretrained(folder)
    before = contents(folder) if there else None

    def fail(self, *_, **__):
        raise error

    monkeypatch.setattr(tiny.tokenizer().__class__, "save_pretrained", fail)  # the weights have been written by then
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save(compressed().model, folder, tiny.tokenizer())
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {folder}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there else [])
    assert not there or contents(folder) == before


def test_a_save_replaces_a_model_as_a_whole_but_nothing_else(tmp_path):
    folder = tmp_path / "model"
    small_models.model("opt").save_pretrained(folder, max_shard_size="20KB")
    result = compressed()
    result.save(folder)
    assert sorted(contents(folder)) == ["compression_report.json", "config.json", "generation_config.json", "model.safetensors"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(UserError, match="exists and is no model"):
            result.save(path)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "thesis"}


def test_gpt2_merges_to_conv1d_that_plain_transformers_reads(tmp_path):
    result = compressed("gpt2")
    expected = small_models.logits(result.model, "gpt2")
    merge_to_dense(result.model).save_pretrained(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {k: v.shape for k, v in keys.items()} == {k: v.shape for k, v in _saved(small_models.model("gpt2"), tmp_path / "dense").items()}
    assert isinstance(result.model.transformer.h[0].mlp.c_fc, Conv1D)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(small_models.logits(again, "gpt2"), expected, rtol=1e-4, atol=1e-4)


def _saved(model, folder):
    model.save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_llama_gets_the_biases_that_lord_made_and_mistral_has_no_place_for_them(tmp_path):
    made = LoRD(rank=0.4, round_rank=1, target_modules=["down_proj", "q_proj"], nsamples=8)
    model = made.compress(small_models.model("llama"), small_models.data("llama")).model
    expected = small_models.logits(model, "llama")
    merge_to_dense(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mlp_bias"] and config["attention_bias"]
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0 and not model.model.layers[0].mlp.up_proj.bias.any()
    torch.testing.assert_close(small_models.logits(type(model).from_pretrained(tmp_path), "llama"), expected, rtol=1e-4, atol=1e-4)
    other = made.compress(small_models.model("mistral"), small_models.data("mistral")).model
    with pytest.raises(ValueError, match=r"no place for model\.layers\.0\.mlp\.down_proj\.bias"):
        merge_to_dense(other)


def test_a_plain_model_is_dense_already():
    model = small_models.model("llama")
    assert merge_to_dense(model) is model

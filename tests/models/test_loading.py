"""Models from folders and by name; whatever is wrong with one is a single line."""

import json

import pytest
import torch
import transformers

import small_folders
from echelon.errors import UserError
from echelon.models import LoadedModel, embedded_dir, load
from echelon.models.loading import load_encoder


def test_a_folder_gives_a_model_in_evaluation_mode_and_its_tokenizer_padding_on_the_left(tmp_path):
    model, tokenizer = load(small_folders.language_model(tmp_path))
    assert isinstance(model, transformers.LlamaForCausalLM) and not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer("Sea waits.").input_ids == [small_folders.WORDS.index(word) for word in ("Sea", "waits", ".")]


def test_the_embedded_model_is_stored_in_two_bytes_and_loaded_in_four_unless_asked_otherwise():
    assert json.loads((embedded_dir() / "lm" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load("embedded").model.dtype == torch.float32
    assert load("embedded", dtype="bfloat16").model.dtype == load("embedded", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_checkpoint_keeps_its_own_dtype_unless_asked_otherwise(tmp_path):
    transformers.LlamaForCausalLM.from_pretrained(small_folders.language_model(tmp_path)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).model.dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").model.dtype == torch.float32


def test_an_encoder_decoder_model_is_loaded_as_one(tmp_path):
    config = transformers.T5Config(
        vocab_size=len(small_folders.WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    small_folders.tokenizer().save_pretrained(tmp_path)
    assert isinstance(load(tmp_path), LoadedModel) and load(tmp_path).model.config.is_encoder_decoder


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    folder = small_folders.language_model(tmp_path)
    before = torch.random.get_rng_state()
    load(folder)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "harm", ["no config", "config is no JSON", "unknown family", "no weights", "weights cut short", "weights of another size", "no tokenizer"]
)
def test_a_damaged_folder_is_one_line_that_names_it(tmp_path, harm):
    folder = tmp_path / "model"
    small_folders.language_model(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    match harm:
        case "no config":
            config.unlink()
        case "config is no JSON":
            config.write_text('{"model_type": ')
        case "unknown family":
            config.write_text(json.dumps({"model_type": "no_such_family"}))
        case "no weights":
            weights.unlink()
        case "weights cut short":
            weights.write_bytes(weights.read_bytes()[:200])
        case "weights of another size":
            config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 32}))
        case "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
    with pytest.raises(UserError, match="cannot load model .*model'") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_name_that_leads_nowhere_and_a_type_that_is_none_are_named():
    with pytest.raises(UserError, match="cannot load model '/no/such/folder'.*give a model folder, a hub id, or 'embedded'"):
        load("/no/such/folder")
    with pytest.raises(UserError, match="dtype 'float23' is not a torch dtype; use auto, float32, bfloat16 or float16"):
        load("embedded", dtype="float23")
    with pytest.raises(UserError, match="dtype 'nn' is not a torch dtype"):
        load("embedded", dtype="nn")


def test_the_embedded_encoder_is_the_same_object_each_time_and_a_missing_one_is_named():
    assert load_encoder("embedded") is load_encoder("embedded")
    with pytest.raises(UserError, match="cannot load encoder '/no/such/folder'") as caught:
        load_encoder("/no/such/folder")
    assert "\n" not in str(caught.value)

"""RankGen's encoder: what a vector is, what is cut from long texts, and the folders that it is loaded from."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_folders
from echelon.errors import UserError
from echelon.score import RankGenEncoder, RankGenScorer, ScoreItem, resolve

PRE, SUFFI, END = (small_folders.WORDS.index(word) for word in ("pre", "suffi", "</s>"))
TEXTS = ["Sea waits.", "Lamp burns slowly and then Gull calls. Storm rises.", "Door", "Child sleeps and then Rope falls. " * 2]


def words(text):
    return [small_folders.WORDS.index(word) for word in text.replace(".", " .").split()]


def encoder(family="bert", **settings):
    backbone = {"bert": small_folders.bert, "t5": small_folders.t5}[family]()
    settings = {"prefix_max_length": 40, "suffix_max_length": 20} | settings
    made = RankGenEncoder(backbone, small_folders.tokenizer(ending=family == "t5"), **settings).eval()
    with torch.no_grad():
        made.projection.weight.add_(0.5 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize(("side", "marker"), [("prefix", PRE), ("suffix", SUFFI)])
def test_a_vector_is_the_projected_state_of_the_first_token_alone(family, side, marker):
    made = encoder(family)
    vectors = made.encode(TEXTS, side)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([[marker, *words(text), *([END] if family == "t5" else [])]])
        with torch.no_grad():
            hidden = made.backbone(input_ids=ids).last_hidden_state[0, 0]
        torch.testing.assert_close(vector, made.projection.weight.detach() @ hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_padding_to_any_length_changes_nothing(family, pooling):
    made = encoder(family, pooling=pooling)
    alone = made.encode(["Sea waits."], "prefix")[0]
    for longer in range(1, 37, 7):
        assert (made.encode(["Sea waits.", "Sea " * longer], "prefix")[0] - alone).abs().max() < 1e-4


def test_vectors_have_no_unit_norm_and_scores_no_temperature():
    made = encoder()
    prefix, suffix = made.encode(TEXTS, "prefix"), made.encode(TEXTS, "suffix")
    assert ((prefix.norm(dim=1) - 1).abs() > 0.1).all()
    scores = RankGenScorer(made).score([ScoreItem(TEXTS[0], text) for text in TEXTS])
    torch.testing.assert_close(scores, suffix @ prefix[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        made.projection.weight.mul_(3)
    torch.testing.assert_close(RankGenScorer(made).score([ScoreItem(TEXTS[0], text) for text in TEXTS]), 9 * scores, atol=1e-3, rtol=1e-3)


def test_an_untrained_projection_is_plain_pooling():
    made = RankGenEncoder(small_folders.bert(), small_folders.tokenizer(), prefix_max_length=40, suffix_max_length=20)
    assert torch.equal(made.projection.weight, torch.eye(16)) and made.projection.bias is None


@pytest.mark.parametrize("ending", [False, True])
def test_a_long_prefix_keeps_its_end_and_a_long_suffix_its_beginning(ending):
    made = RankGenEncoder(small_folders.bert(), small_folders.tokenizer(ending=ending), prefix_max_length=8, suffix_max_length=6)
    text = " ".join(small_folders.NOUNS)
    ids, tail = words(text), [END] * ending
    assert made.tokens([text], "prefix") == [[PRE, *[*ids, *tail][-7:]]]
    assert made.tokens([text], "suffix") == [[SUFFI, *ids[:5]]]  # an end token is cut off with the rest
    assert made.tokens(["Sea Boat", ""], "prefix") == [[PRE, *words("Sea Boat"), *tail], [PRE, *tail]]
    as_released = RankGenEncoder(small_folders.bert(), small_folders.tokenizer(ending=ending), prefix_max_length=8, suffix_max_length=6, keep_prefix="start")
    assert as_released.tokens([text], "prefix") == [[PRE, *ids[:7]]]


def test_what_stands_before_the_window_of_a_prefix_has_no_influence():
    made = encoder(prefix_max_length=10)
    end = "Lamp burns and then Gull calls and Storm rises"
    assert len(words(end)) == 9
    one, other, changed = made.encode([f"Sea waits. {end}", f"Bell stops slowly. Fire. {end}", f"Sea waits. {end[:-5]}falls"], "prefix")
    torch.testing.assert_close(one, other)
    assert (one - changed).abs().max() > 1e-3


def test_each_prefix_is_encoded_once():
    scorer = RankGenScorer(encoder())
    for _ in range(3):
        scorer.score([ScoreItem(prefix, text) for prefix in TEXTS[:2] for text in TEXTS])
    assert scorer.counts == {"prefix": 2, "suffix": 24}
    assert scorer.score([]).shape == (0,)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_checkpoint_is_read_and_run_in_float32(tmp_path, embedding, dtype):
    model, matrix = small_folders.t5(), torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    tensors = {f"t5_encoder.{name}": value.clone().to(dtype) for name, value in model.state_dict().items()}
    table = model.shared.weight.detach().clone().to(dtype)
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        tensors.pop(f"t5_encoder.{name}", None)
        if embedding in (name, "both"):
            tensors[f"t5_encoder.{name}"] = table.clone()
    save_file({**tensors, "projection.weight": matrix.to(dtype)}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    small_folders.tokenizer(ending=True).save_pretrained(tmp_path)
    rounded = copy.deepcopy(model).to(dtype).float()
    made = RankGenEncoder.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    ids = torch.tensor([[SUFFI, *words("Sea waits."), END]])
    with torch.no_grad():
        expected = matrix.to(dtype).float() @ rounded(input_ids=ids).last_hidden_state[0, 0]
    torch.testing.assert_close(made.encode(["Sea waits."], "suffix")[0], expected, atol=1e-4, rtol=1e-4)
    assert isinstance(resolve(tmp_path), RankGenScorer)


def published(folder, **changes):
    model = small_folders.t5()
    tensors = {f"t5_encoder.{name}": value.clone() for name, value in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    tensors["projection.weight"] = torch.eye(16)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    small_folders.tokenizer(ending=True).save_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projection__weight": None}, "has no t5_encoder.* and projection.weight"),
        ({"t5_encoder__encoder__final_layer_norm__weight": None}, r"do not fit \(encoder.final_layer_norm.weight\)"),
        ({"t5_encoder__shared__weight": None}, "do not fit"),
        ({"t5_encoder__encoder__extra": torch.zeros(1)}, r"do not fit \(encoder.extra\)"),
        ({"projection__weight": torch.eye(8)}, "cannot load RankGen"),
    ],
)
def test_a_published_checkpoint_that_does_not_fit_is_refused(tmp_path, changes, said):
    published(tmp_path, **changes)
    with pytest.raises(UserError, match=said) as caught:
        RankGenEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(tmp_path):
    published(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled .bin weights are not read"):
        RankGenEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("adapted", [False, True])
def test_saved_and_loaded_it_gives_the_same_vectors(tmp_path, adapted):
    source = small_folders.encoder(tmp_path / "encoder")
    made = RankGenEncoder.from_backbone(source, prefix_max_length=30, suffix_max_length=9, pooling="mean", keep_prefix="start")
    if adapted:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            made.backbone = get_peft_model(made.backbone, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        made.adapted = True
    made.eval()
    with torch.no_grad():
        made.projection.weight.mul_(1.5)
    made.save_pretrained(tmp_path / "ranker")
    again = RankGenEncoder.from_pretrained(tmp_path / "ranker")
    assert (again.max_length, again.pooling, again.keep_prefix) == ({"prefix": 30, "suffix": 9}, "mean", "start")
    for side in ("prefix", "suffix"):
        assert torch.equal(made.encode(TEXTS, side), again.encode(TEXTS, side))
    files = {path.relative_to(tmp_path / "ranker").as_posix() for path in (tmp_path / "ranker").rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert ("adapter/adapter_model.safetensors" in files) == adapted and ("backbone/model.safetensors" in files) != adapted
    assert set(load_file(tmp_path / "ranker" / "projection.safetensors")) == {"weight"}


@pytest.mark.parametrize("harm", ["settings cut short", "a setting missing", "an unknown setting", "no projection", "projection cut short", "no backbone"])
def test_a_damaged_folder_is_one_line(tmp_path, harm):
    folder = tmp_path / "ranker"
    encoder().save_pretrained(folder)
    told = json.loads((folder / "rankgen.json").read_text())
    projection = folder / "projection.safetensors"
    match harm:
        case "settings cut short":
            (folder / "rankgen.json").write_text('{"source": ')
        case "a setting missing":
            del told["adapted"]
            (folder / "rankgen.json").write_text(json.dumps(told))
        case "an unknown setting":
            (folder / "rankgen.json").write_text(json.dumps({**told, "temperature": 2}))
        case "no projection":
            projection.unlink()
        case "projection cut short":
            projection.write_bytes(projection.read_bytes()[:50])
        case "no backbone":
            (folder / "backbone" / "config.json").unlink()
    with pytest.raises(UserError, match="cannot load") as caught:
        RankGenEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pooling": "cls"}, "pooling is 'cls'"),
        ({"keep_prefix": "middle"}, "keep_prefix is 'middle'"),
        ({"prefix_max_length": 65}, r"prefix_max_length is 65; it must be in \[4, 64\]"),
        ({"suffix_max_length": 3}, r"suffix_max_length is 3; it must be in \[4, 64\]"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        encoder(**settings)


def test_the_embedded_ranker_prefers_what_really_followed():
    prefix = "The captain lowered the sails before the storm reached the ship. The sailors tied themselves to the mast"
    followed, unrelated = " and waited for the first wave to break over the deck.", " because the recipe needs two eggs and a cup of sugar."
    gold, other = RankGenScorer("embedded").score([ScoreItem(prefix, followed), ScoreItem(prefix, unrelated)]).tolist()
    assert gold > other

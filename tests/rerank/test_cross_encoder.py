"""Cross-encoders against sentence-transformers and transformers themselves."""

import copy
import functools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as Theirs

import tiny
from echelon.data.passages import passages
from echelon.errors import UserError
from echelon.models.loading import embedded_dir, embedded_encoder_dir
from echelon.models.randomness import own_randomness
from echelon.rerank import Cache, CrossEncoder, Request
from echelon.score import CrossEncoderScorer, UnigramOverlap

QUERY = "w1 w2 w3"
DOCS = ["w1 w2", "w9 w9 w4 w5 w6 w7", "w3", "w1 w2 w3 w4", "w30 w31 w32", "w8 " * 40]


@functools.cache
def network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = transformers.BertConfig(vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                         max_position_embeddings=64, num_labels=1, pad_token_id=0)  # fmt: skip
        made = transformers.BertForSequenceClassification(config).eval()
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3.0)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cross_encoder")
    network().save_pretrained(place)
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.padding_side = "right"  # BERT counts places from the left, padding included
    tokenizer.save_pretrained(place)
    return place


def ranked_alike(found, expected):
    assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
    assert [hit["score"] for hit in found] == pytest.approx([float(hit["score"]) for hit in expected], abs=1e-5)


def test_names_folders_and_objects_rank_as_theirs_with_their_keys(folder):
    theirs = Theirs(str(folder))
    expected = theirs.rank(QUERY, DOCS, return_documents=True)
    for model in (str(folder), theirs, CrossEncoderScorer(theirs)):
        found = CrossEncoder(model).rank(QUERY, DOCS, return_documents=True)
        ranked_alike(found, expected)
        assert [sorted(hit) for hit in found] == [sorted(hit) for hit in expected] and [hit["text"] for hit in found] == [hit["text"] for hit in expected]
    ranked_alike(CrossEncoder(theirs).rank(QUERY, DOCS, top_k=2), theirs.rank(QUERY, DOCS, top_k=2))


def test_a_classifier_with_its_tokenizer_needs_nothing_else():
    tokenizer = tiny.tokenizer()
    found = {hit["corpus_id"]: hit["score"] for hit in CrossEncoder((network(), tokenizer)).rank(QUERY, DOCS)}
    for place, text in enumerate(DOCS):
        with torch.no_grad():
            expected = network()(**tokenizer(QUERY, text, truncation=True, max_length=64, return_tensors="pt")).logits
        assert found[place] == pytest.approx(expected.item(), abs=1e-5)


def test_pairs_of_all_queries_go_out_together_and_change_no_score(folder):
    calls = []

    class Counting(Theirs):
        def predict(self, pairs, **more):
            calls.append(len(pairs))
            return super().predict(pairs, **more)

    requests = [Request.of(f"w{i} w{i + 1}", DOCS[i:], f"q{i}") for i in range(4)]
    together = CrossEncoder(Counting(str(folder)), batch_size=3).rerank(requests)
    assert calls == [6 + 5 + 4 + 3] and together.stats.prompts == 18 and together.stats.rounds == 1
    for request in requests:
        alone = CrossEncoder(str(folder)).rerank([request])
        assert list(alone.runs[request.qid]) == list(together.runs[request.qid])
        assert list(alone.runs[request.qid].values()) == pytest.approx(list(together.runs[request.qid].values()), abs=1e-5)


def test_scores_are_kept_by_the_weights_and_what_is_around_them(folder):
    cache, request = Cache(), Request.of(QUERY, DOCS)
    first = CrossEncoder(str(folder)).rerank([request], cache=cache)
    again = CrossEncoder(Theirs(str(folder))).rerank([request], cache=cache)
    assert again.runs == first.runs and again.stats.prompts == 0
    assert CrossEncoder(str(folder), max_length=5).rerank([request], cache=cache).stats.prompts == 6
    assert CrossEncoder(Theirs(str(folder), activation_fn=torch.nn.Identity())).rerank([request], cache=cache).stats.prompts == 6
    other = Theirs(str(folder))
    with torch.no_grad():
        next(other.model.parameters()).add_(1.0)
    assert CrossEncoder(other).rerank([request], cache=cache).stats.prompts == 6
    asked = []
    for length in (30, 5, 5):
        tokenizer = copy.deepcopy(tiny.tokenizer())
        tokenizer.model_max_length = length
        asked.append(CrossEncoder((network(), tokenizer)).rerank([request], cache=cache).stats.prompts)
    assert asked == [6, 6, 0]


def test_what_scores_are_is_told_by_the_last_layer(folder):
    request = Request.of(QUERY, DOCS)
    assert CrossEncoder(str(folder)).rerank([request]).score_kind == "prob"
    assert CrossEncoder(Theirs(str(folder), activation_fn=torch.nn.Identity())).rerank([request]).score_kind == "logit"
    assert CrossEncoder((network(), tiny.tokenizer())).rerank([request]).score_kind == "logit"


def test_the_embedded_one_is_minilm_with_its_factors_added_and_its_own_head():
    path, folder = str(embedded_encoder_dir()), embedded_dir() / "reranker"
    kept, told = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    with own_randomness(0):
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).eval()
    weights = theirs.state_dict()
    for name, value in kept.items():
        name, value = name.removeprefix("base_model.model."), value.float()
        if name.endswith("lora_A.weight"):
            up = kept[f"base_model.model.{name.replace('lora_A', 'lora_B')}"].float()
            weights[name.replace("lora_A.", "")] += told["lora_alpha"] / told["r"] * up @ value
        elif "lora_B" not in name:
            weights[name].copy_(value)
    query, docs = "a storm at sea", ["The bread had risen overnight.", "A storm at sea sank the ship.", "Nobody slept while the wind blew. " * 60]
    pairs = transformers.AutoTokenizer.from_pretrained(path)([query] * 3, docs, truncation="only_second", max_length=256, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**pairs).logits[:, 0].tolist()
    before = torch.random.get_rng_state()
    hits = CrossEncoder().rank(query, docs)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert hits[0]["corpus_id"] == 1
    assert [hit["score"] for hit in sorted(hits, key=lambda hit: hit["corpus_id"])] == pytest.approx(expected, abs=1e-4)
    assert CrossEncoder().rerank([Request.of(query, docs)]).score_kind == "logit"


def test_the_embedded_one_finds_where_words_are_from():
    texts = [passage.text for passage in passages()][:30]
    reranker, first = CrossEncoder(max_length=64), 0
    for place in range(0, 30, 3):
        query = " ".join(texts[place].split()[20:40:2])
        first += reranker.rank(query, texts)[0]["corpus_id"] == place
    assert first >= 9


def test_any_scorer_or_function_will_do():
    assert [hit["corpus_id"] for hit in CrossEncoder(UnigramOverlap()).rank("sea storm", ["dry land", "the storm at sea", "a storm"])][-1] == 0
    found = CrossEncoder(lambda query, texts: [len(text) for text in texts]).rank("", ["aa", "b", "cccc", "dd"])
    assert [(hit["corpus_id"], hit["score"]) for hit in found] == [(2, 4.0), (0, 2.0), (3, 2.0), (1, 1.0)]
    with pytest.raises(UserError, match="CallableScorer has no name"):
        CrossEncoder(lambda query, texts: [0.0] * len(texts)).rerank([Request.of("", ["a"])], cache=Cache())


@pytest.mark.parametrize(("make", "said"), [
    (lambda: CrossEncoder("/no/such/model"), "cannot load cross-encoder '/no/such/model'"), (lambda: CrossEncoder(3), "int is no scorer"),
    (lambda: CrossEncoder(lambda query, texts: [1.0]), "one number each"),
    (lambda: CrossEncoder(lambda query, texts: [float("nan")] * 6), "scores must be numbers"),
    (lambda: CrossEncoder(max_length=513), "max_length is 513; the model reads at most 512"),
    (lambda: CrossEncoder(Theirs, max_length=5), "max_length is 5, and the model is loaded already"),
])  # fmt: skip
def test_what_cannot_score_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make().rank(QUERY, DOCS)

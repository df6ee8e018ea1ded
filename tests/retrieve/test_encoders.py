"""Encoders against plain forwards of their models, and what a fingerprint tells apart."""

import dataclasses
import functools
import pickle
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import small_folders
import tiny
from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.models import embedded_encoder_dir, load_encoder
from echelon.retrieve.encoders import ContinuationEncoder, PooledEncoder, SentenceEncoder, resolve_encoder
from echelon.retrieve.vector_cache import CachedEncoder
from echelon.score import RankGenScorer, ScoreItem
from small_encoder import untrained_rankgen

TEXTS = ["Sea waits.", "Lamp burns slowly and then Gull calls. Storm rises.", "Door", "Child sleeps and then Rope falls. " * 3, "Sea waits."]
DOCS = [Doc(f"d{i}", text) for i, text in enumerate(TEXTS)]
ENGLISH = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply on Monday."]


@functools.cache
def folder(family="bert"):
    import tempfile

    return small_folders.encoder(tempfile.mkdtemp(), family)


def made(kind):
    return {
        "sentence": lambda: SentenceEncoder("embedded"),
        "pooled": lambda: PooledEncoder(folder()),
        "t5": lambda: PooledEncoder(folder("t5"), normalize=False),
        "causal": lambda: PooledEncoder((tiny.model("llama"), tiny.tokenizer()), pooling="last"),
        "rankgen": lambda: ContinuationEncoder(untrained_rankgen()),
    }[kind]()


pytestmark = pytest.mark.filterwarnings("ignore:1 of . documents are longer than the 12 tokens")
KINDS = ["sentence", "pooled", "t5", "causal", "rankgen"]


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_finite_float32_rows_of_the_width_told_and_none_for_nothing(kind):
    encoder = made(kind)
    vectors = encoder.encode_documents(DOCS)
    assert vectors.shape == (len(DOCS), encoder.dim) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert encoder.encode_queries([]).shape == encoder.encode_documents([]).shape == (0, encoder.dim)
    assert encoder.encode_queries(["", "Sea"]).shape == (2, encoder.dim)
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) if encoder.similarity == "cosine" else (np.abs(lengths - 1) > 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_order_company_and_batches_change_nothing(kind):
    encoder = made(kind)
    vectors = encoder.encode_documents(DOCS)
    order = [3, 0, 4, 2, 1]
    small = dataclasses.replace(encoder, batch_size=2)
    np.testing.assert_allclose(small.encode_documents([DOCS[i] for i in order]), vectors[order], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([encoder.encode_documents([doc]) for doc in DOCS]), vectors, atol=1e-5)
    assert (vectors[0] == vectors[4]).all()


def test_blocks_of_texts_do_not_show(monkeypatch):
    texts = [small_folders.document(seed, sentences=1) for seed in range(9)] + ["Sea " * 80]
    with pytest.warns(UserWarning, match="1 of 10 queries"):
        expected = made("pooled").encode_queries(texts)
    monkeypatch.setattr("echelon.retrieve.text_encoder.BLOCK", 4)
    with pytest.warns(UserWarning, match="1 of 10 queries"):
        np.testing.assert_allclose(made("pooled").encode_queries(texts), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_is_of_the_last_layer_of_an_unpadded_forward(family, pooling):
    encoder = PooledEncoder(folder(family), pooling=pooling, normalize=False)
    model, tokenizer = encoder._loaded
    for text, vector in zip(TEXTS, encoder.encode_queries(TEXTS), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-4)


def test_the_embedded_encoder_gives_minilms_known_similarities_two_ways():
    sentence, pooled = SentenceEncoder("embedded"), PooledEncoder("embedded")
    vectors = sentence.encode_queries(ENGLISH)
    assert vectors[0] @ vectors[1] == pytest.approx(0.7614, abs=2e-4) and abs(vectors[0] @ vectors[2]) < 0.1
    np.testing.assert_allclose(pooled.encode_queries(ENGLISH), vectors, atol=1e-5)
    assert (sentence.dim, sentence.similarity, sentence.longest("document")) == (384, "cosine", 256)
    assert pooled.longest("document") == 512


def test_title_and_text_are_encoded_together():
    encoder = made("pooled")
    titled = encoder.encode_documents([Doc("a", "Sea waits.", "Storm")])
    np.testing.assert_allclose(titled, encoder.encode_queries(["Storm\nSea waits."]), atol=1e-6)
    assert np.abs(titled - encoder.encode_queries(["Sea waits."])).max() > 1e-3


@pytest.mark.parametrize("kind", [SentenceEncoder, PooledEncoder])
def test_prompts_stand_before_the_texts_of_their_side(kind):
    plain = kind("embedded")
    prompted = kind("embedded", query_prompt="query: ", document_prompt="passage: ")
    np.testing.assert_allclose(prompted.encode_queries(ENGLISH), plain.encode_queries(["query: " + text for text in ENGLISH]), atol=1e-5)
    docs = [Doc(str(i), text) for i, text in enumerate(ENGLISH)]
    expected = plain.encode_documents([Doc(doc.id, "passage: " + doc.text) for doc in docs])
    np.testing.assert_allclose(prompted.encode_documents(docs), expected, atol=1e-5)


def test_a_models_own_prompts_are_used_and_counted():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedded_encoder_dir()), device="cpu", prompts={"query": "Represent this query: ", "passage": "Text: "})
    encoder = SentenceEncoder(model)
    plain = SentenceEncoder("embedded")
    np.testing.assert_allclose(encoder.encode_queries(ENGLISH), plain.encode_queries(["Represent this query: " + text for text in ENGLISH]), atol=1e-5)
    assert encoder.lengths(["food"], "query") == plain.lengths(["Represent this query: food"], "query")
    assert encoder.fingerprint != plain.fingerprint


@pytest.mark.parametrize("kind", ["sentence", "pooled", "rankgen"])
def test_texts_that_are_too_long_are_cut_counted_and_told(kind):
    encoder = {"sentence": SentenceEncoder("embedded", max_length=8), "pooled": PooledEncoder(folder(), max_length=8), "rankgen": made("rankgen")}[kind]
    limit = encoder.longest("document")
    word = "w5 " if kind == "rankgen" else "Sea "
    cut = limit - len(encoder.tokenizer((encoder.prompt("document") + "").strip()).input_ids)
    docs = [Doc("fits", word * cut), Doc("long", word * (cut + 1)), Doc("again", word * (cut + 1)), Doc("longer", word * 300)]
    assert encoder.lengths([docs[0].text, docs[1].text], "document") == [limit, limit + 1]
    with pytest.warns(UserWarning, match=f"2 of 3 documents are longer than the {limit} tokens that are read of each"):
        vectors = encoder.encode_documents(docs)
    np.testing.assert_allclose(vectors, np.tile(vectors[0], (4, 1)), atol=1e-5)
    assert encoder.truncated == {"query": 0, "document": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_documents(docs[:1])
    assert load_encoder().max_seq_length == 256


def test_rankgen_scores_queries_as_prefixes_and_documents_as_suffixes():
    model = untrained_rankgen()
    encoder = ContinuationEncoder(model)
    queries, docs = ["w1 w2 w3", "w30 w31"], [Doc("a", "w4 w5"), Doc("b", "w9 w9 w9"), Doc("c", "w20")]
    scores = encoder.encode_queries(queries) @ encoder.encode_documents(docs).T
    expected = RankGenScorer(model).score([ScoreItem(query, doc.text) for query in queries for doc in docs]).reshape(2, 3)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_a_fingerprint_follows_what_vectors_depend_on_and_nothing_else(tmp_path):
    first = PooledEncoder(folder())
    assert len(first.fingerprint) < 60
    small_folders.encoder(tmp_path / "copy")
    assert PooledEncoder(str(tmp_path / "copy"), batch_size=3).fingerprint == first.fingerprint
    others = [
        PooledEncoder(folder(), **knob)
        for knob in ({"pooling": "cls"}, {"normalize": False}, {"query_prompt": "q "}, {"document_prompt": "d "}, {"max_length": 20}, {"dtype": "bfloat16"})
    ]
    model, tokenizer = AutoModel.from_pretrained(folder(), add_pooling_layer=False), AutoTokenizer.from_pretrained(folder())
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-4
    others += [PooledEncoder((model, tokenizer)), PooledEncoder((AutoModel.from_pretrained(folder(), add_pooling_layer=False), tiny.tokenizer()))]
    others += [PooledEncoder(folder("t5")), ContinuationEncoder(untrained_rankgen()), ContinuationEncoder(untrained_rankgen(suffix_max_length=8))]
    others += [SentenceEncoder("embedded"), SentenceEncoder("embedded", truncate_dim=32), SentenceEncoder("embedded", normalize=False)]
    prints = [encoder.fingerprint for encoder in [first, *others]]
    assert len(set(prints)) == len(prints)


def test_truncated_dimensions_have_length_one_again():
    whole, short = SentenceEncoder("embedded").encode_queries(ENGLISH), SentenceEncoder("embedded", truncate_dim=32)
    made = short.encode_queries(ENGLISH)
    assert short.dim == 32
    np.testing.assert_allclose(made, whole[:, :32] / np.linalg.norm(whole[:, :32], axis=1, keepdims=True), atol=1e-5)


def test_a_lower_precision_is_used_and_leaves_the_shared_model_alone():
    exact = SentenceEncoder("embedded").encode_queries(ENGLISH)
    rough = SentenceEncoder("embedded", dtype="bfloat16").encode_queries(ENGLISH)
    assert 1e-4 < np.abs(rough - exact).max() < 0.05
    assert {weight.dtype for weight in load_encoder().parameters()} == {torch.float32}
    given = AutoModel.from_pretrained(folder(), add_pooling_layer=False)
    PooledEncoder((given, AutoTokenizer.from_pretrained(folder())), dtype="bfloat16").encode_queries(["Sea"])
    assert given.dtype == torch.float32


def test_a_batch_that_is_too_large_for_memory_is_halved(monkeypatch):
    encoder, sizes = PooledEncoder(folder(), batch_size=32), []
    forward = PooledEncoder._vectors

    def scarce(self, texts, side, batch_size):
        sizes.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, texts, side, batch_size)

    expected = encoder.encode_queries(TEXTS)
    monkeypatch.setattr(PooledEncoder, "_vectors", scarce)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=1e-5)
    assert sizes == [32, 16, 8, 4]
    monkeypatch.setattr(PooledEncoder, "_vectors", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("never enough")))
    with pytest.raises(torch.OutOfMemoryError, match="never enough"):
        encoder.encode_queries(TEXTS)


def test_what_goes_to_another_process_is_the_knobs_alone():
    encoder = PooledEncoder(folder(), pooling="cls")
    vectors = encoder.encode_queries(TEXTS)
    packed = pickle.dumps(encoder)
    assert len(packed) < 1000
    assert (pickle.loads(packed).encode_queries(TEXTS) == vectors).all()


@pytest.mark.parametrize("encoder", [SentenceEncoder("embedded", query_prompt="q: "), PooledEncoder(pooling="cls"), ContinuationEncoder(batch_size=7)])
def test_an_encoder_is_made_again_from_its_settings(encoder):
    import json

    again = resolve_encoder(json.loads(json.dumps(encoder.settings)))
    assert again == encoder and type(again) is type(encoder)


def test_encoders_are_found_by_what_users_write(tmp_path):
    untrained_rankgen().save_pretrained(tmp_path)
    assert resolve_encoder() == resolve_encoder("embedded") == SentenceEncoder("embedded")
    assert resolve_encoder("embedded", pooling="cls", batch_size=3) == PooledEncoder(pooling="cls", batch_size=3)
    assert resolve_encoder(folder()) == PooledEncoder(folder())
    assert resolve_encoder(embedded_encoder_dir()) == SentenceEncoder(str(embedded_encoder_dir()))
    assert resolve_encoder("rankgen") == ContinuationEncoder("embedded")
    assert resolve_encoder(tmp_path) == ContinuationEncoder(str(tmp_path)) and resolve_encoder(f"rankgen:{tmp_path}") == ContinuationEncoder(str(tmp_path))
    assert isinstance(resolve_encoder(untrained_rankgen()), ContinuationEncoder)
    assert isinstance(resolve_encoder(load_encoder()), SentenceEncoder)
    assert isinstance(resolve_encoder((tiny.model("llama"), tiny.tokenizer()), pooling="last"), PooledEncoder)
    mine = made("pooled")
    assert resolve_encoder(mine) is mine


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PooledEncoder(batch_size=0), "batch_size is 0; it must be at least 1"),
        (lambda: PooledEncoder(pooling="max"), "pooling is 'max'; it must be one of mean, cls, last"),
        (lambda: PooledEncoder(max_length=3), "max_length is 3; it must be at least 4"),
        (lambda: PooledEncoder(dtype="int8"), "dtype is 'int8'; it must be one of float32"),
        (lambda: SentenceEncoder(truncate_dim=0), "truncate_dim is 0"),
        (lambda: PooledEncoder(folder(), max_length=65).encode_queries(["Sea"]), "max_length is 65; the model reads at most 64 tokens"),
        (lambda: SentenceEncoder("embedded", max_length=513).encode_queries(["Sea"]), "max_length is 513; the model reads at most 512 tokens"),
        (lambda: PooledEncoder("no/such-folder").encode_queries(["Sea"]), "cannot load encoder 'no/such-folder'"),
        (lambda: SentenceEncoder("no/such-folder").encode_queries(["Sea"]), "cannot load encoder 'no/such-folder'"),
        (lambda: ContinuationEncoder("no/such-folder").encode_queries(["Sea"]), "cannot load RankGen 'no/such-folder'"),
        (lambda: made("pooled").encode_queries("Sea"), "texts are one string; give a list of them"),
        (lambda: made("causal").settings, "made from a tuple, not from a name"),
        (lambda: resolve_encoder("embedded", poolin="cls"), "unknown knob 'poolin' of the encoder; its knobs are model, batch_size"),
        (lambda: resolve_encoder(made("pooled"), pooling="cls"), "PooledEncoder is an encoder already; it cannot take pooling"),
        (lambda: resolve_encoder(7), "7 is no encoder; give a name"),
        (lambda: resolve_encoder({"encoder": "colbert"}), "is no encoder"),
    ],
)
def test_what_is_wrong_is_one_line(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_vectors_that_are_no_numbers_name_their_text():
    model = AutoModel.from_pretrained(folder(), add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[small_folders.WORDS.index("Storm")] = torch.nan
    with pytest.raises(ValueError, match="the vector of the query 'Storm rises' is not finite"):
        PooledEncoder((model, AutoTokenizer.from_pretrained(folder()))).encode_queries(["Sea waits", "Storm rises"])


class Counting:
    """An encoder that counts what it is given."""

    dim, similarity, fingerprint = 3, "dot", "counting"

    def __init__(self, fingerprint="counting"):
        self.fingerprint, self.seen = fingerprint, []

    def encode_queries(self, texts):
        self.seen += texts
        return np.array([[len(text), text.count("e"), 1] for text in texts], np.float32).reshape(-1, 3)

    def encode_documents(self, docs):
        return 2 * self.encode_queries([doc.content for doc in docs])


def test_a_cached_encoder_encodes_nothing_twice_and_keeps_encoders_and_sides_apart(tmp_path):
    path = str(tmp_path / "deep" / "vectors.db")
    inner = Counting()
    cached = CachedEncoder(inner, path)
    first = cached.encode_queries(["one", "three", "one"])
    assert inner.seen == ["one", "three"] and (first == Counting().encode_queries(["one", "three", "one"])).all()
    again = CachedEncoder(Counting(), path)
    assert (again.encode_queries(["three", "seven", "one"]) == Counting().encode_queries(["three", "seven", "one"])).all()
    assert again.encoder.seen == ["seven"]
    assert (again.encode_documents([Doc("a", "one")]) == Counting().encode_documents([Doc("a", "one")])).all() and again.encoder.seen == ["seven", "one"]
    other = CachedEncoder(Counting("another"), path)
    other.encode_queries(["one"])
    assert other.encoder.seen == ["one"] and (other.fingerprint, other.dim, other.similarity) == ("another", 3, "dot")
    assert cached.encode_queries([]).shape == (0, 3)


def test_a_cache_that_is_none_is_one_line(tmp_path):
    (tmp_path / "text").write_text("this is no database, and long enough to be taken for a broken one " * 20)
    with pytest.raises(UserError, match="cannot use .*text as a cache of vectors: file is not a database"):
        CachedEncoder(Counting(), str(tmp_path / "text")).encode_queries(["one"])
    with pytest.raises(UserError, match="cannot use .* as a cache of vectors"):
        CachedEncoder(Counting(), str(tmp_path / "text" / "below")).encode_queries(["one"])
    path = str(tmp_path / "vectors.db")
    CachedEncoder(Counting(), path).encode_queries(["one"])
    wider = Counting()
    wider.dim = 4
    with pytest.raises(UserError, match="holds a vector of 3 numbers for an encoder of 4"):
        CachedEncoder(wider, path).encode_queries(["one"])

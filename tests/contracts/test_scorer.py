"""What every scorer owes: order and batching do not matter, nothing gives nothing, and it works wherever scorers are used."""

import functools

import pytest
import torch

import tiny
from echelon.generate import BestOfN, DecodeSession, Sampler, SegmentBeam
from echelon.models import LoadedModel
from echelon.registry import cards
from echelon.score import (
    Cached,
    CallableScorer,
    Cosine,
    CrossEncoderScorer,
    ExactMatch,
    LengthPenalised,
    LogLikelihood,
    Normalised,
    RankGenScorer,
    RewardModel,
    ScoreItem,
    SelfEval,
    Threshold,
    UnigramOverlap,
    Weighted,
    as_scorer,
    checked_scores,
)
from small_encoder import encoder, untrained_rankgen


@functools.cache
def lm():
    return LoadedModel(tiny.model("llama"), tiny.tokenizer())


class Predictor:
    """The two methods of a sentence-transformers CrossEncoder that matter here."""

    def predict(self, pairs, batch_size=32, show_progress_bar=False):
        return [len(b) - 0.1 * len(a) for a, b in pairs]

    def rank(self, query, documents):
        raise AssertionError("not asked")


@functools.cache
def reward_model():
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.BertConfig(vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
        return transformers.BertForSequenceClassification(config)


MAKERS = {
    "unigram_overlap": UnigramOverlap,
    "likelihood": lambda: LogLikelihood(lm()),
    "likelihood sum": lambda: LogLikelihood(lm(), "sum"),
    "likelihood pmi": lambda: LogLikelihood(lm(), "pmi"),
    "likelihood length": lambda: LogLikelihood(lm(), "length", 0.7),
    "rankgen": lambda: RankGenScorer(untrained_rankgen()),
    "cosine": lambda: Cosine(encoder()),
    "callable": lambda: CallableScorer(lambda prefix, texts: [len(text) + 0.5 * len(prefix) for text in texts]),
    "cross encoder": lambda: CrossEncoderScorer(Predictor()),
    "reward model": lambda: RewardModel(reward_model(), tiny.tokenizer()),
    "weighted": lambda: Weighted([(UnigramOverlap(), 2.0), (LogLikelihood(lm()), -1.0)]),
    "length penalised": lambda: LengthPenalised(LogLikelihood(lm(), "sum"), 0.5),
    "cached": lambda: Cached(LogLikelihood(lm())),
    "threshold": lambda: Threshold(UnigramOverlap(), 0.5),
}
ITEMS = [
    ScoreItem(prefix, text)
    for prefix in ("w1 w2 w3", "w9 w9", "w30 w31 w32 w33 w34")
    for text in ("w1 w2", "w3 w9 w9 w4 w5", "w8", "w1 w2 w3 w4 w5 w6 w7 w8", "")
]


def test_every_registered_scorer_is_in_this_suite():
    assert {card.name for card in cards("scorer")} <= set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_scores_are_one_finite_float32_each_and_none_for_nothing(name):
    scorer = MAKERS[name]()
    scores = checked_scores(scorer, ITEMS)
    assert scores.shape == (len(ITEMS),) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert scorer.score([]).shape == (0,)


@pytest.mark.parametrize("name", MAKERS)
def test_order_and_company_do_not_matter(name):
    scorer = MAKERS[name]()
    scores = scorer.score(ITEMS)
    mixed = torch.randperm(len(ITEMS), generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(MAKERS[name]().score([ITEMS[i] for i in mixed]), scores[mixed], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([scorer.score([item]) for item in ITEMS]), scores, atol=1e-5, rtol=1e-5)


def opened():
    session = DecodeSession(tiny.model("llama"), tiny.tokenizer(), sampler=Sampler(), seed=2)
    session.prefill(tiny.prompts(2))
    return session


@pytest.mark.parametrize("name", [*MAKERS, "normalised", "self evaluation"])
@pytest.mark.parametrize("kind", [SegmentBeam, BestOfN])
def test_it_works_in_every_search(name, kind):
    extra = {"normalised": lambda: Normalised(UnigramOverlap()), "self evaluation": lambda: SelfEval(" w1 w2", " w3", " w4")}
    made = {**MAKERS, **extra}[name]()
    found = kind(made, num_samples=3).run(opened(), 6)
    assert len(found) == 2 and all(group[0].score is not None for group in found)
    assert all([c.score for c in group] == sorted((c.score for c in group), reverse=True) for group in found)


def test_likelihood_equals_a_plain_forward():
    item = ITEMS[1]
    prefix, text = (tiny.tokenizer()(t).input_ids for t in (item.prefix, item.text))
    with torch.no_grad():
        logits = tiny.model("llama")(input_ids=torch.tensor([prefix + text])).logits[0].float().log_softmax(-1)
        alone = tiny.model("llama")(input_ids=torch.tensor([[2, *text]])).logits[0].float().log_softmax(-1)
    total = sum(logits[len(prefix) - 1 + i, t].item() for i, t in enumerate(text))
    free = sum(alone[i, t].item() for i, t in enumerate(text))
    for reduce, expected in {"sum": total, "mean": total / len(text), "pmi": total - free, "length": total / len(text) ** 0.7}.items():
        assert LogLikelihood(lm(), reduce, 0.7).score([item]).item() == pytest.approx(expected, abs=1e-4)


def test_self_evaluation_looks_ahead_and_changes_nothing():
    session = opened()
    session.extend(3)
    scorer = SelfEval(" w1 w2", " w3", " w4")
    scorer.attach(session)
    items = [ScoreItem("", session.text(row), row=row) for row in (1, 0)]
    scores = scorer.score(items)
    for item, score in zip(items, scores.tolist(), strict=True):
        ids = [*session.prompt_ids(item.row), *session.new_ids(item.row), 5, 6]
        with torch.no_grad():
            logits = tiny.model("llama")(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert score == pytest.approx((logits[7] - logits[8]).item(), abs=1e-4)
    before = [session.new_ids(row) for row in range(2)]
    plain = opened()
    assert plain.extend(3) == before and plain.extend(3) == session.extend(3)
    with pytest.raises(ValueError, match="needs the session"):
        SelfEval().score(items)


def test_overlap_by_hand():
    def score(prefix, text):
        return UnigramOverlap().score([ScoreItem(prefix, text)]).item()

    assert score("The old captain saw the storm.", "a storm, and another storm!") == pytest.approx(1 / 3)
    assert score("the", "of the") == 1 and score("sea", "the") == 0 and score("the", "sea") == 0


def test_normalised_scores_are_z_scores_of_each_contest():
    scores = Normalised(LogLikelihood(lm())).score(ITEMS).view(3, 5)
    raw = LogLikelihood(lm()).score(ITEMS).view(3, 5)
    torch.testing.assert_close(scores, (raw - raw.mean(1, keepdim=True)) / raw.std(1, correction=0, keepdim=True), atol=1e-4, rtol=1e-4)
    assert Normalised(UnigramOverlap()).score([ScoreItem("a b", "c"), ScoreItem("a b", "d")]).tolist() == [0, 0]


def test_cached_asks_once():
    asked = []
    cached = Cached(CallableScorer(lambda prefix, texts: [asked.append(text) or len(text) for text in texts]))
    assert cached.score(ITEMS[:3]).tolist() == cached.score(ITEMS[:3]).tolist() == [5, 14, 2]
    assert len(asked) == 3


def test_exact_match_judges_finished_texts_only():
    judge = ExactMatch({"1+1=": "2"})
    assert judge.score([ScoreItem("1+1=", " 2 "), ScoreItem("1+1=", "3")]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="judges finished texts only"):
        checked_scores(judge, [ScoreItem("1+1=", "2", finished=False)])
    with pytest.raises(ValueError, match="no answer is known"):
        judge.score([ScoreItem("2+2=", "4")])


def test_scores_that_cannot_be_ranked_are_refused():
    nan = CallableScorer(lambda prefix, texts: [float("nan")] * len(texts))
    with pytest.raises(ValueError, match="CallableScorer gave nan"):
        checked_scores(nan, ITEMS[:1])
    assert checked_scores(nan, ITEMS[:1], allow_invalid=True).item() == float("-inf")
    with pytest.raises(ValueError, match="one number each"):
        CallableScorer(lambda prefix, texts: [1.0, 2.0]).score(ITEMS[:1])
    with pytest.raises(ValueError, match="int is no scorer"):
        as_scorer(3)
    assert isinstance(as_scorer(Predictor()), CrossEncoderScorer)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LogLikelihood(lm(), "median"), "reduce is 'median'"),
        (lambda: LogLikelihood(lm(), length_penalty=-1), "length_penalty is -1"),
        (lambda: RankGenScorer(batch_size=0), "batch_size is 0"),
        (lambda: Weighted([]), "parts is empty"),
        (lambda: Weighted([(UnigramOverlap(), float("nan"))]), "weight is nan"),
        (lambda: LengthPenalised(UnigramOverlap(), -1), "exponent is -1"),
        (lambda: Threshold(UnigramOverlap(), float("nan")), "least is nan"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_prefix_that_texts_share_is_forwarded_once_and_changes_no_score():
    model, seen = lm(), []
    items = [ScoreItem(prefix, text) for prefix in ("w1 w2 w3 " * 12, "w4 w5 " * 9, "w6") for text in ("w7", "w8 w9 w1", "w2 w3 w4 w5")]
    handle = model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    try:
        apart = torch.cat([LogLikelihood(model).score([item]) for item in items])
        alone, seen[:] = sum(seen), []
        together = LogLikelihood(model).score(items)
    finally:
        handle.remove()
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert alone == 3 * (36 + 18 + 1) + 3 * 8
    assert sum(seen) == 35 + 17 + 3 * (3 * 5)  # two shared heads less their last token, then each text behind one token, padded


def test_cosine_reads_the_end_of_a_long_prefix():
    end = "It rained all day."
    far, near = ("The king is dead. " * 80 + end, "It is hot. " * 80 + end)
    scorer = Cosine(prefix_max_length=5)
    one, other = scorer.score([ScoreItem(far, "wet"), ScoreItem(near, "wet")]).tolist()
    assert one == pytest.approx(other, abs=1e-6) == pytest.approx(scorer.score([ScoreItem(end, "wet")]).item(), abs=1e-6)
    with pytest.raises(ValueError, match="prefix_max_length is 0"):
        Cosine(prefix_max_length=0)

"""The report holds everything, escapes everything, needs nothing, and the recommendation follows from the numbers."""

import re

import html5lib
import numpy as np
import pytest

from echelon.compare import recommend, write_report
from echelon.compare.plots import lines
from echelon.compare.table import markdown, terminal
from echelon.errors import UserError
from rigged import rigged

RANDOM = np.random.default_rng(0)
BASE = RANDOM.normal(1, 0.3, 60)


def clear():
    return rigged({"base": BASE, "good": BASE + 0.5, "bad": BASE - 0.2}, failed=["dead"], costs={"base": 1.0, "good": 30.0, "bad": 2.0})


def test_the_page_is_valid_and_needs_nothing_from_outside(tmp_path):
    summary = clear()
    page = write_report(summary, recommend(summary, "score"), tmp_path).read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    assert re.findall(r"https?://[^\"' ]+", page.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.findall(r"<(?:link|img|iframe)\b|@import|\burl\(", page)


def test_the_page_holds_every_method_every_text_and_the_reason_of_a_failure(tmp_path):
    summary = clear()
    page = write_report(summary, recommend(summary, "score"), tmp_path).read_text()
    tree = html5lib.parse(page, namespaceHTMLElements=False)
    rows = ["".join(row.itertext()) for row in tree.iter("tr")]
    assert len(rows) == 1 + 4 and any("ran <out> of memory" in row for row in rows)
    assert [row[:4] for row in rows[1:4]] == ["good", "base", "bad "[:3] + rows[3][3]]  # best first, without JavaScript
    articles = ["".join(article.itertext()) for article in tree.iter("article")]
    assert len(articles) == 3 * 4 and sum("<script>alert(" in text for text in articles) == 9
    assert len(list(tree.iter("script"))) == 1
    for word in ("2.13.0", "a processor", "made up", "7.3 M parameters, 60 prompts"):
        assert word in page
    assert (tmp_path / "plots" / "quality_cost.svg").exists() and (tmp_path / "table.md").exists()


def test_plots_mark_the_front_and_use_a_log_axis_for_costs_that_span_a_decade(tmp_path):
    summary = clear()
    write_report(summary, recommend(summary, "score"), tmp_path)
    drawn = (tmp_path / "plots" / "quality_cost.svg").read_text()
    assert "log scale" in drawn and "<polyline" in drawn
    assert len(re.findall("<circle", drawn)) == 3
    narrow = rigged({"base": BASE, "good": BASE + 0.5})
    write_report(narrow, recommend(narrow, "score"), tmp_path / "b")
    assert "log scale" not in (tmp_path / "b" / "plots" / "quality_cost.svg").read_text()


def test_a_clear_winner_is_recommended_with_its_difference_and_command():
    advice = recommend(clear(), "score")
    assert advice.label == "good"
    assert advice.text.startswith("With 64 new tokens per prompt, use good: score 1.")
    assert "Against base: +0.500 [+0.500, +0.500], p < 0.001" in advice.text
    assert "Failed: dead (ran <out> of memory)" in advice.text and "One seed" in advice.text
    assert advice.command == "echelon generate --model embedded --method good --max_new_tokens 64 PROMPT"


def test_a_tie_is_called_a_tie_and_the_cheaper_method_is_taken():
    noise = RANDOM.normal(0, 0.3, 60)
    summary = rigged({"base": BASE, "dear": BASE + noise - noise.mean() + 0.001}, costs={"base": 1.0, "dear": 9.0})
    advice = recommend(summary, "score")
    assert advice.label == "base" and "not told apart from the highest-ranked dear" in advice.text


def test_limits_leave_out_what_costs_too_much():
    assert recommend(clear(), "score", "seconds_per_prompt<=2x").label == "base"
    assert recommend(clear(), "score", "seconds_per_prompt<=0.1").label is None
    with pytest.raises(UserError, match="did you mean 'seconds_per_prompt'"):
        recommend(clear(), "score", "second_per_prompt<=2x")
    with pytest.raises(UserError, match="not of the form"):
        recommend(clear(), "score", "seconds_per_prompt=2")
    with pytest.raises(UserError, match="did you mean 'score'"):
        recommend(clear(), "scor")


def test_when_all_fail_nothing_is_recommended_and_there_is_still_a_report(tmp_path):
    summary = rigged({}, failed=["dead", "gone"])
    advice = recommend(summary, "score")
    assert advice.label is None and "every method failed" in advice.text
    html5lib.HTMLParser(strict=True).parse(write_report(summary, advice, tmp_path).read_text())


def test_the_tables_mark_best_and_tied():
    text = markdown(clear())
    assert re.search(r"\| good \| 1\.\d{3} ±0\.\d{3} \*", text) and "| dead | failed: ran <out> of memory |" in text
    assert terminal(clear()).row_count == 4


def test_the_table_is_followed_by_differences_to_the_baseline_with_corrected_p():
    summary = clear()
    text = markdown(summary).split("Against base: ")[1]
    assert text.startswith("difference, 95 % interval, and p of the sign-flip test after Holm's correction over this table.")
    gaps = {row.label: row.versus_baseline["score"] for row in summary.finished if row.label != "base"}
    for label, gap in gaps.items():
        assert f"| {label} | {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] p {gap.p_holm:.2g} |" in text
    assert "| base |" not in text and "Against" not in markdown(rigged({"alone": BASE}))


def test_curves_have_ticks_a_log_axis_where_asked_and_a_dot_for_a_single_point():
    drawn = lines({"a": [[1, 0.2], [1000, 0.8]], "b": [[10, 0.5]]}, "quality", "prompts", log=True)
    places = [float(x) for x in re.findall(r'<text class="small" text-anchor="middle" x="([\d.]+)"', drawn)]
    labels = re.findall(r'text-anchor="middle" x="[\d.]+" y="\d+">([\d.]+)</text>', drawn)
    assert labels == ["1", "10", "100", "1000"] and places[1] - places[0] == pytest.approx(places[3] - places[2], abs=0.11)
    assert drawn.count("<circle") == 1 and f'cx="{places[1]:.1f}"' in drawn and ">prompts</text>" in drawn
    assert lines({}, "none") == ""

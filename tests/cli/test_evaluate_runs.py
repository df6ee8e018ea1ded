"""`echelon evaluate --run --qrels`: figures, differences, per-query files, and every way in which runs and judgements do not fit."""

import json
import subprocess
import sys

import ir_measures
import numpy as np
import pytest
import scipy.stats

from echelon.data.runs import Qrels, Run, write_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three runs of thirty queries: one at random, one that is better, and one that is the first again."""
    folder = tmp_path_factory.mktemp("place")
    generator = np.random.default_rng(0)
    qrels: Qrels = {f"q{n}": {f"d{d}": int(generator.integers(1, 3)) for d in generator.choice(50, 5, replace=False)} for n in range(30)}
    plain: Run = {qid: {f"d{d}": float(score) for d, score in enumerate(generator.random(50))} for qid in qrels}
    better: Run = {qid: {doc: score + 0.4 * judged.get(doc, 0) for doc, score in plain[qid].items()} for qid, judged in qrels.items()}
    for name, run in (("plain", plain), ("better", better), ("again", plain)):
        write_run(folder / f"{name}.run", run)
    (folder / "qrels.txt").write_text("".join(f"{qid} 0 {doc} {grade}\n" for qid, judged in qrels.items() for doc, grade in judged.items()))
    return folder


def words(place, *runs, **options):
    given = [word for name in runs for word in ("--run", place / f"{name}.run")]
    return ["evaluate", *given, "--qrels", place / "qrels.txt", *(word for name, value in options.items() for word in (f"--{name}", value))]


def expected(place, name, *measures):
    parsed = [ir_measures.parse_measure(measure) for measure in measures]
    found = ir_measures.calc_aggregate(parsed, ir_measures.read_trec_qrels(str(place / "qrels.txt")), ir_measures.read_trec_run(str(place / f"{name}.run")))
    return {measure: found[one] for measure, one in zip(measures, parsed, strict=True)}


def test_one_run_is_a_table_of_means(echelon, place):
    ran = echelon(*words(place, "plain"))
    means = expected(place, "plain", "nDCG@10", "AP", "R@100")
    assert ran.code == 0 and ran.err == ""
    assert ran.out == "| run | nDCG@10 | AP | R@100 |\n|---|---:|---:|---:|\n| plain | " + " | ".join(f"{value:.4f}" for value in means.values()) + " |\n"


def test_several_runs_are_held_against_the_first_or_the_named_one(echelon, place):
    ran = echelon(*words(place, "plain", "better", "again"))
    assert ran.code == 0 and "Against plain, over 30 queries" in ran.out and "| again | AP | +0.0000 | +0.0000 to +0.0000 | 1 | 1 | 1 | 0/30/0 |" in ran.out
    assert "again ranks as plain with Kendall's tau 1.000, RBO(p=0.9) 1.000" in ran.out
    for named in ("better", place / "better.run"):
        assert "Against better" in echelon(*words(place, "plain", "better", baseline=named)).out


def test_json_and_the_per_query_file_hold_the_same_numbers(echelon, place, tmp_path):
    measures = "nDCG@10,AP(rel=2)@20,RBP(rel=2,p=0.5)"
    ran = echelon(*words(place, "plain", "better", measures=measures, per_query=tmp_path / "q.tsv"), "--json")
    told = json.loads(ran.out)
    assert ran.err == "" and told["queries"] == 30 and told["baseline"] == "plain"
    assert list(told["mean"]["better"]) == ["nDCG@10", "AP(rel=2)@20", "RBP(rel=2,p=0.5)"]
    assert {name: told["mean"]["better"][name] for name in ("nDCG@10", "AP(rel=2)@20")} == pytest.approx(expected(place, "better", "nDCG@10", "AP(rel=2)@20"))
    head, *rows = [line.split("\t") for line in (tmp_path / "q.tsv").read_text().splitlines()]
    assert head == ["run", "measure", "query", "value"] and len(rows) == 2 * 3 * 30
    plain, better = (np.array([float(row[3]) for row in rows if row[:2] == [label, "nDCG@10"]]) for label in ("plain", "better"))
    one = told["against_baseline"]["better"]["nDCG@10"]
    assert one["difference"] == pytest.approx((better - plain).mean()) and one["low"] > 0 and one["p_sign_flip"] < 0.01 <= 3 * one["p_holm"] + 0.01
    assert one["p_t"] == pytest.approx(scipy.stats.ttest_rel(better, plain).pvalue) and one["wins"] == (better > plain).sum()
    assert 0 < told["agreement"]["better"]["Kendall's tau"] < 1


def test_runs_of_one_name_go_by_their_paths(echelon, place, tmp_path):
    write_run(tmp_path / "plain.run", {"q0": {"d1": 1.0}})
    ran = echelon(*words(place, "plain"), "--run", tmp_path / "plain.run")
    assert f"| {place}/plain.run | " in ran.out and f"| {tmp_path}/plain.run | " in ran.out
    assert f"echelon: {tmp_path}/plain.run: 29 of 30 judged queries are not in the run and count 0 (q1, ...)" in ran.err


def test_queries_that_do_not_fit_are_told_on_stderr(echelon, place, tmp_path):
    (tmp_path / "qrels.txt").write_text("q0 0 d1 1\nq1 0 d1 0\n")
    ran = echelon("evaluate", "--run", place / "plain.run", "--qrels", tmp_path / "qrels.txt")
    assert ran.code == 0 and ran.out.count("\n") == 3 and ran.err.splitlines() == [
        "echelon: plain: 28 queries have no judgements and are left out (q2, ...)",
        "echelon: 1 of 2 queries have no relevant document and count 0 (q1)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "a.run is empty"),
        ("q0 Q0 d1 1 2.0 t\nq0 Q0 d 2 1 1.0 t\n", "a.run, line 2: 7 columns"),
        ("q0 Q0 d1 1 2.0 t\nq0 Q0 d1 2 1.0 t\n", "a.run, line 2: the document 'd1' is there twice for the query 'q0'"),
        ("q0 Q0 d1 1 nan t\n", "a.run, line 1: the score of 'd1' is 'nan'"),
        ("other Q0 d1 1 2.0 t\n", "a: no query of the run is judged (it has other; the qrels q0, q1, q2, ...); do both belong to one collection?"),
        ("q0 Q0 d\xff 1 2.0 t\n", "a.run: line 1 is not UTF-8 text"),
    ],
)
def test_broken_runs_are_one_line(echelon, place, tmp_path, content, said):
    (tmp_path / "a.run").write_bytes(content.encode("latin-1"))
    assert said in echelon("evaluate", "--run", tmp_path / "a.run", "--qrels", place / "qrels.txt").refused()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--measures", "nDCG@10,nDGC@5"], "unknown measure 'nDGC' (did you mean 'nDCG'?)"),
        (["--measures", "P"], "measure 'P' needs a cut-off"),
        (["--baseline", "plan"], "--baseline is 'plan' (did you mean 'plain'?); it must be one of the runs: plain"),
        (["--run", "{place}/plain.run"], "plain.run is given twice"),
        (["--run", "/no/such.run"], "cannot read /no/such.run: No such file"),
        (["--qrels", "/no/such.txt"], "cannot read /no/such.txt: No such file"),
        (["--qrels", "{place}/plain.run"], "plain.run, line 1: 6 columns, not 4"),
        (["--data", "x"], "--data is for benchmarks and --run for runs; give one of them"),
        (["--method", "tofu"], "unknown option '--method'"),
        (["--per_query", "/dev/null/x"], "cannot write /dev/null/x"),
        (["--run"], "argument --run: expected one argument"),
    ],
)
def test_bad_words_are_one_line(echelon, place, more, said):
    assert said in echelon(*words(place, "plain"), *(word.format(place=place) for word in more)).refused()


def test_runs_need_judgements_and_judgements_runs(echelon, place):
    assert "--qrels is missing" in echelon("evaluate", "--run", place / "plain.run").refused()
    assert "--qrels is for runs; give at least one --run" in echelon("evaluate", "--qrels", place / "qrels.txt").refused()
    assert "--data is missing" in echelon("evaluate").refused()


def test_help_tells_of_runs_with_and_without_one(echelon):
    for given in (["--help"], ["--run", "x", "--help"]):
        text = " ".join(echelon("evaluate", *given).out.split())
        assert "--run" in text and "--per_query" in text and "suffix_identification" in text


def test_measuring_needs_no_torch(place):
    code = "import sys\nfrom echelon.cli import main\nmain(sys.argv[1:])\nprint('torch' in sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code, *map(str, words(place, "plain", "better"))], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == "False\n" and "| better |" in ran.stdout

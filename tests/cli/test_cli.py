"""The contract of every command: exit status, one line on stderr, results alone on stdout, and no torch before there is work for it."""

import json
import subprocess
import sys

import pytest

import echelon as package
from echelon.cli import VERBS, main
from echelon.registry import cards


def test_help_lists_every_verb(process):
    for words in ([], ["--help"]):
        ran = process(*words)
        assert ran.code == 0 and ran.err == ""
        assert all(f"  {verb} " in ran.out for verb in VERBS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb in ("methods", "compare", "generate", "train", "evaluate")])
def test_every_verb_has_help_that_explains_each_option(echelon, verb):
    ran = echelon(verb, "--help")
    assert ran.code == 0 and ran.err == "" and f"usage: echelon {verb}" in ran.out
    assert "method_knobs" not in ran.out


@pytest.mark.parametrize(("verb", "kind"), [("generate", "decoder"), ("train", "trainer"), ("evaluate", "benchmark")])
def test_the_help_of_a_verb_names_its_methods_and_that_of_a_method_its_knobs(echelon, verb, kind):
    for card in cards(kind):
        text = " ".join(echelon(verb, "--method", card.name, "--help").out.split())
        assert all(other.name in text for other in cards(kind))
        for knob in card.knobs:
            assert f"--method.{knob.name}" in text


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], [], ["--version"], ["methods"], ["methods", "--help"], ["methods", "rankgen"], ["methods", "--json"], ["generat"],
        *([verb, "--help"] for verb in VERBS), ["train", "--method", "galore", "--help"], ["compress", "--method", "svd", "--help"],
    ],
)  # fmt: skip
def test_what_needs_no_model_imports_neither_torch_nor_transformers(words):
    code = (
        "import sys\nfrom echelon.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *{'torch', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1] == "loaded:"


def test_the_version_is_the_packages(process):
    ran = process("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"echelon {package.__version__}\n", "")


def test_the_list_holds_every_method_once_and_json_the_same(echelon):
    ran = echelon("methods")
    assert ran.code == 0 and ran.err == ""
    assert [line.split()[:2] for line in ran.out.splitlines()] == [[card.name, card.kind] for card in cards()]
    told = json.loads(echelon("methods", "--json").out)
    assert [(card["name"], card["kind"]) for card in told] == [(card.name, card.kind) for card in cards()]
    decoders = json.loads(echelon("methods", "--kind", "decoder", "--json").out)
    assert [card["name"] for card in decoders] == [card.name for card in cards("decoder")]


def test_a_card_shows_paper_knobs_and_where_to_import_it(echelon):
    text = echelon("methods", "rankgen", "--kind", "decoder").out
    for part in ("rankgen (decoder)", "2205.09726", "beam_size", "int = 2", "texts kept after each round", "published: ", "MAUVE 85.0",
                 "from echelon.generate.rankgen import RankGen"):  # fmt: skip
        assert part in text
    assert [line for line in echelon("methods", "rankgen").out.splitlines() if line.startswith("rankgen (")] == [
        "rankgen (decoder)", "rankgen (scorer)", "rankgen (trainer)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generat"], "unknown verb 'generat' (did you mean 'generate'?)"),
        (["xyzzy"], "unknown verb 'xyzzy'; verbs are methods, "),
        (["methods", "nuclues"], "unknown method 'nuclues' (did you mean 'nucleus'?)"),
        (["methods", "--kind", "decodr"], "unknown kind 'decodr' (did you mean 'decoder'?)"),
        (["methods", "--jsn"], "unknown argument '--jsn' (did you mean '--json'?)"),
        (["methods", "nucleus", "--kind", "scorer"], "nucleus is no scorer; it is a decoder"),
        (["methods", "rankgen", "nucleus"], "unknown argument 'nucleus'"),
        (["generate", "--method", "nuclues", "x"], "unknown decoder 'nuclues' (did you mean 'nucleus'?)"),
        (["train", "--method", "rankgn"], "unknown trainer, optimizer or layer 'rankgn' (did you mean 'rankgen'?)"),
        (["evaluate", "--method", "sufix_identification"], "unknown benchmark 'sufix_identification' (did you mean 'suffix_identification'?)"),
        (["generate", "--sed", "2", "x"], "unknown option '--sed' (did you mean '--seed'?)"),
        (["generate", "--max-new-token=2", "x"], "unknown option '--max_new_token' (did you mean '--max_new_tokens'?)"),
        (["compare", "--ot", "x"], "unknown option '--ot' (did you mean '--out'?)"),
        (["generate", "--method", "rankgen", "--method.beem_size", "3", "x"],
         "unknown option '--method.beem_size' of rankgen (did you mean '--method.beam_size'?)"),
        (["train", "--method.step", "3"], "unknown option '--method.step' of rankgen (did you mean '--method.steps'?)"),
        (["generate", "--method"], "argument --method: expected one argument"),
        (["generate", "--seed"], "argument --seed: expected one argument"),
        (["generate", "--seed", "1.5", "x"], "--seed is '1.5'; it must be int"),
        (["generate", "--json=maybe", "x"], "--json is 'maybe'; it must be bool"),
        (["generate", "--method", "rankgen", "--method.beam_size", "many", "x"], "--method.beam_size is 'many'; it must be int"),
        (["generate", "--method", "rankgen", "--method.beam_size", "0", "x"], "beam_size is 0; it must be in [1, inf)"),
        (["generate", "--method.top_p", "2", "x"], "top_p is 2.0; it must be in (0, 1]"),
        (["generate", "--method.temperature", "0", "x"], "temperature is 0; it must be above 0"),
        (["train", "--method.steps", "0"], "steps is 0; it must be at least 1"),
        (["train", "--method.suffix_words", "[20, 10]"], "suffix_words is (20, 10); it must be two numbers"),
        (["train", "--method.negatives", "boht"], "--method.negatives is 'boht'; it must be 'both', 'inbook', 'generative'"),
        (["evaluate", "--method.questions", "0"], "questions is 0; it must be at least 1"),
        (["train"], "--data is missing; train needs --data and --out"),
        (["train", "--data", "x"], "--out is missing; train needs --data and --out"),
        (["evaluate"], "--data is missing"),
        (["train", "stray", "--data", "x", "--out", "y"], "stray"),
        (["evaluate", "stray", "--data", "x"], "stray"),
        (["compare", "one", "two"], "one recipe at a time; got one, two"),
    ],
)  # fmt: skip
def test_a_bad_word_is_one_line_that_names_what_would_be_right(echelon, words, said):
    assert said in echelon(*words).refused()


def test_debug_shows_the_traceback_wherever_it_stands():
    for words in (["--debug", "methods", "nuclues"], ["methods", "--debug", "nuclues"]):
        with pytest.raises(ValueError, match="unknown method 'nuclues'"):
            main(words)


def test_as_a_process_a_bad_argument_is_one_line_and_debug_a_traceback(process):
    assert "top_p is 7.0" in process("generate", "--method.top_p", "7", "x").refused()
    assert "unknown method 'nuclues'" in process("methods", "nuclues").refused()
    debugged = process("--debug", "methods", "nuclues")
    assert debugged.code == 1 and "Traceback" in debugged.err and debugged.out == ""


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ValueError("two\n  lines"), 2, "two lines"),
    ],
)
def test_whatever_stops_a_verb_is_one_line_and_its_status(echelon, monkeypatch, raised, code, said):
    def fail(arguments):
        raise raised

    monkeypatch.setattr("echelon.cli.methods.run", fail)
    ran = echelon("methods")
    assert (ran.code, ran.out) == (code, "") and ran.err.startswith("echelon: ") and ran.err.endswith(f"{said}\n") and ran.err.count("\n") == 1


def test_an_unknown_option_in_place_of_a_verb_is_one_line(echelon):
    assert "unknown argument '--versoin' (did you mean '--version'?)" in echelon("--versoin").refused()
    assert echelon("--version") == (0, f"echelon {package.__version__}\n", "")


def test_stdout_on_a_full_disk_is_one_line_and_a_reader_that_leaves_is_no_error(process, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        running = process.start("methods", stdout=full)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 2 and err == "echelon: [Errno 28] No space left on device\n"
    running = process.start("methods", "--json")
    running.stdout.close()
    assert running.wait(timeout=60) == 0 and running.stderr.read() == ""
    running.stderr.close()

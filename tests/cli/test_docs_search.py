"""What docs/search.md shows is what happens."""

import json
import re
import shlex
from pathlib import Path

from echelon.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
TEXTS = {
    "1": "heat transfer in laminar boundary layers", "2": "the captain shouted over the waves", "3": "transfer of heat to a wall", "4": "bread rose overnight",
}  # fmt: skip


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def lines(records):
    return "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in records.items())


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec("\n".join(blocks("python")), shown)
    assert set(shown["found"]["q"]) == {"1", "3"}
    assert sorted(shown["fused"]["q"]) == sorted(shown["result"].runs["q"]) == ["1", "2", "3"]
    assert sorted(hit["corpus_id"] for hit in shown["hits"]) == [0, 1, 2]


def test_the_commands_lead_from_a_corpus_to_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text(lines(dict(list(TEXTS.items())[:3])))
    Path("more.jsonl").write_text(lines(dict(list(TEXTS.items())[3:])))
    Path("queries.jsonl").write_text(lines({"q": "heat transfer", "p": "waves and bread"}))
    Path("qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\nq\t3\t1\np\t2\t1\n")
    commands = [shlex.split(line, comments=True)[1:] for line in blocks("bash")[0].splitlines()]
    for command in commands:
        words = ["embedded" if word == "my_model" else word for word in command]
        if words[:2] == ["index", "--corpus"]:
            words += ["--encoder", "embedded"]
        assert main(words) == 0, words
    assert re.search(r"\| prp \| [\d.]+", capsys.readouterr().out)

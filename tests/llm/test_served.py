"""A real server on this machine: `transformers serve` with the embedded model, against the same model read directly."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from echelon.llm import LocalEngine, Prompt, ServerEngine, Unanswered, load_template
from echelon.models import embedded_dir, load

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ASKED = [
    Prompt((("system", "You tell stories."), ("user", text)))
    for text in ("The wolf ran over the hill and", "Once there was a ship which", "The king said to his daughter that she")
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder of the model, and where the server is; it ends with the module."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(embedded_dir() / "lm", folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": CHAT}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), *where]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        until = time.monotonic() + 180
        while time.monotonic() < until and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_it_writes_what_the_model_writes_here(server):
    folder, url = server
    here = LocalEngine(load(folder, "float32"))
    expected = here.generate(ASKED, max_new_tokens=12)
    found = ServerEngine(url, str(folder), concurrency=3).generate(ASKED, max_new_tokens=12)
    assert [[text.text.strip() for text in texts] for texts in found] == [[text.text.strip() for text in texts] for texts in expected]
    assert all(text.tokens == 12 and text.finish == "length" for texts in found for text in texts)


def test_it_goes_on_with_plain_text(server):
    folder, url = server
    expected = LocalEngine("embedded").generate([Prompt(prompt.messages, "And") for prompt in ASKED], max_new_tokens=8)
    found = ServerEngine(url, str(folder), chat=False).generate([Prompt(prompt.messages, "And") for prompt in ASKED], max_new_tokens=8)
    assert [texts[0].text.strip() for texts in found] == [texts[0].text.strip() for texts in expected]


def test_a_listwise_prompt_is_answered_and_read(server):
    folder, url = server
    made = ServerEngine(url, str(folder), context_length=512, tokenizer=str(folder))
    template = load_template("rankllm")
    prompt = template.render(made, "wolves", ["a wolf in the wood " * 40, "ships on the sea", "the wolf and the lamb"], max_new_tokens=16)
    assert prompt.shrunk_to is None and sorted(template.parse(made.generate([prompt], max_new_tokens=16)[0][0].text, 3)[0]) == [0, 1, 2]


def test_it_has_no_log_probabilities_and_knows_no_other_model(server):
    folder, url = server
    with pytest.raises(ValueError, match="gives no log-probabilities, so choices cannot be scored; let it generate"):
        ServerEngine(url, str(folder)).score_choices(ASKED[:1], [["Yes", "No"]])
    with pytest.raises(Unanswered, match="answered 400: .*pinned"):
        ServerEngine(url, "other", retries=0).generate(ASKED[:1], max_new_tokens=3)

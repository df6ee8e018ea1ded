"""``echelon generate``: continue prompts with any decoder."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from echelon.cli.options import parse
from echelon.data.files import read_text, write_whole
from echelon.errors import UserError


@dataclass
class Options:
    """What to continue, with which model, and how to print it.

    Attributes:
        model: model folder, hub id, or `embedded`.
        prompts: file with one prompt a line, in place of the prompt on the command line.
        max_new_tokens: tokens to write for each prompt (default: the decoder's own, else 64).
        seed: of the sampling noise.
        sentences: cut each text after its last whole sentence.
        stream: print committed text as it comes (one prompt only).
        json: print JSON with every candidate, its score and the cost.
        out: write there in place of stdout.
    """

    model: str = "embedded"
    prompts: str | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    sentences: bool = False
    stream: bool = False
    json: bool = False
    out: str | None = None


def run(arguments: Sequence[str]) -> int:
    options, decoder, words = parse(
        "generate", "Continue a prompt with any decoder.", Options, "decoder", arguments,
        positional=("prompt", "the text to continue; quote it"), default_method="nucleus",
    )  # fmt: skip
    if words and options.prompts:
        raise UserError("give a prompt or --prompts, not both")
    prompts = [line for line in read_text(options.prompts).splitlines() if line.strip()] if options.prompts else [" ".join(words)]
    if not any(prompts):
        raise UserError("no prompt: give one after the options, or a file with one a line by --prompts")
    if options.stream and (len(prompts) > 1 or options.json):
        raise UserError("--stream takes one prompt and no --json")
    from echelon.models import load

    loaded = load(options.model)
    shown: list[str] = []

    def show(event) -> None:
        if event.kind in ("token", "segment") and event.text:
            shown.append(event.text)
            print(event.text, end="", flush=True)

    if options.stream:
        print(prompts[0], end="", flush=True)
    result = decoder.generate(
        loaded, prompts, max_new_tokens=options.max_new_tokens, seed=options.seed,
        truncate_to_sentence=options.sentences, on_event=show if options.stream else None,
    )  # fmt: skip
    if options.stream and shown:
        print()
        return 0
    if options.json:
        rows = [
            {"prompt": prompt, "text": text, "candidates": [dataclasses.asdict(candidate) for candidate in candidates]}
            for prompt, text, candidates in zip(prompts, result.texts, result.candidates, strict=True)
        ]
        content = json.dumps({"method": decoder.method_name, "results": rows, "stats": dataclasses.asdict(result.stats)}, indent=2)
    else:
        content = "\n\n".join(prompt + text for prompt, text in zip(prompts, result.texts, strict=True))
    if options.out:
        write_whole(Path(options.out), content + "\n")
    else:
        sys.stdout.write(content + "\n")
    return 0

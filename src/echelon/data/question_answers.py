"""Questions with their answers, from JSON lines, and how the two are put into one text."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echelon.data.files import read_text
from echelon.errors import UserError

TEMPLATE = "Question: {question}\nAnswer: {answer}"


@dataclass(frozen=True)
class QuestionAnswer:
    """One question.

    Attributes:
        question: what is asked.
        answer: the right answer.
        paraphrased: the right answer in other words; empty where there is none.
        perturbed: wrong answers of the same form.
    """

    question: str
    answer: str
    paraphrased: str = ""
    perturbed: tuple[str, ...] = ()


def read_question_answers(path: str | os.PathLike[str]) -> list[QuestionAnswer]:
    """The questions of a JSON-lines file in the format of TOFU: ``question``, ``answer``, and maybe ``paraphrased_answer`` and ``perturbed_answer``.

    Raises:
        UserError: if the file cannot be read, is empty, or a line is no question with an answer.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append(question_answer(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: not a JSON object with a 'question' and an 'answer'") from error
    if not found:
        raise UserError(f"{path} holds no questions; give a .jsonl with a 'question' and an 'answer' in each line")
    return found


def question_answer(row: Mapping[str, Any]) -> QuestionAnswer:
    """Raises: KeyError: if the row has no question or no answer."""
    wrong = row.get("perturbed_answer") or ()
    wrong = (wrong,) if isinstance(wrong, str) else tuple(wrong)
    return QuestionAnswer(str(row["question"]), str(row["answer"]), str(row.get("paraphrased_answer") or ""), wrong)


def check_template(template: str) -> str:
    """Raises: ValueError: unless the template holds ``{question}`` once, and ends with its only ``{answer}``."""
    if template.count("{question}") != 1 or template.count("{answer}") != 1 or not template.endswith("{answer}"):
        raise ValueError(f"template is {template!r}; it must hold {{question}} once and end with {{answer}}, as {TEMPLATE!r} does")
    return template


def prompt_and_text(question: str, answer: str, template: str = TEMPLATE) -> tuple[str, str]:
    """What is read and what is answered. White space before the answer goes with the answer, where most tokenizers expect it.

    >>> prompt_and_text("Who?", "Nobody.")
    ('Question: Who?\\nAnswer:', ' Nobody.')
    """
    head = template.removesuffix("{answer}")
    prompt = head.rstrip()
    return prompt.replace("{question}", question), head[len(prompt) :] + answer

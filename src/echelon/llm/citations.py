"""Which passages a text cites: [2], [1][3], [1, 3], [2-4], (Source 1), and the same in other scripts' brackets and digits."""

import re

from echelon.llm.permutation import Parsed, plain_characters, without_thought

_LONGEST_RANGE = 1000
_MARKS = re.compile(
    r"\[\s*(?:[^\W\d_]+\.?\s*)?#?(\d+(?:\s*[-–—,;&]\s*#?\d+)*)\s*\]|\(\s*(?:source|passage|document|doc|nguồn|nguon|ref\.?)\s*#?(\d+(?:\s*[-–—,;&]\s*#?\d+)*)\s*\)",
    re.IGNORECASE,
)


def parse_citations(text: str, n: int, nothing: str = "") -> Parsed:
    """Places (from 0) of the cited passages of ``n``, in the order of their first citation; others are not in the order.

    Args:
        text: what the model wrote; a thought before it is not looked at.
        n: how many passages it was shown.
        nothing: what it was told to write if the passages do not hold the answer.

    Returns:
        Its status is ``unparseable`` if nothing valid is cited, ``partial`` if the text says that the passages do not suffice, ``repaired`` if
        passages are cited that do not exist, and ``complete`` else. To cite a passage again is no mistake; it is counted.
    """
    answer = without_thought(text)
    order: list[int] = []
    repeated = out_of_range = 0
    for place in [] if answer is None else _cited(plain_characters(answer)):
        if not 0 <= place < n:
            out_of_range += 1
        elif place in order:
            repeated += 1
        else:
            order.append(place)
    lacking = bool(nothing) and nothing.lower() in (answer or "").lower()
    status = "unparseable" if not order else "partial" if lacking else "repaired" if out_of_range else "complete"
    return Parsed(tuple(order), status, repeated, n - len(order), out_of_range)  # type: ignore[arg-type]


def _cited(text: str) -> list[int]:
    places: list[int] = []
    for match in _MARKS.finditer(text):
        for piece in re.split(r"[,;&]", match[1] or match[2]):
            ends = [int(number[-9:]) if len(number) < 10 else 0 for number in re.findall(r"\d+", piece)]
            first, last = ends[0], ends[-1]
            whole = len(ends) == 2 and first < last <= first + _LONGEST_RANGE
            places += [number - 1 for number in (range(first, last + 1) if whole else ends)]
    return places

"""Write the README's table of methods from the registry: ``python docs/table.py``."""

from pathlib import Path

from echelon.registry import cards

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: made by `python docs/table.py` -->\n", "<!-- end of methods -->"


def table() -> str:
    """One line for each registered method."""
    lines = ["| kind | method | what it does | paper |", "|---|---|---|---|"]
    for card in cards():
        paper = f"[{card.title}](https://arxiv.org/abs/{card.arxiv}), {card.year}" if card.arxiv else f"{card.title}, {card.year}"
        lines.append(f"| {card.kind} | `{card.name}` | {card.summary} | {paper} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The README with its table made anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))

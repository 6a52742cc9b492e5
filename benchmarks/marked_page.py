"""Pages of docs/ into which benchmarks write: what stands between two marks is theirs, the rest a person's."""

from pathlib import Path

Marks = tuple[str, str]  # where the part begins and ends, each once in the page


def write_between(page: Path, marks: Marks, text: str) -> None:
    """Puts a text between the marks of a page, in the place of what stands there; ValueError without them."""
    before, begun, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, ended, after = rest.partition(marks[1])
    if not (begun and ended):
        raise ValueError(f"{page}: has no {' … '.join(marks)}")
    page.write_text(f"{before}{begun}\n\n{text}\n\n{ended}{after}", encoding="utf-8")

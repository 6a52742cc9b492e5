"""Text of others within Markdown."""

import re

from atp_tune.errors import printable


def escaped(text: str) -> str:
    """Text that stands for itself, in one line: no markup, no HTML, no formula, no entity."""
    return re.sub(r"([\\`*_{}\[\]<>|#$&~])", r"\\\1", printable(" ".join(text.split())))


def fenced(language: str, text: str) -> str:
    """Lines that are shown as they are, whatever they hold."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"

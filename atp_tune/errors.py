"""The two ways a run can go wrong that are not bugs: what a user gave, and what a trial came to."""

import re
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches

_SECRETS = (  # in URLs: between the user's name and the host, and as a parameter
    re.compile(r"(\w://[^\s:/@]*:)\S*(?=@)"),
    re.compile(r"([?&][\w-]*(?:pass|pwd|secret|token)[\w-]*=)[^\s&;,\"']*", re.IGNORECASE),
)


def printable(text: str) -> str:
    """Text in one line that a terminal shows and does not act on: line breaks and control characters are escaped."""
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def is_text(text: str) -> bool:
    """Whether files and databases can hold a text: no NUL, no byte of an argument that is not UTF-8."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text)


def without_secrets(text: str) -> str:
    """Text in which no URL shows a password."""
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


def did_you_mean(value: object, names: Sequence[str]) -> str:
    """The end of an error message: the name that is most like the value; "" if none is."""
    near = get_close_matches(value.lower(), names, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


class UserError(Exception):
    """Bad input in one line: what is wrong, where, what to do. The command line prints it and exits with 2."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(without_secrets(text)))


class TrialError(Exception):
    """A trial that gives no usable value: it is recorded as failed with this reason, and the study goes on."""

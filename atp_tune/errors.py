"""The two ways a run can go wrong that are not bugs: what a user gave, and what a trial came to."""

import unicodedata


def printable(text: str) -> str:
    """Text in one line that a terminal shows and does not act on: line breaks and control characters are escaped."""
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


class UserError(Exception):
    """Bad input in one line: what is wrong, where, what to do. The command line prints it and exits with 2."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class TrialError(Exception):
    """A trial that gives no usable value: it is recorded as failed with this reason, and the study goes on."""

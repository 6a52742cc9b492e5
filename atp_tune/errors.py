"""The errors that are not bugs (`UserError`, `TrialError`), and text functions for messages."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

_SECRETS = (  # passwords in URLs: after the user name, and as a parameter
    re.compile(r"(\w://[^\s:/@]*:)\S*(?=@)"),
    re.compile(r"([?&][\w-]*(?:pass|pwd|secret|token)[\w-]*=)[^\s&;,\"']*", re.IGNORECASE),
)


WHOLE = ("texts.", "images.", "model.")  # tables whose keys errors name in full
_KEY = re.compile(r"((?:--)?[a-z][\w.-]*): (.*)", re.ASCII)


def printable(text: str) -> str:
    """The text in one line, safe for terminals: line breaks and control characters are escaped."""
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


def is_text(text: str) -> bool:
    """Whether files and databases can store a text: it has no NUL and no lone surrogate (a byte that is not UTF-8)."""
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text)


def without_secrets(text: str) -> str:
    """The text without passwords in URLs."""
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


def did_you_mean(value: object, names: Sequence[str]) -> str:
    """The end of an error message that suggests the most similar name; "" if none is similar."""
    near = get_close_matches(value.lower(), names, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


class UserError(Exception):
    """Bad input, in one line: what is wrong, where, what to do. The command line prints it and exits with 2.

    `key`: of a study file, an option or an argument, with which the line begins, "" if it names none; `what`: the rest.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text := printable(without_secrets(text)))
        match = _KEY.match(text)
        self.key, self.what = match.groups() if match else ("", text)


@contextmanager
def within(table: str, **names: str) -> Iterator[None]:
    """Errors name a key by its table: of `texts.test`, `seqlen` is `texts.test.seqlen`; whole keys stay as they are.

    `names`: keys that are called otherwise in the table.
    """
    try:
        yield
    except UserError as error:
        key = names.get(error.key, error.key)
        if not key.startswith(WHOLE):
            key = ("." if "." in table else ": ").join(filter(None, (table, key)))
        raise UserError(f"{key}: {error.what}") from None


@contextmanager
def named(present: str, former: str) -> Iterator[None]:
    """Errors say a present name where they first say a former one."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(former, present, 1)) from None


class PluginError(UserError):
    """A plug-in does what none of its kind may do; the line names it and its file. It ends a run."""


class TrialError(Exception):
    """A trial without a usable value; it is stored as failed with this reason, and the study continues."""

"""The marks that most tests have, and errors of a user: one line each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from atp_tune.errors import UserError

slow, parametrize = pytest.mark.slow, pytest.mark.parametrize


@contextmanager
def refused(said: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """What is within ends in an error of one line, in which this pattern is found."""
    with pytest.raises(UserError, match=said) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def refusal(call: Callable[..., object], *given: Any, **more: Any) -> str:
    """The one line of the error that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*given, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)

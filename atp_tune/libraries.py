"""Silences the logs, bars and warnings of the libraries that do the work; their exceptions still reach the caller."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = {
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip


@contextmanager
def silenced() -> Iterator[None]:
    """Silences them within; Optuna's verbosity, transformers' bars and filters of warnings are restored at the end.

    The environment variables stay set, unless the user has set them: libraries read them once.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    had_bars = _shows_bars()
    _show_bars(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        _show_bars(had_bars)


def _shows_bars() -> bool:
    """Whether transformers shows bars of its own, as it does until it is told not to."""
    module = sys.modules.get("transformers.utils.logging")
    return module is None or bool(module.is_progress_bar_enabled())


def _show_bars(shows: bool) -> None:
    """Switches the bars of transformers, if it is imported."""
    if module := sys.modules.get("transformers.utils.logging"):
        (module.enable_progress_bar if shows else module.disable_progress_bar)()

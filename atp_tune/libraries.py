"""Silences the logs, bars and warnings of the libraries that do the work; their exceptions still reach the caller."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = {
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip


@contextmanager
def silenced() -> Iterator[None]:
    """Silences them within; Optuna's verbosity and Python's filters of warnings are restored at the end.

    The environment variables stay set, unless the user has set them: libraries read them once.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)

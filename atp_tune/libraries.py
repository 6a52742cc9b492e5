"""Silences the logs, bars and warnings of the libraries that do the work; their exceptions still reach the caller."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}  # read when they are imported
LOGGERS = ("bitsandbytes",)  # PEFT imports it; on a CPU with AVX-512 BF16 it then asks for a package, with a warning


@contextmanager
def silenced() -> Iterator[None]:
    """Silences them within; what is said, shown and warned of is as before at the end."""
    import optuna

    before = _of_transformers()
    variables = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(variables)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    _set(("ERROR", False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        for logger, level in levels.items():
            logger.setLevel(level)
        for name in variables:
            os.environ.pop(name, None)
        _set(before)


def _of_transformers() -> tuple[Any, bool]:
    """The verbosity of transformers, and whether it shows bars; its defaults before it is imported."""
    module = sys.modules.get("transformers.utils.logging")
    if module is None:
        return os.environ.get("TRANSFORMERS_VERBOSITY", "warning").upper(), True
    return module.get_verbosity(), bool(module.is_progress_bar_enabled())


def _set(what: tuple[Any, bool]) -> None:
    """Sets both, if transformers is imported; a verbosity is a number or the name of one."""
    module: Any = sys.modules.get("transformers.utils.logging")
    if module is None:
        return
    verbosity, shows_bars = what
    module.set_verbosity(getattr(module, verbosity, module.WARNING) if isinstance(verbosity, str) else verbosity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a variable that switches off the bars of downloads
        (module.enable_progress_bar if shows_bars else module.disable_progress_bar)()

"""Whether a Triton kernel runs here: Triton needs a C compiler at the first launch, which many images lack."""

import logging
from collections.abc import Callable
from importlib.util import find_spec

log = logging.getLogger(__name__)


def launches(launch: Callable[[], object], without: str) -> bool:
    """Whether a kernel runs, which `launch` imports and launches once; False without Triton.

    If it fails, a warning in the log says why, after `without`, which says what is done instead. Memory that ran out
    tells nothing of the kernel: that error is raised.
    """
    if find_spec("triton") is None:
        return False
    try:
        launch()
    except Exception as error:  # from Triton, its import, a compiler, ptxas or the driver
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        reason = next(iter(str(error).splitlines()), "")
        log.warning(f"{without}: {type(error).__name__}: {reason}")
        return False
    return True

"""What the long commands do around the work: progress, interruption, and the words at the end."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atp_tune.cli.display import Display
from atp_tune.cli.tables import console, show_applied, show_summary
from atp_tune.config import read_config
from atp_tune.studyfile import StudyFile


def run_study(file: StudyFile, name: str | None, timeout: float | None) -> None:
    """Runs or resumes a study with progress; the summary at the end, also of what is left after Ctrl-C."""
    from atp_tune.summary import summarise
    from atp_tune.tuning import Run, tune

    with quiet(), Display() as display:
        run = Run(file, name or file.name, timeout, display)
        try:
            study = tune(run)
        except KeyboardInterrupt:
            second_one_ends_at_once()
            display.close()
            console.print(
                f"stopped: finished trials are in {file.database or 'the storage'}; the same command goes on from there"
            )
            sys.exit(130)
    show_summary(summarise(study), file)


def run_apply(config: Path, out: Path, device: str) -> None:
    """Writes the sparse checkpoint of a configuration, and compares its perplexity with the file's."""
    read = read_config(config)
    from atp_tune.applying import apply

    with quiet(), Display() as display:
        measured = apply(read, config.parent / read.folder, out, device, display)
    show_applied(read, measured, out)


def run_prune(file: StudyFile, beta: float, out: Path | None) -> None:
    """Prunes once, and prints plan and perplexity."""
    from atp_tune.applying import prune_once

    parameters = {"beta": beta} if beta or "atp" in file.study.allocation.names else {}
    with quiet(), Display() as display:
        plan, measured = prune_once(file, parameters, out, display)
    console.print(f"{plan}, sparsity {file.study.sparsity:g}: perplexity {measured} on the report text")
    if out is not None:
        console.print(f"sparse checkpoint: {out}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries log for their developers; errors still come through as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def second_one_ends_at_once() -> None:
    """From here on Ctrl-C ends the process without further ado."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""The last words of a run: the file of the best configuration, and the commands that come next."""

import shlex
from pathlib import Path

from atp_tune.cli.terminal import console
from atp_tune.errors import UserError, printable
from atp_tune.results.summary import Summary
from atp_tune.spec.config import read_config
from atp_tune.spec.finding import known
from atp_tune.spec.plugged import permission
from atp_tune.spec.studyfile import StudyFile, read
from atp_tune.storage.database import without_password


def show_next(summary: Summary, file: StudyFile) -> None:
    """Prints the file of the best configuration, if it holds the best trial, and the commands that come next."""
    best = file.best_of(summary.name)
    try:
        made = read_config(best) if best.exists() else None
    except UserError:
        return
    is_there = made is not None and summary.best_trial and made.trial == summary.best_trial.number
    if made is None or not summary.is_tested or not is_there:
        return
    is_slim = summary.of_channels
    form = "slim" if is_slim else "sparse" if summary.bits is None else "rounded"
    # A name that no file has here: the name itself, or followed by -2, -3 and so on.
    name = f"{printable(summary.name).replace('/', '_')}-{form}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    config, out = _from_here(best), next((free for free in names if not Path(free).exists()), name)
    study = ["--study", *study_words(summary, file)]
    if points := summary.choices:
        middle = points[len(points) // 2].sparsity
        second = ("another point", ["export", *study, "--sparsity", f"{middle:.4g}"])
    else:
        second = ("page with figures", ["report", *study])
    rows = [
        (
            f"{form} checkpoint",
            ["apply", "--config", config, "--out", out, *["--slim"] * is_slim, *permission(file.study)],
        ),
        second,
        *[("top-1 and top-5", ["evaluate", "--config", config])] * (summary.results.data == "images"),
    ]
    console.print(f"best configuration: {config}")
    if summary.results.data == "text":
        rows.insert(0, ("talk with it", ["chat", *study, *permission(file.study)]))
    for what, words in rows:
        console.print(f"{what + ':':<19} {shlex.join(['python', 'tune.py', *words])}")


def study_words(summary: Summary, file: StudyFile) -> list[str]:
    """The words after `--study` that name a stored study from here."""
    is_known = file.path.absolute() in [path.absolute() for path in known()]
    words = [file.name if is_known else _from_here(file.path)]
    if summary.name != file.name:
        words += ["--study-name", printable(summary.name)]
    url = file.study.storage
    is_elsewhere = url is not None and url != read(file.path).get("storage")
    return words + (["--storage", without_password(url)] if url and is_elsewhere else [])


def _from_here(path: Path) -> str:
    """A path relative to the current folder, if it is inside."""
    here = Path.cwd()
    return printable(str(path.relative_to(here) if path.is_relative_to(here) else path))

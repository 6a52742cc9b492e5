"""What surrounds `evaluate`: progress, where the scores are stored, and their table."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.display import Display
from atp_tune.cli.runtime import quiet
from atp_tune.cli.terminal import console, markdown, markdown_table
from atp_tune.events import Watch, unwatched

if TYPE_CHECKING:
    from atp_tune.spec.config import ZeroShot
    from atp_tune.zeroshot.comparison import Asked


def run_evaluate(config: Path, asked: "Asked", storage: str | None, json: bool, allowed: Mapping[str, bool]) -> None:
    """Compares dense, uniform and best of a configuration, and stores their scores in it and on its study."""
    from atp_tune.results.annotations import attach, study_of
    from atp_tune.spec.config import read_config

    read = read_config(config)
    with quiet():
        if storage is not None:
            study_of(config, read, storage)  # so that a mistake is told before anything runs
        from atp_tune.zeroshot.comparison import evaluate

        found = _watched(json, lambda watch: evaluate(read, config.parent / read.folder, asked, watch, allowed))
        places = attach(config, read, "zero_shot", found, storage)
    _show(found, json)
    if not json:
        where = " and on ".join(places) or f"no place: {config} is of another trial by now"
        console.print(f"stored in {where}", highlight=False)


def run_evaluate_folder(folder: Path, asked: "Asked", json: bool, allowed: Mapping[str, bool]) -> None:
    """Scores one model's folder."""
    with quiet():
        from atp_tune.zeroshot.comparison import evaluate_folder

        found = _watched(json, lambda watch: evaluate_folder(folder, asked, watch, allowed))
    _show(found, json)


def _watched(json: bool, work: "Callable[[Watch], ZeroShot]") -> "ZeroShot":
    """The work's result, with progress on the screen; with `json` whatever libraries print is kept off it."""
    with redirect_stdout(StringIO()) if json else nullcontext(), Display() as display:
        return work(unwatched if json else display)


def _show(found: "ZeroShot", json: bool) -> None:
    from atp_tune.report import tables
    from atp_tune.results.status import to_json

    if json:
        console.print(to_json(found), highlight=False)
        return
    made = tables.zero_shot(found)
    table = markdown_table(*made.head)
    for row in made.rows:
        table.add_row(*row)
    console.print(markdown(table), highlight=False)
    console.print(f"\n{tables.zero_shot_note(found)}", style="dim", highlight=False)

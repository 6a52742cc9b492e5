"""Writes the best configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import Overrides, Storage, StudyLabel, StudyName, load_study, stored_study


def export(
    study: StudyName,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME.best.json beside the study.")] = None,
    json: Annotated[
        bool,
        typer.Option("--json", metavar="", help="Print the configuration; a file is written only with `--out`."),
    ] = False,
    trial: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="This trial, measured in full; default: the best.")
    ] = None,
    storage: Storage = None,
    study_name: StudyLabel = None,
    set_: Overrides = None,
) -> None:
    """Write the best configuration so far as one JSON file, from which `apply` prunes.

    A study of two objectives has no single best: without `--trial` it is the lowest perplexity of the Pareto front.

    Example: `python tune.py export --study smol --out best.json`

    Example: `python tune.py export --study smol --trial 3 --out third.json`
    """
    from atp_tune.errors import printable
    from atp_tune.storage import check_facts
    from atp_tune.studyfile import facts
    from atp_tune.summary import best_config, made_from

    file = load_study(study, storage, None, set_)
    stored = stored_study(file, study_name)
    made = None if set_ else made_from(stored.user_attrs.get("made_from"))
    if made is None:  # the study does not say what it was made with, or other settings are asked for
        check_facts(stored, facts(file.study, file.folder), partly=True)
    printed = Path("stdout")  # relative paths of what is printed start where the user stands
    name = study_name or file.name
    usual = file.best_of(name) if trial is None else file.beside(f"{name}.trial-{trial}.json")
    target = out or (printed if json else usual)
    config = best_config(replace(made, path=file.path) if made else file, stored, target, trial)
    if target is not printed:
        config.write(target)
    print(config.to_json() if json else f"{printable(str(target))}\n", end="")

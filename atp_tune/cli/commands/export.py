"""Writes the best configuration."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.options import Overrides, Storage, StudyLabel, load_study, stored_study

if TYPE_CHECKING:
    from atp_tune.spec.config import Config
    from atp_tune.spec.studyfile import StudyFile

PRINTED = Path("stdout")  # relative paths of what is printed start where the user stands


def export(
    study: Annotated[
        str | None, typer.Option("--study", metavar="NAME", help="Name in `studies/`, or path of a .toml file.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A configuration that is there already, instead of a study.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FORMAT", help="json, llm-compressor, yaml or csv; default: as `--out` ends, else json."
        ),
    ] = None,
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
    """Write the best configuration so far as one JSON file, from which `apply` prunes, or in a format of others.

    `llm-compressor` is a recipe for its `oneshot`; `yaml` and `csv` are the sparsities by block, or by linear where
    they differ within blocks, for code of your own.

    A study of two objectives has no single best: without `--trial` it is the lowest perplexity of the Pareto front.

    Example: `python tune.py export --study smol --out best.json`

    Example: `python tune.py export --study smol --trial 3 --out third.json`

    Example: `python tune.py export --config best.json --format llm-compressor`
    """
    from atp_tune.errors import printable
    from atp_tune.exporting import FORMATS, kind_of, write

    if (study is None) == (config is None):
        raise typer.BadParameter("give it or --config FILE, one of them", param_hint="--study")
    kind = kind_of("json" if json and format_ is None else format_, out)
    if config is not None and trial is not None:
        raise typer.BadParameter("only with --study", param_hint="--trial")
    if json and kind != "json":
        raise typer.BadParameter(f"prints the configuration; leave out --format {kind}", param_hint="--json")
    ending = FORMATS[kind].ending
    if config is not None:
        target = out or (PRINTED if json else config.with_name(f"{config.name.removesuffix('.json')}{ending}"))
        found = _moved(config, target)
    else:
        file = load_study(str(study), storage, None, set_)
        name = study_name or file.name
        usual = file.best_of(name) if trial is None else file.beside(f"{name}.trial-{trial}.json")
        target = out or (PRINTED if json else usual.with_suffix(ending))
        found = _of_study(file, study_name, bool(set_), target, trial)
    if target is not PRINTED:
        write(found, kind, target)
    print(found.to_json() if json else f"{printable(str(target))}\n", end="")


def _of_study(file: "StudyFile", name: str | None, overridden: bool, target: Path, trial: int | None) -> "Config":
    """The best configuration of a study, or that of a trial; `overridden`: other settings are asked for."""
    from atp_tune.results.best_config import best_config
    from atp_tune.results.summary import made_from
    from atp_tune.spec.facts import facts
    from atp_tune.storage.fingerprint import check_facts

    stored = stored_study(file, name)
    made = None if overridden else made_from(stored.user_attrs.get("made_from"))
    if made is None:  # the study does not say what it was made with, or other settings are asked for
        check_facts(stored, facts(file.study, file.folder), partly=True)
    return best_config(replace(made, path=file.path) if made else file, stored, target, trial)


def _moved(config: Path, target: Path) -> "Config":
    """A configuration in a file, as it reads from another folder."""
    from atp_tune.spec.config import read_config

    found = read_config(config)
    return found.seen_from(config.parent / found.folder, target.parent)

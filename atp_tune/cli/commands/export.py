"""Writes the best configuration."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.options import Overrides, Storage, StudyLabel, load_study, stored_study

if TYPE_CHECKING:
    from atp_tune.config import Config

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
            "--format", metavar="FORMAT", help="json, llm-compressor, yaml or csv; default: by `--out`, json."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME.best.json beside the study.")] = None,
    json: Annotated[
        bool,
        typer.Option("--json", metavar="", help="Print the configuration; a file is written only with `--out`."),
    ] = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    set_: Overrides = None,
) -> None:
    """Write the best configuration so far as one JSON file, from which `apply` prunes, or in a format of others.

    `llm-compressor` is a recipe for its `oneshot`; `yaml` and `csv` are the sparsities by block, or by linear where
    they differ within blocks, for code of your own.

    Example: `python tune.py export --study smol --out best.json`

    Example: `python tune.py export --config best.json --format llm-compressor`
    """
    from atp_tune.errors import printable
    from atp_tune.exporting import FORMATS, kind_of, write

    if (study is None) == (config is None):
        raise typer.BadParameter("give it or --config FILE, one of them", param_hint="--study")
    kind = kind_of("json" if json and format_ is None else format_, out)
    if json and kind != "json":
        raise typer.BadParameter(f"prints the configuration; leave out --format {kind}", param_hint="--json")
    ending = FORMATS[kind].ending
    if config is not None:
        target = out or (PRINTED if json else config.with_name(f"{config.name.removesuffix('.json')}{ending}"))
        found = _moved(config, target)
    else:
        target, found = _best(str(study), study_name, storage, set_, out or (PRINTED if json else None), ending)
    if target is not PRINTED:
        write(found, kind, target)
    print(found.to_json() if json else f"{printable(str(target))}\n", end="")


def _best(
    study: str, name: str | None, storage: str | None, set_: list[str] | None, out: Path | None, ending: str
) -> "tuple[Path, Config]":
    """Where the best configuration of a study goes, and what it is."""
    from atp_tune.storage import check_facts
    from atp_tune.studyfile import facts
    from atp_tune.summary import best_config, made_from

    file = load_study(study, storage, None, set_)
    stored = stored_study(file, name)
    made = None if set_ else made_from(stored.user_attrs.get("made_from"))
    if made is None:  # the study does not say what it was made with, or other settings are asked for
        check_facts(stored, facts(file.study, file.folder), partly=True)
    target = out or file.best_of(name or file.name).with_suffix(ending)
    return target, best_config(replace(made, path=file.path) if made else file, stored, target)


def _moved(config: Path, target: Path) -> "Config":
    """A configuration in a file, as it reads from another folder."""
    from atp_tune.config import read_config

    found = read_config(config)
    return found.seen_from(config.parent / found.folder, target.parent)

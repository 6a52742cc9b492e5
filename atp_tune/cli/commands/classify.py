"""`tune.py classify`: what a sparse image classifier, and its dense model, see in pictures."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import Device, Json, Permissions, flag, option, wrong
from atp_tune.cli.terminal import console, markdown, working
from atp_tune.errors import printable


def classify(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR FILE", help="Folder of an image classifier, as `apply` writes it, and pictures: .png, .jpg…"
        ),
    ],
    config: Annotated[Path | None, option("FILE", "In the place of DIR: a configuration, pruned to in memory.")] = None,
    both: Annotated[bool, flag("--both", "Also the dense model's answers, beside the sparse model's.")] = False,
    device: Device = None,
    json: Json = False,
    *,
    may: Permissions,
) -> None:
    """Name what is in pictures, by a sparse image classifier: its five most probable classes.

    The dense model of `--both` is the one that the configuration, or the folder's atp_tune.json, names.

    Example: `python tune.py classify vit-sparse photo.jpg --both`
    """
    place, files = (config, places) if config else (places[0], places[1:])
    if config is None and not place.is_dir():
        raise wrong("DIR", f"there is no folder {place}; give one before the pictures")
    if not files:
        raise wrong("FILE...", "give pictures after the folder")
    if config is not None and not config.is_file():
        raise wrong("--config", f"there is no file {config}")
    from atp_tune.events import Place
    from atp_tune.sparse.both_models import classify

    with working(json) as watch:
        there = Place(Path(), device or "auto", vars(may), watch)
        found = classify(files, place, both, there)
    from atp_tune.results.status import to_json

    if json:
        console.print(to_json(found))
        return
    rows = []
    for one in found:
        answers = [one.classes] if one.dense is None else [one.dense, one.classes]
        for name, guesses in zip(("dense", "sparse"), answers, strict=False):
            side = [] if one.dense is None else [name]
            rows.append([_cell(one.file), *side, *(_cell(f"{g.name} {g.probability:.1%}") for g in guesses)])
    model = [] if found[0].dense is None else ["model"]
    ranks = [str(place + 1) for place in range(len(found[0].classes))]
    console.print(markdown(["picture", *model, *ranks], rows))


def _cell(text: str) -> str:
    """A name of a file or a class, which a stranger may have given, as it is."""
    from rich.markup import escape

    return escape(printable(text).replace("|", "\\|"))

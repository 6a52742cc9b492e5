"""`tune.py evaluate`: scores models on tasks of lm-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.options import Device, Json, Permissions, option, wrong
from atp_tune.cli.terminal import console, markdown, working

if TYPE_CHECKING:
    from atp_tune.spec.config import ZeroShot


def evaluate(
    model: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder of a single model, as `apply` writes it.")
    ] = None,
    config: Annotated[
        Path | None,
        option("FILE", "Configuration whose dense, uniform and best models are compared in memory."),
    ] = None,
    tasks: Annotated[
        str,
        option(
            "LIST", "Tasks or groups of lm-eval, FOLDER/ or FILE.yaml, with commas; zero-shot: the seven of the papers."
        ),
    ] = "zero-shot",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many items of each task.")] = None,
    num_fewshot: Annotated[int | None, option("K", "Few-shot examples; default: 0.", "--num-fewshot", min=0)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size in sequences.")] = 8,
    device: Device = None,
    storage: Annotated[
        str | None,
        option("URL", "Storage that holds the study; default: NAME.db beside the configuration."),
    ] = None,
    json: Json = False,
    *,
    may: Permissions,
) -> None:
    """Score models on tasks of lm-eval (`pip install -e '.[eval]'`): zero-shot accuracy with its standard error.

    The scores are stored in the configuration and in its study; the report shows them. As with lm-eval itself, code in
    a folder of tasks runs. `zero-shot` is boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa,
    with data from the hub; `scripts/offline-tasks DIR` makes tasks that need no network. An image classifier is scored
    on its test images: top-1 and top-5 accuracy.

    Example: `python tune.py evaluate smol-sparse --tasks boolq,piqa --limit 100`

    Example: `python tune.py evaluate --config studies/smol.best.json`
    """
    if (config is None) == (model is None):
        raise wrong("--config", "give either DIR or --config FILE")
    if model is not None and storage is not None:
        raise wrong("--storage", "only with --config")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    from atp_tune.events import Place
    from atp_tune.results.annotations import attach, check
    from atp_tune.spec.config import read_config

    path, read = config or Path(), config and read_config(config)
    with working(json) as watch:
        if read:
            check(path, read, storage)
        from atp_tune.sparse import comparing

        base = path.parent / read.folder if read else Path()
        place = Place(base, device or "auto", vars(may), watch)
        asked = comparing.TaskOptions(names, limit, num_fewshot, batch)
        found = (
            comparing.evaluate(read, asked, place) if read else comparing.evaluate_folder(model or Path(), asked, place)
        )
        places = attach(path, read, "zero_shot", found, storage) if read else []
    _show(found, json)
    if read and not json:
        console.print(f"stored in {' and on '.join(places) or f'no place: {config} is of another trial by now'}")


def _show(found: "ZeroShot", json: bool) -> None:
    from atp_tune.report import tables
    from atp_tune.results.status import to_json

    if json:
        console.print(to_json(found))
        return
    made = tables.zero_shot(found)
    console.print(markdown(made.head, made.rows))
    console.print(f"\n{tables.zero_shot_note(found)}", style="dim")

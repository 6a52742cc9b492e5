"""`tune.py evaluate`: scores models on tasks of lm-eval."""

from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.options import BestOptions, Permissions, checked_prompts, wrong
from atp_tune.cli.terminal import console, markdown, working
from atp_tune.errors import printable

if TYPE_CHECKING:
    from atp_tune.spec.config import ZeroShot


def evaluate(
    model: Path | None = None,
    *,
    config: Path | None = None,
    tasks: str = "zero-shot",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = 8,
    device: str | None = None,
    storage: str | None = None,
    json: bool = False,
    may: Permissions,
) -> None:
    """Score models on tasks of lm-eval (`pip install -e '.[eval]'`): zero-shot accuracy with its standard error.

    The scores are stored in the configuration and in its study; the report shows them. As with lm-eval itself, code in
    a folder of tasks runs. `zero-shot` is boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa,
    with data from the hub; `scripts/offline-tasks DIR` makes tasks that need no network. An image classifier is scored
    on its test images: top-1 and top-5 accuracy.

    Example: `python tune.py evaluate smol-sparse --tasks boolq,piqa --limit 100`

    Example: `python tune.py evaluate --config studies/smol.best.json`

    Options:
        model DIR: Folder of a single model, as `apply` writes it.
        config FILE: Configuration whose dense, uniform and best models are compared in memory.
        tasks LIST: Tasks or groups of lm-eval, FOLDER/ or FILE.yaml, with commas; zero-shot: the seven of the papers.
        limit 1..: Use only the first so many items of each task.
        num_fewshot K 0..: Few-shot examples; default: 0.
        batch 1..: Batch size in sequences.
        storage URL: Storage that holds the study; default: NAME.db beside the configuration.
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
    from atp_tune.report import contents
    from atp_tune.results.status import to_json

    if json:
        console.print(to_json(found))
        return
    made = contents.zero_shot(found)
    console.print(markdown(made.head, made.rows))
    console.print(f"\n{contents.zero_shot_note(found)}", style="dim")


# --- `tune.py generate`: shows what dense, uniform and best make of prompts.


def generate(
    *,
    config: Path | None = None,
    prompt: list[str] | None = None,
    tokens: int = 48,
    set_: list[str] | None = None,
    json: bool = False,
    options: BestOptions,
) -> None:
    """Continue prompts by the dense model, by uniform and by the best configuration, pruned in memory.

    Texts are greedy and without a chat template, so that they differ by the weights alone; `chat` uses the template.
    With --prompt these prompts alone are continued, and nothing is stored. Without, the texts of three fixed prompts
    and of the study's own are stored in the configuration and in its study, as a run does at its end; summary, report
    and model card show them.

    Example: `python tune.py generate --config studies/smol.best.json --prompt "The moon is"`

    Options:
        tokens 1..4096: Tokens of each continuation, at most.
    """
    options.check("--config FILE", config, set=set_)
    prompts = checked_prompts(prompt)
    from atp_tune.cli.tables import show_continuations
    from atp_tune.metrics import PROMPTS
    from atp_tune.results.annotations import attach, check
    from atp_tune.results.status import to_json

    with working(json) as watch:
        best = options.best(config, set_)
        usual = (*PROMPTS, *(best.file.study.continuations.prompts if best.file else ()))
        where = best.path, best.config
        if not prompts:
            check(*where, best.storage)
        found = best.made(watch).generate(prompts or usual, tokens=tokens)
        places = [] if prompts else attach(*where, "continuations", found, best.storage)
    if json:
        console.print(to_json(found))
        return
    show_continuations(found)
    if not prompts:
        console.print(f"stored in {' and on '.join(places) or f'no place: {best.path} is of another trial by now'}")


# --- `tune.py classify`: what a sparse image classifier, and its dense model, see in pictures.


def classify(
    places: list[Path],
    *,
    config: Path | None = None,
    both: bool = False,
    device: str | None = None,
    json: bool = False,
    may: Permissions,
) -> None:
    """Name what is in pictures, by a sparse image classifier: its five most probable classes.

    The dense model of `--both` is the one that the configuration, or the folder's atp_tune.json, names.

    Example: `python tune.py classify vit-sparse photo.jpg --both`

    Options:
        places DIR FILE: Folder of an image classifier, as `apply` writes it, and pictures: .png, .jpg…
        config FILE: In the place of DIR: a configuration, pruned to in memory.
        both: Also the dense model's answers, beside the sparse model's.
    """
    place, files = (config, places) if config else (places[0], places[1:])
    if config is None and not place.is_dir():
        raise wrong("DIR", f"there is no folder {place}; give one before the pictures")
    if not files:
        raise wrong("FILE...", "give pictures after the folder")
    if config is not None and not config.is_file():
        raise wrong("--config", f"there is no file {config}")
    from atp_tune.events import Place
    from atp_tune.sparse.comparing import classify

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

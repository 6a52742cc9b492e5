"""`tune.py generate`: shows what dense, uniform and best make of prompts."""

from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.options import (
    AllowPickle,
    Device,
    Json,
    Overrides,
    Prompts,
    Storage,
    StudyLabel,
    TrustPlugins,
    TrustRemoteCode,
    checked_prompts,
    load_study,
    permissions,
    stored_study,
)
from atp_tune.cli.terminal import console

if TYPE_CHECKING:
    from atp_tune.spec.config import Config
    from atp_tune.spec.studyfile import StudyFile


def generate(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration, as a run or `export` writes it.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Study whose best trial is taken, without a configuration.")
    ] = None,
    study_name: StudyLabel = None,
    prompt: Prompts = None,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of each continuation, at most.")] = 48,
    device: Device = None,
    storage: Storage = None,
    set_: Overrides = None,
    json: Json = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_plugins: TrustPlugins = False,
) -> None:
    """Continue prompts by the dense model, by uniform and by the best configuration, pruned in memory.

    Texts are greedy and without a chat template, so that they differ by the weights alone; `chat` uses the template.
    With --prompt these prompts alone are continued, and nothing is stored. Without, the texts of three fixed prompts
    and of the study's own are stored in the configuration and in its study, as a run does at its end; summary, report
    and model card show them.

    Example: `python tune.py generate --config studies/smol.best.json --prompt "The moon is"`
    """
    if (config is None) == (study is None):
        raise typer.BadParameter("give either --config FILE or --study NAME", param_hint="--config")
    if study is None and (study_name is not None or set_):
        raise typer.BadParameter("only with --study", param_hint="--study-name" if study_name else "--set")
    prompts = checked_prompts(prompt)
    allowed = permissions(allow_pickle, trust_remote_code, trust_plugins)
    from atp_tune.cli.display import Display
    from atp_tune.cli.runtime import quiet
    from atp_tune.cli.tables import show_continuations
    from atp_tune.events import ignore_events
    from atp_tune.metrics.continuations import PROMPTS
    from atp_tune.results.annotations import attach, check
    from atp_tune.results.status import to_json
    from atp_tune.spec.config import read_config

    usual: tuple[str, ...] = PROMPTS
    with quiet():
        if config is not None:
            path, read = config, read_config(config)
        else:
            file = load_study(study or "", storage, None, set_)
            path, read = _best_of(file, study_name)
            storage, usual = file.storage_url, (*PROMPTS, *file.study.continuations.prompts)
            allowed = {key: given or file.permissions[key] for key, given in allowed.items()}
        if not prompts:
            check(path, read, storage)
        from atp_tune.api.configuration import Configuration

        with redirect_stdout(StringIO()) if json else nullcontext(), Display() as display:
            watch, base = ignore_events if json else display, path.parent / read.folder
            made = Configuration(read, base, device or "auto", allowed, watch=watch)
            found = made.generate(prompts or usual, tokens=tokens)
        places = [] if prompts else attach(path, read, "continuations", found, storage)
    if json:
        console.print(to_json(found))
        return
    show_continuations(found)
    if not prompts:
        console.print(f"stored in {' and on '.join(places) or f'no place: {path} is of another trial by now'}")


def _best_of(file: "StudyFile", name: str | None) -> tuple[Path, "Config"]:
    """The file of a study's best configuration, which need not exist, and the configuration."""
    from atp_tune.results.best_config import best_config

    path = file.best_of(name or file.name)
    return path, best_config(file, stored_study(file, name), path)

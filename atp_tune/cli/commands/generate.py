"""`tune.py generate`: shows what dense, uniform and best make of prompts."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.best import BestOptions
from atp_tune.cli.options import Json, Overrides, Prompts, checked_prompts, option
from atp_tune.cli.terminal import console, working


def generate(
    config: Annotated[Path | None, option("FILE", "Configuration, as a run or `export` writes it.")] = None,
    prompt: Prompts = None,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of each continuation, at most.")] = 48,
    set_: Overrides = None,
    json: Json = False,
    *,
    options: BestOptions,
) -> None:
    """Continue prompts by the dense model, by uniform and by the best configuration, pruned in memory.

    Texts are greedy and without a chat template, so that they differ by the weights alone; `chat` uses the template.
    With --prompt these prompts alone are continued, and nothing is stored. Without, the texts of three fixed prompts
    and of the study's own are stored in the configuration and in its study, as a run does at its end; summary, report
    and model card show them.

    Example: `python tune.py generate --config studies/smol.best.json --prompt "The moon is"`
    """
    options.check("--config FILE", config, set=set_)
    prompts = checked_prompts(prompt)
    from atp_tune.cli.tables import show_continuations
    from atp_tune.metrics.continuations import PROMPTS
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

"""`tune.py plan`: estimates what a study will cost."""

from typing import TYPE_CHECKING

from atp_tune.cli.options import load_study
from atp_tune.cli.terminal import console, gib, table, trials, working
from atp_tune.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atp_tune.cost.forecast import Forecast, Memory, StudyCost
    from atp_tune.spec.studyfile import StudyFile


def plan(
    *,
    study: str,
    json: bool = False,
    storage: str | None = None,
    study_name: str | None = None,
    device: str | None = None,
    trust_plugins: bool = False,
    set_: list[str] | None = None,
) -> None:
    """Estimate what a study will cost before it runs: tokens, seconds, memory, and what does not fit.

    Loads the model and sends one batch of each text through three blocks, from whose seconds all others are estimated;
    nothing is stored.
    `atp_tune/cost/forecast.py` lists the keys of the JSON document.

    Example: `python tune.py plan --study smol`
    """
    show_plan(load_study(study, storage, device, set_, trust_plugins), study_name, json)


def show_plan(file: "StudyFile", study_name: str | None, json: bool = False) -> None:
    """Measures and prints the cost of a study, as a table or as one JSON document."""
    from atp_tune.cost.planning import foresee
    from atp_tune.results.status import to_json

    with working(json) as watch:
        found = foresee(file, study_name or file.name, watch)
    console.print(to_json(found)) if json else show(found)


def show(found: "Forecast") -> None:
    """Prints the cost of a trial with each pruner, the cost of the study, its memory, and what does not fit."""
    where = {
        "none": "on the device",
        "cpu": "in host memory, for each worker again, two blocks on the device",
        "disk": "on disk, mapped",
    }
    weights = found.weights
    console.print(f"{printable(found.study)}: {found.device}, {found.dtype}\n")
    rows = table("trial", "tokens", "calibrate", "prune", "evaluate", "seconds")
    for trial in found.trial:
        times = trial.seconds
        parts = (times.calibrate, times.prune, times.evaluate, times.total) if times else (None,) * 4
        seconds = ["–" if part is None else f"{part:.1f}" for part in parts]
        name = trial.pruner if trial.what == "trial" else f"screening {trial.pruner}"
        rows.add_row(name, f"{trial.tokens.total:,}", *seconds)
    console.print(rows)
    for line in (
        f"study:   {_study_cost(found.whole)}",
        f"weights: {gib(weights.bytes)} in {weights.blocks} blocks of up to {gib(weights.largest_block)}, "
        f"{where[weights.offload]}",
        f"memory:  {_memory(found.memory)}",
    ):
        console.print(line)
    for problem in found.problems:
        console.print(f"does not fit: {problem}", style="yellow")


def cost_beside(found: "Sequence[StudyCost]", preset: str, other: str) -> str:
    """What a study takes, and what it would take with another preset, if that is known, in one line."""
    from atp_tune.results.formatting import duration

    own, *others = found
    line = f"{preset}: {_study_cost(own.model_copy(update={'tokens': None}))}"
    for cost in others:
        if cost.seconds is not None and own.seconds is not None:
            line += f"; --preset {other} measures {'more' if cost.seconds > own.seconds else 'less'}"
            line += f", in about {duration(cost.seconds)}"
    return line


def _study_cost(whole: "StudyCost") -> str:
    """Trials, tokens and time of a study in one line."""
    from atp_tune.results.formatting import duration

    if whole.trials is None:
        return "the number of trials is not known"
    tokens = "" if whole.tokens is None else f", {whole.tokens:,} tokens through the model"
    time = "" if whole.seconds is None else f", about {duration(whole.seconds)}"
    left = "" if not whole.done or whole.seconds_left is None else f" ({duration(whole.seconds_left)} left)"
    done = f"{whole.done} of " if whole.done else ""
    screened = f" after {trials(whole.screened)} of screening" if whole.screened else ""
    most = "at most " if whole.early_termination and whole.done < whole.trials else ""
    without = ", without the tasks of limit.min_accuracy" if whole.without_tasks else ""
    parts = (("for prices", whole.descents), ("to train the best plan", whole.training))
    own = " and ".join(f"{duration(seconds)} {what}" for what, seconds in parts if seconds)
    of_it = f", of which {own}" if time and own else ""
    return f"{most}{done}{trials(whole.trials)}{screened}{tokens}{time}{of_it}{left}{without}"


def _memory(memory: "Memory") -> str:
    """Peaks of host and device in one line."""
    host = f"host {gib(memory.host)} of {gib(memory.host_free)} ({gib(memory.loading)} while loading)"
    if memory.device is None or memory.device_free is None:
        return host
    return f"{host}, device {gib(memory.device)} of {gib(memory.device_free)}"

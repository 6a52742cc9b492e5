"""What `plan` says: what a trial and a study will cost, and what does not fit."""

from typing import TYPE_CHECKING

from atp_tune.cli.terminal import console, gib, table, trials
from atp_tune.errors import printable

if TYPE_CHECKING:
    from atp_tune.cost.forecast import Forecast, Memory, Whole


def show_forecast(found: "Forecast") -> None:
    """What a study will cost: a trial of each pruner, the whole, memory, and what stands in the way."""
    where = {"device": "on the device", "host": "in host memory, two blocks on the device", "disk": "on disk, mapped"}
    weights = found.weights
    console.print(f"{printable(found.study)}: {found.device}, {found.dtype}\n", highlight=False)
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
        f"{where[weights.residency]}",
        f"memory:  {_memory(found.memory)}",
    ):
        console.print(line, highlight=False)
    for problem in found.problems:
        console.print(f"does not fit: {problem}", style="yellow", highlight=False)


def _study_cost(whole: "Whole") -> str:
    """Trials, tokens and time of a study in one line."""
    from atp_tune.results.formatting import duration

    if whole.trials is None:
        return "not known how many trials"
    tokens = "" if whole.tokens is None else f", {whole.tokens:,} tokens through the model"
    time = "" if whole.seconds is None else f", about {duration(whole.seconds)}"
    left = "" if not whole.done or whole.seconds_left is None else f" ({duration(whole.seconds_left)} left)"
    done = f"{whole.done} of " if whole.done else ""
    screened = f" after {trials(whole.screened)} of screening" if whole.screened else ""
    most = "at most " if whole.settles and whole.done < whole.trials else ""
    return f"{most}{done}{trials(whole.trials)}{screened}{tokens}{time}{left}"


def _memory(memory: "Memory") -> str:
    """Peaks of host and device in one line."""
    host = f"host {gib(memory.host)} of {gib(memory.host_free)} ({gib(memory.loading)} while loading)"
    if memory.device is None or memory.device_free is None:
        return host
    return f"{host}, device {gib(memory.device)} of {gib(memory.device_free)}"

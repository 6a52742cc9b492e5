"""Every allocation with every pruner at three targets, each with the same number of trials: writes docs/results.md.

    python benchmarks/allocations.py

Each line of the result is one study on the model and the texts of `smol`, all in one database, so that the command
goes on where it was stopped, and ends at once when all is there. About 600 trials: an hour on 2 cores that multiply
bfloat16 fast, four hours on others.
"""

import argparse
import itertools
import platform
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial

from atp_tune.bench import Bench
from atp_tune.cli.running import quiet
from atp_tune.events import Event, TrialEnded
from atp_tune.perplexity import change, perplexity
from atp_tune.plan import shown
from atp_tune.studyfile import StudyFile, load
from atp_tune.summary import best_of_each, is_uniform, parameters_of
from atp_tune.tuning import Run, open_bench, tune

ROOT = Path(__file__).parents[1]
ALLOCATIONS = ("uniform", "atp", "curve", "owl", "alphapruning", "er", "global")
COLUMNS = ("allocation", "best parameters", "search", "report", "report, against uniform", "against atp", "trials", "s")


def main() -> None:
    """Runs what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt", "magnitude"])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--database", type=Path, default=ROOT / "build" / "allocations.db")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    bench, found = None, {}
    with quiet():
        for target, pruner, name in itertools.product(options.targets, options.pruners, ALLOCATIONS):
            file = study_file(options, target, pruner, name)
            bench = bench or open_bench(Run(file, name, None, told))
            found[target, pruner, name] = run(file, f"{target:g}-{pruner}-{name}", bench)
            options.out.write_text(page(options, bench, found), encoding="utf-8")
    print(options.out)


def study_file(options: argparse.Namespace, target: float, pruner: str, name: str) -> StudyFile:
    """The study of one line: `smol` with another target, pruner and allocation."""
    overrides = {
        "sparsity": target,
        "prune.pruners": f"['{pruner}']",
        "allocation": f"'{name}'",
        "search.trials": options.trials,
        "storage": f"sqlite:///{options.database.absolute()}",
    }
    return load("smol", [f"{key}={value}" for key, value in overrides.items()])


def run(file: StudyFile, name: str, bench: Bench) -> optuna.Study:
    """The study, driven to its end; its best.json is left beside the database."""
    print(name, flush=True)
    return tune(Run(file, name, None, told, bench))


def told(event: Event) -> None:
    """One line a trial."""
    if isinstance(event, TrialEnded):
        value = f"{event.value:.2f}" if event.value is not None else f"failed: {event.reason}"
        print(f"  [{event.done}/{event.total}] {value}", flush=True)


def page(options: argparse.Namespace, bench: Bench, found: dict[tuple[float, str, str], optuna.Study]) -> str:
    """The whole of docs/results.md."""
    dense = next(iter(found.values()))
    search, report = (perplexity(nlls) for nlls in (dense.user_attrs["dense"], dense.user_attrs["reports"]["dense"]))
    parts = [
        "# Allocations compared\n",
        "Written by `python benchmarks/allocations.py`. SmolLM2-135M-Instruct, "
        f"{str(bench.checkpoint.dtype).removeprefix('torch.')}, torch "
        f"{torch.__version__.partition('+')[0]} on {platform.machine()} CPU, texts of `studies/smol.toml`; up to "
        f"{options.trials} trials a line, uniform included; allocations without parameters have one point. Dense: "
        f"{search} on the search text, {report} on the report text.\n",
        "Perplexity ± standard error over windows. Changes are on the report text, which no search has seen, paired "
        "window by window, so that their error is that of the difference. `erk` is `er` for linears. Seconds are of "
        "the search, on a machine that was not idle.\n",
        (ROOT / "docs" / "results.notes.md").read_text(encoding="utf-8"),
    ]
    for target, pruner in dict.fromkeys((target, pruner) for target, pruner, _ in found):
        lines = {name: study for (t, p, name), study in found.items() if (t, p) == (target, pruner)}
        parts += [f"## {target:.0%}, {pruner}\n", table(lines)]
    return "\n".join(parts)


def table(studies: dict[str, optuna.Study]) -> str:
    """One line for each allocation."""
    rows = [row(name, study, studies) for name, study in studies.items()]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def row(name: str, study: optuna.Study, studies: dict[str, optuna.Study]) -> list[str]:
    """The best trial of one study, uniform left out where the line is another allocation's."""
    best = best_of(name, study)
    if best is None:
        return [name, "no trial has a value", *[""] * (len(COLUMNS) - 2)]
    report = report_of(study, best)
    against = [""] * 2
    for k, other in enumerate(("uniform", "atp")):
        rival = best_of(other, studies[other]) if other in studies and other != name else None
        if rival is not None:
            against[k] = str(change(report_of(studies[other], rival), report))
    score = f"{best.value:.2f} ± {best.user_attrs['stderr']:.2f}"
    seconds = sum(sum(trial.user_attrs.get("seconds", {}).values()) for trial in study.trials)
    return [
        name,
        shown(parameters_of(best)),
        score,
        str(perplexity(report)),
        *against,
        str(len(study.trials)),
        f"{seconds:.0f}",
    ]


def best_of(name: str, study: optuna.Study) -> FrozenTrial | None:
    """The best trial of the line's own allocation."""
    return next((trial for trial in best_of_each(study) if name == "uniform" or not is_uniform(trial)), None)


def report_of(study: optuna.Study, trial: FrozenTrial) -> list[float]:
    """Window NLLs of a trial on the report text."""
    nlls: list[float] = study.user_attrs["reports"][str(trial.number)]
    return nlls


if __name__ == "__main__":
    main()

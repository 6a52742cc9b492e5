"""Allocations compared, each in a study of its own with the same number of trials: writes docs/results.md.

    python benchmarks/allocations.py                    SmolLM2-135M, three pruners, three targets
    python benchmarks/allocations.py --study FILE --title NAME --out docs/results-NAME.md     another model or text
    python benchmarks/allocations.py --set model.dtype=float32 --out docs/results-float32.md  another number format

Each line of the result is one study with the settings of `smol-60`, or another, all in one database below `build`, so
that the command goes on where it was stopped, and ends at once when all is there. With all pruners and targets about
600 trials of SmolLM2: an hour on 2 cores that multiply bfloat16 fast, four hours on others.
"""

import argparse
import itertools
import platform
import shlex
import sys
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial

from atp_tune.cli.terminal import quiet
from atp_tune.config.plugged import plug_in
from atp_tune.config.studyfile import StudyFile, load
from atp_tune.events import Event, TrialEnded
from atp_tune.measures import change, perplexity
from atp_tune.plan import shown
from atp_tune.results.goals import goal_in
from atp_tune.results.results import allocation_parameters, is_uniform
from atp_tune.results.summary import summarise
from atp_tune.run.session import Session
from atp_tune.search.runner import StudyRun, is_complete, open_context, tune
from atp_tune.storage import opening

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
NOTES = ROOT / "benchmarks" / "notes"  # what a page says about its tables, in a file of the page's name
Line = tuple[float, str, str]  # target, pruner, allocation

TARGETS = (0.5, 0.6, 0.7)
PRUNERS = ("wanda", "sparsegpt", "magnitude")
PLUGGED = {name: f"{ROOT / 'examples' / 'plugins' / name}.py:{name.upper()}" for name in ("dlp", "lsa")}
ALLOCATIONS = ("uniform", "atp", "curve", "owl", "alphapruning", *PLUGGED, "er", "global", "gradient", "gradient-rows")
COLUMNS = (
    "allocation",
    "best parameters",
    "validation",
    "test",
    "test, against uniform",
    "over draws, against uniform",
    "against atp",
)


def main() -> None:
    """Runs what is missing and writes the tables, anew after every line."""
    options = read_options()
    with quiet():
        asked = [*filter(fits, itertools.product(options.targets, options.pruners, options.allocations))]
        everything = filter(fits, itertools.product(TARGETS, PRUNERS, ALLOCATIONS))
        files = {line: study_file(options, line) for line in dict.fromkeys((*everything, *asked))}
        found = {line: study for line, file in files.items() if (study := complete(file, line))}
        context = open_context(StudyRun(next(iter(files.values())), "", None, told))
        for line, file in files.items():
            if line in found or line not in asked or options.write_only:
                continue
            print(name_of(line), flush=True)
            found[line] = tune(StudyRun(file, name_of(line), None, told, context))
            options.out.write_text(page(options, context, found), encoding="utf-8")
        options.out.write_text(page(options, context, found), encoding="utf-8")
    print(options.out)


def read_options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="smol-60", help="the study with the model and the texts")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study")
    parser.add_argument("--title", default="SmolLM2-135M-Instruct", help="the model's name in the page")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--pruners", nargs="+", default=PRUNERS, choices=PRUNERS)
    parser.add_argument("--allocations", nargs="+", default=ALLOCATIONS, choices=ALLOCATIONS)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--database", type=Path, help="default: build/allocations.db, of another page build/OUT.db")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--write-only", action="store_true", help="run nothing: write what the database has")
    options = parser.parse_args()
    if options.out == PAGE and (options.set or options.study != "smol-60"):
        parser.error(f"{PAGE.name} is of `smol-60` as it is; give another --out, which has a database of its own")
    name = "allocations" if options.out == PAGE else options.out.stem
    given = [word for word in sys.argv[1:] if word != "--write-only"]
    options.command = shlex.join(["python", "benchmarks/allocations.py", *given])
    options.database = options.database or ROOT / "build" / f"{name}.db"
    return options


def fits(line: Line) -> bool:
    """Whether a line differs from all others: without rows `gradient-rows` is `gradient`."""
    return line[1] == "wanda" or line[2] != "gradient-rows"


def name_of(line: Line) -> str:
    """The study's name in the database."""
    return f"{line[0]:g}-{line[1]}-{line[2]}"


def complete(file: StudyFile, line: Line) -> optuna.Study | None:
    """The line's study, if it has come to its end."""
    db = opening.open_storage(file.storage_url, create=False)
    study = opening.find_study(db, name_of(line)) if db else None
    return study if study is not None and is_complete(study, file) else None


def study_file(options: argparse.Namespace, line: Line) -> StudyFile:
    """The study of one line: `smol-60`, or the one asked for, with another target, pruner and allocation."""
    target, pruner, name = line
    overrides = {
        "sparsity": target,
        "prune.pruners": f"['{pruner}']",
        "allocation": f"'{PLUGGED.get(name, name)}'",
        "search.trials": options.trials,
        "storage": f"sqlite:///{options.database.absolute()}",
        "continuations.tokens": 0,
    }
    file = load(options.study, [*options.set, *(f"{key}={value}" for key, value in overrides.items())])
    plug_in(file.study, file.folder, trusted=True)
    return file


def told(event: Event) -> None:
    """One line a trial."""
    if isinstance(event, TrialEnded):
        value = f"{event.scores['perplexity']:.2f}" if event.scores else f"failed: {event.reason}"
        print(f"  [{event.done}/{event.total}] {value}", flush=True)


def page(options: argparse.Namespace, context: Session, found: dict[Line, optuna.Study]) -> str:
    """The whole page."""
    attrs = next(iter(found.values())).user_attrs
    validation, test = (perplexity(nlls) for nlls in (attrs["dense"], attrs["test_nlls"]["dense"]))
    notes, study = NOTES / options.out.name, Path(options.study).name
    parts = [
        "# Allocations compared\n",
        f"`{options.command}` writes this page. It prunes {options.title} in "
        f"{str(context.checkpoint.dtype).removeprefix('torch.')} with torch {torch.__version__.partition('+')[0]} on "
        f"a CPU ({platform.machine()}), with the texts of `{study}`. Each line is a study of at most "
        f"{options.trials} trials, including uniform; allocations without parameters need one trial. Perplexity of "
        f"the dense model: {validation} on the validation text, {test} on the test text.\n",
        "Perplexities ± their standard error over windows. Changes are on the test text, which chose nothing, paired "
        "by windows; over draws of the calibration text with their standard deviation. For linears `erk` is `er`.\n",
        *([notes.read_text(encoding="utf-8")] if notes.exists() else []),
    ]
    for target, pruner in sorted({line[:2] for line in found}, key=lambda pair: (pair[0], PRUNERS.index(pair[1]))):
        lines = {name: found[target, pruner, name] for name in ALLOCATIONS if (target, pruner, name) in found}
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
    own = report_of(study, best)
    from_uniform, from_atp = (report_of_best(other, studies) for other in ("uniform", "atp"))
    return [
        name,
        shown(allocation_parameters(best)),
        f"{best.value:.2f} ± {best.user_attrs['stderr']:.2f}",
        str(perplexity(own)),
        str(change(from_uniform, own)) if from_uniform and name != "uniform" else "",
        drawn.changed if (drawn := summarise(study).over_draws.get(best.number)) else "",
        str(change(from_atp, own)) if from_atp and name != "atp" else "",
    ]


def report_of_best(name: str, studies: dict[str, optuna.Study]) -> list[float] | None:
    """Window NLLs of a line's best trial on the test text; None without such a line."""
    best = best_of(name, studies[name]) if name in studies else None
    return report_of(studies[name], best) if best is not None else None


def best_of(name: str, study: optuna.Study) -> FrozenTrial | None:
    """The best trial of the line's own allocation."""
    return next((trial for trial in goal_in(study).leaders() if name == "uniform" or not is_uniform(trial)), None)


def report_of(study: optuna.Study, trial: FrozenTrial) -> list[float]:
    """Window NLLs of a trial on the test text."""
    nlls: list[float] = study.user_attrs["test_nlls"][str(trial.number)]
    return nlls


if __name__ == "__main__":
    main()

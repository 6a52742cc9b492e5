"""How far above the lowest point early termination ends a study: the real sampler on known curves.

    python benchmarks/early_termination.py                      made-up valleys, 12 searches of each
    python benchmarks/early_termination.py --grid URL NAME …    measured curves: studies with a grid, in a storage

Nothing is pruned here: a trial has the window NLLs of its β, made up or interpolated between those of the grid. Made-up
windows differ as real ones do: each has a level and a slope of its own, and all of them jump from step to step of β, as
masks do. What a study ends at is compared with the lowest point of the very same curve.
"""

import argparse
import math
import statistics
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import optuna

from atp_tune.allocations import Budget
from atp_tune.config.search import SearchConfig
from atp_tune.search.runner import should_terminate
from atp_tune.search.samplers import make_sampler
from atp_tune.search.space import Space
from atp_tune.storage.progress import measured

WINDOWS, STEPS, TOTAL = 16, 40, 24
BUDGET = Budget(0.6, (1,) * 30)
SHAPES: dict[str, Callable[[float], float]] = {  # nats per token above the lowest, at a share of the interval
    "sharp": lambda u: 40 * (u - 0.31) ** 2,
    "flat": lambda u: 1.1 * max(0.0, 0.22 - u) + 8 * max(0.0, u - 0.4) ** 3,
    "off-centre": lambda u: 3 * (u - 0.72) ** 2 + float(u > 0.95),
    "at the lower end": lambda u: 1.5 * u,
    "at the upper end": lambda u: 0.8 * (1 - u),
    "two, the right one lower": lambda u: min(0.05 + 25 * (u - 0.2) ** 2, 25 * (u - 0.75) ** 2),
    "two, the left one lower": lambda u: min(25 * (u - 0.15) ** 2, 0.04 + 25 * (u - 0.7) ** 2),
    "like SmolLM2's": lambda u: 0.22 * max(0.0, 1 - 5 * u) ** 1.5 + 3 * max(0.0, u - 0.4) ** 2 + 8 * max(0.0, u - 0.8),
}


@dataclass(frozen=True)
class Curve:
    """Window NLLs [WINDOWS] at each β in [0, high], and the lowest mean of them."""

    nlls: Callable[[float], np.ndarray]
    high: float
    lowest: float


@dataclass(frozen=True)
class End:
    """Trials of a search, whether it terminated early, and how far its best perplexity lies above the lowest."""

    trials: int
    should_terminate: bool
    above: float


def made_up(shape: str, seed: int, jitter: float) -> Curve:
    """A valley of some shape; `jitter`: standard deviation of its jumps, in nats per token."""
    draw = np.random.default_rng(zlib.crc32(f"{shape} {seed}".encode()))
    knots, high = np.linspace(0, 1, STEPS + 1), 2 * 0.4 / 29
    jumps = jitter * (draw.normal(size=STEPS + 1) + 2 * draw.normal(size=(WINDOWS, STEPS + 1)))
    levels, slopes = 4 + 0.2 * draw.normal(size=WINDOWS), 0.1 * draw.normal(size=(3, WINDOWS))

    def nlls(beta: float) -> np.ndarray:
        u = beta / high
        own = levels + slopes[0] * math.sin(3 * u) + slopes[1] * math.cos(4 * u) + slopes[2] * u
        found: np.ndarray = own + SHAPES[shape](u) + np.array([np.interp(u, knots, row) for row in jumps])
        return found

    return Curve(nlls, high, min(float(nlls(high * k / 400).mean()) for k in range(401)))


def from_grid(storage: str, names: Iterable[str]) -> Curve:
    """The curve through the trials of studies."""
    trials = [trial for name in names for trial in measured(optuna.load_study(study_name=name, storage=storage))]
    found = {trial.params["beta"]: trial.user_attrs["nlls"] for trial in trials}
    betas = sorted(found)
    rows = np.array([found[beta] for beta in betas])

    def nlls(beta: float) -> np.ndarray:
        return np.array([np.interp(beta, betas, column) for column in rows.T])

    return Curve(nlls, betas[-1], float(rows.mean(axis=1).min()))


def search(curve: Curve, seed: int, total: int = TOTAL) -> End:
    """One study on a curve, until it terminates early or has its total."""
    space = Space(BUDGET, ("wanda",), {"atp": {"beta": (0.0, curve.high)}})
    study = optuna.create_study(sampler=make_sampler(SearchConfig(trials=total, seed=seed), space))
    for params in [*space.uniform(), {**space.uniform()[0], "beta": curve.high / 2}]:
        study.enqueue_trial(params)

    def measure(trial: optuna.Trial) -> float:
        trial.suggest_categorical("pruner", space.pruners)
        trial.suggest_categorical("allocation", ("atp",))
        beta = trial.suggest_float("beta", 0.0, curve.high)
        nlls = curve.nlls(beta)
        trial.set_user_attr("nlls", nlls.tolist())
        levels = [BUDGET.target - beta, BUDGET.target + beta]
        trial.set_user_attr("plan", {"method": "wanda", "allocation": "atp", "levels": levels})
        return math.exp(nlls.mean())

    settled = False
    while not settled and len(study.trials) < total:
        study.optimize(measure, n_trials=1)
        settled = should_terminate(study, space)
    return End(len(study.trials), settled, study.best_value / math.exp(curve.lowest) - 1)


def row(name: str, ends: list[End]) -> str:
    """A line of the table, over the studies that terminated early."""
    done = [end for end in ends if end.should_terminate]
    if not done:
        return f"| {name} | 0 of {len(ends)} | – | – | – | – |"
    above = [end.above for end in done]
    return (
        f"| {name} | {len(done)} of {len(ends)} | {statistics.fmean(end.trials for end in done):.1f} | "
        f"{statistics.fmean(above):.2%} | {max(above):.2%} | {sum(value > 0.02 for value in above)} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--jitter", type=float, nargs="+", default=[0.007, 0.02], help="of made-up valleys")
    parser.add_argument("--grid", nargs="+", help="the URL of a storage, and studies of one curve in it")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print("| valley | terminated early | trials | above the lowest, mean | worst | by more than 2% |")
    print("|---|---|---|---|---|---|")
    if asked.grid:
        curve = from_grid(asked.grid[0], asked.grid[1:])
        print(row(" ".join(asked.grid[1:]), [search(curve, seed) for seed in range(asked.seeds)]))
        return
    for jitter in asked.jitter:
        for shape in SHAPES:
            ends = [search(made_up(shape, seed, jitter), seed) for seed in range(asked.seeds)]
            print(row(f"{shape}, jumps {jitter:.1%}", ends), flush=True)


if __name__ == "__main__":
    main()

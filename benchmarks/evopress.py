"""EvoPress against prices at 1, 3 and 10 times the seconds of prices: the tables of docs/evopress.md.

    python benchmarks/evopress.py                              SmolLM2-135M at 60 %, Wanda, the texts of `smol`
    python benchmarks/evopress.py --minutes 12                 stops after a while; the same command goes on
    python benchmarks/evopress.py --fitness nll --multiples 1 3
    python benchmarks/evopress.py --pruner sparsegpt --multiples 1
    python benchmarks/evopress.py --start prices               polishes the point that prices found
    python benchmarks/evopress.py --show                       measures nothing: writes the tables again

Prices descend first, then EvoPress searches for so many times as long, in the same process with the same threads, on
the same windows of the calibration text and the same places of weights. Seconds are those of the processor by thread,
so that other jobs do not count. Nothing else of the study is searched: each point is pruned by the package's own pass
and measured as a trial is. What is found lies in build/evopress/NAME.json, and is written within seconds.

What both need is not counted: loading, and the places of the weights; nor, in favour of EvoPress, the dense model's
hidden states of all windows, SparseGPT's levels, and the fitness on all windows that the trajectory shows. The descent
by prices is by Wanda's places for both pruners, as the package makes it.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic, process_time
from typing import Any, cast

import evopress_page as page
import torch
from evopress_fitness import KINDS, BySparseGPT, Level, TextFitness, by_wanda
from evopress_search import Levels, Mark, Run, Settings, next_generation, read_run, sparsities, state_of

from atp_tune.allocations import Budget, LinearSparsities, prices
from atp_tune.cache import write_atomically
from atp_tune.cli.runtime import quiet
from atp_tune.cpu import cpu_name
from atp_tune.errors import UserError
from atp_tune.events import Event, Step
from atp_tune.inputs import Items
from atp_tune.plan import Plan
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.search.calibration_gradients import CalibrationGradients
from atp_tune.search.context import ContextConfig, TrialContext
from atp_tune.search.priced import POOL, Descent
from atp_tune.spec.studyfile import StudyFile, load

BUILD = Path(__file__).parents[1] / "build" / "evopress"
SHOWN = (0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)  # multiples of the seconds of prices at which a search is looked at
TUNED = {"wanda": 0.776, "sparsegpt": 0.773}  # κ that the studies of docs/allocations.md chose on the validation text
SAVED = 5  # seconds between two times that a search is written


class Uncached(CalibrationGradients):
    """Gradients whose results are not kept, so that they can be timed."""

    def kept(self, measured: str, own: Sequence[Any], constants: Sequence[Any], measure: Any) -> Any:
        """What `measure` finds."""
        return measure()


class Clock:
    """Seconds of the processor by thread, seconds that passed by, and whether the time of this process is over."""

    def __init__(self, minutes: float | None) -> None:
        self._end = float("inf") if minutes is None else monotonic() + 60 * minutes

    def now(self) -> tuple[float, float]:
        """Both times."""
        return process_time() / torch.get_num_threads(), monotonic()

    def check(self) -> None:
        """Raises TimeoutError at the end of the time."""
        if monotonic() > self._end:
            raise TimeoutError


class Bench:
    """A model with its texts, the record of what was found, and what measures and searches."""

    @torch.no_grad()
    def __init__(self, file: StudyFile, context: TrialContext, path: Path, clock: Clock) -> None:
        self.file, self.context, self.path, self.clock = file, context, path, clock
        if not isinstance(file.study.sparsity, float):
            raise UserError(f"study {file.name}: searches more than one sparsity; give one, as --set sparsity=0.6")
        self.target = file.study.sparsity
        self.shapes = context.checkpoint.shapes
        self.budget = context.budget(self.target)
        self.record = self._read()
        text = file.study.data.calibration
        self.pool: Items = context.inputs.many(text, POOL, context.folder, file.folder, context.bos)
        context.inputs.check_disjoint({**context.windows, "calibration": self.pool})
        plain = context.measured.statistics(Wanda())
        self._ranks = [
            {x.name: Ranks.of(x.matrix(context.checkpoint.weights(i)[x.key]), plain[i][x.name]) for x in linears}
            for i, linears in enumerate(context.checkpoint.linears)
        ]

    def _read(self) -> dict[str, Any]:
        facts = {
            "machine": cpu_name(), "threads": torch.get_num_threads(), "dtype": self.context.dtype,
            "torch": torch.__version__.partition("+")[0], "target": self.target, "contents": self.context.contents(),
        }  # fmt: skip
        if not self.path.exists():
            return {"facts": facts, "runs": {}, "points": {name: {} for name in TUNED}}
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        if found["facts"] != facts:
            raise UserError(f"{self.path}: was begun on another machine, model or text; give another --name")
        return found

    def save(self) -> None:
        """Writes the record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.record, default=asdict).encode())

    @torch.no_grad()
    def level(self, pruner: str) -> Level:
        """What prunes a linear to so many zeros in each row."""
        if pruner == "wanda":
            return by_wanda(self._ranks)
        made = self.context.methods.pruner(pruner)
        return BySparseGPT(made, self.context.measured.statistics(made), lambda: self.clock.now()[0])

    def descend(self) -> None:
        """Sparsities by prices, once, with the seconds that they take."""
        if "prices" in self.record:
            return
        context = self.context
        began = self.clock.now()
        gradients = Uncached(context.checkpoint, context.inputs, context.score, self.pool, context.heads, told)
        [end] = Descent(gradients, self._ranks.__getitem__).ends([self.target], "wanda", "")
        seconds, wall = (after - before for before, after in zip(began, self.clock.now(), strict=True))
        self.record["prices"] = {"seconds": seconds, "wall": wall, "end": end}
        self.save()

    @property
    def priced(self) -> LinearSparsities:
        """The end of the descent by prices."""
        return tuple(map(tuple, self.record["prices"]["end"]))

    def at_kappa(self, kappa: float) -> LinearSparsities:
        """Sparsities by prices at a distance from uniform."""
        known = Budget(self.target, self.budget.sizes, self.shapes, Known(self.priced))  # type: ignore[arg-type]
        return cast(LinearSparsities, prices.sparsities(known, kappa))

    def uniform(self) -> LinearSparsities:
        """The target everywhere."""
        return tuple((self.target,) * len(row) for row in self.shapes)

    def search(self, title: str, asked: Run, most: float) -> Run:
        """Goes on with a search until it has taken so many times the seconds of prices."""
        run = read_run(self.record["runs"].get(title)) or asked
        if run.request != asked.request:
            raise UserError(f"{self.path}: {title} was begun with other settings; give another --title")
        seen = {mark.multiple for mark in run.marks}
        left = [multiple for multiple in (0.0, *SHOWN) if multiple <= most and multiple not in seen]
        if not left:
            return run
        pool, level = self.pool.batch(self.context.checkpoint.device), self.level(run.pruner)
        text = TextFitness(self.context, pool, level, run.fitness)
        text.prepare()
        if "kl" not in self.record["prices"]:
            by_places = TextFitness(self.context, pool, self.level("wanda"), run.fitness)
            self.record["prices"] |= by_places.both(state_of(self.priced, self.shapes))
        text.stitched.keep(run.state)
        self.record["runs"][title] = run
        for multiple in left:
            evolve(self, run, text, level, multiple * self.record["prices"]["seconds"])
            found = text.both(run.state)
            run.marks.append(Mark(multiple, run.seconds, run.generation, run.tokens, **found, state=run.state))
            print(f"{title} {multiple:g}×: generation {run.generation}, {found}", flush=True)
            self.save()
        return run

    def measure(self, pruner: str, name: str, found: LinearSparsities) -> None:
        """Prunes to these sparsities and measures both texts, as a trial does, for each draw of the calibration."""
        points = self.record["points"][pruner]
        if name in points:
            return
        self.clock.check()
        plan = Plan(pruner, name, tuple(self.budget.block_means(found)), {}, found)
        nlls: dict[str, list[list[float]]] = {"validation": [], "test": []}
        zeros = list[int]()
        for draw in range(self.file.study.data.calibration.draws):
            context = self.context.drawn(draw) if draw else self.context
            pruned = list(context.prune(plan))
            zeros.append(sum(sum(block.zeros.values()) for block in pruned))
            for role, by_draw in nlls.items():
                by_draw.append(context.all_nlls([(block.index, block.weights) for block in pruned], role))
        points[name] = {"realised": zeros[0] / sum(self.budget.sizes), "nlls": nlls}
        self.save()


class Known:
    """Dense metrics with a known end of the descent by prices."""

    def __init__(self, end: LinearSparsities) -> None:
        self._end = end

    def priced_sparsities(self, target: float, score: str) -> LinearSparsities:
        """That end."""
        return self._end


def evolve(bench: Bench, run: Run, text: TextFitness, level: Level, seconds: float) -> None:
    """Goes on, generation by generation, until the run has taken so many seconds."""
    levels, pool, saved = Levels.of(bench.shapes, run.settings.share), bench.pool, monotonic()
    while run.seconds < seconds:
        began, free = bench.clock.now(), getattr(level, "seconds", 0.0)
        found = next_generation(run.state, run.generation, levels, run.settings, len(pool), text)
        text.stitched.keep(found.state)
        after = bench.clock.now()
        run.state = found.state
        run.generation += 1
        run.tokens += found.windows * pool.positions
        run.seconds += after[0] - began[0] - (getattr(level, "seconds", 0.0) - free)
        run.wall += after[1] - began[1]
        if monotonic() > saved + SAVED:
            bench.save()
            saved, change = monotonic(), f"{found.before:.4f} → {found.fitness:.4f}"
            print(f"generation {run.generation}, {run.seconds:.0f} of {seconds:.0f} s: {change}", flush=True)
            bench.clock.check()


def told(event: Event) -> None:
    """Steps of the descent."""
    if isinstance(event, Step) and event.phase == "step":
        print(f"prices: step {event.done} of {event.total}", flush=True)


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", default="smol", help="the study with the model and the texts")
    add("--set", action="append", default=[], metavar="KEY=VALUE")
    add("--name", help="of the record; default: the study's")
    add("--title", help="of the search; default: from its fitness and its start")
    add("--pruner", default="wanda", choices=TUNED)
    add("--fitness", default="kl", choices=KINDS)
    add("--start", default="uniform", choices=("uniform", "prices"))
    add("--multiples", type=float, nargs="+", default=[1, 3, 10], choices=SHOWN)
    add("--offspring", type=int, default=Settings.offspring)
    add("--stages", type=int, nargs="+", default=[n for stage in Settings.stages for n in stage])
    add("--share", type=float, default=Settings.share, help="of a block's weights, of one level")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--minutes", type=float, help="stop after so many")
    add("--show", action="store_true", help="measure nothing")
    add("--search-only", action="store_true", help="measure no point")
    return parser.parse_args(words)


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Bench]:
    """The bench of these options."""
    clock = Clock(options.minutes)
    torch.set_num_threads(options.threads)
    file = load(options.study, options.set)
    with TrialContext.open(ContextConfig.of_study(file.study, file.folder, None)) as context:
        yield Bench(file, context, BUILD / f"{options.name or file.name}.json", clock)


def work(options: argparse.Namespace) -> None:
    """Descends, searches, and measures what is missing."""
    stages = tuple(zip(options.stages[::2], options.stages[1::2], strict=True))
    settings = Settings(options.offspring, stages, options.share, options.seed)
    pruner, beyond = options.pruner, "" if options.pruner == "wanda" else f"{options.pruner}, "
    title = options.title or f"{beyond}{options.fitness} from {options.start}"
    with opened(options) as bench:
        bench.descend()
        begun = state_of(bench.uniform() if options.start == "uniform" else bench.priced, bench.shapes)
        asked = Run(pruner, options.fitness, options.start, settings, begun)
        try:
            run = bench.search(title, asked, max(options.multiples))
        finally:
            bench.save()
        if options.search_only:
            return
        bench.measure(pruner, "uniform", bench.uniform())
        for kappa in (1.0, TUNED[pruner]):
            bench.measure(pruner, f"prices, κ = {kappa:g}", bench.at_kappa(kappa))
        for mark in run.marks:
            if mark.multiple in options.multiples:
                bench.measure(pruner, f"{title}, {mark.multiple:g}×", sparsities(mark.state, bench.shapes))


def main() -> None:
    """Does what is missing, and writes the tables."""
    options = options_of()
    try:
        with quiet():
            if not options.show:
                work(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except TimeoutError:
        print("the time is over: the same command goes on")
    page.write(BUILD)


if __name__ == "__main__":
    main()

"""EvoPress against prices at 1, 3 and 10 times the seconds of prices: the tables of docs/evopress.md.

    python benchmarks/evopress.py                              SmolLM2-135M at 60 %, Wanda, the texts of `smol-60`
    python benchmarks/evopress.py --minutes 12                 stops after a while; the same command goes on
    python benchmarks/evopress.py --fitness nll --multiples 1 3
    python benchmarks/evopress.py --pruner sparsegpt --multiples 1
    python benchmarks/evopress.py --start prices               polishes the point that prices found
    python benchmarks/evopress.py --show                       measures nothing: writes the tables again

Prices descend first, then EvoPress searches for so many times as long, in the same process with the same threads, on
the same windows of the calibration text and the same places of weights. Seconds are those of the processor by thread,
so that other jobs do not count. Nothing else of the study is searched: each point is pruned by the package's own pass
and measured as a trial is. What is found lies in build/evopress/NAME/, and is written within seconds.

What both need is not counted: loading, and the places of the weights; nor, in favour of EvoPress, the dense model's
hidden states of all windows, SparseGPT's levels, and the fitness on all windows that the trajectory shows. The descent
by prices is by Wanda's places for both pruners, as the package makes it. With Wanda there is also the descent of
`row-prices`, at κ = 1.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, process_time
from typing import cast

import evopress_page as page
import torch
from evopress_fitness import KINDS, BySparseGPT, Level, TextFitness, by_wanda
from evopress_search import Levels, Moment, Run, Settings, next_generation, read_run, sparsities, state_of
from torch import Tensor

from atp_tune.allocations import Budget, LinearSparsities, prices
from atp_tune.allocations.rows import RowOffsets
from atp_tune.blocks.levels import ByPlaces
from atp_tune.blocks.pricing import Pricing
from atp_tune.blocks.row_pricing import RowPricing
from atp_tune.cache import sha256_of_json
from atp_tune.checkpoints.linears import Linear
from atp_tune.cli.runtime import quiet
from atp_tune.cpu import cpu_name
from atp_tune.errors import UserError
from atp_tune.inputs import Items
from atp_tune.measures import perplexity
from atp_tune.plan import Plan
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.run.prices import POOL, CalibrationGradients, windows_of_step
from atp_tune.run.session import Session, Setup
from atp_tune.spec.studyfile import StudyFile, load

BUILD = Path(__file__).parents[1] / "build" / "evopress"
SHOWN = (0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)  # multiples of the seconds of prices at which a search is looked at
TUNED = {"wanda": 0.776, "sparsegpt": 0.773}  # κ that the studies of docs/allocations.md chose on the validation text
SAVED = 5  # seconds between two times that a search is written


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
    def __init__(self, file: StudyFile, context: Session, record: page.Record, clock: Clock) -> None:
        self.file, self.context, self.record, self.clock = file, context, record, clock
        if not isinstance(file.study.sparsity, float):
            raise UserError(f"study {file.name}: searches more than one sparsity; give one, as --set sparsity=0.6")
        self.target = file.study.sparsity
        self.shapes = context.checkpoint.shapes
        self.budget = context.budget(self.target)
        self._check()
        text = file.study.data.calibration
        self.pool: Items = context.inputs.many(text, POOL, context.folder, file.folder, context.bos)
        context.inputs.check_disjoint({**context.windows, "calibration": self.pool})
        plain = context.measured.statistics(Wanda())
        self._ranks = [
            {x.name: Ranks.of(x.matrix(context.checkpoint.weights(i)[x.key]), plain[i][x.name]) for x in linears}
            for i, linears in enumerate(context.checkpoint.linears)
        ]

    def _check(self) -> None:
        """UserError unless the record is of this machine, model and text."""
        contents = sha256_of_json([self.context.contents(), self.target])
        facts = {
            "machine": cpu_name(), "threads": torch.get_num_threads(), "dtype": self.context.dtype,
            "torch": torch.__version__.partition("+")[0], "target": self.target, "contents": contents,
        }  # fmt: skip
        if self.record.parts.setdefault("facts", facts) != facts:
            raise UserError(f"{self.record.folder}: was begun on another machine, model or text; give another --name")
        self.record.save("facts")

    @torch.no_grad()
    def level(self, pruner: str) -> Level:
        """What prunes a linear to so many zeros in each row."""
        if pruner == "wanda":
            return by_wanda(self._ranks)
        made = self.context.methods.pruner(pruner)
        return BySparseGPT(made, self.context.measured.statistics(made), lambda: self.clock.now()[0])

    def descend(self) -> None:
        """Sparsities by prices, as `Descent` finds them, and the seconds of its steps, between which it may stop."""
        if "prices" in self.record.parts:
            return
        gradients, known = self._gradients(), self.record.parts.setdefault("steps", [])
        samples = gradients.samples(windows_of_step(self.pool.positions, [self.target]), prices.STEPS)

        def prices_at(step: int, found: LinearSparsities) -> prices.Prices:
            sample = next(samples)
            if step == len(known):
                began = self.clock.now()
                pricing = Pricing(gradients.of_blocks, ByPlaces(self._places))
                costs = pricing.prices(found, sample)
                took = [after - before for before, after in zip(began, self.clock.now(), strict=True)]
                known.append({"took": took, "prices": costs})
                self.record.save("steps")
                print(f"prices: step {step + 1} of {prices.STEPS}, {took[0]:.1f} s", flush=True)
                self.clock.check()
            return cast(prices.Prices, known[step]["prices"])

        [end] = prices.descend(self.shapes, [self.target], prices_at)
        seconds, wall = (sum(step["took"][k] for step in known) for k in (0, 1))
        self.record.keep("prices", {"seconds": seconds, "wall": wall, "end": end})

    def descend_by_rows(self) -> None:
        """The same with rows, whose loss needs the dense model's states of the pool, counted too."""
        if "row-prices" in self.record.parts:
            return
        print("row-prices", flush=True)
        gradients, began = self._gradients(), self.clock.now()
        many = windows_of_step(self.pool.positions, [self.target])
        samples = gradients.samples(many, prices.STEPS, share=0.5)
        pricing = RowPricing(gradients.of_blocks, self._places)
        [end] = prices.descend(self.shapes, [self.target], lambda step, found: pricing.prices(found, next(samples)))
        seconds, wall = (after - before for before, after in zip(began, self.clock.now(), strict=True))
        rows = pricing.offsets().stored()
        self.record.keep("row-prices", {"seconds": seconds, "wall": wall, "end": end, "rows": rows})
        self.clock.check()

    def _gradients(self) -> CalibrationGradients:
        context = self.context
        return CalibrationGradients(
            context.checkpoint, context.inputs, context.score, self.pool, context.heads, lambda event: None
        )

    def _places(self, index: int, linear: Linear, _: Tensor) -> Tensor:
        return self._ranks[index][linear.name].places

    @property
    def priced_by_rows(self) -> Plan:
        """The plan at the end of the descent with rows."""
        found = self.record.parts["row-prices"]
        plan = self.plan("wanda", tuple(map(tuple, found["end"])))
        return replace(plan, row_offsets=RowOffsets.read(found["rows"], self.shapes))

    def plan(self, pruner: str, found: LinearSparsities) -> Plan:
        """The plan of such sparsities."""
        return Plan(pruner, "linears", tuple(self.budget.block_means(found)), {}, found)

    @property
    def priced(self) -> LinearSparsities:
        """The end of the descent by prices."""
        return tuple(map(tuple, self.record.parts["prices"]["end"]))

    def at_kappa(self, kappa: float) -> LinearSparsities:
        """Sparsities by prices at a distance from uniform."""
        known = Budget(self.target, self.budget.sizes, self.shapes, Known(self.priced))  # type: ignore[arg-type]
        return cast(LinearSparsities, prices.sparsities(known, kappa))

    def uniform(self) -> LinearSparsities:
        """The target everywhere."""
        return tuple((self.target,) * len(row) for row in self.shapes)

    def search(self, title: str, asked: Run, seconds: float) -> Run:
        """Goes on with a search until it has taken so many seconds."""
        part = f"search {title}"
        run = read_run(self.record.parts[part]) if part in self.record.parts else asked
        if run.request != asked.request:
            raise UserError(f"{self.record.folder}: {title} was begun with other settings; give another --title")
        if run.at(seconds) is None:
            text = self.fitness(run)
            text.prepare()
            self.record.parts[part] = run
            evolve(self, run, text, seconds, lambda: self.record.save(part))
            self.record.save(part)
        return run

    def fitness(self, run: Run) -> TextFitness:
        """The fitness of a search on the pool."""
        pool = self.pool.batch(self.context.checkpoint.device)
        return TextFitness(self.context, pool, self.level(run.pruner), run.fitness)

    def look(self, title: str, run: Run, multiples: Sequence[float]) -> None:
        """Fitness on the whole pool at these multiples of the seconds of prices, and of prices."""
        part, seconds = f"fitness {title}", self.record.parts["prices"]["seconds"]
        seen, text = self.record.parts.setdefault(part, {}), None
        wanted = {f"{multiple:g}": run.at(multiple * seconds) for multiple in multiples}
        states = {key: run.moments[number].state for key, number in wanted.items() if number is not None}
        if run.pruner == "wanda":
            states["prices"] = state_of(self.priced, self.shapes)
        for key, state in states.items():
            if key not in seen:
                text = text or self.fitness(run)
                seen[key] = text.both(state)
                self.record.save(part)
                print(f"{title}, {key}: {seen[key]}", flush=True)
                self.clock.check()

    def measure(self, pruner: str, wanted: dict[str, Plan]) -> None:
        """Prunes by these plans and measures both texts, as a trial does: all by one draw before the next."""
        part = f"points {pruner}"
        points = self.record.parts.setdefault(part, {})
        for draw in range(self.file.study.data.calibration.draws):
            context = self.context.drawn(draw) if draw else self.context
            for name, plan in wanted.items():
                point = points.setdefault(name, {"realised": 0.0, "nlls": {"validation": [], "test": []}})
                if len(point["nlls"]["test"]) > draw:
                    continue
                pruned = list(context.prune(plan))
                zeros = sum(sum(block.zeros.values()) for block in pruned)
                point["realised"] = zeros / sum(self.budget.sizes)
                for role, by_draw in point["nlls"].items():
                    by_draw.append(context.all_nlls([(block.index, block.weights) for block in pruned], role))
                self.record.save(part)
                print(f"{name}: {perplexity(point['nlls']['test'][-1])} on the test text", flush=True)
                self.clock.check()


class Known:
    """Dense metrics with a known end of the descent by prices."""

    def __init__(self, end: LinearSparsities) -> None:
        self._end = end

    def priced_sparsities(self, target: float, pruner: str) -> LinearSparsities:
        """That end."""
        return self._end


def evolve(bench: Bench, run: Run, text: TextFitness, seconds: float, save: Callable[[], None]) -> None:
    """Goes on, generation by generation, until the run has taken so many seconds."""
    levels, pool, saved = Levels.of(bench.shapes, run.settings.share), bench.pool, monotonic()
    text.stitched.keep(run.moments[-1].state)
    while (last := run.moments[-1]).seconds < seconds:
        began, free = bench.clock.now(), text.free_seconds
        found = next_generation(last.state, len(run.moments) - 1, levels, run.settings, len(pool), text)
        text.stitched.keep(found.state)
        took, wall = (after - before for before, after in zip(began, bench.clock.now(), strict=True))
        took += last.seconds - (text.free_seconds - free)
        tokens = last.tokens + found.windows * pool.positions
        run.moments.append(Moment(took, last.wall + wall, tokens, found.fitness, found.state))
        if monotonic() > saved + SAVED:
            save()
            saved, change = monotonic(), f"{found.before:.4f} → {found.fitness:.4f}"
            print(f"generation {len(run.moments) - 1}, {took:.0f} of {seconds:.0f} s: {change}", flush=True)
            bench.clock.check()


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", default="smol-60", help="the study with the model and the texts")
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
    add("--seconds", type=float, help="search for so long, whatever prices took, and measure nothing")
    add("--minutes", type=float, help="stop after so many")
    add("--show", action="store_true", help="measure nothing")
    return parser.parse_args(words)


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Bench]:
    """The bench of these options."""
    clock = Clock(options.minutes)
    torch.set_num_threads(options.threads)
    file = load(options.study, options.set)
    record = page.Record(BUILD / (options.name or file.name))
    with Session.open(Setup.of_study(file.study, file.folder, None)) as context:
        yield Bench(file, context, record, clock)


def work(options: argparse.Namespace) -> None:
    """Descends, searches, and measures what is missing."""
    stages = tuple(zip(options.stages[::2], options.stages[1::2], strict=True))
    settings = Settings(options.offspring, stages, options.share, options.seed)
    pruner, beyond = options.pruner, "" if options.pruner == "wanda" else f"{options.pruner}, "
    title = options.title or f"{beyond}{options.fitness} from {options.start}"
    with opened(options) as bench:
        if options.seconds is None or options.start == "prices":
            bench.descend()
        if options.seconds is None and pruner == "wanda":
            bench.descend_by_rows()
        begun = state_of(bench.uniform() if options.start == "uniform" else bench.priced, bench.shapes)
        asked = Run(pruner, options.fitness, options.start, settings, [Moment(0.0, 0.0, 0, 0.0, begun)])
        if options.seconds is not None:
            bench.search(title, asked, options.seconds)
            return
        seconds = bench.record.parts["prices"]["seconds"]
        run = bench.search(title, asked, max(options.multiples) * seconds)
        points = {"uniform": bench.uniform()}
        points |= {f"prices, κ = {kappa:g}": bench.at_kappa(kappa) for kappa in (1.0, TUNED[pruner])}
        for multiple in options.multiples:
            number = run.at(multiple * seconds)
            assert number is not None
            points[f"{title}, {multiple:g}×"] = sparsities(run.moments[number].state, bench.shapes)
        plans = {name: bench.plan(pruner, found) for name, found in points.items()}
        bench.measure(pruner, plans | ({page.ROWS: bench.priced_by_rows} if pruner == "wanda" else {}))
        bench.look(title, run, [multiple for multiple in (0.0, *SHOWN) if multiple <= max(options.multiples)])


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

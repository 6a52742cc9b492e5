"""Perplexity with and without refinement, for pruners, rounds of swaps, steps and sizes of the calibration text.

    python benchmarks/refinement.py                                         SmolLM2-135M at 60 %, the texts of `smol-60`
    python benchmarks/refinement.py --set model.source=FILE.gguf               another model
    python benchmarks/refinement.py --pruners wanda --swaps 0 20 --steps 0 5   with swaps in the masks, and without
    python benchmarks/refinement.py --nsamples 16 64 --allocation prices --parameter kappa=0.776

Every row prunes once, at one allocation, and measures both texts. Changes are against the same pruner without
refinement, paired by windows. The first row of each pruner is that pruner alone.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

from atp_tune.cli.runtime import quiet
from atp_tune.measures import change, perplexity
from atp_tune.plan import make_plan
from atp_tune.run.session import Session, Setup
from atp_tune.spec.prune import UPDATING
from atp_tune.spec.studyfile import StudyFile, load

HEAD = ("calibration tokens", "pruner", "swaps", "steps", "validation", "change", "test", "change", "s to prune")


@dataclass(frozen=True)
class Measured:
    """Window NLLs of a pruned model on both texts, and the seconds that pruning took."""

    nlls: dict[str, list[float]]
    seconds: float


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="smol-60")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--pruners", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--swaps", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--nsamples", type=int, nargs="+", default=[16])
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    values = {name: float(value) for name, _, value in (text.partition("=") for text in options.parameter)}
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    with quiet():
        for nsamples in options.nsamples:
            file = load(options.study, [*options.set, f"texts.calibration.nsamples={nsamples}"])
            for row in rows(file, options, values):
                print(f"| {' | '.join(row)} |", flush=True)


def rows(file: StudyFile, options: argparse.Namespace, values: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """The rows of one size of the calibration text: the dense model, then each pruner alone and in each way."""
    setup = Setup.of_study(file.study, file.folder, None)
    with Session.open(setup) as context:
        tokens = f"{context.items('calibration').numel():,}"
        dense = [str(perplexity(context.all_nlls(context.dense(), role))) for role in ("validation", "test")]
        yield (tokens, "dense", "", "", dense[0], "", dense[1], "", "")
        for pruner in options.pruners:
            rounds = [0] if pruner in UPDATING else options.swaps
            ways = [(swaps, steps) for swaps in rounds for steps in options.steps if swaps or steps]
            alone = None
            for swaps, steps in ((0, 0), *ways):
                context.prune_settings = context.prune_settings.model_copy(update={"swaps": swaps, "refine": steps})
                found = measured(context, pruner, options, values)
                alone = alone or found
                yield (tokens, pruner, str(swaps), str(steps), *cells(alone, found), f"{found.seconds:.0f}")


def measured(context: Session, pruner: str, options: argparse.Namespace, values: dict[str, float]) -> Measured:
    """Prunes once, and measures both texts."""
    plan = make_plan(pruner, options.allocation, context.budget(options.sparsity), values)
    began = perf_counter()
    blocks = [(block.index, block.weights) for block in context.prune(plan)]
    seconds = perf_counter() - began
    return Measured({role: context.all_nlls(blocks, role) for role in ("validation", "test")}, seconds)


def cells(alone: Measured, found: Measured) -> list[str]:
    """Perplexity and its change on both texts."""
    shown = []
    for role in ("validation", "test"):
        before, after = alone.nlls[role], found.nlls[role]
        shown += [str(perplexity(after)), "" if found is alone else str(change(before, after))]
    return shown


if __name__ == "__main__":
    main()

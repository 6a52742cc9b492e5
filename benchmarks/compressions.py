"""One model, compressed in every way that the package has: the tables and the figure of docs/compressions.md.

    python benchmarks/compressions.py                      SmolLM2-135M; goes on where it was stopped
    python benchmarks/compressions.py --study fashion      an image classifier with float32 weights, DINOv2-small
    python benchmarks/compressions.py --study vit          one that is trained here (`image_classifiers.py`)
    python benchmarks/compressions.py --speed              tokens or images per second of zeros and channels; idle cores
    python benchmarks/compressions.py --show               measures nothing: writes tables and figure again

A point is one plan that no search has chosen, measured once on both texts: a line in docs/compressions/points.jsonl,
appended at once. What is there is skipped. Bytes are of the whole model, 16 bits for each weight that a way leaves
alone; perplexities are of the weights as they are then stored, computed in float32.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from time import perf_counter
from typing import cast

import compressions_page as page
import torch
from compressions_page import DENSE, Measured, Rate
from compressions_points import PATH, Point, Values, points
from image_classifiers import CLASSIFIERS, study_of
from torch import Tensor

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.cache import sha256_of_json
from atp_tune.checkpoints.devices import find_device, find_dtype
from atp_tune.cli.display import Display
from atp_tune.cli.runtime import quiet
from atp_tune.cpu import cpu_name
from atp_tune.errors import UserError
from atp_tune.measures import perplexity
from atp_tune.packed.layout import LEAST, Kind, pack, zeros_of
from atp_tune.packed.modeling_atp_sparse import BITMASK, SCALES, VALUES, unpack_as
from atp_tune.run.session import Session, Setup
from atp_tune.scores.evaluation import Block
from atp_tune.sparse.applying import config_of
from atp_tune.spec.config import Config
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import StudyFile, load
from atp_tune.speed.benchmark import check_positions
from atp_tune.speed.model_pair import passing_pair
from atp_tune.speed.packed_engine import PACKED, packed
from atp_tune.speed.throughput import Workload, measured, measured_images
from atp_tune.speed.torch_engine import opened

ITEM = 2  # bytes of a weight that is not rounded further


def main() -> None:
    """Measures what is missing, then writes tables and figure."""
    options = parse()
    overrides = ["model.dtype=float32", *options.set]
    base = study_of(options.study, overrides) if options.study in CLASSIFIERS else load(options.study, overrides)
    try:
        with quiet(), Display() as display:
            if options.speed:
                measure_speed(base, display, Workload(options.tokens, runs=options.runs), options.only)
            elif not options.show:
                measure_missing(base, display, options.only)
            page.write_page()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="smol-bits", help="the study with model and texts, or a trained classifier")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", default="", help="points in whose series and name this stands")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--show", action="store_true")
    return parser.parse_args()


@contextmanager
def opened_context(base: StudyFile, display: Display) -> Iterator[Session]:
    """The context of all points."""
    study = Point(DENSE, "").study_file(base).study
    setup = Setup.of_study(study, base.folder, base.study.bos)
    with Session.open(replace(setup, draws=1, sparsities=PATH), display) as context:
        yield context


def set_up(context: Session, study: Study) -> None:
    """Makes a context that of a point's study."""
    context.prune_settings = study.prune
    context.quantize, context.bits = None if study.bits is None else study.quantize, study.fixed_bits


def measure_missing(base: StudyFile, display: Display, only: str = "") -> None:
    """Measures the points that are not kept yet, and keeps each at once."""
    there = {(one.facts, one.values) for one in page.known()}
    with opened_context(base, display) as context:
        for point in points():
            if only not in point.title:
                continue
            file = point.study_file(base)
            facts = [point.keys, point.values, point.beta, PATH, context.contents()]
            key = sha256_of_json(facts)
            if all((key, values) in there for values in point.values):
                continue
            set_up(context, file.study)
            for found in measure(context, file, point, key):
                page.keep(found)
                scores = ", ".join(str(perplexity(nlls)) for nlls in found.nlls.values())
                print(f"{point.title}, {found.values}: {found.bytes / 1e6:.1f} MB, {scores}", flush=True)


@torch.inference_mode()
def measure(context: Session, file: StudyFile, point: Point, facts: str) -> Iterator[Measured]:
    """Prunes once; stores the weights in each of the point's number formats, and measures those on both texts."""
    began = perf_counter()
    if point.is_dense:
        pruned = [PrunedBlock(index, weights, {}, None, {}) for index, weights in context.dense()]
    else:
        pruned = list(context.prune(point.plan(context, file)))
    seconds, size = perf_counter() - began, sum(context.checkpoint.sizes)
    total, itemsize = context.stored_bytes
    others = (total // itemsize - size) * ITEM
    for values in point.values:
        counted: list[int] = []
        test = context.alongside("test")
        blocks = test.follow(stored(context, block, values, counted) for block in pruned)
        scores = {"validation": context.all_scores(blocks, "validation"), "test": test.scores()}
        yield Measured(
            file.name, point.series, point.name, values, facts, others + -(-sum(counted) // 8), sum(counted) / size,
            sum(sum(block.zeros.values()) for block in pruned) / size,
            {role: [round(nll, 6) for nll in found.nlls] for role, found in scores.items()},
            {role: found.ranks for role, found in scores.items() if found.ranks},
            round(seconds, 1), cpu_name(), str(date.today()),
        )  # fmt: skip


def stored(context: Session, block: PrunedBlock, values: Values, counted: list[int]) -> Block:
    """A block with its weights as they are stored; appends their bits to `counted`."""
    linears = context.checkpoint.linears[block.index]
    weights = block.weights | {linear.key: block.weights[linear.key].clone() for linear in linears}
    for linear in linears:
        matrix = linear.matrix(block.weights[linear.key])
        if not block.bits:
            again, bits = in_format(matrix, values, block.zeros.get(linear.name, 0) if block.channels else None)
            linear.matrix(weights[linear.key]).copy_(again)
        else:
            assert context.quantize is not None
            gone = 0 if context.bits is None else block.zeros[linear.name]
            bits = context.quantize.stored_bits(linear.out_features, linear.in_features, block.bits[linear.name], gone)
        counted.append(bits)
    return block.index, weights


def in_format(matrix: Tensor, values: Values, gone: int | None) -> tuple[Tensor, int]:
    """A matrix rounded as it is stored, and its bits.

    As `pack` stores it where it has the zeros for it, else in 16 bits; `gone`: weights that are cut off, not zero.
    """
    if gone is not None or zeros_of(matrix) < LEAST:
        return matrix.bfloat16(), (matrix.numel() - (gone or 0)) * 8 * ITEM
    parts = pack(matrix, "int8" if values == "int8" else "bf16")
    again = unpack_as({"shape": [*matrix.shape]}, parts[VALUES], parts[BITMASK], parts.get(SCALES))
    return again, 8 * sum(part.nbytes for part in parts.values())


def measure_speed(base: StudyFile, display: Display, task: Workload, only: str) -> None:
    """Measures the points that something here can run, each beside the dense model, and keeps each at once."""
    wanted = [point for point in points() if point.runs and only in point.title]
    there = {(rate.key, rate.speed.device, rate.speed.cores) for rate in page.rates()}
    missing = []
    for point in wanted:
        names = {(base.name, point.series, point.name, values): values for values in point.values}
        left = {key: v for key, v in names.items() if (key, cpu_name(), torch.get_num_threads()) not in there}
        missing += [(point, left)] if left else []
    device = find_device("cpu")
    for config, (_, left) in zip(configs(base, display, [point for point, _ in missing]), missing, strict=True):
        with passing_pair(config, base.folder, "cpu", display, {}) as pair:
            work, measure = replace(task, of_images=pair.of_images), measured_images if pair.of_images else measured
            check_positions(pair, work)
            for key, values in left.items():
                dtype, change = find_dtype("auto", device), partial(packed, kind=cast(Kind, values))
                is_slim = config.prune.pattern == "channels"
                name = "torch" if is_slim else f"{PACKED} {values}"
                opening = opened(pair, work, device, dtype, name, None if is_slim else change)
                page.keep_rate(Rate(key, str(date.today()), measure(opening, name, work, display)))
                print(*key, flush=True)


def configs(base: StudyFile, display: Display, wanted: list[Point]) -> list[Config]:
    """What makes the model of each point."""
    if not wanted:
        return []
    with opened_context(base, display) as context:
        files = [point.study_file(base) for point in wanted]
        found = []
        for point, file in zip(wanted, files, strict=True):
            set_up(context, file.study)
            found.append(config_of(file, context, point.plan(context, file)))
        return found


if __name__ == "__main__":
    main()

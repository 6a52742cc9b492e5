"""`tune.py speedup`: measures size and speed of a sparse model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atp_tune.cli.options import BestOptions, load_study, wrong
from atp_tune.cli.terminal import console, markdown, working
from atp_tune.errors import UserError

if TYPE_CHECKING:
    from atp_tune.metrics import Speed
    from atp_tune.spec.config import Config
    from atp_tune.spec.study import Study

PLAIN = (
    "Zeros in a dense file make nothing smaller or faster by themselves: the file keeps its bytes, and torch "
    "multiplies by each 0. `tune.py pack DIR --out DIR2` writes the folder without them."
)


TOKENS = 128  # of the prompt, by default, as the help says
STRAY = 0.01  # largest share of zeros of a dense or slim model


Engine = Literal["packed", "torch", "semi-structured"]


def speedup(
    model: Path | None = None,
    *,
    config: Path | None = None,
    engine: Engine | None = None,
    runs: int = 5,
    tokens: int | None = None,
    batch: int = 1,
    options: BestOptions,
) -> None:
    """Measure file size and tokens, or images, per second of a sparse model against the dense one, on this machine.

    Zeros in a dense file make nothing smaller or faster by themselves: a smaller file needs compression, and a faster
    model needs an engine that skips zeros. The numbers are stored in the configuration and in its study.
    docs/speedup.md says what to expect.

    With `--study` each point of a front that has no speed yet, or the best of a study at one sparsity, is pruned,
    measured and removed again; the front's table then has a column of tokens, or images, per second.

    Example: `python tune.py speedup smol-sparse`

    Example: `python tune.py speedup --config studies/smol.best.json`

    Example: `python tune.py speedup --study smol-front`

    Options:
        model DIR: Sparse checkpoint, as `apply` writes it.
        config FILE: Configuration; the sparse model is written to the cache.
        engine ENGINE: packed (the default on a CPU), torch or semi-structured (2:4 on an NVIDIA GPU); torch is always
            measured.
        runs 1..: Measurements of each model; dense and sparse take turns.
        tokens 4..: Length of a language model's prompt in tokens, by default 128.
        batch 1..: Texts or images at once; rates are of all together, and are not stored.
    """
    if sum(given is not None for given in (config, model, options.study)) != 1:
        raise wrong("--config", "give one of DIR, --config FILE and --study NAME")
    if batch > 1 and options.study is not None:
        raise wrong("--batch", "not with --study, whose points are compared at one")
    from atp_tune.cli.tables import show_summary
    from atp_tune.events import Message, Place
    from atp_tune.plan import percent
    from atp_tune.spec.config import read_config
    from atp_tune.spec.data import CLASSES

    with working() as watch:
        from atp_tune.results import annotations
        from atp_tune.results.stored import best_config, file_as_run, stored_study
        from atp_tune.results.summary import summarise
        from atp_tune.speed.benchmark import check, default_engine, measure
        from atp_tune.speed.torch_engine import Workload, about, find_pair, passing_pair

        # What is measured, and what computes it.
        place = options.device or "auto"
        if options.study is not None:
            file = load_study(options.study, options.storage, None, None)
            stored = stored_study(file, options.study_name)
            path, file = file.best_of(options.study_name or file.name), file_as_run(stored, file)
            asked: Study | Config = file.study
        else:
            path = about(model) if model is not None else config or Path()
            asked = read = read_config(path)
        if asked.score == CLASSES and tokens is not None:
            raise UserError(
                "--tokens: an image classifier has no prompt; leave it out, --batch N takes N images at once"
            )
        named = engine or default_engine(place, asked.prune.pattern)
        check(named, asked.prune.pattern, place)
        task = Workload(tokens=tokens or TOKENS, runs=runs, batch=batch)
        if options.study is None:
            annotations.check(path, read, options.storage)
            pair = find_pair(read, model, Place(path.parent / read.folder, place, options.allowed, watch))
            found = measure(pair, named, task, place, watch)
            places = annotations.attach(path, read, "speed", found, options.storage) if batch == 1 else []
        else:
            # The points that have no speed yet, each stored at once.
            summary = summarise(stored)
            trials = summary.goal.timed(summary)
            for count, trial in enumerate(trials, 1):
                read = best_config(file, stored, path, trial.number)
                share = percent(read.sparsity.target)
                watch(Message(f"{count} of {len(trials)}: trial {trial.number}, {share} sparsity"))
                dense = trial.user_attrs.get("packed_bytes") == summary.dense_bytes is not None  # nothing is packed
                with passing_pair(read, Place(path.parent / read.folder, place, options.allowed, watch)) as pair:
                    found = measure(pair, "torch" if dense and named == "packed" else named, task, place, watch)
                annotations.attach(path, read, "speed", found, file.storage_url)
    if options.study is not None:
        show_summary(summarise(stored), file)
        return
    _show(found)
    one = "image" if asked.score == CLASSES else "text"
    console.print(f"stored in {', '.join(places)}" if places else f"not stored: only rates of one {one} at a time are")


def _show(found: "Speed") -> None:
    """Prints bytes, zeros and rates as Markdown tables."""
    sizes = found.sizes
    files = [("uncompressed", sizes.dense, sizes.sparse)]
    if sizes.dense_zstd is not None and sizes.sparse_zstd is not None:
        files.append(("compressed with zstd", sizes.dense_zstd, sizes.sparse_zstd))
    has_zeros = max(found.zeros.values(), default=0.0) > STRAY
    if sizes.packed is not None and has_zeros:
        files.append(("packed", sizes.dense, sizes.packed))
    for table in (
        markdown(
            ("weight files", "dense", "with zeros" if has_zeros else "slim", "smaller"),
            ((name, _megabytes(dense), _megabytes(sparse), f"{dense / sparse:.2f}×") for name, dense, sparse in files),
        ),
        markdown(("linear", "zeros"), ((kind, f"{share:.2%}") for kind, share in found.zeros.items())),
        rates_table(found),
    ):
        console.print(table, "\n", sep="")
    for line in summary_of(found):
        console.print(line, style="dim")
    if has_zeros:
        console.print(PLAIN)


def summary_of(found: "Speed") -> Iterator[str]:
    """What was measured: a line for all engines, and a line for each."""
    row = found.engines[0]
    what = "classify: an image" if row.batch == 1 else f"classify: {row.batch} images at once"
    if row.tokens:
        texts = "a prompt" if row.batch == 1 else f"{row.batch} prompts at once, each"
        what = f"prefill: {texts} of {row.tokens} tokens; decode: the {row.steps} tokens after it, one at a time"
    runs = len(next(iter(row.rates.values())).dense)
    yield (
        f"{found.unit} per second, median (lowest to highest) of {runs} runs in which dense and sparse took turns; "
        f"{what}"
    )
    for one in found.engines:
        exact = "" if one.logits is None else f"; logits are transformers' within {one.logits:.0e} of the largest"
        yield f"{one.name}: version {one.version} on {one.where}{exact}"


def rates_table(found: "Speed") -> str:
    """A row for each engine and phase: rates of dense and sparse, sparse / dense, sparse / torch's best dense."""
    from atp_tune.metrics import spread

    rows = []
    for row in found.engines:
        for phase, rates in row.rates.items():
            both = (spread(values, ".1f") for values in (rates.dense, rates.sparse))
            ratio = spread(rates.ratios, ".2f")
            rows.append((row.name, phase, *both, f"{ratio}×", f"{found.over_torch(row, phase):.2f}×"))
    return markdown(("engine", "phase", "dense", "sparse", "sparse / dense", "sparse / torch's best dense"), rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"

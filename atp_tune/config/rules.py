"""The table of what does not go together in a study: for each case the key, whether it is so, and what to do.

A rule that looks at one table of the file alone is a validator of that table.
"""

import math
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from atp_tune.config.data import CLASSES, Text
from atp_tune.config.prune import OF_ZEROS, PER_LINEAR, QuantizeConfig, parse
from atp_tune.config.search import ACCURACY, NEXT_TOKEN, STEP

if TYPE_CHECKING:
    from atp_tune.config.study import Study

Row = tuple[str, Any, str]  # the key, whether the case is given, and the reason with the way out


def check_together(study: "Study") -> None:
    """Raises ValueError for the first row of the table that holds."""
    for key, is_given, reason in chain.from_iterable(rows(study) for rows in TABLE):
        if is_given:
            raise ValueError(f"{key}: {reason}")


def _where(condition: Any, where: str, *rows: Row) -> Iterator[Row]:
    """Yields rows which hold under one more condition, named at the end of each reason."""
    return ((key, condition and is_given, f"{reason} where {where}") for key, is_given, reason in rows)


def _of_items(study: "Study") -> Iterator[Row]:
    """Yields the rows on image classifiers and language models."""
    images, limit, prune = study.images, study.limit, study.prune
    own = 'protocol = "paper-images" has "dense"'
    yield (
        "protocol",
        images is None and study.protocol == "paper-images",
        "paper-images is of image classifiers, and this study has texts; take paper",
    )
    yield (
        "prune.statistics",
        study.protocol == "paper-images" and prune.statistics != "dense",
        f'{own}, not "{prune.statistics}"; set it, or take paper',
    )
    if images is None:
        yield (
            "search.objective",
            ACCURACY in study.search.objective,
            "accuracy is of images, and this study has texts; take perplexity or kl",
        )
        yield (
            "limit.max_drop",
            limit and limit.max_drop is not None,
            "is of the accuracy on images, and this study has texts; take max_increase",
        )
        yield (
            "search.score",
            study.search.score == CLASSES,
            "classes is the score of images, and this study has texts; leave it out",
        )
    else:
        yield "texts", study.texts, "a study has either texts or images; leave one of them out"
        yield "search.score", "score" in study.search.model_fields_set, "images have one score, classes; leave it out"
        yield "continuations", study.continuations.prompts, "a classifier continues no prompts; leave it out"
        yield (
            "limit.min_accuracy",
            limit and limit.min_accuracy,
            "is measured on tasks of texts; take max_drop, of the accuracy on images",
        )


def _of_roles(study: "Study") -> Iterator[Row]:
    """Yields the rows on what each role reads: others' documents or images, unless the paper tunes on the test text."""
    data, what = study.data.table, study.data.items
    roles: Any = dict(study.data)
    yield (
        f"{data}.test",
        study.is_by_paper and roles["test"],
        f'protocol = "{study.protocol}" reports on the validation {data[:-1]}; leave it out',
    )
    yield (
        "texts.bos",
        study.is_by_paper and study.texts and study.texts.bos is True,
        'protocol = "paper" measures as the papers do, without BOS; leave it out',
    )
    yield (
        f"{data}.test",
        not study.is_by_paper and roles["test"] is None,
        'is needed (or ask for protocol = "paper", which tunes on the test text)',
    )
    for role, other in (("validation", "calibration"), ("test", "calibration"), ("test", "validation")):
        yield (
            f"{data}.{role}",
            not study.is_by_paper and roles[role].overlaps(roles[other]),
            f"reads the same {what} as {data}.{other}; give it another split or part",
        )


def _of_texts(study: "Study") -> Iterator[Row]:
    """Yields the rows on pairs of image and text, and on a vision tower, which needs them."""
    texts, tower = study.texts, study.model.has_tower
    for role, text in texts or ():
        if not isinstance(text, Text):
            continue
        key, pairs = f"texts.{role}", text.images is not None
        is_parquet = text.source.startswith("file:") and text.source.endswith(".parquet")
        yield (
            f"{key}.images",
            tower and not pairs,
            (
                "is needed, the column of images, where the vision tower is pruned "
                '(model.prune = ["language", "vision"]), which without images has no inputs and changes no score'
            ),
        )
        yield (
            f"{key}.images",
            not tower and role != "calibration" and pairs,
            "models are measured on text; give images to texts.calibration alone",
        )
        yield (
            f"{key}.source",
            pairs and not text.source.startswith("hub:") and not is_parquet,
            "pairs of image and text are read from file:X.parquet or hub:ORG/NAME",
        )
        yield f"{key}.shuffle", pairs and text.shuffle, 'is of documents; take sampling = "random" for pairs'
        yield f"{key}.draws", pairs and getattr(text, "draws", 1) > 1, "are of texts; leave it out for pairs"
        yield f"{key}.nsamples", pairs and text.nsamples is None, "is needed, the number of pairs"
    if texts and texts.calibration.images is not None:
        by_prices = (*study.allocation.by_prices, "")[0]
        yield (
            "texts.bos",
            texts.bos == "auto",
            "is measured on texts, and texts.calibration has images; give true or false",
        )
        yield "texts.bos", tower and texts.bos, "the processor writes what pairs begin with; set it to false"
        yield (
            "allocation.names",
            by_prices,
            f"{by_prices} goes down on texts, and texts.calibration has images; take another",
        )
    yield from _where(
        tower, 'model.prune = ["language", "vision"]',
        ("images", study.images, "a classifier has no language model; leave model.prune out"),
        ("bits", study.bits, "are of language models alone"),
        ("prune.pattern", parse(study.prune.pattern).channels, "channels are of language models alone"),
        ("search.score", study.search.score != NEXT_TOKEN, "plug-ins score texts, and these are pairs"),
    )  # fmt: skip


def _of_weights(study: "Study") -> Iterator[Row]:
    """Yields the rows on what is done to weights: zeros, bits, channels."""
    bits, quantize, prune, pattern = study.bits, study.quantize, study.prune, parse(study.prune.pattern)
    low, high = quantize.widths[0], quantize.widths[-1]
    others = sorted({*prune.model_fields_set, *prune.tables} - {"statistics"})
    of_zeros, by_linear = (
        ([name for name in study.allocation.names if name in names] or [""])[0] for names in (OF_ZEROS, PER_LINEAR)
    )
    yield (
        "quantize",
        bits is None and quantize != QuantizeConfig(),
        "belongs to a study with bits, and this one has a sparsity; leave it out",
    )
    yield (
        "bits",
        bits and not low <= bits <= high,
        f"must be from {low} to {high}, as quantize.widths allows, got {bits or 0:g}",
    )
    yield from _where(
        bits and study.sparsity is not None, "a sparsity and bits are given",
        ("bits", bits not in quantize.widths, f"must be one of {', '.join(map(str, quantize.widths))}"),
        ("quantize.quantizers", len(quantize.quantizers) > 1, 'must be one name, as ["gptq"],'),
        ("prune.pattern", pattern.channels, "must be of single weights"),
    )  # fmt: skip
    yield from _where(
        study.by_bits, "bits are given",
        (f"prune.{(*others, '')[0]}", others, "is of zeros; leave it out, of prune only statistics stay"),
        ("limit", study.limit, "needs an interval of sparsities; leave it out"),
        ("allocation.names", of_zeros,
         f"{of_zeros} is of zeros; take gradient, atp or another that shares out bits too,"),
    )  # fmt: skip
    yield from _where(
        pattern.channels, 'prune.pattern = "channels"',
        ("allocation.names", by_linear,
         f"{by_linear} gives each linear a sparsity of its own; take atp or another that does not,"),
        ("search.screen", study.search.screen, "ranks single weights; leave it out"),
        ("search.sampler", study.search.sampler == "grid", 'must be "gp", "tpe" or "random"'),
    )  # fmt: skip
    if pattern.group is not None and pattern.sparsity is not None and isinstance(study.sparsity, float):
        only, is_it = f"{pattern.sparsity:.6g}", math.isclose(study.sparsity, pattern.sparsity, abs_tol=1e-6)
        yield (
            "prune.pattern",
            not is_it or study.allocation.names != ("uniform",),
            (
                f"{prune.pattern} makes {only} zeros in every block; set sparsity = {only} and "
                f'allocation = "uniform" (prune: --allocation uniform), or pattern = "mixed:{max(8, pattern.group)}"'
            ),
        )


def _of_the_best(study: "Study") -> Iterator[Row]:
    """Yields the rows on what comes after the search: training and speed."""
    calibration, pattern = study.data.calibration, parse(study.prune.pattern)
    for is_given, reason in (
        (study.bits, "bits are given, since training would undo the rounding"),
        (pattern.channels, 'prune.pattern = "channels" (`finetune` trains the folder)'),
        (study.interval and study.limit is None, "sparsity is an interval without a limit"),
        (study.search.score != NEXT_TOKEN, "plug-ins score, since training lowers the NLL or KL of the next token"),
        (study.model.has_tower, 'model.prune = ["language", "vision"]'),
        (isinstance(calibration, Text) and calibration.images is not None, "texts.calibration has images"),
    ):  # fmt: skip
        yield "recover", study.recover and is_given, f'must be left out, or "none", where {reason}'
    what = "bits" if study.by_bits else 'prune.pattern = "channels"'
    yield (
        "speed",
        study.speed and (study.by_bits or pattern.channels),
        f"packed weights have single zeros, which {what} makes none of; leave it out",
    )


def _of_search(study: "Study") -> Iterator[Row]:
    """Yields the rows on the interval of sparsities, its limit, and the screening."""
    search, limit, validation = study.search, study.limit, study.data.validation
    low, high = study.interval or (0.0, 1.0)
    yield (
        "limit",
        limit and not study.interval,
        f"needs an interval of sparsities, such as sparsity = [0.1, {study.sparsity}]",
    )
    yield "sparsity", low >= high, f"the interval [{low}, {high}] must run from the lower to the higher"
    yield (
        "sparsity",
        any(abs(end / STEP - round(end / STEP)) > 1e-6 for end in (low, high)),
        f"the ends of [{low}, {high}] must be multiples of {STEP}",
    )
    yield from _where(
        study.interval, "sparsity is an interval",
        ("search.objective", len(search.objective) > 1, "must be one name"),
        ("search.objective", ACCURACY in search.objective, 'must be "cross-entropy" or "kl"'),
        ("search.sampler", search.sampler == "grid", 'must be "gp", "tpe" or "random"'),
        ("search.stopper", search.stopper != "none", "must be left out"),
        ("search.early_termination", search.early_termination, "must be left out"),
        ("allocation.beta", not isinstance(study.allocation.beta, str), 'must be "auto" or "both"'),
        ("prune.pattern", parse(study.prune.pattern).sparsity is not None, "must not fix the sparsity"),
    )  # fmt: skip
    by_hits = limit and (limit.min_accuracy is not None or limit.max_drop is not None)
    yield (
        "limit",
        limit and not by_hits and (limit.max_kl is not None) != ("kl" in search.objective),
        'max_kl goes with search.objective = "kl", limits of perplexity with "perplexity"',
    )
    windows, kinds, stride = validation.nsamples, len(getattr(validation, "turns", ())), 0
    if search.screen:
        stride = search.screen.stride
    yield (
        "search.screen.stride",
        stride and windows and stride >= windows,
        f"leaves one of {windows} windows; must be less than that",
    )
    yield (
        "search.screen.stride",
        stride and kinds and stride % kinds == 0,
        f"leaves windows of one kind; take no multiple of {kinds}",
    )


TABLE = (_of_items, _of_texts, _of_weights, _of_the_best, _of_roles, _of_search)

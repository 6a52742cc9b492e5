"""Sparsities and limits as people type them: 0.6, 60%, 0.3..0.8, 30%..80%; 5% or 0.05 more perplexity."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp_tune.config.plugged import is_task_path
from atp_tune.config.prune import bits_of_size
from atp_tune.errors import UserError
from atp_tune.measures import Limit
from atp_tune.plan import SEARCHED, Searched, are_steps

Interval = tuple[float, float]
ZEROS, BITS = SEARCHED

# Where only a limit is given: below 30 % nothing is saved, since a matrix is packed from 45 % zeros on, and before 70 %
# pruning without training has broken a language model. A descent by prices goes along all of it.
WHOLE: Interval = (0.3, 0.7)
AMONG = f"such as {WHOLE[0]:g}..{WHOLE[1]:g}"
# Where neither a sparsity nor a limit is given: 0.1 nats per token, between what llama.cpp's Q3_K_M (+4 %) and Q2_K
# (+15 %) cost LLaMA-7B. A sparsity would not do: the 60 % of the papers break small models.
INCREASE = 0.1
LIMIT: Limit = {"max_increase": INCREASE}
LOWEST = {"max_increase": 0.0, "max_perplexity": 1.0, "max_kl": 0.0, "max_drop": 0.0}  # a limit must be greater


def parse_target(text: str, by: Searched = ZEROS) -> float | Interval:
    """A target, or an interval of targets with ends that are multiples of a step; UserError for anything else."""
    lowest, highest = by.bounds
    try:
        amounts = [share(end) for end in text.split("..")]
    except ValueError:
        raise UserError(f"{by.option}: must be {by.typed}, got {text}") from None
    for value, end in zip(amounts, text.split(".."), strict=True):
        if not lowest < value < highest:
            way = f"; {value:g} % is {value / 100:g}" if highest == 1 < value < 100 and "%" not in end else ""
            raise UserError(f"{by.option}: must be between {lowest} and {highest}, got {end}{way}")
    if amounts != sorted({*amounts}) or len(amounts) > 2:
        raise UserError(f"{by.option}: {text} must run from the lower {by.name} to the higher")
    low, *high = (by.sign * amount for amount in amounts[:: by.sign])
    if high and not are_steps(low, *high):
        raise UserError(f"{by.option}: the ends of {text} must be multiples of {by.step}")
    return (low, *high) if high else low  # type: ignore[return-value]


def one_target(text: str, key: str = "sparsity") -> float:
    """The target that `--sparsity` or `--bpw` names; UserError for anything else, and for an interval."""
    target = parse_target(text, next(one for one in SEARCHED if one.option == option(key)))
    if isinstance(target, tuple):
        raise UserError(f"{option(key)}: {text} is an interval; give the one number that the plan is to have")
    return target


def parse_limit(key: str, text: str) -> float:
    """The value of a key of `LimitConfig`; ValueError for anything else."""
    is_share = key in ("max_increase", "max_drop")
    try:
        value = share(text) if is_share else float(text)
    except ValueError:
        raise ValueError(f"must be a number{', such as 5% or 0.05' * is_share}, got {text}") from None
    if not LOWEST[key] < value < math.inf:
        raise ValueError(f"must be a finite number greater than {LOWEST[key]:g}, got {text}")
    if key == "max_drop" and value >= 1:
        raise ValueError(f"must be less than 100%: 1% is one point of accuracy, got {text}")
    if is_share and value >= 1 and "%" not in text:
        raise ValueError(f"{text} is {100 * value:g}%; write {value:g}% or {value / 100:g}, or {100 * value:g}%")
    return value


def share(text: str) -> float:
    """A share, from a number or a number of percent; ValueError if it is neither."""
    number = text.strip()
    return round(float(number[:-1]) / 100, 12) if number.endswith("%") else float(number)


def in_percent(sparsity: float | Interval) -> str:
    """A sparsity or an interval as it stands in names of studies: 60, 30..80."""
    return "..".join(f"{100 * end:g}" for end in (sparsity if isinstance(sparsity, tuple) else (sparsity,)))


def only_limit(given: Mapping[str, Any]) -> Limit | None:
    """The limit that one of these options sets, by key of `LimitConfig`; None if none is given.

    Values as they are typed, or as TOML and Python have them. UserError for two options, and for a wrong value.
    """
    values = {key: value for key, value in given.items() if value not in (None, "", [], {})}
    if len(values) > 1:
        first, second, *_ = map(option, values)
        raise UserError(f"{second}: there is one limit, and {first} is given too; leave one out")
    for key, value in values.items():
        try:
            return {key: parse_accuracies(value) if key == "min_accuracy" else parse_limit(key, str(value))}
        except ValueError as error:
            raise UserError(f"{option(key)}: {error}") from None
    return None


def parse_accuracies(given: Any) -> dict[str, float]:
    """The least accuracy of each task, from texts `TASK=0.6` or `TASK=60%` or a mapping; ValueError for anything else.

    A task's file or folder is named by its absolute path: the study may be resumed from elsewhere.
    """
    shares = dict[str, float]()
    texts = [f"{task}={least}" for task, least in given.items()] if isinstance(given, Mapping) else given
    for text in map(str, texts if isinstance(texts, list) else [texts]):
        task, _, value = text.rpartition("=")
        try:
            least = share(value)
        except ValueError:
            least = math.nan
        if not task or not 0 <= least <= 1:
            raise ValueError(f"must be TASK=SHARE, such as piqa=0.6 or piqa=60%, got {text}")
        if is_task_path(task):
            task = str(Path(task).expanduser().absolute())
        if task in shares:
            raise ValueError(f"{task} is given twice")
        shares[task] = least
    return shares


def goal(
    sparsity: Any, limits: Mapping[str, Any], settings: Mapping[str, Any], size: str | None = None
) -> tuple[float | Interval | None, Limit | None]:
    """The target, or the interval to search in, and the limit that are asked for; without both, `LIMIT`.

    None of both with a `size`, unless it is an interval of bits. `limits`: as of `only_limit`; `settings`: tables of
    overrides of the study file, which may ask for either. UserError for wrong ones.
    """
    limit = only_limit(limits)
    if size is not None:
        ends = parse_target(size.removesuffix("bpw"), BITS) if ".." in size else None
        for key in [*([] if sparsity is None else ["sparsity"]), *((not ends and limit) or ())]:
            raise UserError(f"{option(key)}: --size finds zeros and bits that fit it; leave one of them out")
        if isinstance(ends, tuple):
            return ends, limit
        try:
            bits_of_size(size, 1, 0, 1)
        except ValueError as error:
            raise UserError(f"--size: {error}") from None
        return None, None
    own = settings.get("limit")
    if limit is None and isinstance(own, Mapping):
        limit = only_limit({key: value for key, value in own.items() if key in (*LOWEST, "min_accuracy")})
    if sparsity is None and (sparsity := settings.get("sparsity")) is None:
        search = settings.get("search")
        by_objective = isinstance(search, Mapping) and search.get("objective") in ("kl", ["kl"])
        usual = {"max_kl": INCREASE} if by_objective else LIMIT
        return WHOLE, limit or (None if own == "none" else usual)
    sparsity = "..".join(map(str, sparsity)) if isinstance(sparsity, tuple | list) else str(sparsity)
    target = parse_target(sparsity)
    if limit and not isinstance(target, tuple):
        name = option(next(iter(limit)))
        raise UserError(
            f"--sparsity: {sparsity} is one sparsity, and {name} finds the highest; leave --sparsity out, or give an "
            f"interval {AMONG}"
        )
    return target, limit


def size_of(kind: str | None, bpw: str | None, size: str | None) -> str | None:
    """The size that is asked for, or as bits a weight of a format, such as 4.8bpw or 4.5..6bpw; else UserError."""
    if bpw is not None:
        if size or not kind:
            raise UserError("--bpw: goes with --format, in the place of --size")
        target = parse_target(bpw, BITS)
        return f"{bpw if isinstance(target, tuple) else f'{-target:g}'}bpw"
    if kind and not size:
        raise UserError(f"--format: {kind} needs --bpw, such as --bpw 4.8; with gguf --size, such as 100MB, does too")
    return size


def option(key: str) -> str:
    """The option that sets a key of `LimitConfig`."""
    return f"--{key.replace('_', '-')}"


# --- The name of the blocks of a model, by which files and studies tell them.
#
# model.layers                                          model.layers.0, model.layers.1, …
# vision_tower.layers (2) + language_model.layers       two blocks of a vision tower, then those of the language model

_BOTH = re.compile(r"(?P<tower>.+) \((?P<count>\d{1,4})\) \+ (?P<rest>.+)")


def joined(tower: str, count: int, rest: str) -> str:
    """The name of the `count` blocks of a vision tower and of those of the language model."""
    return f"{tower} ({count}) + {rest}"


def in_tower(blocks: object) -> int:
    """The number of blocks, the first, that are of a vision tower; 0 for all other names."""
    match = _BOTH.fullmatch(blocks) if isinstance(blocks, str) else None
    return int(match["count"]) if match else 0


def block_name(blocks: str, index: int) -> str:
    """The name in the model of one block."""
    match = _BOTH.fullmatch(blocks)
    if match is None:
        return f"{blocks}.{index}"
    count = int(match["count"])
    return f"{match['tower']}.{index}" if index < count else f"{match['rest']}.{index - count}"

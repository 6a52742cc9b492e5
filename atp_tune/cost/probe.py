"""The probe: times one batch in three blocks for a few seconds, from which a study's cost is forecast."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from atp_tune.blocks.prune_pass import Pass, advance, wait_for
from atp_tune.checkpoints.devices import peak_memory, reset_peak_memory
from atp_tune.config.prune import make_plan
from atp_tune.config.study import Study
from atp_tune.cost.forecast import ProbeRates, PrunerRate
from atp_tune.run.dense_model import dense_states
from atp_tune.run.session import Session
from atp_tune.scores.next_token import head_scores

T = TypeVar("T")
PROBE_SECONDS = 15.0  # seconds after which no further block is probed


class Clock:
    """Seconds by name, each the median of all measurements under that name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found = defaultdict[str, list[float]](list)

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Runs and times some work, to the end of its last kernel; its result."""
        wait_for(self._device)
        began = perf_counter()
        result = work()
        wait_for(self._device)
        self._found[name].append(perf_counter() - began)
        return result

    def add(self, phases: dict[str, float], name: str) -> None:
        """Adds the seconds of phases timed elsewhere, as `PHASE NAME`."""
        for phase, seconds in phases.items():
            self._found[f"{phase} {name}"].append(seconds)

    def typical(self, name: str) -> float:
        """The median seconds; 0 without measurements."""
        return statistics.median(self._found.get(name, [0.0]))

    def forget(self) -> None:
        """Drops all measurements, after a warm-up."""
        self._found.clear()


@torch.inference_mode()
def probe(session: Session, study: Study, load: float) -> ProbeRates:
    """Times each pruner of a study in the first, middle and last block, each text in them, twice, and the head.

    `load`: seconds of opening the session. Assumes that all blocks cost the same.
    """
    pruners = study.methods.short_names
    clock, last = Clock(session.checkpoint.device), len(session.checkpoint.blocks) - 1
    probed = list(dict.fromkeys((last // 2, last, 0)))  # after block 0, so that each is copied when it is asked for
    batches = {role: _entering(session, role, probed) for role in session.windows}

    def time_block(index: int) -> None:
        weights = clock.time("fetch", partial(session.checkpoint.weights, index))
        for name in pruners:  # seconds by phase of the block in a trial; statistics "dense" are timed as "block"
            plan = make_plan(name, "uniform", session.budget(study.highest), {}, session.pattern)
            work = Pass(
                session.replay,
                session.batch("calibration"),
                session.methods.pruner(name),
                dense_states=None,
                in_one_pass=session.prune_settings.statistics == "sequential",
                channels=session.channel_pruner(name),
            )
            clock.add(work.step(plan, index, batches["calibration"][index].clone()).seconds, name)
        for role, states in batches.items():
            moved = states[index].clone()
            clock.time(f"run {role}", partial(advance, session.replay, session.batch(role), index, weights, moved))

    with peak(session.checkpoint.device) as taken:
        time_block(0)  # warm-up
        clock.forget()
        began = perf_counter()
        for number, index in enumerate(2 * probed):
            if not number or perf_counter() - began < PROBE_SECONDS:
                time_block(index)
        ends = _probe_ends(session, "kl" in study.search.objective)
    tokens = {role: len(states[0]) * session.windows[role].positions for role, states in batches.items()}
    run = {role: clock.typical(f"run {role}") / tokens[role] for role in batches}
    each = {name: clock.typical(f"calibrate {name}") / tokens["calibration"] for name in pruners}
    dense = max((each[name] for name in pruners if session.methods.measures(name)), default=2 * run["calibration"])
    if session.prune_settings.statistics == "dense":
        each = dict.fromkeys(pruners, run["calibration"])
    rates = {name: PrunerRate(each[name], clock.typical(f"prune {name}")) for name in pruners}
    return ProbeRates(last + 1, load, run, dense, ends, clock.typical("fetch"), rates, taken[0])


def _entering(session: Session, role: str, probed: list[int]) -> dict[int, Tensor]:
    """Hidden states [windows, tokens, width] of one batch of a text for each probed block.

    Those of block 0 will do for all, unless blocks change their shape.
    """
    batch = session.batch(role)
    items = session.items(role)[: batch.windows]
    if not _is_shaped(session):
        return dict.fromkeys(probed, session.replay.embed(items).clone())
    states = enumerate(dense_states(session.replay, batch, items))
    return {index: before for index, (before, _) in states if index in probed}


def _is_shaped(session: Session) -> bool:
    """Whether the hidden states of some blocks have another shape than those of block 0."""
    return session.inputs.has_steps or session.replay.in_tower > 0


def _probe_ends(session: Session, kl: bool) -> float:
    """Seconds per token of embedding and head, on validation windows, else on test windows."""
    heads, clock = session.heads, Clock(session.checkpoint.device)
    role = "validation" if "validation" in session.windows else "test"
    items = session.items(role)[: heads.windows]
    final = None
    if _is_shaped(session):
        for _, final in dense_states(session.replay, session.batch(role), items):  # noqa: B007 - the last one stays
            pass
    for turn in range(4):
        if turn == 1:
            clock.forget()  # the first turn is a warm-up
        hidden = clock.time("embed", partial(session.replay.embed, items))
        hidden = hidden if final is None else final  # the head takes states of the last block's shape
        clock.time(
            "head", partial(head_scores, session.replay, session.score, heads, items, hidden, hidden if kl else None)
        )
    return (clock.typical("embed") + clock.typical("head")) / (len(items) * session.windows[role].positions)


@contextmanager
def peak(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds, after the body, its peak bytes without mapped files.

    As `peak_memory` says on a GPU, else of the process; an upper bound where the process's peak cannot be reset.
    """
    taken = list[int]()
    if device.type != "cpu":
        reset_peak_memory(device)
        before, mapped = peak_memory(device), 0
    else:
        with suppress(OSError):  # where the system cannot reset the process's peak
            Path("/proc/self/clear_refs").write_text("5")
        before, mapped = psutil.Process().memory_info().rss, mapped_bytes()
    yield taken
    files = 0 if device.type != "cpu" else mapped_bytes() - mapped
    taken.append(max(0, peak_memory(device) - before - files))


def mapped_bytes() -> int:
    """Bytes of mapped files in memory; 0 if unknown."""
    return int(getattr(psutil.Process().memory_info(), "shared", 0))

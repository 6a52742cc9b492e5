"""Continuations of prompts by dense, uniform and best of a configuration, from one checkpoint in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from atp_tune.checkpoints.devices import oom_as_user_error
from atp_tune.events import EventHandler, TrialStarted
from atp_tune.metrics.continuations import Continuations
from atp_tune.plan import Plan, make_plan
from atp_tune.run.session import Session, Setup
from atp_tune.search.continuations import Continuing
from atp_tune.search.kept_blocks import prune_whole
from atp_tune.sparse.applying import plan_as_pruned
from atp_tune.spec.config import Config
from atp_tune.spec.patterns import parse

COPIED = ("generate", "chat DIR")  # what needs a pruned copy, and what needs none


def open_config(config: Config, base: Path, device: str, watch: EventHandler, allowed: Mapping[str, bool]) -> Session:
    """The context that prunes to a configuration, to be closed; paths start at `base`, `allowed` as for `apply`."""
    setup = Setup.of_config(config, {"calibration": config.calibration}, base, device, allowed)
    return Session.open(setup, watch)


def uniform_plan(config: Config, context: Session) -> Plan:
    """The uniform plan with the pruner and the target of a configuration."""
    return make_plan(config.pruner, "uniform", context.budget(config.target), {}, parse(config.prune.pattern))


def continuations(
    config: Config,
    base: Path,
    prompts: Sequence[str],
    tokens: int,
    device: str,
    watch: EventHandler,
    allowed: Mapping[str, bool],
) -> Continuations:
    """What dense, uniform with the same pruner, and best make of prompts.

    UserError if the model is not the configuration's.
    """
    with open_config(config, base, device, watch, allowed) as context, oom_as_user_error("generate"):
        best = plan_as_pruned(config, context)
        uniform = uniform_plan(config, context)
        work = Continuing(context, prompts, tokens)
        watch(TrialStarted("continuations: dense", None))
        work.say("dense", context.checkpoint.weights)
        watch(TrialStarted("continuations: uniform", None))
        work.say("uniform", prune_whole(context, uniform, *COPIED))
        if best.levels == uniform.levels:
            work.repeat("best", "uniform")
        else:
            watch(TrialStarted("continuations: best", best))
            context.begin(config.batches)
            work.say("best", prune_whole(context, best, *COPIED))
        found = work.result()
    assert found is not None
    return found

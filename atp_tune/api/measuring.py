"""The end of a study with `speed`: bytes and rates of its best plan, packed in memory, beside the dense model."""

import optuna

from atp_tune.api.lender import Lender
from atp_tune.errors import UserError
from atp_tune.events import Place, TrialStarted
from atp_tune.metrics.speed import AT_THE_END, Speed
from atp_tune.results.annotations import store
from atp_tune.results.best_config import best_config
from atp_tune.results.goals import best_trial
from atp_tune.results.summary import summarise
from atp_tune.search.final_scores import write_best
from atp_tune.search.runner import StudyRun
from atp_tune.spec.config import Config


def is_unmeasured(run: StudyRun, study: optuna.Study) -> bool:
    """Whether the best plan of a study is to be measured: it is complete, asks for it, and has no speed yet."""
    if not run.file.study.speed or not run.reports:
        return False
    summary = summarise(study)
    return summary.complete and summary.best_trial is not None and summary.speed is None


def measure_best(run: StudyRun, study: optuna.Study, lender: Lender | None = None) -> None:
    """Measures the best plan of a complete study that asks for it, as it was pruned, unless that is done.

    What prevents it, such as a missing C compiler, is reported in one line, and ends no run.
    """
    best = best_trial(study)
    if best is None or not is_unmeasured(run, study):
        return
    try:
        found = _measured(run, best_config(run.file, study, run.file.best_of(run.name)), lender or Lender())
    except Exception as error:  # a model's own code may raise anything
        from atp_tune.checkpoints.convert import one_line

        run.note(f"speed: not measured, {error if isinstance(error, UserError) else one_line(error)}")
        return
    store(study, "speed", best.number, found.model_dump(mode="json"))
    write_best(run, study)
    run.publish(study)


def _measured(run: StudyRun, config: Config, lender: Lender) -> Speed:
    from atp_tune.api.models import lent_as
    from atp_tune.checkpoints.devices import find_device, oom_as_user_error
    from atp_tune.sparse.applying import plan_of
    from atp_tune.sparse.comparing import is_fast, open_config
    from atp_tune.speed.packed_engine import measure_in_memory
    from atp_tune.speed.throughput import Workload

    spec = run.file.study
    base = run.file.best_of(run.name).parent / config.folder
    place = Place(base, spec.device, run.file.permissions, run.watch)
    with lent_as(config, lender, place) as place:
        if not is_fast(find_device(place.device)):
            raise UserError("the kernel of packed weights needs a CPU and a C compiler (cc), or the wheel ziglang")
        run.watch(TrialStarted("speed: the best plan, packed, beside the dense model", None))
        with oom_as_user_error("speed"), open_config(config, place) as context:
            return measure_in_memory(context, plan_of(config, context), Workload(*AT_THE_END), run.watch)

"""The end of a study: its best plan is trained (`[recover]`), then measured beside the dense model (`speed`)."""

from collections.abc import Sequence

import optuna

from atp_tune.api.arguments import Lender
from atp_tune.cache import cache_dir
from atp_tune.errors import UserError
from atp_tune.events import Place, TrialStarted
from atp_tune.metrics.speed import AT_THE_END, Speed
from atp_tune.results.annotations import store
from atp_tune.results.goals import best_trial
from atp_tune.results.results import uniform_of
from atp_tune.results.stored import best_config
from atp_tune.results.summary import summarise
from atp_tune.search.final_scores import write_best
from atp_tune.search.runner import StudyRun
from atp_tune.spec.config import Config
from atp_tune.spec.recover import RecoverConfig, Recovered
from atp_tune.spec.studyfile import settings
from atp_tune.storage.process import identity


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
    from atp_tune.api.configuration import lent_as
    from atp_tune.checkpoints.devices import find_device, oom_as_user_error
    from atp_tune.sparse.applying import plan_of
    from atp_tune.sparse.comparing import is_fast, open_config
    from atp_tune.speed.benchmark import measure_in_memory
    from atp_tune.speed.torch_engine import Workload

    spec = run.file.study
    base = run.file.best_of(run.name).parent / config.folder
    place = Place(base, spec.device, run.file.permissions, run.watch)
    with lent_as(config, lender, place) as place:
        if not is_fast(find_device(place.device)):
            raise UserError("the kernel of packed weights needs a CPU and a C compiler (cc), or the wheel ziglang")
        run.watch(TrialStarted("speed: the best plan, packed, beside the dense model", None))
        with oom_as_user_error("speed"), open_config(config, place) as context:
            return measure_in_memory(context, plan_of(config, context), Workload(*AT_THE_END), run.watch)


# --- Recovery at the end of a study with `[recover]`: the kept weights of its best plan are trained.


def is_pending(run: StudyRun, study: optuna.Study) -> bool:
    """Whether the best plan of a study is to be trained: it is complete, and was not trained with these settings."""
    asked = run.file.study.recover
    if asked is None or not run.reports:
        return False
    summary = summarise(study)
    is_done = summary.recovered is not None and summary.recovered.settings == asked
    return summary.complete and summary.best_trial is not None and not is_done


def recover_best(run: StudyRun, study: optuna.Study, lender: Lender | None = None) -> None:
    """Trains the best plan of a complete study that asks for it, unless that is done, and stores what it came to.

    What prevents it, such as too little memory, is reported, and ends no run: the study is complete without.
    """
    asked, best = run.file.study.recover, best_trial(study)
    if asked is None or best is None or not is_pending(run, study):
        return
    if (made := settings(run.file)) != study.user_attrs.get("made_from"):
        study.set_user_attr("made_from", made)  # with the `recover` that is asked for now
    config = best_config(run.file, study, run.file.best_of(run.name))
    uniform = uniform_of(study, best)
    nlls = study.user_attrs.get("test_nlls", {}).get(str(uniform.number), ()) if uniform else ()
    study.set_user_attr("training", identity())  # so that others see it
    try:
        found = _skipped(config, asked) or _recovered(run, best.number, config, asked, nlls, lender or Lender())
    except UserError as error:
        run.note(f"warning: the best plan stays as it was pruned: {error}")
        return
    finally:
        study.set_user_attr("training", {})
    if not found.kept:
        run.note(f"the best plan stays as it was pruned: {found.reason}")
    store(study, "recovered", best.number, found.model_dump(mode="json"))
    write_best(run, study)
    run.publish(study)


def _skipped(config: Config, asked: RecoverConfig) -> Recovered | None:
    """Why the best plan is not worth training; None if it is."""
    dense, pruned = config.scored("dense", "validation"), config.scored("best", "validation")
    if not asked.min_increase or dense is None or pruned is None:
        return None
    increase = pruned.value / dense.value - 1
    if increase >= asked.min_increase:
        return None
    cost = f"pruning changes the perplexity on the validation text by {increase:+.1%}"
    reason = f"{cost}, less than recover.min_increase = {asked.min_increase:g} asks for; a lower one trains it"
    return Recovered(settings=asked, kept=False, skipped=True, reason=reason)


def _recovered(
    run: StudyRun, trial: int, config: Config, asked: RecoverConfig, uniform: Sequence[float], lender: Lender
) -> Recovered:
    run.watch(TrialStarted(f"training the kept weights of trial {trial}", None))
    from atp_tune.api.configuration import in_folder
    from atp_tune.sparse.finetuning import recovered

    base = run.file.best_of(run.name).parent / config.folder
    place = Place(base, run.file.study.device, run.file.permissions, run.watch)
    with in_folder(config, lender, place, cache_dir("recovered")) as (of_folder, place, _):
        kinds = getattr(run.file.study.test_text, "turns", ())
        return recovered(of_folder, asked, place, uniform, kinds)

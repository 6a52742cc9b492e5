"""Recovery at the end of a study with `[recover]`: the kept weights of its best plan are trained."""

import optuna

from atp_tune.api.lender import Lender
from atp_tune.cache import cache_dir
from atp_tune.errors import UserError
from atp_tune.events import TrialStarted
from atp_tune.results.best_config import best_config
from atp_tune.results.summary import Summary, summarise
from atp_tune.search.final_scores import write_best
from atp_tune.search.runner import StudyRun
from atp_tune.spec.config import Config
from atp_tune.spec.recover import RecoverConfig, Recovered


def is_pending(run: StudyRun, summary: Summary) -> bool:
    """Whether the best plan of a study is to be trained: it is complete, and was not trained with these settings."""
    asked, known = run.file.study.recover, summary.recovered
    is_done = known is not None and known.settings == asked
    return asked is not None and summary.best_trial is not None and run.reports and summary.complete and not is_done


def recover_best(run: StudyRun, study: optuna.Study, lender: Lender | None = None) -> None:
    """Trains the best plan of a complete study that asks for it, unless that is done, and stores what it came to.

    What prevents it, such as too little memory, is reported, and ends no run: the study is complete without.
    """
    asked, summary = run.file.study.recover, summarise(study)
    best = summary.best_trial
    if asked is None or best is None or not is_pending(run, summary):
        return
    run.watch(TrialStarted(f"training the kept weights of trial {best.number}", None))
    config = best_config(run.file, study, run.file.best_of(run.name))
    try:
        found = _recovered(run, config, asked, summary, lender or Lender())
    except UserError as error:
        said = str(error) if str(error).startswith("recover") else f"recover: {error}"
        run.note(f"warning: the best plan stays as it was pruned: {said}")
        return
    if not found.kept:
        run.note(f"the best plan stays as it was pruned: {found.reason}")
    known = study.user_attrs.get("recovered", {})
    study.set_user_attr("recovered", {**known, str(best.number): found.model_dump(mode="json")})
    write_best(run, study)
    run.publish(study)


def _recovered(run: StudyRun, config: Config, asked: RecoverConfig, summary: Summary, lender: Lender) -> Recovered:
    from atp_tune.api.models import in_folder
    from atp_tune.sparse.recovering import recovered

    spec = run.file.study
    allowed = {
        "allow_pickle": spec.model.allow_pickle, "trust_remote_code": spec.model.trust_remote_code,
        "trust_plugins": run.file.trusts_plugins,
    }  # fmt: skip
    base = run.file.best_of(run.name).parent / config.folder
    place = cache_dir("recovered")
    with in_folder(config, lender, spec.device, place) as found:
        of_folder, device, _ = found
        return recovered(of_folder, asked, base, device, run.watch, allowed, summary.uniform_nlls)

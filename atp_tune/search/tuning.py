"""Running a study: made or resumed, driven to its total, and closed with the numbers on the report text."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic, sleep
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.allocations import Budget
from atp_tune.errors import TrialError, UserError, printable
from atp_tune.events import Note, TrialEnded, TrialStarted, Watch
from atp_tune.results.summary import best_config, is_by_kl, kl_of, made_from, score_of, undrawn, unreported
from atp_tune.results.wording import loss_of
from atp_tune.scores.perplexity import perplexity
from atp_tune.search.samplers import first_trials, make_sampler, make_stopper, total_trials
from atp_tune.search.screening import SUFFIX, begins_with, confirmed, is_screening, renamed, screening_file
from atp_tune.search.settling import GAIN, has_settled
from atp_tune.search.space import Space, make_space
from atp_tune.spec.study import Screen
from atp_tune.spec.studyfile import TRIALS, StudyFile, facts, settings
from atp_tune.trials import mounts, storage
from atp_tune.trials.process import GRACE, identity, is_alive, versions
from atp_tune.trials.stored import TRIAL, checked
from atp_tune.trials.trace import Trace

if TYPE_CHECKING:
    from atp_tune.search.bench import Bench
    from atp_tune.search.objective import Objective

LONGEST = 200  # bytes of a study's name, from which files are named
REPORTER = "reporter"  # system attribute of a study: the process that measures the report text
POLL = 2  # seconds between looks at a trial that runs elsewhere


@dataclass(frozen=True)
class Run:
    """One call of the command: the study file, the study's name, and how many seconds to go on at most.

    A `bench` that is open already, with this model and these texts, spares loading them. When the total is reached,
    a run that `reports` measures the report text, and one that `writes` writes the best configuration here. Of several
    workers one reports, and none writes: that is left to the process that started them. `mix`: another device or number
    format than the one on which the study began is no reason to refuse. `screens`: the study that this one is the
    screening of. `trace`: what follows the trials of this process.
    """

    file: StudyFile
    name: str
    timeout: float | None
    watch: Watch
    bench: "Bench | None" = None
    reports: bool = True
    writes: bool = True
    mix: bool = False
    screens: str | None = None
    trace: Trace = field(default_factory=Trace)

    def note(self, text: str) -> None:
        """Tells one line."""
        self.watch(Note(text))


def tune(run: Run) -> optuna.Study:
    """Makes or resumes the study and drives it to its total; KeyboardInterrupt leaves it ready to resume.

    A study that is complete is returned at once, without loading torch or the model. UserError for bad input.
    """
    return completed(run) or _work(replace(run, watch=run.trace.heard_by(run.watch)))


def completed(run: Run) -> optuna.Study | None:
    """The study if it is complete; UserError if it was made with other facts, or cannot be stored."""
    check_name(run.name)
    storage.check_writable(run.file.storage_url)
    if warning := mounts.warning(run.file.storage_url):
        run.note(warning)
    _check_screening(run)
    study = begun(run)
    if study is None or storage.is_new(study):
        return None
    storage.check_facts(study, facts(run.file.study, run.file.folder), partly=True, any_dtype=run.mix)
    run = adopting(run, study)
    if not is_complete(study, run.file):
        if not run.mix:
            storage.check_device(study, _device(run))
        return None
    _write_best(run, study)
    return study


def _check_screening(run: Run) -> None:
    """UserError where a study that is no screening has the name that this one's screening would have."""
    if run.file.study.search.screen is None:
        return
    other = begun(replace(run, name=run.name + SUFFIX))
    if other is not None and not storage.is_new(other) and not is_screening(other):
        raise UserError(
            f"search.screen: the screening would be called {other.study_name}, as a study of its own is; "
            "choose another --study-name NAME"
        )


def adopting(run: Run, study: optuna.Study) -> Run:
    """The run with the total that the study was last asked for, unless this command asks for one itself."""
    made = made_from(study.user_attrs.get("made_from"))
    if made is None or run.file.sets_trials or not made.sets_trials:
        return run
    search = run.file.study.search.model_copy(update={"trials": made.study.search.trials})
    spec = run.file.study.model_copy(update={"search": search})
    asked = tuple(override for override in made.overrides if override.startswith(TRIALS))
    return replace(run, file=replace(run.file, study=spec, overrides=(*run.file.overrides, *asked)))


def begun(run: Run) -> optuna.Study | None:
    """The study as it stands, if there is one."""
    db = storage.open_storage(run.file.storage_url, create=False)
    return storage.find_study(db, run.name) if db else None


def check_name(name: str) -> None:
    """UserError for a study's name that files and terminals cannot bear."""
    if not name or printable(name) != name or len(name.encode()) > LONGEST:
        shown = name if len(name) <= 40 else f"{name[:39]}…"
        raise UserError(
            f"study {shown}: its name must have 1 to {LONGEST} bytes, all printable; choose --study-name NAME"
        )


def _device(run: Run) -> str:
    from atp_tune.checkpoints.devices import device_name, find_device

    return device_name(run.bench.checkpoint.device if run.bench else find_device(run.file.study.device))


def is_complete(study: optuna.Study, file: StudyFile) -> bool:
    """Whether the total is reached, nothing runs, and the final numbers belong to the best trial."""
    sizes, best = study.user_attrs.get("sizes"), storage.best_trial(study)
    if sizes is None or storage.running(study):
        return False
    total = total_trials(file.study.search, make_space(file.study, Budget(file.study.sparsity, tuple(sizes))))
    done = storage.counted(study) >= storage.total_of(study, total, file.goes_on)
    return done and (best is None or not (unreported(study) or undrawn(study, file.study.texts.calibration.draws)))


def _work(run: Run) -> optuna.Study:
    db = storage.open_storage(run.file.storage_url, create=False)  # before the model, in which time it may go away
    before = storage.find_study(db, run.name) if db else None
    if before:
        run = adopting(run, before)
        _recover(run, before)  # now: what a process of this host left is read before others take it for silent
    if run.bench is not None:
        return _search(run, run.bench, db, before)
    with open_bench(run, before) as bench:
        return _search(run, bench, db, before)


def _search(
    run: Run, bench: "Bench", db: optuna.storages.BaseStorage | None, before: optuna.Study | None
) -> optuna.Study:
    """All of the run that wants a bench; `before`: the study as it was found in `db`, if it was."""
    batches = {**bench.batches, **(storage.batches_of(before) if before else {})}
    bench.begin(batches)
    search, space = run.file.study.search, make_space(run.file.study, bench.budget(run.file.study.sparsity))
    total = total_trials(search, space)
    db = db or storage.open_storage(run.file.storage_url, create=True)
    assert db is not None
    known = {**facts(run.file.study, run.file.folder), **bench.contents()}
    study = storage.create_study(db, run.name, known, run.mix)
    _describe(run, study, bench, total, batches)
    _compare_versions(run, study)
    study.pruner = make_stopper(search)
    if search.screen is None:
        _measure_dense(run, study, bench)
        first, screened = first_trials(search, space)[:total], list[FrozenTrial]()
    else:
        run, screened = _screen(run, search.screen, bench)
        first = begins_with(confirmed(screened, space, search.screen.confirm), space, total)
    study.sampler = make_sampler(search, space, screened)
    for params in first:
        study.enqueue_trial(params, {storage.START: True}, skip_if_exists=True)
    total = _drive(run, study, bench, space, total)
    if run.reports and storage.counted(study) >= total:
        _measure_dense(run, study, bench)
        report(run, study, bench, space)
    return study


def _screen(run: Run, screen: Screen, bench: "Bench") -> tuple[Run, list[FrozenTrial]]:
    """Runs the screening, or goes on with it: the run with the time that is left, and the measured points, best first,
    none before it is complete. It has measured the dense model, on its part of the text, so that the main study need
    not do so before its search.
    """
    began, file = monotonic(), screening_file(run.file, screen)
    inner = replace(
        run, file=file, name=run.name + SUFFIX, watch=renamed(run.watch), reports=False, writes=False,
        bench=bench.screening(screen.every), screens=run.name,
    )  # fmt: skip
    study = begun(inner)
    if study is None or not is_complete(study, file):
        study = _work(inner)
    if run.timeout is not None:
        run = replace(run, timeout=max(0.0, run.timeout - (monotonic() - began)))
    return run, storage.measured(study) if is_complete(study, file) else []


def open_bench(run: Run, study: optuna.Study | None = None) -> "Bench":
    """Loads the model and the texts, the report text only where it is not the search text; windows begin with BOS as in
    the study, if it was begun.
    """
    from atp_tune.checkpoints.devices import memory_for
    from atp_tune.search.bench import Bench, Setup

    run.note("loading the model and the texts")
    spec = run.file.study
    texts = {"calibration": spec.texts.calibration, "search": spec.texts.search}
    if spec.texts.report is not None:
        texts["report"] = spec.texts.report
    draws, bos = spec.texts.calibration.draws, storage.bos_of(spec, study)
    setup = Setup(spec.model, spec.prune, texts, run.file.folder, spec.device, draws=draws, bos=bos)
    with memory_for("loading"):
        return Bench.open(setup, run.watch)


def _describe(run: Run, study: optuna.Study, bench: "Bench", total: int, batches: dict[str, int]) -> None:
    total = storage.total_of(study, total, run.file.goes_on)
    model = bench.checkpoint
    attributes = {
        "sizes": list(model.sizes), "blocks": model.blocks_name, "linears": model.linear_names,
        "total": total, "made_from": settings(run.file),
        **({} if "batches" in study.user_attrs else {"batches": batches}),
        **({"screens": run.screens} if run.screens else {}),
    }  # fmt: skip
    if bench.bos_effect is not None:
        attributes["bos"] = bench.bos_effect.model_dump()
    for name, value in attributes.items():
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)


def _compare_versions(run: Run, study: optuna.Study) -> None:
    """Notes that earlier trials were measured by other versions: allowed, but it may show in a value's last digits."""
    own = versions()
    for trial in study.get_trials(deepcopy=False):
        other = trial.user_attrs.get("versions", own)
        if other != own:
            names = [name for name in own if other.get(name) != own[name]]
            was, now = (", ".join(f"{name} {all_.get(name, '?')}" for name in names) for all_ in (other, own))
            run.note(f"trial {trial.number} was measured with {was}; now it is {now}: last digits may differ")
            return


def _measure_dense(run: Run, study: optuna.Study, bench: "Bench") -> None:
    from atp_tune.checkpoints.devices import memory_for

    if "dense" in study.user_attrs:
        return
    run.watch(TrialStarted("dense model", None))
    bench.begin(storage.batches_of(study))
    with memory_for("dense model"):
        nlls = bench.all_nlls(bench.dense(), "search")
    if not math.isfinite(perplexity(nlls).value):
        raise UserError(
            f"model.source: the perplexity of the dense model {run.file.study.model.source} is not finite: its weights "
            "hold NaN, or overflow in this number format; give another model, or set model.dtype, and --study-name NAME"
        )
    study.set_user_attr("dense", nlls)


def _drive(run: Run, study: optuna.Study, bench: "Bench", space: Space, total: int) -> int:
    """Runs trials until the total is reached or the time is up; trials that run elsewhere count as theirs.

    The total that was reached, or is to be: another run may ask for another one meanwhile.
    """
    from atp_tune.search.objective import Objective

    search = run.file.study.search
    objective = Objective(bench, space, search.stopper != "none", run.watch, search.objective)
    end = None if run.timeout is None else monotonic() + run.timeout
    while end is None or monotonic() < end:
        trials = _recover(run, study)
        total = study.user_attrs.get("total", total)
        elsewhere = [trial for trial in trials if trial.state == TrialState.RUNNING]
        remaining = total - sum(map(storage.counts, trials)) - len(elsewhere)
        if remaining > 0:
            _optimise(run, study, objective, remaining, total, end)
        elif elsewhere:
            _wait(run, study, elsewhere[0])
        else:
            break
    return total


def _recover(run: Run, study: optuna.Study) -> list[FrozenTrial]:
    """Ends the trials that nobody runs any more, and tells of them; all trials as they are then."""
    trials = study.get_trials(deepcopy=False)
    if lost := storage.recover(study, trials):
        trials = study.get_trials(deepcopy=False)
        for number in lost:
            run.note(loss_of(trials[number]))
    return trials


def _optimise(
    run: Run,
    study: optuna.Study,
    objective: "Objective",
    n_trials: int,
    total: int,
    end: float | None,
) -> None:
    def ended(study: optuna.Study, trial: FrozenTrial) -> None:
        trials = _recover(run, study)  # read once: a study of many workers is long, and its trials are short
        best, done = next(iter(storage.ranked(trials)), None), sum(map(storage.counts, trials))
        reason = trial.user_attrs.get("failure") if trial.state == TrialState.FAIL else None
        if trial.values is not None or reason:
            run.watch(_ended(trial, reason, best, done, total))
        if run.file.study.search.settle and done < total and has_settled(study, objective.space):
            storage.settle(study, total)
            run.note(f"settled after {done} of {total}: a better point is expected to gain less than {GAIN:.0%}")
            study.stop()
        is_late = end is not None and monotonic() >= end  # Optuna's own timeout goes by a clock that may be set
        running = sum(other.state == TrialState.RUNNING for other in trials)
        if is_late or done + running >= total:  # other processes have done, or do, the rest
            study.stop()

    attempt = Attempt(objective, total, run.trace)
    try:
        study.optimize(attempt, n_trials=n_trials, catch=(TrialError,), callbacks=[ended])
    except KeyboardInterrupt:
        storage.recover(study)
        raise
    except UnboundLocalError as error:  # Optuna's own, where a trial can neither be told nor read
        raise error.__context__ if isinstance(error.__context__, UserError) else error from None
    except (UpdateFinishedTrialError, ValueError, AssertionError) as error:
        if isinstance(error.__context__, UserError):  # the storage took neither the value nor the failure
            raise error.__context__ from None
        if not attempt.is_lost(study):
            raise
        run.note(f"trial {attempt.number} gave no sign of life for {GRACE} s: it is run again")


def _ended(trial: FrozenTrial, reason: str | None, best: FrozenTrial | None, done: int, total: int) -> TrialEnded:
    """What is told of a trial: what it came to, and the best."""
    value, kl = (found.value if found else None for found in (score_of(trial), kl_of(trial)))
    best_value, best_kl = (of(best) if best else None for of in (score_of, kl_of))
    return TrialEnded(
        trial.number, value, reason, best_value.value if best_value else None, done, total,
        kl=kl, best_kl=best_kl.value if best and best_kl and is_by_kl(best) else None,
    )  # fmt: skip


class Attempt:
    """Calls the objective unless other workers have reached the total, and knows afterwards whether they took its trial
    for lost while it ran: Optuna has no error of its own for telling such a trial, what it raises looks like a bug.
    """

    def __init__(self, objective: Callable[[optuna.Trial], tuple[float, ...]], total: int, trace: Trace) -> None:
        self.number = -1
        self._objective = objective
        self._total = total
        self._trace = trace
        self._is_bug = False

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """The objective's values."""
        self.number, self._is_bug = trial.number, True
        try:
            self._check_need(trial)
            with self._trace.of(trial.study.study_name, trial.number):
                value = self._objective(trial)
        except (TrialError, UpdateFinishedTrialError):
            self._is_bug = False
            raise
        self._is_bug = False
        return value

    def _check_need(self, trial: optuna.Trial) -> None:
        trials, number = trial.study.get_trials(deepcopy=False), trial.number
        if storage.is_surplus(trials, number, self._total) or storage.is_repetition(trials, number):
            trial.set_user_attr("lost", storage.SURPLUS)
            raise TrialError("not needed")

    def is_lost(self, study: optuna.Study) -> bool:
        """Whether the last trial was ended by somebody else."""
        return self.number >= 0 and not self._is_bug and study.trials[self.number].state.is_finished()


def _wait(run: Run, study: optuna.Study, trial: FrozenTrial) -> None:
    """Gives a trial that runs elsewhere the time to end, or to show no sign of life."""
    where = trial.user_attrs.get("host", "another process")
    run.note(f"waiting for trial {trial.number}, which {where} runs (or was running when it stopped)")
    while any(other.number == trial.number for other in storage.running(study)):
        sleep(POLL)
        _recover(run, study)


def report(run: Run, study: optuna.Study, bench: "Bench", space: Space) -> None:
    """Measures dense, uniform and the best of each allocation on the report text, once, those also on other draws of
    the calibration text if there are to be some, and writes the best down.

    Each measurement is stored at once, and by itself: two hosts may do this at the same moment.
    """
    draws = run.file.study.texts.calibration.draws
    _wait_for_reporter(run, study, draws)
    is_missing = bool(unreported(study) or undrawn(study, draws))
    if is_missing:
        study._storage.set_study_system_attr(study._study_id, REPORTER, identity())
    try:
        for name in unreported(study):
            nlls, kls = _report_scores(run, study, bench, space, name)
            if kls:  # first: what has NLLs is not measured again
                study.set_user_attr(f"report_kls:{name}", kls)
            study.set_user_attr(f"reports:{name}", nlls)
        for draw, name in undrawn(study, draws):
            study.set_user_attr(f"draws:{name}:{draw}", _drawn_nlls(run, study, bench, space, draw, name))
    finally:
        if is_missing:
            study._storage.set_study_system_attr(study._study_id, REPORTER, None)
    _write_best(run, study)


def _wait_for_reporter(run: Run, study: optuna.Study, draws: int) -> None:
    """Leaves the report text to another process of this host that measures it: two may end a study together."""
    told = False
    while (unreported(study) or undrawn(study, draws)) and _is_reported(study):
        if not told:
            run.note("waiting for the numbers on the report text, which another process measures")
        told = True
        sleep(POLL)


def _is_reported(study: optuna.Study) -> bool:
    """Whether another process of this host measures the report text; what others do cannot be known from here."""
    other = study._storage.get_study_system_attrs(study._study_id).get(REPORTER)
    return isinstance(other, dict) and other.get("pid") != os.getpid() and is_alive(checked(other, TRIAL))


def _write_best(run: Run, study: optuna.Study) -> None:
    """Writes the best configuration down, unless it is there: a run may have been killed just before it was."""
    if not run.writes or storage.best_trial(study) is None:
        return
    out = run.file.best_of(run.name)
    config = best_config(run.file, study, out)
    if not out.exists() or out.read_bytes() != config.to_json().encode():
        config.write(out)


def _report_scores(
    run: Run, study: optuna.Study, bench: "Bench", space: Space, name: str
) -> tuple[list[float], list[float]]:
    """Window NLLs on the report text, and KLs if the study minimises them; with the paper's protocol the search's."""
    from atp_tune.checkpoints.devices import memory_for

    dense = name == "dense"
    trial = None if dense else study.trials[int(name)]
    if run.file.study.texts.report is None:
        if trial is None:
            return study.user_attrs["dense"], []
        return trial.user_attrs["nlls"], trial.user_attrs.get("kls", [])
    plan = None if trial is None else space.plan(trial.params)
    title = f"report: {'dense model' if dense else f'trial {name}'}"
    run.watch(TrialStarted(title, plan))
    _begin_as(study, trial, bench)
    pruned = None if plan is None else ((block.index, block.weights) for block in bench.prune(plan))
    with memory_for(title):
        return bench.all_scores(
            pruned or bench.dense(), "report", kl="kl" in run.file.study.search.objective and not dense
        )


def _drawn_nlls(run: Run, study: optuna.Study, bench: "Bench", space: Space, draw: int, name: str) -> list[float]:
    """Window NLLs of a trial's plan on the text that reports, pruned by another draw of the calibration text."""
    from atp_tune.checkpoints.devices import memory_for

    trial, draws = study.trials[int(name)], run.file.study.texts.calibration.draws
    plan, title = space.plan(trial.params), f"draw {draw + 1} of {draws}: trial {name}"
    run.watch(TrialStarted(title, plan))
    _begin_as(study, trial, bench)
    pruned = ((block.index, block.weights) for block in bench.drawn(draw).prune(plan))
    with memory_for(title):
        return bench.all_nlls(pruned, "search" if run.file.study.texts.report is None else "report")


def _begin_as(study: optuna.Study, trial: FrozenTrial | None, bench: "Bench") -> None:
    """Begins in the batches in which a trial was measured, which decide its mask, or in its study's."""
    own = storage.batches_in(trial, study.user_attrs.get("fingerprint", {})) if trial else {}
    bench.begin({**storage.batches_of(study), **own})

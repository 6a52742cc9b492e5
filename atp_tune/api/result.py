"""`Result`: a study and its findings, from Python."""

from __future__ import annotations  # help() shows the types as they stand here

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_tune.api.arguments import Lender, Settings, as_arguments, study_file
from atp_tune.config.best import Config
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError
from atp_tune.measures import PERPLEXITY, TEXTS
from atp_tune.results.formatting import method_words, plan_words, spent, texts_note, trial_remark
from atp_tune.results.goals import Choice, chosen
from atp_tune.results.results import DENSE, TRAINED, allocation_name
from atp_tune.results.status import best_config, file_as_run, stored_study
from atp_tune.results.summary import Summary, made_from, overview, summarise
from atp_tune.storage import opening

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go
    from transformers import PreTrainedModel

    from atp_tune.api.configuration import Configuration
    from atp_tune.config.prune import Engine
    from atp_tune.measures import Perplexity

Row = dict[str, Any]  # of a trial or a point, for notebooks: flat, one value in a cell


def frame(rows: list[Row]) -> Any:
    """The rows as a `pandas.DataFrame`, or as they are without pandas."""
    try:
        from pandas import DataFrame
    except ImportError:
        return rows
    return DataFrame(rows)


HERE = Path("best.json")  # a configuration that is not written is as if it lay in the current folder


class Result:
    """A study and what it found; of a study that still runs, what it found so far.

    Methods that prune take the best trial, or another: `trial`, its number; over an interval also `sparsity` or `bpw`,
    for the nearest point of the front, or `max_increase`, `max_kl` or, of image classifiers, `max_drop` (of accuracy),
    for the smallest plan within it.
    """

    def __init__(self, study: optuna.Study, file: StudyFile, lender: Lender | None = None) -> None:
        self.study = study
        self._file = file
        self._lender = lender or Lender()

    @property
    def name(self) -> str:
        """The name of the study in its storage."""
        return self.study.study_name

    @property
    def summary(self) -> Summary:
        """All numbers of the study, read anew."""
        return summarise(self.study)

    @property
    def is_complete(self) -> bool:
        """Whether all trials are measured, and the best ones on the test text."""
        return self.summary.complete

    @property
    def best(self) -> Config:
        """The configuration of the best trial; UserError if no trial has a value yet."""
        return self._config()

    @property
    def trials(self) -> Any:
        """All trials, one row each: a `pandas.DataFrame` where pandas is installed, else a list of dicts.

        Number, state, plan, sparsity, scores with errors, seconds and parameters. Where weights are rounded alone
        `effective_bits` are in the place of sparsity: per weight, with scales.
        """
        summary = self.summary
        name, key = summary.amount.row
        return frame(
            [
                {
                    "trial": trial.number,
                    "state": trial.state.name.lower(),
                    "plan": plan_words(trial),
                    name: trial.user_attrs.get(key),
                    **dict(summary.results.record(trial)),
                    "seconds": round(sum(spent(trial).values()), 3) if spent(trial) else None,
                    **trial.params,
                    **({"allocation": allocation_name(trial)} if "allocation" in trial.params else {}),
                    "remark": trial_remark(trial, summary) or None,
                }
                for trial in summary.trials
            ]
        )

    @property
    def front(self) -> Any:
        """The points of a study over an interval of sparsities or bits, the largest first, in the form of `trials`.

        Each has sparsity or bits, method, scores, uniform's, and changes against dense and uniform with errors. Empty
        for a study at one target.
        """
        summary, rows = self.summary, list[Row]()
        results = summary.results
        for point in summary.points:
            uniform = results.uniform(point.trial)
            beside = {f"{'test_' * (text == 'test')}uniform_perplexity": results.score(uniform, text) for text in TEXTS}
            changes = {"against_dense": results.change(DENSE, point.trial)}
            for by in results.measures:
                name = "against_uniform" if by is PERPLEXITY else f"{by.name}_against_uniform"
                changes[name] = results.against_uniform(point.trial, by)
            against = [(name, difference and difference.change) for name, difference in changes.items()]
            rows.append(
                {
                    "trial": point.trial.number,
                    **point.amount,
                    "method": method_words(point.trial),
                    **dict(results.record(point.trial)),
                    **{name: score and score.value for name, score in beside.items()},
                    **{name: change and change.value for name, change in against},
                    **{f"{name}_stderr": change and (change.stderr or None) for name, change in against},
                    "excess": point.excess,
                    "packed_bytes": point.packed_bytes,
                    f"{results.words.rate}_per_second": point.speed and point.speed.fastest,
                    "best": point.is_best,
                }
            )
        return frame(rows)

    def plot(self, figure: str | None = None) -> go.Figure:
        """A Plotly figure: "perplexity", "points", "front", "sparsity", "error" or "seconds".

        By default the points of a front, else perplexity against β or by trial. UserError for a figure that the study
        has no data for.
        """
        from atp_tune.report.figures import draw

        drawn = draw(self.summary)
        name = figure or self.summary.goal.figures[0]
        if name not in drawn:
            has = ", ".join(drawn) or "none yet"
            raise UserError(f'plot: the study has no figure "{name}"; it has {has}')
        return drawn[name]

    def configuration(self, *, device: str | None = None, **choice: Any) -> Configuration:
        """The configuration of a trial with the methods that make its model: `apply`, `save`, `push` and more."""
        from atp_tune.api.configuration import Configuration

        config = self._config(**choice)
        where = device or self._file.study.device
        return Configuration(config, Path(config.folder), where, self._file.permissions, self._lender)

    def apply(self, *, device: str | None = None, **choice: Any) -> PreTrainedModel:
        """The model, pruned, in memory; a model of the caller is copied and stays dense.

        UserError if the model is not the study's any more.
        """
        return self.configuration(device=device, **choice).apply()

    def save(
        self,
        folder: str | Path,
        *,
        packed: bool = False,
        slim: bool = False,
        dtype: str | None = None,
        format: Engine | None = None,
        device: str | None = None,
        **choice: Any,
    ) -> Perplexity:
        """Writes the pruned model as a Hugging Face folder with a model card; returns its test perplexity.

        The perplexity is measured on the folder as it is on the disk. `packed`: without zeros, and with rounded weights
        as codes of their bits: smaller, and loaded by transformers where atp_tune is imported. `slim`: without the
        channels that `pattern = "channels"` prunes. `dtype` and `format`: of the weights, as in `Configuration.save`.
        UserError if the folder exists.
        """
        made = self.configuration(device=device, **choice)
        return made.save(folder, packed=packed, slim=slim, dtype=dtype, format=format)

    def push(self, repository: str, *, private: bool = False, device: str | None = None, **choice: Any) -> str:
        """Uploads the pruned model with its card to the Hugging Face hub, ORG/NAME, and returns its address.

        UserError without a login, or if the hub refuses.
        """
        return self.configuration(device=device, **choice).push(repository, private=private)

    def _config(self, **choice: Any) -> Config:
        """The configuration of a trial; UserError for two choices, and for one that is not there."""
        known = {"trial", "sparsity", "bpw", "max_increase", "max_perplexity", "max_kl", "max_drop"}
        if unknown := choice.keys() - known:
            raise TypeError(f"{min(unknown)}: names no trial; one is named by {', '.join(sorted(known))}")
        with as_arguments():
            found = chosen(self.study, choice)
            number = found.trial.number if isinstance(found, Choice) else found
            return best_config(file_as_run(self.study, self._file), self.study, HERE, number)

    def __repr__(self) -> str:
        summary = self.summary
        done = f"{summary.done} of {summary.total} trials"
        if summary.best_trial is None:
            return f"<Result {self.name}: {done}>"
        model = TRAINED if summary.results.trained else summary.best_trial
        pairs = ((text, summary.results.score(model, text)) for text in TEXTS)
        scores = ", ".join(f"{text} perplexity {score}" for text, score in pairs if score)
        trained = ", trained" if summary.results.trained else ""
        return f"<Result {self.name}: {done}, best {method_words(summary.best_trial)}{trained}, {scores}>"

    def _repr_html_(self) -> str:
        """The table of results, for notebooks."""
        summary = self.summary
        table = overview(summary)

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in table.rows)
        caption = "; ".join(part for part in (self.name, texts_note(summary)) if part)
        return f"<table><caption>{escape(caption)}</caption>{row(table.head, 'th')}{body}</table>"


def load_study(
    study: str | Path,
    *,
    storage: str | None = None,
    study_name: str | None = None,
    settings: Settings | None = None,
    model: Any = None,
    tokenizer: Any = None,
    texts: Any = None,
    trust_plugins: bool = False,
) -> Result:
    """The stored study of a study file, by name or path, finished or running.

    Args:
        study: Name of a study in ./studies or the package, or the path of a .toml file. With `storage` also the name
            of a study that has no file.
        storage: Optuna storage URL; by default the study's own.
        study_name: Name in the storage; by default the study file's.
        settings: Keys of the study file that the study was run with, as `--set` sets them.
        model: The study's model, if it lay in memory.
        tokenizer: Its tokenizer.
        texts: The study's texts, if they lay in memory.
        trust_plugins: Run the code that the study names, of its model too, to prune again.

    Returns:
        What `tune` returned, or what a running study has found so far.

    Raises:
        UserError: If there is no such study, or it has no trials yet.
    """
    lender = Lender.of(model, tokenizer, texts)
    try:
        file = study_file(study, storage, settings or {})
        there = stored_study(file, study_name)
    except UserError:  # perhaps a study without a file, with the settings that it was made from
        candidate = opening.stored(storage, study_name or str(study)) if storage else None
        original = made_from(candidate) if candidate else None
        if candidate is None or original is None:
            raise
        there, file = candidate, replace(original, study=original.study.model_copy(update={"storage": storage}))
    trusts_model = trust_plugins or file.trusts_model
    return Result(there, replace(file, trusts_plugins=trust_plugins, trusts_model=trusts_model), lender)

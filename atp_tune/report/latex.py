"""The report as a booktabs table for a paper: dense, uniform and the best of each allocation."""

from collections.abc import Sequence

from optuna.trial import FrozenTrial

from atp_tune.measures import Change, Divergence, Estimate, Perplexity
from atp_tune.plan import method_in, percent
from atp_tune.report.contents import Contents
from atp_tune.results.formatting import errors_of
from atp_tune.results.front import Point
from atp_tune.results.summary import Summary
from atp_tune.results.trials import allocation_of, is_uniform, parameters_of
from atp_tune.spec.config import Divergences, Scores

_SPECIAL = {
    **{char: f"\\{char}" for char in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "–": "--", "’": "'", "±": r"$\pm$", "×": r"$\times$", "β": r"$\beta$", "γ": r"$\gamma$",
    "δ": r"$\delta$", "φ": r"$\varphi$", "ν": r"$\nu$", "λ": r"$\lambda$", "ε": r"$\varepsilon$",
}  # fmt: skip


def make(studies: Sequence[Contents]) -> bytes:
    r"""One table of all studies; it needs \usepackage{booktabs}."""
    has_kl = any("kl" in contents.summary.objectives for contents in studies)
    has_hits = any(contents.summary.hits for contents in studies)
    rows = "\n\\midrule\n".join("\n".join(_rows(contents, len(studies) > 1, has_kl, has_hits)) for contents in studies)
    names = ", ".join(escaped(contents.summary.name) for contents in studies)
    what, columns = ("Perplexity and KL divergence", "llrrrrr") if has_kl else ("Perplexity", "llrrr")
    data = " or ".join(dict.fromkeys(contents.summary.data for contents in studies))
    over = {"text": "windows", "images": "images"}.get(data, "windows or images")
    errors = escaped(errors_of(studies[0].summary) if len(studies) == 1 else f"standard error over {over}")
    more = f" & KL, validation {data} & KL, test {data}" if has_kl else ""
    if has_hits:
        what, columns, more = f"{what} and accuracy", columns + "rr", f"{more} & Validation accuracy & Test accuracy"
    return f"""\
% \\usepackage{{booktabs}}
\\begin{{table}}
\\centering
\\caption{{{what} ($\\pm$: {errors}) of {names}.}}
\\begin{{tabular}}{{{columns}}}
\\toprule
Pruner & Allocation & Validation {data} & Test {data} & Against uniform{more} \\\\
\\midrule
{rows}
\\bottomrule
\\end{{tabular}}
\\end{{table}}
""".encode()


def _rows(contents: Contents, titled: bool, has_kl: bool, has_hits: bool) -> list[str]:
    summary, sparsity = contents.summary, contents.sparsity
    rows = []
    if titled:
        what = "" if summary.bits is not None else "sparsity "
        at = f", {what}{sparsity}" if sparsity else ""
        rows.append(f"\\multicolumn{{{5 + 2 * has_kl + 2 * has_hits}}}{{l}}{{{escaped(summary.name + at)}}} \\\\")
    rows.append(
        _row("", "dense", summary.dense, None, [*(["0", "0"] if has_kl else []), *_hits(summary, None, has_hits)])
    )
    if summary.interval:
        return [*rows, *(_point(summary, point, has_kl, has_hits) for point in summary.points)]
    best = summary.best_trial
    if best is not None:
        pruner = escaped(method_in(best.params))
        kls = _more(summary, summary.uniform_trial, has_kl, has_hits)
        rows.append(_row(pruner, "uniform", summary.uniform, None, kls))
    for rank in summary.ranks:
        if not is_uniform(rank.trial):
            more = _more(summary, rank.trial, has_kl, has_hits)
            rows.append(_plan_row(rank.trial, "", rank.scores, rank.against, more))
    return rows


def _point(summary: Summary, point: Point, has_kl: bool, has_hits: bool) -> str:
    """The row of a point of a study over an interval of sparsities."""
    against = point.against.change if point.against else None
    kls = _more(summary, point.trial, has_kl, has_hits)
    return _plan_row(point.trial, f"{percent(point.sparsity)} ", point.scores, against, kls)


def _plan_row(trial: FrozenTrial, before: str, scores: Scores, against: Change | None, kls: list[str]) -> str:
    beta = None if is_uniform(trial) else parameters_of(trial).get("beta")
    name = escaped(before + allocation_of(trial)) + (f" ($\\beta={beta:.4f}$)" if beta is not None else "")
    return _row(escaped(method_in(trial.params)), name, scores, against, kls)


def _row(pruner: str, name: str, scores: Scores, against: Change | None, kls: list[str]) -> str:
    change = _per_cent(against, "+.1f")
    return " & ".join((pruner, name, _score(scores.validation), _score(scores.test), change, *kls)) + r" \\"


def _more(summary: Summary, trial: FrozenTrial | None, has_kl: bool, has_hits: bool) -> list[str]:
    """The cells of KL and accuracy of a trial, as far as the table has them."""
    return [*_kls(summary.kl(trial), has_kl), *(_hits(summary, trial, has_hits) if trial else ["--"] * 2 * has_hits)]


def _hits(summary: Summary, trial: FrozenTrial | None, has_hits: bool) -> list[str]:
    found = summary.hits.trial(trial)
    return [_per_cent(found.validation), _per_cent(found.test)] if has_hits else []


def _per_cent(found: Estimate | None, style: str = ".1f") -> str:
    return f"${_said(found, style, '.1f', 100)}\\,\\%$" if found else "--"


def _said(found: Estimate, style: str, error: str, times: float = 1.0) -> str:
    said = f"{times * found.value:{style}}"
    return f"{said} \\pm {times * found.stderr:{error}}" if found.stderr else said


def _kls(found: Divergences, has_kl: bool) -> list[str]:
    return [_score(found.validation, 4), _score(found.test, 4)] if has_kl else []


def _score(score: Perplexity | Divergence | None, digits: int = 2) -> str:
    return f"${_said(score, f'.{digits}f', f'.{digits}f')}$" if score else "--"


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(char, char) for char in " ".join(text.split()))

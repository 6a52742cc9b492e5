"""The report as a booktabs table for a paper: dense, uniform and the best of each allocation."""

from collections.abc import Sequence

from atp_tune.perplexity import Change, Perplexity
from atp_tune.report.contents import Contents
from atp_tune.summary import Rank, allocation_of, is_uniform, parameters_of

_SPECIAL = {
    **{char: f"\\{char}" for char in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "–": "--", "’": "'", "±": r"$\pm$", "β": r"$\beta$", "γ": r"$\gamma$", "δ": r"$\delta$",
    "φ": r"$\varphi$", "ν": r"$\nu$", "λ": r"$\lambda$", "ε": r"$\varepsilon$",
}  # fmt: skip


def make(studies: Sequence[Contents]) -> bytes:
    r"""One table of all studies; it needs \usepackage{booktabs}."""
    rows = "\n\\midrule\n".join("\n".join(_rows(contents, len(studies) > 1)) for contents in studies)
    names = ", ".join(escaped(contents.summary.name) for contents in studies)
    return f"""\
% \\usepackage{{booktabs}}
\\begin{{table}}
\\centering
\\caption{{Perplexity (standard error over windows) of {names}.}}
\\begin{{tabular}}{{llrrr}}
\\toprule
Pruner & Allocation & Search text & Report text & Against uniform \\\\
\\midrule
{rows}
\\bottomrule
\\end{{tabular}}
\\end{{table}}
""".encode()


def _rows(contents: Contents, titled: bool) -> list[str]:
    summary, sparsity = contents.summary, contents.target
    rows = []
    if titled:
        at = f", sparsity {sparsity:g}" if sparsity is not None else ""
        rows.append(f"\\multicolumn{{5}}{{l}}{{{escaped(summary.name + at)}}} \\\\")
    rows.append(_row("", "dense", summary.dense.search, summary.dense.report, None))
    best = summary.best_trial
    if best is not None:
        pruner = escaped(str(best.params.get("pruner", "")))
        rows.append(_row(pruner, "uniform", summary.uniform.search, summary.uniform.report, None))
    return rows + [_rank(rank) for rank in summary.ranks if not is_uniform(rank.trial)]


def _rank(rank: Rank) -> str:
    beta = parameters_of(rank.trial).get("beta")
    name = escaped(allocation_of(rank.trial)) + (f" ($\\beta={beta:.4f}$)" if beta is not None else "")
    pruner = escaped(str(rank.trial.params.get("pruner", "")))
    return _row(pruner, name, rank.scores.search, rank.scores.report, rank.against)


def _row(pruner: str, name: str, search: Perplexity | None, report: Perplexity | None, against: Change | None) -> str:
    change = f"${100 * against.value:+.1f} \\pm {100 * against.stderr:.1f}\\,\\%$" if against else "--"
    return " & ".join((pruner, name, _score(search), _score(report), change)) + r" \\"


def _score(score: Perplexity | None) -> str:
    return f"${score.value:.2f} \\pm {score.stderr:.2f}$" if score else "--"


def escaped(text: str) -> str:
    """Text without what LaTeX would act on."""
    return "".join(_SPECIAL.get(char, char) for char in " ".join(text.split()))

"""A LaTeX table for a paper: dense, uniform and the best of each allocation."""

import re
from collections.abc import Sequence

from atp_tune.report.contents import Contents
from atp_tune.results.formatting import errors_of
from atp_tune.results.results import NOTHING
from atp_tune.results.tables import overview

_SPECIAL = {
    **{char: f"\\{char}" for char in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "–": "--", "’": "'", "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
    "β": r"$\beta$", "γ": r"$\gamma$", "κ": r"$\kappa$",
    "δ": r"$\delta$", "φ": r"$\varphi$", "ν": r"$\nu$", "λ": r"$\lambda$", "ε": r"$\varepsilon$",
}  # fmt: skip


def make(studies: Sequence[Contents]) -> bytes:
    r"""One table of all studies, with the columns of each; it needs \usepackage{booktabs}."""
    tables = [overview(contents.summary, "trial") for contents in studies]
    head = [*dict.fromkeys(name for table in tables for name in table.head)]
    parts = []
    for contents, table in zip(studies, tables, strict=True):
        rows = [dict(zip(table.head, cells, strict=True)) for cells in table.rows]
        lines = [" & ".join(escaped(row.get(name, NOTHING)) for name in head) + r" \\" for row in rows]
        if len(studies) > 1:
            amount = contents.summary.amount.told.lower().partition("{")[0]
            title = contents.summary.name + (f", {amount}{contents.sparsity}" if contents.sparsity else "")
            lines.insert(0, f"\\multicolumn{{{len(head)}}}{{l}}{{{escaped(title)}}} \\\\")
        parts.append("\n".join(lines))
    names = ", ".join(escaped(contents.summary.name) for contents in studies)
    units = " or ".join(dict.fromkeys(contents.summary.results.unit for contents in studies))
    errors = errors_of(studies[0].summary) if len(studies) == 1 else f"standard error over {units}"
    measures = dict.fromkeys(by.title for contents in studies for by in contents.summary.results.measures)
    what, body = ", ".join(measures), "\n\\midrule\n".join(parts)
    return f"""\
% \\usepackage{{booktabs}}
\\begin{{table}}
\\centering
\\caption{{{what[0].upper()}{what[1:]} ($\\pm$: {escaped(errors)}) of {names}.}}
\\begin{{tabular}}{{l{"r" * (len(head) - 1)}}}
\\toprule
{" & ".join(map(escaped, head))} \\\\
\\midrule
{body}
\\bottomrule
\\end{{tabular}}
\\end{{table}}
""".encode()


def escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped; the sign of a number is a minus, no hyphen."""
    signed = re.sub(r"(?<!\S)-(?=\d)", "−", " ".join(text.split()))
    return "".join(_SPECIAL.get(char, char) for char in signed)

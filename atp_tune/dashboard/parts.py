"""Notes and figures as Optuna's dashboard stores them: texts in parts, as system attributes of a study.

The dashboard itself is an extra, which only `serve` needs. `tests/test_dashboard.py` compares with its own functions.
"""

from collections.abc import Mapping
from typing import Any

PREFIX = "dashboard:"  # of the dashboard's attributes
LENGTH = 2045  # characters of a part, which fit into a column of Optuna's tables


def note_parts(text: str, version: int, trial: int | None = None) -> dict[str, Any]:
    """The attributes of a note; `trial`: the trial's id in the storage, None for the study's own note."""
    head = _head(trial)
    return {f"{head}note_ver": version, **_parts(f"{head}note_str:", text)}


def note_version(attributes: Mapping[str, Any], trial: int | None = None) -> int:
    """The version of a stored note; 0 if there is none that a dashboard wrote."""
    version = attributes.get(f"{_head(trial)}note_ver")
    return version if isinstance(version, int) else 0


def note_in(attributes: Mapping[str, Any], trial: int | None = None) -> str:
    """The text of a stored note; "" if there is none, or if a part is missing or no text."""
    if not note_version(attributes, trial):
        return ""
    prefix = f"{_head(trial)}note_str:"
    count = sum(key.startswith(prefix) for key in attributes)
    parts = [attributes.get(f"{prefix}{index}") for index in range(count)]
    return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else ""


def figure_parts(name: str, json: str) -> dict[str, Any]:
    """The attributes of a figure: its name among the study's figures, and Plotly's JSON of it."""
    return _parts(f"{PREFIX}plot_data:{name}:", json)


def _head(trial: int | None) -> str:
    return PREFIX if trial is None else f"{PREFIX}{trial}:"


def _parts(prefix: str, text: str) -> dict[str, str]:
    starts = range(0, len(text), LENGTH)
    return {f"{prefix}{index}": text[start : start + LENGTH] for index, start in enumerate(starts)}

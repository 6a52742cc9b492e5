"""Completion by the Tab key: names of studies, keys of `--set` and their values, pruners, allocations, trials.

A shell runs the command again for each Tab, so this imports no torch and no Optuna, opens no server's database, and
prints nothing that is no completion: a mistake completes nothing.
"""

import os
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import typer

KEY = "_ATP_TUNE_COMPLETED_KEY"  # the key whose value is completed in bash
SAFE = re.compile(r"\w[\w.-]*")  # zsh evaluates what is printed
# not only those that are here, since finding them takes seconds
DEVICES = ("auto", "cpu", "mps", "cuda", "cuda:0")

Complete = Callable[[typer.Context, str], list[str]]


def silent(complete: Callable[[typer.Context, str], Iterable[str]]) -> Complete:
    """The completions that begin with what is typed; none if anything goes wrong."""

    @wraps(complete)
    def tried(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [text for text in complete(ctx, incomplete) if text.startswith(incomplete)]
        except Exception:  # the user is still typing
            return []

    return tried


@silent
def study_names(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of study files; a path is left to the shell, and so is a name that a shell would expand or run."""
    from atp_tune.config.finding import known

    return [path.stem for path in known() if SAFE.fullmatch(path.stem)]


@silent
def overrides(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Keys of study files; of the only one that fits, or after its `=`, the values.

    A second completion, if only a made-up one, keeps bash from adding a space after `=`.
    """
    from atp_tune.config.writing import choices

    found, key = choices(), os.environ.get(KEY, "")
    if key:  # bash completes what comes after `=` as a word of its own
        return found[key]
    typed, equals, _ = incomplete.partition("=")
    keys = [key for key in found if (key == typed if equals else key.startswith(typed))]
    values = [f"{keys[0]}={value}" for value in found[keys[0]] or ["VALUE"]] if len(keys) == 1 else []
    return values if equals else [*(f"{key}=" for key in keys), *values]


@silent
def pruners(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of pruners; the place of a plug-in is left to the shell."""
    from atp_tune.pruners import PRUNERS

    return PRUNERS


@silent
def allocations(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Names of allocations."""
    from atp_tune.allocations import ALLOCATIONS

    return ALLOCATIONS


@silent
def trials(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Numbers of the trials that a study has finished, from its SQLite file."""
    from atp_tune.cli.options import load_study
    from atp_tune.config.finding import finished_trials

    options: dict[str, Any] = ctx.params
    file = load_study(options["study"], options.get("storage"), None, list(options.get("set_") or []))
    name = options.get("study_name") or file.name
    return [str(number) for number in finished_trials(file.database, name)] if file.database else []


COMPLETED: dict[str, Complete] = {  # what completes an option, by its name
    "study": study_names, "set_": overrides, "pruner": pruners, "allocation": allocations, "trial": trials,
    "device": silent(lambda ctx, incomplete: DEVICES),
}  # fmt: skip


def rejoin(environment: Any) -> None:
    """Joins `KEY`, `=` and `VALUE`, which bash has made three words, in the variables that a completion reads.

    A last word of this kind is cut: bash replaces only what comes after `=`.
    """
    if not any(name.endswith("_COMPLETE") and value == "complete_bash" for name, value in environment.items()):
        return
    words, place = environment.get("COMP_WORDS", "").split("\n"), environment.get("COMP_CWORD", "")
    if not place.isdecimal():
        return
    joined: list[str] = []
    for before, word in zip(["", *words], words[: int(place) + 1], strict=False):
        if joined and "=" in (word, before):
            joined[-1] += word
        else:
            joined.append(word)
    option, equals, rest = joined[-1].partition("=")
    if option.startswith("-") and "=" in rest:  # --set=KEY=VALUE
        joined[-1:] = [option, rest]
    key, equals, value = joined[-1].partition("=")
    if equals and not key.startswith("-"):
        environment[KEY], joined[-1] = key, value
    environment |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1)}

"""The page of commands: every command and option, from the command line itself."""

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from atp_tune.cli.application import MODEL, app

HEAD = """# Commands

`python tune.py COMMAND` in a checkout, `atp-tune COMMAND` once installed. `--help` after a command prints its part
of this page.

"""
RUN = "tune.py --study NAME"
TYPES = {" <int range>": " N", " <int>": " N", " <float range>": " NUMBER", " <float>": " NUMBER", " <str>": ""}


def page() -> str:
    """The page in Markdown: a section for each command, and first one for running a study."""
    group: Any = typer.main.get_command(app)
    top = group.make_context("tune.py", ["studies"], resilient_parsing=True)
    parts = [HEAD, *_section("--study NAME", f"{RUN} [OPTIONS]", group, top)]
    for name, command in group.commands.items():
        context = type(top)(command, info_name=name, parent=top)
        parts += _section(name, command.get_usage(context).removeprefix("Usage: "), command, context)
    return "".join(parts)


def anchor(name: str) -> str:
    """The anchor of a command's section."""
    return {MODEL: "model", "--study NAME": "study"}.get(name, name)


def _section(name: str, usage: str, command: Any, context: Any) -> Iterator[str]:
    yield f"## `{name}` {{ #{anchor(name)} }}\n\n```text\n{usage}\n```\n\n{(command.help or '').strip()}\n\n"
    for param in command.params:
        record = param.get_help_record(context)
        if record:
            yield _option(*record)


def _option(names: str, meaning: str) -> str:
    """One option as a term and its definition; limits and defaults in brackets."""
    for name, word in TYPES.items():
        names = names.replace(name, word)
    meaning, _, extra = re.fullmatch(r"(.*?)(  \[(.*)\])?", meaning, re.S).groups()  # type: ignore[union-attr]
    facts = f" *({extra.replace('x>=', 'at least ').replace('; ', ', ')})*" if extra else ""
    return f"`{names}`\n:   {meaning.replace('<', '&lt;')}{facts}\n\n"

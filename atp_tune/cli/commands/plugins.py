"""`tune.py plugins`: lists the pruners, allocations, scores, sources of texts and samplers that are known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli import completion
from atp_tune.cli.options import Json, Overrides, TrustPlugins, load_study, option, wrong
from atp_tune.cli.terminal import console

if TYPE_CHECKING:
    from atp_tune.catalogue import Entry


def plugins(
    file: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE.py]...", help="List the plug-ins of these files too.")
    ] = None,
    study: Annotated[
        str | None,
        option("NAME", "List the plug-ins that this study names too.", autocompletion=completion.study_names),
    ] = None,
    json: Json = False,
    trust_plugins: TrustPlugins = False,
    set_: Overrides = None,
) -> None:
    """List what a study can name: pruners, allocations, scores, sources of texts and samplers.

    They are built in, come from installed packages by entry points, or from files, whose code runs only with
    `--trust-plugins`. A pruner's settings are keys of its table in a study file, as in `--set prune.wanda.compare=row`;
    the bounds of an allocation's parameters are those at 60 % of a Llama with 32 blocks. docs/plugins.md says how to
    write one.

    Example: `python tune.py plugins`

    Example: `python tune.py plugins examples/plugins/ria.py --trust-plugins`
    """
    from atp_tune.catalogue import entries
    from atp_tune.cli.terminal import quiet
    from atp_tune.errors import UserError
    from atp_tune.plugins import ASK, registered_in
    from atp_tune.results.status import to_json
    from atp_tune.spec.plugged import named_in

    if set_ and study is None:
        raise wrong("--set", "only with --study")
    named = []
    with quiet():
        for each in file or ():
            if not trust_plugins:
                raise UserError(f"{each}: is Python code, which is not run; read it, then allow it with {ASK}")
            named += registered_in(each)
        if study is not None:
            loaded = load_study(study, None, None, set_, trust_plugins)
            named += [(one.kind, one.short) for one in named_in(loaded.study)]
        found = entries(named)
    if json:
        print(to_json(found))
        return
    for kind in dict.fromkeys(entry.kind for entry in found):
        console.print(f"{kind}s" if kind != "source of texts" else "sources of texts")
        _show([entry for entry in found if entry.kind == kind])


def _show(entries: "list[Entry]") -> None:
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        source = "" if entry.origin == "built in" else f" ({entry.origin})"
        console.print(f"  {entry.name:<{width}}  {entry.about}{source}")
        for one in entry.settings:
            about = f": {one.description}" if one.description else ""
            console.print(f"  {'':<{width}}    {one.name} = {one.default}, {one.type}{about}")
        for name, (low, high) in entry.parameters.items():
            console.print(f"  {'':<{width}}    {name} in [{low:.4g}, {high:.4g}]")

"""`tune.py prune`: prunes once, without a search."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli import completion
from atp_tune.cli.options import Device, DType, Overrides, TrustPlugins, load_study, option, wrong
from atp_tune.cli.terminal import console, working
from atp_tune.spec.finding import BARE


def prune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.", show_default=False)
    ] = None,
    pruner: Annotated[
        str | None,
        typer.Option(
            help="magnitude, wanda, sparsegpt, dsnot, alps or a plug-in; default: the study's first, or wanda.",
            autocompletion=completion.pruners,
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros, between 0 and 1; default: the study's, or 0.7.")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="uniform, atp, curve, prices, row-prices, owl, alphapruning, alphapruning-linear, er, erk, global or "
            "a plug-in; default: atp.",
            autocompletion=completion.allocations,
        ),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Common difference β per block; 0 is uniform.")] = None,
    parameter: Annotated[
        list[str] | None, option("NAME=VALUE", "Another parameter, as in γ=-0.1 or gamma=-0.1.")
    ] = None,
    out: Annotated[Path | None, option("DIR", "Folder for the sparse checkpoint; new or empty.")] = None,
    dtype: DType = None,
    study: Annotated[
        str | None,
        option(
            "NAME", "Take the model, the texts and the settings from this study.", autocompletion=completion.study_names
        ),
    ] = None,
    device: Device = None,
    trust_plugins: TrustPlugins = False,
    set_: Overrides = None,
) -> None:
    """Prune once, without a search, and print the perplexity on the test text.

    By default the calibration text is C4 and the test text is WikiText-2 test, as in the papers; `--study` and `--set`
    change them.

    Example: `python tune.py prune --study smol --beta 0.004`

    Example: `python tune.py prune --study smol --allocation owl --parameter lam=0.08`

    Example: `python tune.py prune meta-llama/Llama-2-7b-hf --sparsity 0.7 --beta 0.004 --out DIR`
    """
    if model is None and study is None:
        raise wrong("MODEL", "give a model, or --study NAME to take the model of a study")
    if dtype is not None and out is None:
        raise wrong("--dtype", "only with --out DIR")
    values = _parameters(beta, parameter)
    if allocation in ("atp", "curve") and not values:
        raise wrong("--beta", f"{allocation} without any is uniform; for example --beta 0.004")
    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().absolute())
    from atp_tune.spec.plugged import rooted

    pruners, names = (list(rooted([name], Path())) if name else None for name in (pruner, allocation))
    options = {"model.source": model, "prune.pruners": pruners, "allocation.names": names, "sparsity": sparsity}
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    if sparsity is not None:
        named.append("limit=none")  # which only a search over sparsities has
    base = Path() if study is None else None
    file = load_study(study or str(BARE), None, device, [*named, *(set_ or [])], trust_plugins, base)
    if file.study.interval is not None:
        from atp_tune.plan import percent

        searched = f"{study or 'the study'} searches from {percent(file.study.interval)}"
        raise wrong("--sparsity", f"{searched}; give one, such as --sparsity 0.6")
    if study is None:  # relative paths start at the current folder
        file = replace(file, path=Path("prune.toml"))
    from atp_tune.api.pruning import prune_study

    with working() as watch:
        plan, measured = prune_study(file, values, out, watch, dtype and dtype.value)
    amounts = (("sparsity {:g}", file.study.sparsity), ("{:g} bits", file.study.bits))
    amount = ", ".join(words.format(value) for words, value in amounts if value is not None)
    console.print(f"{plan}, {amount}: perplexity {measured} on the test text")
    if out is not None:
        console.print(f"sparse checkpoint: {out}")


def _parameters(beta: float | None, others: list[str] | None) -> dict[str, float]:
    from atp_tune.allocations.budget import SYMBOLS

    names = {symbol: name for name, symbol in SYMBOLS.items()}
    values = {} if beta is None else {"beta": beta}
    for text in others or []:
        symbol, _, value = text.partition("=")
        name = names.get(symbol, symbol)
        if name in values:
            raise wrong("--parameter", f"{symbol} is given twice")
        try:
            values[name] = float(value)
        except ValueError:
            raise wrong("--parameter", f'"{text}" is not NAME=NUMBER') from None
    return values

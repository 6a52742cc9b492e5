"""`tune.py prune`: prunes once, without a search."""

from dataclasses import replace
from pathlib import Path

from atp_tune.cli.options import DType, load_study, wrong
from atp_tune.cli.terminal import console, working
from atp_tune.spec.finding import BARE


def prune(
    model: str | None = None,
    *,
    pruner: str | None = None,
    sparsity: float | None = None,
    allocation: str | None = None,
    beta: float | None = None,
    parameter: list[str] | None = None,
    out: Path | None = None,
    dtype: DType = None,
    study: str | None = None,
    device: str | None = None,
    trust_plugins: bool = False,
    set_: list[str] | None = None,
) -> None:
    """Prune once, without a search, and print the perplexity on the test text.

    By default the calibration text is C4 and the test text is WikiText-2 test, as in the papers; `--study` and `--set`
    change them.

    Example: `python tune.py prune --study smol --beta 0.004`

    Example: `python tune.py prune --study smol --allocation owl --parameter lam=0.08`

    Example: `python tune.py prune meta-llama/Llama-2-7b-hf --sparsity 0.7 --beta 0.004 --out DIR`

    Options:
        model MODEL: Hub id, folder or .gguf file.
        pruner: magnitude, wanda, sparsegpt, dsnot, alps or a plug-in; default: the study's first, or wanda.
        sparsity: Share of zeros, between 0 and 1; default: the study's, or 0.7.
        allocation: uniform, atp, curve, prices, row-prices, owl, alphapruning, alphapruning-linear, er, erk, global or
            a plug-in; default: atp.
        beta: Common difference β per block; 0 is uniform.
        parameter NAME=VALUE: Another parameter, as in γ=-0.1 or gamma=-0.1.
        study NAME: Take the model, the texts and the settings from this study.
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
        plan, measured = prune_study(file, values, out, watch, dtype)
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

"""Measures size and speed of a sparse model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import AllowPickle, Device, Storage, TrustRemoteCode


class Engine(StrEnum):
    """What computes the models."""

    torch = "torch"
    deepsparse = "deepsparse"
    semi_structured = "semi-structured"


def speedup(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A configuration; the sparse model is pruned into the cache.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Or a folder that `apply` wrote; it says what it was made of.")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            metavar="ENGINE",
            help="torch; deepsparse: a CPU; semi-structured: 2:4 on an NVIDIA GPU. torch is measured too.",
        ),
    ] = Engine.torch,
    setup: Annotated[
        bool, typer.Option("--setup", metavar="", help="Install DeepSparse first, apart from everything else.")
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="Times that dense and sparse take turns.")] = 5,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of the prompt.")] = 128,
    device: Device = None,
    storage: Storage = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what the zeros of a sparse model are worth here: bytes of its files, tokens per second.

    Zeros in a dense file make nothing smaller or faster by themselves: files need compression, and speed needs an
    engine that leaves zeros out. The numbers are kept in the configuration and with its study. docs/speedup.md says
    what to expect.

    Example: `python tune.py speedup --config studies/smol.best.json`

    Example: `python tune.py speedup --config studies/smol.best.json --engine deepsparse --setup`
    """
    from atp_tune.cli.speeding import run_setup, run_speedup

    if setup:
        if engine != Engine.deepsparse:
            raise typer.BadParameter("only with --engine deepsparse", param_hint="--setup")
        run_setup()
        if config is None and model is None:
            return
    if (config is None) == (model is None):
        raise typer.BadParameter("give it or --model DIR, one of them", param_hint="--config")
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    run_speedup(config, model, engine.value, (tokens, runs), device or "auto", storage, allowed)

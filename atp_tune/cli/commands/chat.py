"""`tune.py chat`: talks with a sparse model, and with its dense model."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.best import BestOptions
from atp_tune.cli.options import option
from atp_tune.cli.terminal import console
from atp_tune.events import ignore_events


def chat(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="DIR|FILE", help="Sparse folder, or a configuration, to which is pruned in memory."),
    ] = None,
    max_new_tokens: Annotated[int, option("N", "Tokens of an answer, at most.", "--max-new-tokens", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0 takes the likeliest token; more draws at random.")
    ] = 0.0,
    system: Annotated[str | None, option("TEXT", "System message, for a chat template.")] = None,
    *,
    options: BestOptions,
) -> None:
    """Talk with a sparse model in the terminal: `/dense` and `/uniform` show what the dense and the uniform answer.

    With `--study` the best of a study is pruned and packed in memory; a trained one is written as a folder into the
    cache, which is removed at the end.

    The tokenizer's chat template is used; without one, each line is continued as text. `/help` lists the commands.
    Through a pipe, the whole input is one message, and only its answer is printed.

    Example: `python tune.py chat --study smol`

    Example: `python tune.py chat smol-sparse`

    Example: `echo "Why is the sky blue?" | python tune.py chat studies/smol.best.json`
    """
    options.check("DIR|FILE", model, storage=options.storage)
    from atp_tune.cli.terminal import quiet

    try:
        with quiet(), _place(model, options) as (place, where, allowed):
            _chat(place, (max_new_tokens, temperature), system, where, allowed)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _place(model: Path | None, options: BestOptions) -> Iterator[tuple[Path, str, dict[str, bool]]]:
    """The folder or the configuration to talk with, the device, and what may run; of a study it is removed again."""
    if model is not None:
        yield model, options.device or "auto", options.allowed
        return
    from atp_tune.cache import cache_dir, temporary_folder
    from atp_tune.cli.display import Display

    best = options.best()
    with temporary_folder(cache_dir("recovered") / "model") as place:
        if best.config.is_trained:  # which are weights of a folder
            with Display() as display:
                best.made(display if at_terminal() else ignore_events).save(place / "trained")
            yield place / "trained", best.device, best.allowed
            return
        best.made(ignore_events).write(place / "best.json")
        yield place / "best.json", best.device, best.allowed


def at_terminal() -> bool:
    """Whether a person types and reads; else the input is one message, and only its answer is printed."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _chat(place: Path, options: tuple[int, float], system: str | None, device: str, allowed: dict[str, bool]) -> None:
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.cli.chat_session import ChatSession, as_message
    from atp_tune.events import Event, Message, Place, TrialStarted
    from atp_tune.generation import ChatOptions
    from atp_tune.sparse.comparing import CHAT, BothModels

    def show(event: Event) -> None:
        if isinstance(event, Message):
            console.print(event.text, style="dim")
        elif isinstance(event, TrialStarted):
            console.print(f"{event.title} {event.plan or ''}".rstrip(), style="dim")

    is_terminal = at_terminal()
    models = BothModels(place, CHAT, Place(place, device, allowed, show if is_terminal else ignore_events))
    message = "" if is_terminal else as_message(sys.stdin.buffer.read())
    with models, oom_as_user_error("chat"):
        session = ChatSession(models.speaker, ChatOptions(*options), system)
        if is_terminal:
            session.talk()
        else:
            session.answer_once(message)

"""`tune.py chat`: talks with a sparse model, and with its dense model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import AllowPickle, Device, TrustPlugins, TrustRemoteCode, permissions
from atp_tune.cli.terminal import console


def chat(
    model: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", help="Sparse folder, or a configuration, to which is pruned in memory."),
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens of an answer, at most.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0 takes the likeliest token; more draws at random.")
    ] = 0.0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message, for a chat template.")] = None,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_plugins: TrustPlugins = False,
) -> None:
    """Talk with a sparse model in the terminal: `/dense` and `/both` show what the dense model answers.

    The tokenizer's chat template is used; without one, each line is continued as text. `/help` lists the commands.
    Through a pipe, the whole input is one message, and only its answer is printed.

    Example: `python tune.py chat smol-sparse`

    Example: `echo "Why is the sky blue?" | python tune.py chat studies/smol.best.json`
    """
    from atp_tune.cli.runtime import quiet

    allowed = permissions(allow_pickle, trust_remote_code, trust_plugins)
    try:
        with quiet():
            _chat(model, (max_new_tokens, temperature), system, device or "auto", allowed)
    except KeyboardInterrupt:
        sys.exit(130)


def _chat(place: Path, options: tuple[int, float], system: str | None, device: str, allowed: dict[str, bool]) -> None:
    from atp_tune.chatting import ChatModels
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.cli.chat_session import ChatSession, as_message
    from atp_tune.events import Event, Message, TrialStarted, ignore_events
    from atp_tune.generation.conversation import ChatOptions

    def show(event: Event) -> None:
        if isinstance(event, Message):
            console.print(event.text, style="dim")
        elif isinstance(event, TrialStarted):
            console.print(f"{event.title} {event.plan or ''}".rstrip(), style="dim")

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    models = ChatModels(place, device, show if is_terminal else ignore_events, allowed)
    message = "" if is_terminal else as_message(sys.stdin.buffer.read())
    with models, oom_as_user_error("chat"):
        session = ChatSession(models.speaker, ChatOptions(*options), system)
        if is_terminal:
            session.talk()
        else:
            session.answer_once(message)

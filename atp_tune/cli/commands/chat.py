"""`tune.py chat`: talks with a sparse model, and with its dense model."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from atp_tune.cli.options import BestOptions
from atp_tune.cli.terminal import echo
from atp_tune.errors import UserError, is_text
from atp_tune.events import ignore_events

if TYPE_CHECKING:
    from atp_tune.folders.comparing import Which
    from atp_tune.run.generation import Answer, ChatMessage, ChatOptions, Speaker

# --- A chat in a terminal: lines that a person types, commands among them, and answers as they come.

Shown = Literal["sparse", "dense", "uniform", "both"]
SIDES: "dict[Shown, tuple[Which, ...]]" = {
    "sparse": ("sparse",), "dense": ("dense",), "uniform": ("uniform",), "both": ("dense", "sparse"),
}  # fmt: skip
PLAIN = "the tokenizer has no chat template: each line is continued as text, on its own"
HELP = """\
/dense    the dense model answers
/uniform  the model with as many zeros, the same share in each block, answers
/sparse   the sparse model answers
/both     both answer the same conversation, which goes on with the sparse model's answer
/reset    forget the conversation
/quit     end, as Ctrl-D; Ctrl-C stops an answer"""


class ChatSession:
    """A conversation with one model, or with both; they see the same messages."""

    def __init__(self, speaker: "Callable[[Which], Speaker]", options: "ChatOptions", system: str | None) -> None:
        """`speaker` loads a model; UserError if `system` is given and the sparse model has no chat template."""
        self._speaker = speaker
        self._options = options
        self._system: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)
        self._shown: Shown = "sparse"
        self.has_template = speaker("sparse").has_template
        if system and not self.has_template:
            raise UserError("--system: the tokenizer has no chat template, so there is no place for it; leave it out")

    def talk(self) -> None:
        """Answers lines from the terminal until its end."""
        with suppress(ImportError):
            import readline  # noqa: F401  (edits lines and recalls earlier ones)

        echo("/dense, /uniform, /sparse or /both choose who answers; /help has more; Ctrl-D ends", style="dim")
        if not self.has_template:
            echo(PLAIN, style="dim")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                echo()
                return
            except KeyboardInterrupt:
                echo("\n/quit or Ctrl-D ends", style="dim")
                continue
            if line == "/quit":
                return
            try:
                self._reply(line) if line and not line.startswith("/") else self._obey(line)
            except UserError as error:
                echo(f"error: {error}")

    def answer(self, side: "Which", text: str, is_stopped: Callable[[], bool]) -> "Answer":
        """Prints the answer to a message as it comes, and nothing else."""
        messages: list[ChatMessage] = [*self._messages, {"role": "user", "content": text}]
        answer = self._speaker(side).answer(messages, self._options, _say, is_stopped)
        echo()
        return answer

    def _obey(self, line: str) -> None:
        """Obeys a command; does nothing for an empty line."""
        if line == "/reset":
            self._messages = list(self._system)
            echo("a new conversation", style="dim")
        elif line == "/help":
            echo(HELP)
        elif (shown := line.removeprefix("/")) in SIDES:
            for side in SIDES[shown]:
                self._speaker(side)  # loaded now, not while a person waits for an answer
            self._shown = shown
            echo("both models answer" if shown == "both" else f"the {shown} model answers", style="dim")
        elif line:
            echo(f"{line}: is no command; /help lists them")

    def _reply(self, text: str) -> None:
        """Answers a message by each model that is shown; the last answer stays in the conversation."""
        if not is_text(text):
            raise UserError("the message is not UTF-8 text; write it again")
        answer: Answer | None = None
        with stoppable() as is_stopped:
            for side in SIDES[self._shown]:
                if is_stopped():
                    break
                if self._shown == "both":
                    echo(f"{side}:", style="bold")
                answer = self.answer(side, text, is_stopped)
                if answer.ended_by == "length":
                    echo("(cut off: no token is left; see --max-new-tokens and /reset)", style="dim")
                if answer.ended_by == "person":
                    echo("(stopped)", style="dim")
        said = answer.text if answer else ""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]


def _say(text: str) -> None:
    echo(text, end="")


def as_message(given: bytes) -> str:
    """The message in a program's input; UserError if it is not UTF-8 text, or empty."""
    try:
        text = given.decode()
    except UnicodeDecodeError:
        raise UserError("the message is not UTF-8 text; write it in UTF-8") from None
    if not text.strip():
        raise UserError('the message is empty; for example: echo "Hello" | python tune.py chat DIR')
    return text.strip()


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt.

    A model thus ends its answer between two tokens, and is ready for the next.
    """
    presses = 0

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def chat(
    model: Path | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    system: str | None = None,
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

    Options:
        model DIR|FILE: Sparse folder, or a configuration, to which is pruned in memory.
        max_new_tokens N 1..: Tokens of an answer, at most.
        temperature 0..100: 0 takes the likeliest token; more draws at random.
        system TEXT: System message, for a chat template.
    """
    options.check("DIR|FILE", model, storage=options.storage)
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.cli.display import Display
    from atp_tune.cli.terminal import quiet
    from atp_tune.events import Event, Message, Place, TrialStarted
    from atp_tune.folders.comparing import CHAT, BothModels
    from atp_tune.run.generation import ChatOptions
    from atp_tune.utils.cache import cache_dir, temporary_folder

    def show(event: Event) -> None:
        if isinstance(event, Message):
            echo(event.text, style="dim")
        elif isinstance(event, TrialStarted):
            echo(f"{event.title} {event.plan or ''}".rstrip(), style="dim")

    # Whether a person types and reads; else the input is one message, and only its answer is printed.
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    place, where, allowed = model, options.device or "auto", options.allowed
    try:
        with quiet(), ExitStack() as stack:
            if place is None:
                best = options.best()
                folder = stack.enter_context(temporary_folder(cache_dir("recovered") / "model"))
                where, allowed = best.device, best.allowed
                if best.config.is_trained:  # which are weights of a folder
                    place = folder / "trained"
                    with Display() as display:
                        best.made(display if is_terminal else ignore_events).save(place)
                else:
                    place = folder / "best.json"
                    best.made(ignore_events).write(place)
            models = BothModels(place, CHAT, Place(place, where, allowed, show if is_terminal else ignore_events))
            message = "" if is_terminal else as_message(sys.stdin.buffer.read())
            with models, oom_as_user_error("chat"):
                session = ChatSession(models.speaker, ChatOptions(max_new_tokens, temperature), system)
                session.talk() if is_terminal else session.answer("sparse", message, lambda: False)
    except KeyboardInterrupt:
        sys.exit(130)

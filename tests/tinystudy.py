"""A study that runs in seconds: a tiny Llama that was trained for a moment, three local texts, and ways to run it."""

import os
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import alembic.script
import optuna
import pytest
import torch
import typer.main
from alembic.config import Config
from alembic.script import ScriptDirectory
from forking import Forked
from processes import popen
from prose import prose
from sqlalchemy import event
from sqlalchemy.engine import Engine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp_tune.allocations import gradient
from atp_tune.blocks import replay
from atp_tune.cli import main
from atp_tune.cli.terminal import quiet
from atp_tune.config.studyfile import StudyFile, load
from atp_tune.events import EventHandler, ignore_events
from atp_tune.report.publishing import publish
from atp_tune.search.runner import StudyRun, tune
from atp_tune.storage import opening
from atp_tune.storage.attributes import PREFIX

Process = subprocess.Popen[str] | Forked
TUNE = Path(__file__).parents[1] / "tune.py"
BLOCKS, WIDTH, TOKENS = 4, 32, 32
TOPICS = prose(460_000)
HANGS = 600  # seconds after which what is waited for will not come, on a machine however slow: the test fails
# A trial of a few tenths of a second, long enough to be killed in.
LONG = ("texts.calibration.nsamples=250", "texts.validation.nsamples=250")
STUDY = f"""\
description = "a tiny Llama"
sparsity = 0.6
device = "cpu"

[model]
source = "model"
dtype = "float32"

[texts.calibration]
source = "file:calibration.txt"
nsamples = 8
seqlen = {TOKENS}

[texts.validation]
source = "file:validation.txt"
nsamples = 16
seqlen = {TOKENS}

[texts.test]
source = "file:test.txt"
nsamples = 16
seqlen = {TOKENS}

[search]
trials = 3
sampler = "random"

[continuations]
tokens = 0
"""


class Migrations(ScriptDirectory):
    """Optuna reads its fifteen migrations each time that it opens a database; in the tests it does so once."""

    known: dict[str, ScriptDirectory] = {}  # noqa: RUF012

    @classmethod
    def from_config(cls, config: Config) -> ScriptDirectory:
        place = config.get_main_option("script_location") or ""
        if place not in cls.known:
            cls.known[place] = ScriptDirectory.from_config(config)
        return cls.known[place]


alembic.script.ScriptDirectory = Migrations  # type: ignore[misc]
typer.main.get_command = cache(typer.main.get_command)  # else each command in this process has all options read again


@event.listens_for(Engine, "connect")
def hurry(connection: object, _: object) -> None:
    """SQLite need not wait for the disk in the process of the tests; processes that they start do."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


def make_place(place: Path) -> Path:
    """Fills a folder with the model, its texts and the study file."""
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for index, role in enumerate(("calibration", "validation", "test")):
        start = 100_000 + 20_000 * index
        (place / f"{role}.txt").write_text(TOPICS[start : start + 20_000])
    (place / "long.txt").write_text(TOPICS[160_000:])
    (place / "tiny.toml").write_text(STUDY)
    return place


@cache
def make_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Trained once, with special tokens, if any; to be read only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=[*special], show_progress=False
    )
    tokenizer.train_from_iterator([TOPICS[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 300,
    labels_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    intermediate: int = 48,
) -> LlamaForCausalLM:
    """Trained until its blocks matter: on any CPU, pruning makes it worse, and a β above 0 is clearly better.

    `labels_of` gives what is to be predicted of a batch, and may change it.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=intermediate, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(TOPICS[:50_000], add_special_tokens=False).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = torch.stack([ids[start : start + TOKENS] for start in torch.randint(len(ids) - TOKENS, (16,))])
        labels = labels_of(batch) if labels_of else batch
        optimizer.zero_grad()
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@contextmanager
def copied(source: Path, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of a study's folder, to be made ready for all tests of a file; the cache lies beside it."""
    place = Path(shutil.copytree(source, factory.mktemp("copy") / "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(place.parent / "cache"))
        yield place


def copy_of(fixture: str) -> Any:
    """A fixture: a copy of another one's folder, for one test, which knows the token windows of the tiny study."""

    @pytest.fixture
    def copy(request: pytest.FixtureRequest, tmp_path: Path, windows: None) -> Path:
        return Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / str(request.fixturename)))

    return copy


def study_file(place: Path, *overrides: str) -> StudyFile:
    return load(str(place / "tiny.toml"), overrides)


def stored(place: Path, name: str = "tiny", database: Path | None = None) -> optuna.Study:
    """The study as its storage has it, or another file."""
    db = opening.open_storage(f"sqlite:///{database}" if database else study_file(place).storage_url, create=False)
    assert db is not None
    study = opening.find_study(db, name)
    assert study is not None
    return study


def run(
    place: Path,
    *overrides: str,
    name: str = "tiny",
    timeout: float | None = None,
    watch: EventHandler = ignore_events,
    mix: bool = False,
) -> optuna.Study:
    """The study, driven to its total in this process."""
    with quiet():
        return tune(StudyRun(study_file(place, *overrides), name, timeout, watch, mix=mix, publisher=publish))


def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descents by prices of a few steps, where only their end is of interest; test_pricing.py has whole ones."""
    for name, steps in (("STEPS", 4), ("FURTHER", 2), ("AT_LOWEST", 1)):
        monkeypatch.setattr(gradient, name, steps)


def settings(*overrides: str) -> list[str]:
    """Overrides as options of the command line."""
    return [word for override in overrides for word in ("--set", override)]


def start(
    *arguments: str | Path,
    cwd: Path | None = None,
    before: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    inject: Callable[[], None] | None = None,
    alone: bool = False,
) -> Process:
    """`python tune.py …` in a process of its own, forked from one that has imported everything.

    One that is `alone`, comes after the words of another program, or has an `environment` that counts from the imports
    on, is started as a user does. `inject` is called in a forked process before the command begins.
    """
    words = [str(argument) for argument in arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(environment or {})}
    if not (alone or before or environment):
        return Forked(words, variables, cwd, inject)
    command, pipe = [*before, sys.executable, str(TUNE), *words], subprocess.PIPE
    return popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=variables)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def is_clean(self) -> bool:
        """Whether it succeeded with nothing to say."""
        return (self.code, self.err) == (0, "")

    @property
    def error(self) -> str:
        """The one line of an error, without its first word."""
        assert self.code == 2
        line = self.err.removesuffix("\n")
        assert "\n" not in line
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


def hear(process: Process, words: str, seconds: float = HANGS, err: bool = False) -> str:
    """What a process prints until these words come, to stderr if `err`; `finish` gives the rest."""
    stream = process.stderr if err else process.stdout
    assert stream is not None
    heard, over = "", monotonic() + seconds
    while words not in heard:
        assert monotonic() < over, heard
        if select.select([stream], [], [], 1)[0]:
            said = os.read(stream.fileno(), 1 << 16).decode()
            assert said, f"ended: {heard}"
            heard += said
    return heard


def finish(process: Process, seconds: float = HANGS) -> Answer:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Answer(process.returncode, out, err)


def script(*arguments: str | Path, cwd: Path | None = None) -> Answer:
    return finish(start(*arguments, cwd=cwd))


class CommandLine:
    """The command line in this process: what the script does, without the seconds of its imports."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str | Path) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["tune.py", *map(str, arguments)])
        self._monkeypatch.setenv("COLUMNS", "200")
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self._capsys.readouterr()
        return Answer(int(ended.value.code or 0), captured.out, captured.err)

    def ok(self, *arguments: str | Path) -> Answer:
        """Of a command that must succeed."""
        answer = self(*arguments)
        assert answer.code == 0
        return answer


def wait_until(condition: Callable[[], object], seconds: float = HANGS) -> None:
    """Returns when the condition holds; asked for at once, then ever more seldom, to 20 times a second."""
    end, pause = monotonic() + seconds, 0.0005
    while not condition():
        assert monotonic() < end
        sleep(pause)
        pause = min(2 * pause, 0.05)


def free_port() -> int:
    """A port that nobody listens on, for now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(database: Path, number: int, process: Process, seconds: float = HANGS) -> None:
    """Returns when trial `number`, or a later one, has its plan and is being measured.

    A machine that does other things may miss it, in a study of few trials: there the trial is `preloaded.held`.
    """
    end = monotonic() + seconds
    while monotonic() < end:
        assert process.poll() is None, process.communicate()
        if _measures(database, number):
            return
        sleep(0.005)
    raise AssertionError(f"trial {number} did not start in {seconds} s")


def _measures(database: Path, number: int) -> bool:
    query = (
        "SELECT 1 FROM trials JOIN trial_system_attributes USING (trial_id) "
        f"WHERE number >= ? AND state = 'RUNNING' AND key = '{PREFIX}plan'"
    )
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return connection.execute(query, (number,)).fetchone() is not None
    except sqlite3.OperationalError:  # the file or its tables are being made
        return False


def go_silent(database: Path) -> None:
    """As if what runs on a study had sent its last heartbeat, or begun its trials, an hour ago."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
        connection.execute(
            "UPDATE trials SET datetime_start = datetime('now', 'localtime', '-1 hour') WHERE state = 'RUNNING'"
        )


def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a tiny study's 16 windows: a stopper comes to word after each batch."""
    monkeypatch.setitem(replay.TOKENS, "cpu", 2 * TOKENS)

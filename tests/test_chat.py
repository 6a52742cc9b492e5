"""`chat`: in a pseudo-terminal as a person sees it, and through a pipe."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from forking import Forked
from preloaded import at_terminal
from processes import popen
from test_models import write_gguf
from tinystudy import HANGS, TUNE, Answer, CommandLine, Process, make_tokenizer
from transformers import AutoModelForCausalLM

from atp_tune.checkpoints.convert import gguf_folder
from atp_tune.events import silent
from atp_tune.packed.kernel import PackedMatrix

# Makes the terminal that is its input the one whose Ctrl-C it hears, then becomes the command.
AT_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
LINE = "The import statement"
PLAIN = "the tokenizer has no chat template: each line is continued as text, on its own"


@pytest.fixture
def endless(tiny_place: Path, tmp_path: Path) -> Path:
    """A folder whose answers end when they are stopped, and not before."""
    folder = Path(shutil.copytree(tiny_place / "model", tmp_path / "endless"))
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, "eos_token_id": None, "max_position_embeddings": 10**6}))
    return folder


def greedy(folder: Path, text: str, count: int) -> str:
    """The continuation of a text by a folder, without atp_tune."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), make_tokenizer()
    ids = tokenizer(text).input_ids
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < count and 0 not in tokens:
            tokens.append(int(model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture
def piped(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The answer to a message through a pipe."""

    def send(message: str | bytes, *arguments: str | Path) -> Answer:
        given = message.encode() if isinstance(message, str) else message
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return command("chat", *arguments)

    return send


def test_a_gguf_file_answers_as_its_folder(piped: Callable[..., Answer], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    answer, other = (piped("the", each, "--max-new-tokens", "6") for each in (file, gguf_folder(file, silent)))
    assert answer == other
    assert (answer.code, answer.err) == (0, "")


def environment() -> dict[str, str]:
    return {**os.environ, "TERM": "dumb", "COLUMNS": "200"}


class Person:
    """Someone at a terminal of this command."""

    def __init__(self, *arguments: str | Path, alone: bool = False) -> None:
        self._terminal, self._other = pty.openpty()
        words = ["chat", *map(str, arguments)]
        self.process: Process
        if alone:  # started as a user does
            command, other = [sys.executable, "-c", AT_TERMINAL, str(TUNE), *words], self._other
            self.process = popen(command, stdin=other, stdout=other, stderr=other, env=environment())
        else:
            self.process = Forked(words, environment(), inject=partial(at_terminal, os.ttyname(self._other)))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)
        os.close(self._other)

    def types(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def sees(self, words: str, again: str = "") -> str:
        """What the terminal shows until these words come; the keys `again` are typed again each second without any."""
        seen, over = "", monotonic() + HANGS
        while words not in seen:
            assert monotonic() < over, seen
            if select.select([self._terminal], [], [], 1)[0]:
                seen += os.read(self._terminal, 1 << 12).decode(errors="replace").replace("\r\n", "\n")
            elif again:
                self.types(again)
        return seen

    def begins(self, line: str) -> None:
        """Types a line, and waits until 30 characters of the answer are there."""
        self.types(line + "\n")
        seen, over = "", monotonic() + HANGS
        while len(seen.partition("\n")[2]) < 30:
            assert monotonic() < over, seen
            if select.select([self._terminal], [], [], 1)[0]:
                seen += os.read(self._terminal, 1 << 12).decode(errors="replace")

    def asks(self, line: str) -> str:
        """What is shown after a line, until the next prompt; without the line itself."""
        self.types(line + "\n")
        seen = self.sees("\n> ")
        assert seen.startswith(line + "\n")
        return seen.removeprefix(line + "\n").removesuffix("\n> ")

    def ends(self) -> int:
        return int(self.process.wait(HANGS))


@pytest.fixture
def person(request: pytest.FixtureRequest) -> Iterator[Any]:
    opened: list[Person] = []

    def sit_down(*arguments: str | Path, alone: bool = False) -> Person:
        opened.append(Person(*arguments, alone=alone))
        return opened[-1]

    yield sit_down
    for one in opened:
        one.close()


# --- through a pipe


@slow
def test_only_the_answer_is_printed(sparse: Path, piped: Callable[..., Answer]) -> None:
    """By a process of its own, and by this one, as the other tests."""
    command = [sys.executable, str(TUNE), "chat", str(sparse), "--max-new-tokens", "9"]
    done = subprocess.run(
        command, input=f"{LINE}\n", capture_output=True, text=True, timeout=HANGS, check=True, env=environment()
    )
    assert (done.stdout, done.stderr) == (greedy(sparse, LINE, 9) + "\n", "")
    assert piped(LINE, sparse, "--max-new-tokens", "9") == Answer(0, done.stdout, "")


@slow
@parametrize("isa", ["", "torch"])
def test_sparse_weights_are_packed_in_memory_where_the_kernel_runs(
    isa: str, sparse: Path, tmp_path: Path, command: CommandLine, piped: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a folder that `apply` wrote, and of a packed one."""
    packed, used = tmp_path / "packed", list[int]()
    command.ok("pack", sparse, "--out", packed)
    product = PackedMatrix.product
    monkeypatch.setattr(PackedMatrix, "product", lambda self, x: used.append(len(x)) or product(self, x))
    monkeypatch.setenv("ATP_TUNE_ISA", isa)
    for folder in (sparse, packed):
        used.clear()
        answer = piped(LINE, folder, "--max-new-tokens", "8", "--device", "cpu")
        assert answer.code == 0
        assert answer.out.strip() == greedy(sparse, LINE, 8).strip()
        assert bool(used) == (not isa)


@parametrize(
    ("text", "expected"),
    [
        (b" \n", 'the message is empty; for example: echo "Hello" | python tune.py chat DIR'),
        (b"\xff", "the message is not UTF-8 text; write it in UTF-8"),
    ],
)
def test_a_message_that_is_none(text: bytes, expected: str, tiny_place: Path, piped: Callable[..., Answer]) -> None:
    assert piped(text, tiny_place / "model").error == expected


# --- bad input


@slow
def test_code_and_pickles_need_their_flags(tiny_place: Path, tmp_path: Path, piped: Callable[..., Answer]) -> None:
    folder = Path(shutil.copytree(tiny_place / "model", tmp_path / "pickled"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "has its weights in pickles only" in piped(LINE, folder).error
    allowed = piped(LINE, folder, "--allow-pickle", "--max-new-tokens", "5")
    assert allowed == Answer(0, greedy(tiny_place / "model", LINE, 5) + "\n", "")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.C"}})
    )
    assert "needs code of its own, which is not run" in piped(LINE, folder, "--allow-pickle").error


# --- in a terminal


@slow
@parametrize("what", ["folder", "study"])
def test_a_conversation_with_all_models(what: str, sparse: Path, done: Path, person: Any, command: CommandLine) -> None:
    """Of a folder, and of a study whose best plan is pruned and packed in memory."""
    other = done / "uniform"
    command.ok("prune", "--study", done / "tiny.toml", "--beta", "0", "--out", other)
    given = (sparse,) if what == "folder" else ("--study", done / "tiny.toml")
    one = person(*given, "--max-new-tokens", "9")
    first = one.sees("\n> ")
    assert f"{PLAIN}\n" in first
    folders = {"sparse": sparse, "dense": done / "model", "uniform": other}
    said = {name: greedy(folder, LINE, 9) for name, folder in folders.items()}
    assert said["sparse"] != said["dense"]
    cut = "\n(cut off: no token is left; see --max-new-tokens and /reset)"
    assert one.asks(LINE) == said["sparse"] + cut
    assert one.asks("/dense").endswith("the dense model answers")
    assert one.asks(LINE) == said["dense"] + cut
    assert one.asks("/uniform").endswith("the uniform model answers")
    assert one.asks(LINE) == said["uniform"] + cut
    assert one.asks("/both") == "both models answer"
    assert one.asks(LINE) == f"dense:\n{said['dense']}{cut}\nsparse:\n{said['sparse']}{cut}"
    assert one.asks("/sparse") == "the sparse model answers"
    assert one.asks(LINE) == said["sparse"] + cut
    assert "/reset    forget the conversation" in one.asks("/help")
    assert one.asks("/nosuch") == "/nosuch: is no command; /help lists them"
    one.types("/quit\n")
    assert one.ends() == 0


@slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(endless: Path, person: Any) -> None:
    one = person(endless, "--max-new-tokens", "1000000", alone=True)
    one.sees("\n> ")
    one.begins(LINE)  # it streams: this answer has no end
    one.types("\x03")
    one.sees("(stopped)\n> ")
    one.types("half a line")
    one.sees("half a line")
    one.types("\x03")
    # Python's readline misses a signal that comes just before it waits for a key, until the next key.
    one.sees("/quit or Ctrl-D ends\n> ", again="\x03")
    assert one.asks("/dense") == f"error: {endless}: has no atp_tune.json, so its dense model is not known"
    one.begins(LINE)
    one.types("\x03")
    one.sees("(stopped)\n> ")
    one.types("\x04")
    assert one.ends() == 0


@slow
def test_control_characters_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from atp_tune.cli.terminal import echo

    echo("a\x1b[2Jb\n:smile:", end="")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n:smile:"

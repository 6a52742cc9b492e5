"""Tab in a real bash, with the script that the command itself prints."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from expect import parametrize, slow
from tinystudy import HANGS, TUNE, stored

from atp_tune.allocations import ALLOCATIONS
from atp_tune.cli import options
from atp_tune.config.finding import known
from atp_tune.pruners import PRUNERS

BASH = shutil.which("bash")
# The function that bash calls for a Tab, on words that bash has split.
TAB = """
tab() {
  COMP_WORDS=("$@") COMP_CWORD=$(( $# - 1 )) COMPREPLY=()
  spec=$(complete -p "$(basename "$1")") || exit 3
  function=${spec#*-F }
  ${function%% *} "$1"
  printf '%s\\n' "${COMPREPLY[@]}"
}
"""
BREAKS = "=:"  # of COMP_WORDBREAKS: characters that are words of their own


def split(line: str) -> list[str]:
    """The words of a line as bash gives them to a completion; the last one is being typed."""
    words: list[str] = []
    for word in line.split(" "):
        part = word
        for mark in BREAKS:
            part = part.replace(mark, f"\n{mark}\n")
        words += [piece for piece in part.split("\n") if piece] or [""]
    return words


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the installed command, as pip writes it, first on PATH beside the interpreter; a home folder."""
    folder, home = tmp_path / "bin", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    command = folder / "atp-tune"
    command.write_text(f"#!{sys.executable}\nfrom atp_tune.cli import main\nmain()\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(TUNE.parent))
    monkeypatch.setenv("HOME", str(home))
    return folder


def bash(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    assert BASH
    return subprocess.run(
        [BASH, "--norc", "-c", script, "bash", *arguments],
        capture_output=True, text=True, timeout=HANGS, check=False, cwd=cwd,
    )  # fmt: skip


def tabs(program: str, lines: list[str], cwd: Path) -> list[list[str]]:
    """What Tab offers at the end of each line, in one shell, which has read the command's script."""
    calls = [f"tab {shlex.join([program, *split(line)])}; echo --" for line in lines]
    source = f"source <({shlex.quote(program)} --show-completion)"
    done = bash("\n".join([source, TAB, *calls]), cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    *found, rest = done.stdout.split("--\n")
    assert (len(found), rest) == (len(lines), "")
    return [[line for line in offered.split("\n") if line] for offered in found]


def tab(program: str, line: str, cwd: Path) -> list[str]:
    """The same of one line."""
    return tabs(program, [line], cwd)[0]


@slow
def test_the_installed_command(programs: Path, done: Path) -> None:
    names = [*known()]
    trials = [str(trial.number) for trial in stored(done).trials if trial.state.name == "COMPLETE"]
    assert trials
    cases = (
        ("--study smol", [name for name in names if name.startswith("smol")]),
        ("--study=smol-fa", ["smol-fast"]),
        ("status --study paper-s", ["paper-smol-60"]),
        ("sta", ["status"]),
        (
            "--study smol --set search.sa",
            ["search.sampler=", *(f"search.sampler={n}" for n in ("gp", "tpe", "grid", "random"))],
        ),
        ("--study smol --set search.sampler=", ["gp", "tpe", "grid", "random"]),
        ("--study smol --set search.sampler=g", ["gp", "grid"]),
        ("--study smol --set=search.sampler=t", ["tpe"]),
        ("--study smol --set search.seed=3 --set sparsi", ["sparsity=", "sparsity=VALUE"]),
        ("--study smol --set search.seed=3 --timeo", ["--timeout"]),
        ("--study smol --set prune.alps.", [f"prune.alps.{key}=" for key in ("damping", "rho", "iterations", "steps")]),
        ("prune --pruner ", list(PRUNERS)),
        ("prune --allocation er", ["er", "erk"]),
        ("prune --device c", ["cpu", "cuda", "cuda:0"]),
        (f"export --study {done / 'tiny.toml'} --trial ", trials),
        (f"export --study {done / 'tiny.toml'} --study-name other --trial ", []),
    )
    *offered, allocations = tabs("atp-tune", [*(line for line, _ in cases), "prune --allocation "], done)
    for (line, expected), found in zip(cases, offered, strict=True):
        assert found == expected, line
    assert set(ALLOCATIONS) == set(allocations)


@parametrize(
    ("words", "joined", "key"),
    [
        (["x", "--set", "a", "=", "b"], ["x", "--set", "b"], "a"),
        (["x", "--set", "a", "="], ["x", "--set", ""], "a"),
        (["x", "--set", "a", "=", "b", "--study", ""], ["x", "--set", "a=b", "--study", ""], None),
        (["x", "--set", "=", "a", "=", "b"], ["x", "--set", "b"], "a"),
        (["x", "--study", "=", "s"], ["x", "--study=s"], None),
        (["x", ""], ["x", ""], None),
    ],
)
def test_words_are_joined(words: list[str], joined: list[str], key: str | None) -> None:
    environment = {"_X_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    options.rejoin(environment)
    assert environment["COMP_WORDS"].split("\n") == joined
    assert environment["COMP_CWORD"] == str(len(joined) - 1)
    assert environment.get(options.KEY) == key


@slow
def test_names_that_a_shell_would_run_are_left_out(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    for name in ("mine", "my*", "my$(touch made)", "my`touch made`", "my'x", "my x"):
        (tmp_path / "studies" / f"{name}.toml").touch()
    assert tab("atp-tune", "--study m", tmp_path) == ["mine"]
    assert not (tmp_path / "made").exists()

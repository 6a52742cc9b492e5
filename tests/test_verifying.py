"""The hashes and the environment that a sparse folder carries, and what `apply --verify` makes of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expect import slow
from tinystudy import TUNE, CommandLine

from atp_tune.config.best import read_config
from atp_tune.config.manifest import environment
from atp_tune.folders.publishing import verify

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    about = json.loads((folder / "atp_tune.json").read_text())
    change(about["manifest"])
    (folder / "atp_tune.json").write_text(json.dumps(about))


def elsewhere(manifest: dict[str, Any]) -> None:
    """As if another machine had written the folder."""
    found = manifest["environment"]
    found["versions"] |= {"torch": "1.0", "safetensors": "0.1"}
    found |= {"instructions": ["altivec"], "processor": "Abacus", "python": "3.99.0", "system": "Windows AMD64"}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# --- files


@slow
def test_what_was_written_is_what_sha256sum_says(sparse: Path) -> None:
    manifest = read_config(sparse / "atp_tune.json").manifest
    assert manifest is not None
    assert manifest.files.keys() == FILES
    lines = "".join(f"{sha}  {name}\n" for name, sha in manifest.files.items())
    subprocess.run(["sha256sum", "--check", "--quiet"], input=lines, text=True, cwd=sparse, check=True)
    assert manifest.environment.device == "cpu (1 threads)"
    assert manifest.environment.processor


def test_a_folder_as_it_was_written(sparse: Path, command: CommandLine) -> None:
    (sparse / "notes.txt").write_text("mine")
    (sparse / ".gitattributes").write_text("of the hub")
    (sparse / "README.md").write_text("another card")
    lines = command.ok("apply", "--verify", sparse).out.splitlines()
    assert lines[0] == f"{sparse}: all {len(FILES)} files are as they were written, 1 of them with weights"
    assert lines[1] == "not of the checkpoint: notes.txt"
    assert lines[-1] == "versions and CPU instructions are the same here"


def test_a_changed_bit_is_found_behind_equal_size_and_times(sparse: Path, command: CommandLine) -> None:
    weights = sparse / "model.safetensors"
    stat = weights.stat()
    flip(weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    said = command("apply", "--verify", sparse).error
    assert said.startswith(f"{sparse}: not what was written; changed: model.safetensors; copy or download")


@slow
def test_a_fine_tuned_folder_is_verified_as_it_is_now(sparse: Path, done: Path, command: CommandLine) -> None:
    words = ["--out", done / "tuned", "--text", f"file:{done / 'long.txt'}", "--steps", "1", "--batch", "1"]
    command.ok("finetune", sparse, *words, "--seqlen", "32", "--device", "cpu", "--patience", "0")
    verify(done / "tuned")
    flip(done / "tuned" / "model.safetensors")
    assert "changed: model.safetensors" in command("apply", "--verify", done / "tuned").error
    (done / "tuned" / "atp_tune.finetune.json").write_text("{}")
    assert "is no record of `finetune`" in command("apply", "--verify", done / "tuned").error


@slow
def test_verify_needs_neither_torch_nor_a_network(sparse: Path) -> None:
    script = (
        "import socket, sys, runpy\n"
        "socket.socket.connect = None\n"
        f"sys.argv = ['tune.py', 'apply', '--verify', {str(sparse)!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(TUNE)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "files are as they were written" in done.stdout


# --- the environment


def test_another_environment_is_listed_by_its_effect(sparse: Path, command: CommandLine) -> None:
    edit(sparse, elsewhere)
    answer = command.ok("apply", "--verify", sparse)
    assert "written on Abacus, cpu (1 threads)" in answer.out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in answer.out.splitlines() if "|" in line]
    assert [(row[0], row[1], row[3]) for row in rows[2:]] == [
        ("torch", "1.0", "digits may differ"),
        ("CPU instructions", "altivec", "digits may differ"),
        *([("system", "Windows AMD64", "digits may differ")] if os.uname().machine != "AMD64" else []),
        ("safetensors", "0.1", "no matter"),
        ("processor", "Abacus", "no matter"),
        ("Python", "3.99.0", "no matter"),
    ]
    assert rows[2][2] == environment().versions["torch"]


# --- made again from its own configuration


@slow
def test_a_folder_made_again_says_whether_its_bytes_are_the_same(
    sparse: Path, done: Path, command: CommandLine, tmp_path: Path
) -> None:
    read_config(sparse / "atp_tune.json").seen_from(done, sparse).write(sparse / "atp_tune.json")
    answer = command.ok("apply", "--config", sparse / "atp_tune.json", "--out", tmp_path / "again", "--device", "cpu")
    assert f"all {len(FILES)} files are the configuration's, byte for byte" in answer.out
    command.ok("apply", "--verify", tmp_path / "again")
    edit(sparse, elsewhere)
    edit(sparse, lambda manifest: manifest["files"].update({"model.safetensors": "0" * 64}))
    answer = command("apply", "--config", sparse / "atp_tune.json", "--out", tmp_path / "third", "--device", "cpu")
    torch = environment().versions["torch"]
    assert (
        f"1 of {len(FILES)} files differ from the configuration's: model.safetensors (torch 1.0 there, {torch} here;"
        in (answer.out)
    )

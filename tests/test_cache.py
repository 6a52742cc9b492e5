import hashlib
import os
import platform
import stat
from pathlib import Path
from time import monotonic, time

import psutil
import pytest
from expect import parametrize, refusal, refused
from huggingface_hub import constants

from atp_tune.errors import UserError
from atp_tune.utils.cache import (
    TakenError,
    cache_dir,
    file_atomically,
    folder_atomically,
    sha256_of,
    sha256_of_files,
    temporary_folder,
    write_atomically,
    write_out,
)

DEAD = 2**22 + 1  # more than Linux gives


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refuse(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATP_TUNE_CACHE", str(tmp_path / "file"))
    assert refusal(cache_dir, "models") == (
        f"cache folder {tmp_path}/file/models: Not a directory; set ATP_TUNE_CACHE to a folder that can be written"
    )


# --- where it lies


# --- hashes


def test_a_changed_file_has_a_new_hash(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    sha256_of(file)
    before = file.stat()
    file.write_bytes(b"abd")  # as long as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert sha256_of(file) == digest(b"abd")
    file.write_bytes(b"abcd")  # as old as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sha256_of(file) == digest(b"abcd")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_blob_of_the_hub_is_named_by_its_hash(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = hub_cache / "models--org--name" / "blobs" / digest(b"x")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"x")
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(hashlib, "file_digest", refuse)
    assert sha256_of(tmp_path / "model.safetensors") == digest(b"x")


@parametrize(
    "folder", ["", "models--org--name/blobs", "hub/blobs", "hub/datasets--org--name/blobs", "hub/models--a/b/blobs"]
)
def test_another_file_of_such_a_name_is_hashed(folder: str, hub_cache: Path, tmp_path: Path) -> None:
    """A stranger can call a file, or what a link leads to, as he likes."""
    file = tmp_path / folder / digest(b"the model that everybody trusts")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"mine")
    (tmp_path / "model.gguf").symlink_to(file)
    assert sha256_of(file) == sha256_of(tmp_path / "model.gguf") == digest(b"mine")


def test_files_are_hashed_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {f"{number}.bin": os.urandom(1000 + number) for number in range(9)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files, said = [tmp_path / name for name in contents], list[str]()
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert sha256_of_files(files[:3], said.append) == dict(list(expected.items())[:3])
    assert said == []  # it is read at once
    monkeypatch.setattr("atp_tune.utils.cache.LARGE", 6000)
    assert list(sha256_of_files(files, said.append).items()) == list(expected.items())
    assert len(said) == 1 and str(tmp_path) in said[0]
    assert sha256_of_files(files, said.append) == expected
    assert len(said) == 1
    with pytest.raises(FileNotFoundError):
        sha256_of_files([*files, tmp_path / "missing"], said.append)


def test_hashing_ends_at_once_when_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1")
    with large.open("wb") as out:
        out.truncate(1 << 40)  # a hole, which would take minutes to hash

    def interrupted(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("atp_tune.utils.cache.keep", interrupted)
    began = monotonic()
    with pytest.raises(KeyboardInterrupt):
        sha256_of_files([small, large], lambda _: None)
    assert monotonic() - began < 30


# --- files and folders, whole or not at all


@parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_a_file_that_cannot_be_written_stays_as_it_was(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(step, refuse)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_the_old_file_is_there_until_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fsync(handle: int) -> None:
        seen.append((tmp_path / "a").read_bytes())
        os_fsync(handle)

    os_fsync = os.fsync
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a", b"new")
    assert seen == [b"old"]


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with folder_atomically(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
        assert folder.parent == out.parent
    assert names(out.parent) == ["folder"]
    assert names(out) == ["file"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_a_folder_of_the_cache_that_another_process_made_first_is_kept(tmp_path: Path) -> None:
    with folder_atomically(tmp_path / "a", shared=True) as folder:
        (folder / "file").write_text("second")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "file").write_text("first")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "first"


@parametrize("is_folder", [True, False])
def test_a_result_whose_place_was_filled_meanwhile_is_an_error_and_kept_beside(is_folder: bool, tmp_path: Path) -> None:
    """It was dropped without a word, and the other folder measured and described as this one."""
    file = tmp_path / "a" / "file" if is_folder else tmp_path / "a"
    with pytest.raises(TakenError) as caught, folder_atomically(tmp_path / "a") as folder:
        (folder / "file").write_text("second")
        file.parent.mkdir(exist_ok=True)
        file.write_text("first")
    where = tmp_path / "a-2"
    assert str(caught.value) == f"{tmp_path}/a: was filled meanwhile, and is left as it is; the result is in {where}"
    assert names(tmp_path) == ["a", "a-2"]
    assert (file.read_text(), (where / "file").read_text()) == ("first", "second")


@parametrize("has_links", [True, False])
def test_a_new_file_replaces_none(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_links:
        monkeypatch.setattr("os.link", refuse)
    write_atomically(tmp_path / "a", b"first", is_new=True)
    with pytest.raises(TakenError, match=f"^{tmp_path}/a: is there already, and is not replaced; "):
        write_out(tmp_path / "a", b"second", is_new=True)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"
    with refused(f"^{tmp_path}/a/b: {tmp_path}/a is no folder; ") as told:
        write_out(tmp_path / "a" / "b", b"third", is_new=True)
    assert type(told.value) is UserError


# --- what a killed process leaves


@parametrize(("is_alive", "later", "stays"), [(False, 0, False), (True, 0, True), (True, 3600, False)])
@parametrize("made", ["folder", "file", "within"])
def test_what_dead_processes_left_is_removed(
    is_alive: bool, later: int, stays: bool, made: str, tmp_path: Path
) -> None:
    """Also of one whose number this process has: a container that is started again gives it the same."""
    pid = os.getpid() if is_alive else DEAD
    began = psutil.Process().create_time() - psutil.boot_time() - later
    left = f".a.{platform.node()}-{pid}-{began:.0f}-x1_y"
    if made == "within":
        left = f".{left}.{platform.node()}-{pid}-{began:.0f}-z"
    (tmp_path / left).write_text("x") if made == "file" else (tmp_path / left / "deep").mkdir(parents=True)
    others = {".a.txt", f".a.elsewhere-{pid}-{began:.0f}-x", f".b.{platform.node()}-{pid}-{began:.0f}-x"}
    for other in others:
        (tmp_path / other).touch()
    with temporary_folder(tmp_path / "a") as folder:
        mine = {folder.name}
        assert {*names(tmp_path)} == others | mine | ({left} if stays else set())
    with file_atomically(tmp_path / "a") as file:
        file.write_text("x")
    assert {*names(tmp_path)} == others | {"a"} | ({left} if stays else set())


@parametrize(("hours", "within", "stays"), [(0, 25, True), (25, 0, True), (25, 25, False)])
def test_another_container_of_this_name_may_live(hours: int, within: int, stays: bool, tmp_path: Path) -> None:
    """Two with one cache removed each other's folders, also while deep in them files were still written."""
    left = tmp_path / f".a.{platform.node()}-{DEAD}-1-01234567-x"
    (left / "deep").mkdir(parents=True)
    (left / "deep/file").touch()
    for place, age in ((left / "deep/file", within), (left / "deep", hours), (left, hours)):
        os.utime(place, (time() - 3600 * age,) * 2)
    with temporary_folder(tmp_path / "a"):
        assert left.exists() == stays

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from expect import parametrize, slow
from tinystudy import run

from atp_tune.events import Event, Message
from atp_tune.storage import opening


def mount(monkeypatch: pytest.MonkeyPatch, *table: tuple[str | Path, str]) -> None:
    rows = [SimpleNamespace(mountpoint=str(place), fstype=kind) for place, kind in table]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: rows if all else [])


@parametrize(
    ("file", "kind"),
    [
        ("/home/ada/x.db", "ext4"),
        ("/data/x.db", "nfs4"),
        ("/data/local/x.db", "xfs"),
        ("/database/x.db", "ext4"),
        ("/data/shadow/x.db", "cifs"),  # mounted over another one
    ],
)
def test_the_innermost_and_last_mount_decides(file: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        ("/", "ext4"),
        ("/data/shadow", "xfs"),
        ("/data", "nfs4"),
        ("/data/local", "xfs"),
        ("/data/shadow", "cifs"),
    ]
    mount(monkeypatch, *table)
    assert opening.file_system(Path(file)) == kind


@parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "9p", "fuse.glusterfs", "NFS"])
def test_file_systems_of_a_network(kind: str) -> None:
    assert opening.is_network(kind)


@parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "apfs", "NTFS", "fuse.ntfs-3g", "zfs", ""])
def test_file_systems_of_this_machine(kind: str) -> None:
    assert not opening.is_network(kind)


def test_other_databases_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    mount(monkeypatch, ("/", "nfs"))
    assert opening.network_warning("sqlite:////x.db")
    for address in ("postgresql://h/x", "grpc://h:port", "sqlite://"):
        assert opening.network_warning(address) is None


def said(place: Path) -> str:
    return (
        f"warning: {place / 'tiny.db'} lies on a network file system (nfs4), where SQLite's locks do not work: only "
        "one machine may open it. For several, run `python tune.py serve` on one and give the others --storage "
        "grpc://HOST:13000, or use PostgreSQL (docs/serving.md)"
    )


@slow
def test_a_run_says_so_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Message):
            notes.append(event.text)

    mount(monkeypatch, ("/", "ext4"), (place, "nfs4"))
    run(place, "search.trials=1", watch=watch)
    assert [note for note in notes if "warning" in note] == [said(place)]

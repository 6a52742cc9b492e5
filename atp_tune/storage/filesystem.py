"""What kind of file system a file lies on: SQLite's locks do not work on those of a network."""

from pathlib import Path

import psutil
from sqlalchemy.engine import make_url

NETWORK = {
    "9p", "acfs", "afp", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "gcsfuse", "gfs",
    "gfs2", "glusterfs", "goofys", "gpfs", "juicefs", "lustre", "mfs", "moosefs", "ncpfs", "nfs", "nfs3",
    "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "rclone", "s3fs", "smb", "smb2", "smb3", "smbfs", "sshfs",
    "webdav", "wekafs",
}  # fmt: skip


def kind_of(file: Path) -> str:
    """The type of the file system that a file lies on, or would; "" if that is not known."""
    place = file.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return max(reversed(mounts), key=lambda part: len(Path(part.mountpoint).parts)).fstype if mounts else ""


def is_network(kind: str) -> bool:
    """Whether a file system's type is one of a network, also behind FUSE."""
    return kind.lower().removeprefix("fuse.") in NETWORK


def warning(address: str) -> str | None:
    """What there is to say of a database on a network file system, in one line."""
    file = make_url(address).database if address.startswith("sqlite") else None
    kind = kind_of(Path(file)) if file else ""
    if not is_network(kind):
        return None
    return (
        f"warning: {file} lies on a network file system ({kind}), where SQLite's locks do not work: only one "
        "machine may open it. For several, run `python tune.py serve` on one and give the others --storage "
        "grpc://HOST:13000, or use PostgreSQL (docs/serving.md)"
    )

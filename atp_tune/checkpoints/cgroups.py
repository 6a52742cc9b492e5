"""Memory that the control groups of this process leave it: the limits of containers, of Slurm's jobs, of services.

A limit holds for a group and all below it, so each group from the process's own up to the root has a say. What a group
uses includes the page cache of the files that it reads; the part that the kernel drops first (inactive files) counts as
free here, as it does for Docker and Kubernetes. Both versions of control groups may be mounted; a controller belongs to
one of them. Source: Linux, Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst; proc(5) on mountinfo.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Names:
    """What a version calls a group's limit, its use, and the inactive files of its `memory.stat`."""

    limit: str
    use: str
    inactive: str


V1 = Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Names("memory.max", "memory.current", "inactive_file")


def free_in_cgroups(process: Path = PROCESS) -> int | None:
    """Bytes that the tightest limit leaves to a process, given by its folder in /proc; None where there is no limit."""
    free = [_free(folder, names) for folder, names in _groups(process)]
    return min((size for size in free if size is not None), default=None)


def _groups(process: Path) -> Iterator[tuple[Path, Names]]:
    """The folders of the groups that the process is in, from its own upwards; none where the system has no groups."""
    try:
        paths = dict(line.split(":", 2)[1:] for line in (process / "cgroup").read_text().splitlines())
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        place, _, kind = mount.partition(" - ")
        root, point = place.split()[3:5]
        if kind.startswith("cgroup2 "):
            yield from ((folder, V2) for folder in _upwards(Path(point), root, paths.get("", "/")))
        elif kind.startswith("cgroup ") and "memory" in kind.split()[-1].split(","):
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), "/")
            yield from ((folder, V1) for folder in _upwards(Path(point), root, path))


def _upwards(point: Path, root: str, path: str) -> Iterator[Path]:
    """The folder of the group `path`, and those above it, in a mount at `point` that shows what is below `root`.

    A group that is not below it, as a container may be told of, has the limits of the mount's own.
    """
    inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) and ".." not in path else Path()
    yield from (point / part for part in (inside, *inside.parents))


def _free(folder: Path, names: Names) -> int | None:
    try:
        limit, use = (int((folder / name).read_text()) for name in (names.limit, names.use))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max", which is no limit, or a group without this controller
        return None
    return max(0, limit - use + int(stat.get(names.inactive, 0)))

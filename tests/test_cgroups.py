import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from processes import output

from atp_tune.checkpoints import devices
from atp_tune.checkpoints.devices import PROCESS, cgroup_limit, free_in_cgroups, host_memory

MIB = 1 << 20
UNLIMITED = 9223372036854771712  # what version 1 says


class Machine:
    """A folder like /proc/self, and control groups that its `mountinfo` points to."""

    def __init__(self, place: Path, version: int, path: str, root: str = "/") -> None:
        self.process, self.groups, self._version = place / "proc", place / "groups", version
        self.process.mkdir(parents=True)
        line = f"0::{path}" if version == 2 else f"5:cpu,cpuacct:/other\n4:memory,hugetlb:{path}\n1:name=systemd:/init"
        (self.process / "cgroup").write_text(f"{line}\n")
        kind = "cgroup2 cgroup2 rw,nsdelegate" if version == 2 else "cgroup cgroup rw,memory,hugetlb"
        (self.process / "mountinfo").write_text(
            "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
            f"30 22 0:26 / {place}/cpu rw,nosuid shared:8 - cgroup cgroup rw,cpu,cpuacct\n"
            f"31 22 0:27 {root} {self.groups} rw,nosuid shared:9 master:1 - {kind}\n"
        )

    def limit(self, path: str, limit: int | str, use: int, inactive: int = 0) -> None:
        """Gives a group a limit."""
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if self._version == 2 else ("limit_in_bytes", "usage_in_bytes")
        for name, value in zip(names, (limit, use), strict=True):
            (folder / name if self._version == 2 else folder / f"memory.{name}").write_text(f"{value}\n")
        prefix = "" if self._version == 2 else f"inactive_file {7 * inactive}\ntotal_"
        (folder / "memory.stat").write_text(f"anon 5\nactive_file 9\n{prefix}inactive_file {inactive}\n")

    @property
    def free(self) -> int | None:
        return free_in_cgroups(self.process)


@pytest.fixture(params=[1, 2])
def version(request: Any) -> int:
    return int(request.param)


def test_a_group_leaves_its_limit_less_its_use_but_for_files_that_are_dropped_first(
    version: int, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, version, "/job/step")
    machine.limit("job/step", 1000, 700, 250)
    assert machine.free == 550
    machine.limit("job/step", 1000, 1100, 30)
    assert machine.free == 0


def test_the_tightest_of_the_groups_above_counts(version: int, tmp_path: Path) -> None:
    machine = Machine(tmp_path, version, "/job/step/task")
    machine.limit("job/step/task", 900, 100)
    machine.limit("job/step", "max" if version == 2 else UNLIMITED, 500)
    machine.limit("job", 1000, 500)
    machine.limit("elsewhere", 10, 0)
    assert machine.free == 500
    assert cgroup_limit(machine.process) == 900
    machine.limit(".", 600, 590)
    assert machine.free == 10
    assert cgroup_limit(machine.process) == 600


def test_a_container_sees_its_own_group_as_the_root(version: int, tmp_path: Path) -> None:
    """With a namespace of its own as `/`, without one under the name that it has outside."""
    for number, path in enumerate(("/", "/docker/1234", "/../../elsewhere")):
        machine = Machine(tmp_path / str(number), version, path, root="/" if path == "/" else "/docker/1234")
        machine.limit(".", 1000, 300)
        assert machine.free == 700


def test_host_memory_is_the_smaller_of_the_machines_and_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    for limit, expected in ((None, 1000), (300, 300), (5000, 1000)):
        monkeypatch.setattr(devices, "free_in_cgroups", lambda limit=limit: limit)
        assert host_memory() == expected


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group below that of this process, with a limit of 3 GiB; it goes with the test."""
    own = dict(line.split(":", 2)[1:] for line in (PROCESS / "cgroup").read_text().splitlines())
    for root, names in ((Path("/sys/fs/cgroup/memory"), "memory"), (Path("/sys/fs/cgroup"), "")):
        folder = root / own.get(names, "/").strip("/") / f"atp_tune-{uuid4().hex}"
        limit = folder / ("memory.limit_in_bytes" if names else "memory.max")
        try:
            folder.mkdir()
        except OSError:
            continue
        if limit.exists():
            limit.write_text(str(3 << 30))
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("control groups cannot be made here")


@pytest.mark.slow
def test_a_process_in_a_real_group_has_what_its_limit_leaves(group: Path) -> None:
    code = (
        f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
        "from atp_tune.checkpoints.devices import host_memory\n"
        "before = host_memory()\n"
        "held = bytearray(b'1') * (512 << 20)\n"
        "print(before, host_memory())\n"
    )
    before, after = map(int, output(sys.executable, "-c", code).split())
    assert 2 << 30 < before < 3 << 30
    assert before - after == pytest.approx(512 * MIB, rel=0.1)

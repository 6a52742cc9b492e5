"""docs/slurm.sh under a real Slurm of one node, with its own controller, daemon and munge in a folder of the test."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import optuna
import pytest
from crews import LONG
from faults import has
from optuna.trial import TrialState
from processes import popen
from test_network import needs, serving
from tinystudy import HANGS, free_port, settings, stored, wait_until

pytestmark = pytest.mark.slow
TOTAL = 20  # trials, so that an array is disturbed before it has them
SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sh"

CONF = """\
ClusterName=atp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=requeue_delay=1,sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=high Nodes=ALL State=UP PriorityTier=2
"""


@contextmanager
def running(command: list[str]) -> Iterator[None]:
    process = popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(HANGS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm cluster of one node, which claims to have two GPUs, for all tests."""
    needs("slurmctld", "slurmd", "munged", "sbatch")
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("needs root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = platform.node().split(".")[0]
    conf = CONF.format(host=host, folder=folder, control=free_port(), daemon=free_port(), cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as daemons:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
        for command in commands(folder):
            daemons.enter_context(running(command))
        yield


@pytest.fixture
def slurm(cluster: None) -> Iterator[None]:
    """The cluster without a job, before and after."""
    wait_until(lambda: said("sinfo", "-h", "-p", "low", "-o", "%t") == "idle")
    yield
    said("scancel", "-u", "root")
    wait_until(lambda: said("squeue", "-h") == "")


def commands(folder: Path) -> list[list[str]]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    munged = ["munged", "--force", "--foreground", f"--seed-file={folder / 'munge.seed'}", *options]
    return [munged, ["slurmctld", "-D"], ["slurmd", "-D"]]


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def submit(place: Path, port: int, *more: str) -> str:
    """Two tasks of the script; the number of the job."""
    sizes = ["--array=0-1", "--cpus-per-task=1", f"--output={place}/%x-%A_%a.log"]
    study = [str(place / "tiny.toml"), f"grpc://127.0.0.1:{port}", *settings(*LONG, f"search.trials={TOTAL}"), *more]
    command = ["sbatch", "--parsable", *sizes, str(SCRIPT), *study]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPT.parents[1]).stdout.strip()


def trials(place: Path) -> list[optuna.trial.FrozenTrial]:
    return stored(place, database=place / "served.db").trials


def in_state(place: Path, state: TrialState) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in trials(place) if trial.state == state]


def has_measured(place: Path, number: int) -> bool:
    return has(place / "served.db", "SELECT 1 FROM trials WHERE state = 'COMPLETE' LIMIT 1 OFFSET ?", number - 1)


def logs(place: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(place.glob("atp-tune-*.log")))


def done(place: Path) -> bool:
    return has_measured(place, TOTAL) and said("squeue", "-h") == ""


@pytest.mark.parametrize("how", ["time is up", "preempted"])
def test_an_array_runs_a_study(how: str, place: Path, slurm: None) -> None:
    port = free_port()
    with serving(place, "127.0.0.1", free_port(), port):
        job = submit(place, port)
        wait_until(lambda: has_measured(place, 2))
        if how == "time is up":  # what --signal does then
            said("scancel", "--signal=TERM", job)
        else:
            subprocess.run(["srun", "-p", "high", "-n", str(os.cpu_count()), "sleep", "1"], check=True)
        wait_until(lambda: done(place))
    whole = in_state(place, TrialState.COMPLETE)
    assert len(whole) == TOTAL, logs(place)
    assert not [trial for trial in trials(place) if not trial.state.is_finished()]
    interrupted = [trial for trial in trials(place) if trial.user_attrs.get("lost") == "interrupted"]
    assert "stopped: finished trials are in" in logs(place)
    assert "Traceback" not in logs(place)
    proposed = [trial.params for trial in interrupted if "beta" in trial.params]
    assert all(params in [trial.params for trial in whole] for params in proposed)
    assert len({trial.user_attrs["pid"] for trial in whole}) > 1


def test_a_cancelled_array_does_not_come_back(place: Path, slurm: None) -> None:
    port = free_port()
    with serving(place, "127.0.0.1", free_port(), port):
        job = submit(place, port)
        wait_until(lambda: has_measured(place, 2))
        said("scancel", job)
        wait_until(lambda: said("squeue", "-h") == "")
        begun = [trial for trial in in_state(place, TrialState.RUNNING) if trial.user_attrs]
        assert not begun, logs(place)  # one without a word of its process is queued again after a minute
        assert len(in_state(place, TrialState.COMPLETE)) < TOTAL

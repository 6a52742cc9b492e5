"""Workers on a Ray cluster: two nodes with raylets of their own on this machine, and two that only a network joins."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from crews import LONG, TOTAL, check_whole, measured, meeting, trials
from expect import slow
from optuna.trial import TrialState
from processes import popen
from test_network import HERE, THERE, Namespace, namespace, serving  # noqa: F401
from tinystudy import (
    HANGS,
    Process,
    finish,
    free_port,
    settings,
    start,
    wait_for,
    wait_until,
)

from atp_tune.storage.progress import INTERRUPTED, SURPLUS, retry_history

STORE = 80_000_000  # bytes of a node's object store; Ray wants at least 75 MB


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What nodes inherit: Ray would run workers at niceness 15, where a test beside them takes all the cores."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"USAGE_STATS_ENABLED": "0", "worker_niceness": "0"}.items():
            patch.setenv(f"RAY_{name}", value)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def head(environment: None) -> Iterator[Any]:
    """A cluster whose head has no room for work, for all tests."""
    if "CI" not in os.environ:
        pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    made = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def cluster(head: Any) -> Iterator[Any]:
    """The cluster for one test, which adds nodes with one CPU each; they go with it."""
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node)
    head.wait_for_nodes(HANGS)


def add_node(cluster: Any, **resources: int) -> Any:
    return cluster.add_node(object_store_memory=STORE, **(resources or {"num_cpus": 1}))


def begin(place: Path, cluster: Any, *more: str, texts: tuple[str, ...] = LONG) -> Process:
    words = ["--engine", "ray", "--ray-address", cluster.address, *settings(*texts, f"search.trials={TOTAL}"), *more]
    return start("--study", place / "tiny.toml", *words)


@slow
def test_two_nodes_share_a_study(place: Path, cluster: Any) -> None:
    add_node(cluster)
    add_node(cluster)
    answer = finish(begin(place, cluster, "--workers", "2", *meeting(place), texts=()))  # its code goes by its place
    assert answer.is_clean
    check_whole(place)
    assert {trial.params["pruner"] for trial in measured(place)} == {"meeting"}
    assert len({trial.user_attrs["pid"] for trial in measured(place)}) == 2
    assert answer.out.count("loading the model and the texts") == 1
    assert f"[{TOTAL}/{TOTAL}]" in answer.out
    assert "the others wait" not in answer.out


def stop_in_a_trial(place: Path) -> int:
    """Stops the one worker while it runs a trial; its process id."""
    while True:
        [pid] = {trial.user_attrs["pid"] for trial in measured(place)}
        os.kill(pid, signal.SIGSTOP)
        now = [trial for trial in trials(place) if trial.state == TrialState.RUNNING]
        if now and "plan" in now[0].user_attrs:
            return int(pid)
        os.kill(pid, signal.SIGCONT)
        sleep(0.01)


@slow
def test_a_node_that_dies_in_a_trial(place: Path, cluster: Any) -> None:
    """The only node dies, another comes: Ray's words for it do not matter, the trial is run again."""
    node = add_node(cluster)
    process = begin(place, cluster)
    wait_for(place / "tiny.db", 3, process)
    pid = stop_in_a_trial(place)
    cluster.remove_node(node, allow_graceful=False)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    add_node(cluster)
    answer = finish(process)
    assert answer.is_clean
    assert "worker 0 died (" in answer.out
    assert "it is started again" in answer.out
    check_whole(place)
    lost = [trial for trial in trials(place) if trial.state == TrialState.FAIL]
    assert len(lost) == 1
    assert f"trial {lost[0].number} was lost with its process: it is run again" in answer.out
    assert [trial.state for trial in trials(place) if trial.params == lost[0].params] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]


@slow
def test_sigterm_stops_all_and_loses_nothing(place: Path, cluster: Any) -> None:
    add_node(cluster, num_cpus=2)
    many = 400  # trials, more than are done while a busy machine passes the signal on
    process = begin(place, cluster, "--workers", "2", "--trials", str(many))
    wait_for(place / "tiny.db", 3, process)
    process.send_signal(signal.SIGTERM)
    answer = finish(process)
    assert (answer.code, answer.err) == (130, "")
    assert "stopped: finished trials are in" in answer.out
    assert "died" not in answer.out
    assert not [trial for trial in trials(place) if trial.state == TrialState.RUNNING]
    assert len(measured(place)) < many
    failed = {trial.number: trial for trial in trials(place) if trial.state == TrialState.FAIL}
    assert {trial.user_attrs.get("lost") for trial in failed.values()} <= {
        INTERRUPTED,
        SURPLUS,
    }  # SURPLUS: queued twice
    lost = [trial for trial in failed.values() if trial.user_attrs["lost"] == INTERRUPTED]
    kept = [trial for trial in trials(place) if trial.state in (TrialState.WAITING, TrialState.COMPLETE)]
    repeated = {number: trial.params for trial in kept for number in retry_history(trial)}
    # A worker that is stopped later may still take one of them, and finish it.
    assert all(repeated[trial.number] == trial.params for trial in lost)


@slow
def test_more_workers_than_gpus(place: Path, cluster: Any) -> None:
    add_node(cluster, num_cpus=1, num_gpus=1)
    answer = finish(begin(place, cluster, "--workers", "2", "--device", "auto", texts=()))
    assert answer.is_clean
    assert "the cluster has 1 GPUs for 2 workers: the others wait until there are more" in answer.out
    check_whole(place)
    assert len({trial.user_attrs["pid"] for trial in measured(place)}) == 1


@slow
def test_two_hosts(place: Path, namespace: Namespace) -> None:  # noqa: F811
    """The other host is a network namespace: it has an address of its own."""
    cluster = f"{HERE}:{free_port()}"
    node = ["--num-cpus=1", f"--object-store-memory={STORE}", "--disable-usage-stats"]
    head = [f"--port={cluster.rpartition(':')[2]}", f"--node-ip-address={HERE}", "--include-dashboard=false"]
    with ExitStack() as nodes:
        nodes.enter_context(ray_start("--head", *head, *node))
        wait_for_nodes(cluster, 1)
        there = ("ip", "netns", "exec", namespace.name)
        nodes.enter_context(ray_start(f"--address={cluster}", f"--node-ip-address={THERE}", *node, before=there))
        wait_for_nodes(cluster, 2)
        words = ["--study", place / "tiny.toml", *settings(f"search.trials={TOTAL}"), "--engine", "ray"]
        words += ["--ray-address", cluster, "--workers", "2", *meeting(place)]
        answer = finish(start(*words))
        assert "a file of one machine, and the cluster has several; start `python tune.py serve" in answer.error
        port = free_port()
        with serving(place, HERE, free_port(), port, "tiny.db"):
            answer = finish(start(*words, "--storage", f"grpc://{HERE}:{port}"))
        assert answer.is_clean
        check_whole(place)
        assert len({trial.user_attrs["pid"] for trial in measured(place)}) == 2, answer.out  # which says who died


@contextmanager
def ray_start(*options: str, before: tuple[str, ...] = ()) -> Iterator[None]:
    """A node in a process of its own."""
    program = Path(sys.executable).parent / "ray"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = popen([*before, str(program), "start", "--block", *options], **quiet)
    try:
        yield
    finally:
        process.terminate()
        process.wait(HANGS)


def wait_for_nodes(address: str, number: int) -> None:
    """Returns when a cluster has so many nodes that live: a node says nothing that could be heard."""
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    wait_until(lambda: answers(address))
    known = GlobalState()
    known._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    wait_until(lambda: len(known._live_node_ids()) == number)
    known.disconnect()


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True

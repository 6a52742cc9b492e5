"""The dashboard's server over real HTTP, on the finished tiny study and on one that runs."""

import http.client
import json
import re
import shutil
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import optuna
import psutil
import pytest
from expect import parametrize, slow
from optuna.trial import TrialState
from tinystudy import HANGS, CommandLine, finish, go_silent, run, start, wait_until

from atp_tune.config.best import read_config
from atp_tune.report.servers import serve
from atp_tune.storage import opening


@dataclass
class Dashboard:
    """What a browser would ask for."""

    port: int
    told: list[str]
    grpc_port: int = 0

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=HANGS) as answer:
            return bytes(answer.read())

    def studies(self) -> dict[str, int]:
        listed = json.loads(self.get("/api/studies"))["study_summaries"]
        return {study["study_name"]: study["study_id"] for study in listed}

    def study(self, name: str) -> Any:
        return json.loads(self.get(f"/api/studies/{self.studies()[name]}?after=0"))

    def write_note(self, body: str, version: int) -> None:
        path = f"/api/studies/{self.studies()['tiny']}/note"
        content = json.dumps({"body": body, "version": version}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", content, {"Content-Type": "application/json"}, method="PUT"
        )
        urllib.request.urlopen(request, timeout=HANGS).close()

    def ask_for(self, host: str) -> int:
        """The status of the page for a browser that took this machine for `host`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGS)
        connection.request("GET", "/api/studies", headers={"Host": host})
        status = connection.getresponse().status
        connection.close()
        return status


@contextmanager
def served(database: Path) -> Iterator[Dashboard]:
    stop: list[bool] = []
    ready: list[tuple[list[str], int, int]] = []
    told: list[str] = []
    place = f"sqlite:///{database}", "127.0.0.1", (0, 0), database.with_suffix(".artifacts")
    thread = Thread(target=serve, args=(*place, lambda: bool(stop), lambda *news: ready.append(news), told.append))
    thread.start()
    try:
        wait_until(lambda: bool(ready) or not thread.is_alive())
        _, port, grpc_port = ready[0]
        yield Dashboard(port, told, grpc_port)
    finally:
        stop.append(True)
        thread.join(HANGS)
        assert not thread.is_alive()


@pytest.fixture
def dashboard(done: Path) -> Iterator[Dashboard]:
    with served(done / "tiny.db") as dashboard:
        yield dashboard


def open_db(place: Path) -> optuna.storages.BaseStorage:
    db = opening.open_storage(f"sqlite:///{place / 'tiny.db'}", create=False)
    assert db is not None
    return db


@slow
def test_own_words_are_kept_below_ours(dashboard: Dashboard) -> None:
    note = dashboard.study("tiny")["note"]
    dashboard.write_note(note["body"] + "\nAsk Ada about trial 4.\n", note["version"] + 1)
    again = dashboard.study("tiny")["note"]
    assert again["body"].count("## tiny:") == 1
    assert again["body"].endswith("Ask Ada about trial 4.\n")
    assert again["version"] > note["version"]
    dashboard.write_note(again["body"].replace("4", "5"), again["version"] + 1)
    assert dashboard.study("tiny")["note"]["body"].endswith("Ask Ada about trial 5.\n")


@slow
def test_artifacts_are_current_and_there_once(dashboard: Dashboard, done: Path, tmp_path: Path) -> None:
    wait_until(lambda: len(dashboard.study("tiny")["artifacts"]) == 2)
    study = dashboard.study("tiny")
    names = {artifact["filename"]: artifact["artifact_id"] for artifact in study["artifacts"]}
    assert set(names) == {"best.json", "report.html"}
    content = dashboard.get(f"/artifacts/{dashboard.studies()['tiny']}/{names['best.json']}")
    (tmp_path / "elsewhere.json").write_bytes(content)
    found = read_config(tmp_path / "elsewhere.json")
    beside = read_config(done / "tiny.best.json")
    assert found.model_copy(update={"folder": ""}) == beside.model_copy(update={"folder": ""})
    assert (Path(found.folder) / "model").is_dir()
    assert b"<html" in dashboard.get(f"/artifacts/{dashboard.studies()['tiny']}/{names['report.html']}")
    run(done, "search.trials=9")
    wait_until(lambda: dashboard.study("tiny")["note"]["body"].count("9 of 9"))
    assert len(dashboard.study("tiny")["artifacts"]) == 2


@slow
def test_an_artifact_is_of_its_folder_and_acts_on_nothing(dashboard: Dashboard, done: Path, tmp_path: Path) -> None:
    """A link in the folder is not followed, and a page in it is of another origin than the dashboard."""
    wait_until(lambda: len(dashboard.study("tiny")["artifacts"]) == 2)
    ids = [artifact["artifact_id"] for artifact in dashboard.study("tiny")["artifacts"]]
    paths = [f"http://127.0.0.1:{dashboard.port}/artifacts/{dashboard.studies()['tiny']}/{name}" for name in ids]
    with urllib.request.urlopen(paths[0], timeout=HANGS) as answer:
        rules = answer.headers["Content-Security-Policy"].split()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert rules[0] == "sandbox"
    assert "allow-same-origin" not in rules
    (tmp_path / "secret").write_text("mine")
    for name, path in zip(ids, paths, strict=True):
        (done / "tiny.artifacts" / name).unlink()
        (done / "tiny.artifacts" / name).symlink_to(tmp_path / "secret")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(path, timeout=HANGS)


@slow
def test_what_lies_in_the_folder_of_artifacts_is_left_alone(done: Path, command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "best.json").write_text("mine")
    shutil.rmtree(done / "tiny.artifacts")
    (done / "tiny.artifacts").symlink_to(tmp_path / "home")
    words = ("serve", "--study", done / "tiny.toml", "--port", "0", "--grpc-port", "0")
    assert f"is a link to {tmp_path / 'home'}, where files would be written" in command(*words).error
    with served(done / "tiny.db") as dashboard:  # as with --artifacts
        wait_until(lambda: len(dashboard.study("tiny")["artifacts"]) == 2)
    assert (tmp_path / "home" / "best.json").read_text() == "mine"
    assert len(list((tmp_path / "home").iterdir())) == 3


@slow
def test_a_study_that_runs_is_followed(place: Path) -> None:
    worker = start("--study", place / "tiny.toml", "--set", "search.trials=12")
    wait_until((place / "tiny.db").exists)
    versions = set()
    with served(place / "tiny.db") as dashboard:
        wait_until(lambda: "tiny" in dashboard.studies())
        while worker.poll() is None:
            study = dashboard.study("tiny")
            versions.add(study["note"]["version"])
        assert "12 of 12 trials are done." in dashboard.study("tiny")["note"]["body"]
        wait_until(lambda: len(dashboard.study("tiny")["trials"]) == 12)
    assert finish(worker).code == 0
    assert len(versions) > 1


@slow
def test_a_worker_without_signs_of_life_loses_its_trial(done: Path) -> None:
    study = opening.find_study(open_db(done), "tiny")
    assert study is not None
    study.enqueue_trial(study.trials[3].params)
    with pytest.warns(UserWarning, match="Heartbeat"):
        trial = study.ask()
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    go_silent(done / "tiny.db")
    with served(done / "tiny.db") as dashboard:
        wait_until(lambda: dashboard.told)
        assert dashboard.told == ["tiny: trial 6: sent no heartbeat; it is queued again"]
    again = study.get_trials()[7]
    assert again.state == TrialState.WAITING
    assert again.system_attrs["fixed_params"] == study.trials[3].params


@slow
def test_the_command_says_what_it_serves_and_stops_cleanly(done: Path) -> None:
    server = start("serve", "--study", done / "tiny.toml", "--port", "0", "--grpc-port", "0")
    assert server.stdout is not None
    lines = [server.stdout.readline() for _ in range(4)]
    assert lines[0] == f"serving sqlite:///{done / 'tiny.db'}: tiny\n"
    assert lines[1].startswith("dashboard:    http://127.0.0.1:")
    assert lines[2].startswith("workers join: python tune.py --study NAME --storage grpc://127.0.0.1:")
    assert b"<html" in urllib.request.urlopen(lines[1].split()[1] + "/dashboard", timeout=HANGS).read().lower()
    server.send_signal(signal.SIGTERM)
    answer = finish(server)
    assert (answer.code, answer.out, answer.err) == (0, "stopped: everything that workers sent is stored\n", "")


@slow
def test_listening_to_all_warns(done: Path) -> None:
    server = start("serve", "--study", done / "tiny.toml", "--port", "0", "--grpc-port", "0", "--listen", "0.0.0.0")
    assert server.stdout is not None
    lines = "".join(server.stdout.readline() for _ in range(5))
    server.send_signal(signal.SIGINT)
    assert "warning: neither port has a login" in lines
    assert finish(server).code == 0


@parametrize("option", ["--port", "--grpc-port"])
def test_a_port_in_use(option: str, done: Path, command: CommandLine) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = [word for pair in {"--port": "0", "--grpc-port": "0", option: str(port)}.items() for word in pair]
        answer = command("serve", "--study", done / "tiny.toml", *words)
    assert answer.error == f"127.0.0.1:{port}: Address already in use; choose another port with {option} N"


def other_addresses() -> list[str]:
    """Addresses of this machine that are not the one that is served by default."""
    found = [address.address for each in psutil.net_if_addrs().values() for address in each]
    return [
        "127.0.0.2",
        *(address for address in found if re.fullmatch(r"[0-9.]+", address) and address != "127.0.0.1"),
    ]


@slow
def test_by_default_only_this_machine_is_let_in(done: Path) -> None:
    with served(done / "tiny.db") as dashboard:
        for port in (dashboard.port, dashboard.grpc_port):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            for address in other_addresses():
                with pytest.raises(OSError, match=r"refused|unreachable"):
                    socket.create_connection((address, port), timeout=5)


@slow
def test_a_page_of_a_stranger_does_not_reach_the_dashboard(dashboard: Dashboard) -> None:
    through_nginx, through_a_tunnel = "127.0.0.1:8080", "localhost:9000"
    for host in (through_nginx, through_a_tunnel, "LOCALHOST", "[::1]:8080"):
        assert dashboard.ask_for(host) == 200, host
    for host in ("evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "", "["):
        assert dashboard.ask_for(host) == 403, host

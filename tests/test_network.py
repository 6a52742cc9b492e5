"""Workers behind a real network: a namespace with an address of its own, and nginx with TLS and a token."""

import base64
import os
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from preloaded import enter
from processes import popen
from tinystudy import (
    HANGS,
    LONG,
    Answer,
    Process,
    finish,
    free_port,
    hear,
    run,
    settings,
    start,
    stored,
    study_file,
    wait_for,
    wait_until,
)

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[1] / "docs"
NETWORK = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"  # of this process alone
HERE, THERE = f"{NETWORK}.1", f"{NETWORK}.2"


def needs(*programs: str) -> None:
    """CI has all of them; elsewhere a test that cannot run is skipped."""
    missing = [program for program in programs if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs {', '.join(missing)}")
    assert not missing


@contextmanager
def serving(
    place: Path, host: str, port: int, grpc_port: int, database: str = "served.db"
) -> "Iterator[subprocess.Popen[str]]":
    words = ["--listen", host, "--port", str(port), "--grpc-port", str(grpc_port)]
    server = start("serve", "--study", place / "tiny.toml", "--storage", f"sqlite:///{place / database}", *words)
    try:
        hear(server, "Ctrl-C stops")
        yield server
    finally:
        server.terminate()
        assert finish(server).code == 0


@dataclass(frozen=True)
class Namespace:
    """A network namespace that is joined to this one by a cable with two ends."""

    name: str
    cable: str

    def worker(self, place: Path, *words: str | Path) -> Process:
        """A study's worker there, whose trial 2 is `held`."""
        return start(*words, inject=partial(enter, self.name, place, 2))

    def wait_for(self, port: int) -> None:
        """Returns when the server is reached from there: a cable that was just laid may carry nothing yet."""
        knock = f"import socket; socket.create_connection(({HERE!r}, {port}), 1)"
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", knock]
        wait_until(lambda: subprocess.run(command, check=False, capture_output=True).returncode == 0)

    def cut(self) -> None:
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        ip("link", "set", self.cable, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    needs("ip")
    name = f"atp{os.getpid()}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError:
        if "CI" in os.environ:
            raise
        pytest.skip("needs the right to make network namespaces")
    try:
        ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}w", "netns", name)
        try:
            ip("addr", "add", f"{HERE}/24", "dev", f"{name}h")
            ip("link", "set", f"{name}h", "up")
            ip("-n", name, "addr", "add", f"{THERE}/24", "dev", f"{name}w")
            ip("-n", name, "link", "set", f"{name}w", "up")
            ip("-n", name, "link", "set", "lo", "up")
            yield Namespace(name, f"{name}h")
        finally:
            ip("link", "delete", f"{name}h")  # at once: with its namespace it goes some time later
    finally:
        ip("netns", "delete", name)


def trials(place: Path) -> list[optuna.trial.FrozenTrial]:
    return stored(place, database=place / "served.db").trials


def test_a_worker_elsewhere_outlives_a_cut_cable(place: Path, namespace: Namespace) -> None:
    port = free_port()
    overrides = (*LONG, "search.trials=5")
    with serving(place, HERE, free_port(), port):
        words = ("--study", place / "tiny.toml", "--storage", f"grpc://{HERE}:{port}")
        namespace.wait_for(port)
        worker = namespace.worker(place, *words, *settings(*overrides))
        wait_for(place / "served.db", 2, worker)
        namespace.cut()
        (place / "go-2").touch()
        heard = hear(worker, "does not answer; trying again, nothing is lost")
        running = [trial.number for trial in trials(place) if trial.state == TrialState.RUNNING]
        assert worker.poll() is None
        namespace.mend()
        answer = finish(worker)
    assert answer.code == 0
    assert running == [2]
    assert "answers again" in heard + answer.out
    undisturbed = run(place, *overrides, name="undisturbed")
    assert [(t.params, t.value) for t in trials(place)] == [(t.params, t.value) for t in undisturbed.trials]


@dataclass(frozen=True)
class Proxy:
    """nginx as in docs/nginx.conf."""

    port: int
    certificate: Path
    place: Path

    def worker(self, token: str | None, trusted: bool = True) -> Answer:
        environment = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(self.certificate)} if trusted else {}
        environment |= {"ATP_TUNE_TOKEN": token} if token else {}
        words = ("--study", self.place / "tiny.toml", "--storage", f"grpcs://127.0.0.1:{self.port}")
        return finish(start(*words, environment=environment))

    def page(self, login: str | None) -> int:
        headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}/dashboard", headers=headers)
        try:
            with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=self.certificate)) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture
def nginx(place: Path, tmp_path: Path) -> Iterator[Proxy]:
    needs("nginx", "openssl")
    web, grpc, tls = free_port(), free_port(), free_port()
    make_certificate(tmp_path)
    secret = subprocess.run(["openssl", "passwd", "-apr1", "lovelace"], check=True, capture_output=True, text=True)
    (tmp_path / "atp_tune.htpasswd").write_text(f"ada:{secret.stdout}")
    conf = (DOCS / "nginx.conf").read_text().replace("/etc/nginx", str(tmp_path)).replace("CHANGE-ME", "s3cret")
    for old, new in (("listen 443", f"listen 127.0.0.1:{tls}"), ("1:8080", f"1:{web}"), ("1:13000", f"1:{grpc}")):
        assert old in conf
        conf = conf.replace(old, new)
    (tmp_path / "nginx.conf").write_text(conf)
    tmp_path.chmod(0o755)
    options = f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/nginx.log; user root;"
    with serving(place, "127.0.0.1", web, grpc):
        command = [
            shutil.which("nginx", path="/usr/sbin:" + os.environ["PATH"]) or "",
            "-c",
            str(tmp_path / "nginx.conf"),
        ]
        process = popen([*command, "-g", options], stderr=subprocess.DEVNULL)
        proxy = Proxy(tls, tmp_path / "atp_tune.crt", place)
        try:
            wait_until(lambda: answers(proxy))
            yield proxy
        finally:
            process.terminate()
            process.wait(HANGS)


def answers(proxy: Proxy) -> bool:
    try:
        return proxy.page(None) > 0
    except OSError:
        return False


def make_certificate(folder: Path) -> None:
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(folder / "atp_tune.key"), "-out", str(folder / "atp_tune.crt")]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)


def test_a_proxy_with_tls_and_logins(nginx: Proxy, place: Path) -> None:
    assert (nginx.page(None), nginx.page("ada:wrong"), nginx.page("ada:lovelace")) == (401, 401, 200)
    refused = (
        f"storage grpcs://127.0.0.1:{nginx.port}: refuses; set ATP_TUNE_TOKEN to the token that its proxy asks for"
    )
    assert nginx.worker(None).error == refused
    assert nginx.worker("wrong").error == refused
    assert "no TLS that can be trusted" in nginx.worker("s3cret", trusted=False).error
    answer = nginx.worker("s3cret")
    assert answer.code == 0
    assert [trial.state for trial in trials(place)] == [TrialState.COMPLETE] * 3
    assert study_file(place).study.search.trials == 3


def test_plain_grpc_to_a_port_with_tls(nginx: Proxy, place: Path) -> None:
    answer = finish(start("--study", place / "tiny.toml", "--storage", f"grpc://127.0.0.1:{nginx.port}"))
    assert "write grpcs://" in answer.error

"""`tune.py serve`: the dashboard, and the storage for workers on other machines."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.terminal import console, trials
from atp_tune.errors import printable

if TYPE_CHECKING:
    from atp_tune.serving.servers import Served, Service


def serve(
    *,
    study: str | None = None,
    storage: str | None = None,
    listen: str = "127.0.0.1",
    port: int = 8080,
    grpc_port: int = 13000,
    artifacts: Path | None = None,
) -> None:
    """Serve Optuna's dashboard for all studies of a storage, and let workers on other machines join them.

    Without `--study` and `--storage` it serves the database in `studies/` that was changed last.

    Example: `python tune.py serve`, then `python tune.py --study smol --storage grpc://HOST:13000` on any machine

    Options:
        study NAME: Serve the storage of this study, with all studies in it.
        listen ADDRESS: 0.0.0.0 lets other machines connect.
        port 0..65535: Port of the dashboard.
        grpc_port 0..65535: Port for workers on other machines.
        artifacts DIR: Folder of the dashboard's files; default: beside the database.
    """
    from atp_tune.cli.terminal import STOPS, quiet
    from atp_tune.serving.servers import choose
    from atp_tune.serving.servers import serve as answer

    service = choose(study, storage, listen, port, grpc_port, artifacts)
    told: list[int] = []
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in STOPS}
    try:
        with quiet():
            answer(service, lambda: bool(told), lambda served: _show(service, served), console.print)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print("stopped: everything that workers sent is stored")


def _show(service: "Service", served: "Served") -> None:
    """Prints which studies are served, the dashboard's address, and the command by which workers join."""
    from atp_tune.serving.servers import host_of, is_loopback
    from atp_tune.storage.database import without_password

    names = served.studies if len(served.studies) <= 5 else [*served.studies[:4], f"… {len(served.studies)} studies"]
    studies = ", ".join(map(printable, names)) or "no study yet"
    name = host_of(service.listen)
    console.print(f"serving {without_password(service.address)}: {studies}")
    if service.others:
        console.print(f"not served:   {', '.join(map(printable, service.others))}; --study NAME serves its database")
    console.print(f"dashboard:    http://{name}:{served.port}")
    console.print(f"workers join: python tune.py --study NAME --storage grpc://{name}:{served.grpc_port}")
    if not is_loopback(service.listen):
        console.print(
            "warning: neither port has a login: whoever can connect can change and delete studies; "
            "docs/serving.md shows a proxy with TLS and a token", style="yellow",
        )  # fmt: skip
    console.print("Ctrl-C stops", style="dim")


# --- `tune.py merge`: copies the trials of several databases into a new one.


def merge(storages: list[str], *, out: Path, study: str | None = None) -> None:
    """Merge the trials of one study from several databases, as of machines without a shared network, into a new one.

    Example: `python tune.py merge here.db there.db --out both.db`

    Options:
        storages FILE…: Databases or storage URLs of one study.
        out FILE: The new database.
        study NAME: Name of the study; needed if the databases hold several.
    """
    from atp_tune.api.merging import merge as unite
    from atp_tune.cli.terminal import quiet
    from atp_tune.results.summary import summarise

    with quiet():
        merged = unite(storages, out, study)
    for share in merged.shares:
        known = f", {share.known} of them known already" if share.known else ""
        left = f"; {share.unfinished} running or waiting trials are left out" if share.unfinished else ""
        console.print(f"{share.address}: {trials(share.trials)}{known}{left}")
    found = summarise(merged.study)
    console.print(f"{out}: {trials(len(found.trials))}, {found.done} of {found.total} done")
    file = found.made_from.name if found.made_from else "NAME"
    other = "" if found.name == file else f" --study-name {found.name}"
    console.print(f"resume: python tune.py --study {file}{other} --storage sqlite:///{out}")

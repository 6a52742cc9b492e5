"""A Hugging Face hub on this machine: folders KIND/ORG/NAME served as far as downloads need it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders below `root`; a file GATED makes one gated; main is the only revision."""

    root: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(body)

    def do_GET(self) -> None:
        self.answer("")

    def answer(self, body: str) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        self.asked.append("/".join(parts))
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        if parts == [""]:  # somebody asks whether there is a hub at all
            self.refuse(404, "EntryNotFound")
            return
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repository, action, rest = self.root / kind / parts[0] / parts[1], parts[2:3], parts[3:]
        if not repository.is_dir():
            self.refuse(401, "RepoNotFound")
        elif (repository / "GATED").exists():
            self.refuse(403, "GatedRepo")
        elif rest and rest[0] not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif api:
            self.describe(repository, action, rest[1:], body)
        else:
            self.download(repository.joinpath(*rest[1:]))

    def describe(self, repository: Path, action: list[str], rest: list[str], body: str) -> None:
        rows = [row(file, repository) for file in sorted(repository.rglob("*"))]
        if action == ["tree"]:
            whole = "recursive=True" in self.path or "recursive=true" in self.path
            inside = [row for row in rows if str(row["path"]).startswith("/".join([*rest, ""]))]
            depth = len(rest)
            self.send_json([row for row in inside if whole or str(row["path"]).count("/") == depth])
        elif action == ["paths-info"]:
            self.send_json([row for row in rows if str(row["path"]) in unquote(body)])
        else:
            names = [{"rfilename": row["path"]} for row in rows if row["type"] == "file"]
            name = "/".join(repository.parts[-2:])
            self.send_json({"id": name, "sha": COMMIT, "siblings": names, "tags": [], "private": False})

    def download(self, file: Path) -> None:
        if not file.is_file():
            self.refuse(404, "EntryNotFound")
            return
        self.send(200, file.read_bytes(), {"ETag": f'"{tag(file)}"', "X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def row(file: Path, repository: Path) -> dict[str, object]:
    path = str(file.relative_to(repository))
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": "0" * 40}
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": tag(file)}


def tag(file: Path) -> str:
    return hashlib.sha1(str(file).encode() + file.read_bytes()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the hub's address and the paths that were asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("At", (Hub,), {"root": root, "asked": asked}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

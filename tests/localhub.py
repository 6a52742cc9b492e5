"""A Hugging Face hub on this machine: folders KIND/ORG/NAME, served as far as downloads and uploads need it.

`publish_c4` and `publish_wikitext2` make the two data sets of the papers, with texts of one's own.
"""

import base64
import gzip
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors",)  # files that go to the large file storage


@dataclass
class Uploads:
    """What uploads need to know, and what they left: accounts by token, visibilities, large files and commits.

    `hold`: SHA-256 of a large file whose upload is not answered until `go_on` is set. `cut`: KIND/ORG/NAME/FILE, whose
    download is cut off in the middle, once; `resumed`: bytes from which on a file was asked for.
    """

    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    hold: str | None = None
    cut: str | None = None
    resumed: list[int] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders below `root`; a file GATED makes one gated; main is the only revision."""

    root: Path
    asked: list[str]
    uploads: Uploads

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = urlparse(self.path).path
        if path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.offer(json.loads(body))
        elif "/preupload/" in path or "/commit/" in path:
            self.asked.append(path.strip("/"))
            self.write(path.split("/")[3:], body)
        else:
            self.answer(body)

    def do_PUT(self) -> None:
        name, content = self.path.rpartition("/")[2], self.body()
        assert hashlib.sha256(content).hexdigest() == name
        if name == self.uploads.hold:
            self.uploads.held.set()
            self.uploads.go_on.wait()
            return  # the connection is closed without an answer
        self.uploads.large[name] = content
        self.uploads.received.append(name)
        self.send(200, b"", {})

    def body(self) -> bytes:
        """What was sent, also in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    @property
    def account(self) -> dict[str, Any] | None:
        return self.uploads.accounts.get(str(self.headers["Authorization"]).removeprefix("Bearer "))

    def may_write(self, owner: str) -> bool:
        """Answers with an error if the request's account may not write under an owner."""
        account = self.account
        orgs = [org["name"] for org in account["orgs"] if org["roleInOrg"] != "read"] if account else []
        if account and owner in (account["name"], *orgs):
            return True
        self.send(403 if account else 401, b'{"error": "no permission"}', {"Content-Type": "application/json"})
        return False

    def create(self, asked: dict[str, Any]) -> None:
        if self.may_write(asked["organization"]):
            name = f"{asked['organization']}/{asked['name']}"
            folder = self.root / "models" / name
            status = 409 if folder.is_dir() else 200
            if status == 200:
                folder.mkdir(parents=True)
                self.uploads.private[name] = asked.get("visibility") == "private" or asked.get("private", False)
            url = f"http://{self.headers['Host']}/{name}"
            self.send(status, json.dumps({"url": url}).encode(), {"Content-Type": "application/json"})

    def offer(self, asked: dict[str, Any]) -> None:
        """Where to send which large files: those that are not stored yet."""
        place = f"http://{self.headers['Host']}/large/"
        self.send_json({"transfer": "basic", "objects": [
            found if found["oid"] in self.uploads.large
            else {**found, "actions": {"upload": {"href": place + found["oid"]}}}
            for found in asked["objects"]
        ]})  # fmt: skip

    def write(self, parts: list[str], body: str) -> None:
        """Says how files are to be sent, or makes a commit of them."""
        folder = self.root / "models" / parts[0] / parts[1]
        if not self.may_write(parts[0]):
            return
        if parts[2] == "preupload":
            self.send_json({"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": git_oid(folder / file["path"])}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
            return
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.uploads.large[value["oid"]])
        self.uploads.commits.append(lines[0]["value"]["summary"])
        self.send_json(
            {"commitUrl": f"http://{self.headers['Host']}/{parts[0]}/{parts[1]}/commit/{COMMIT}", "commitOid": COMMIT}
        )

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
        if len(parts) == 1:
            if parts == ["whoami-v2"] and self.account:
                self.send_json(self.account)
            else:
                self.refuse(401 if parts == ["whoami-v2"] else 404, "")
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
            private = self.uploads.private.get(name, False)
            self.send_json({"id": name, "sha": COMMIT, "siblings": names, "tags": [], "private": private})

    def download(self, file: Path) -> None:
        if not file.is_file():
            self.refuse(404, "EntryNotFound")
            return
        content, headers = file.read_bytes(), {"ETag": f'"{tag(file)}"', "X-Repo-Commit": COMMIT}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start = int(found[1])
            self.uploads.resumed.append(start)
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(206, content[start:], {**headers, "Content-Range": span})
        elif self.command == "GET" and str(file.relative_to(self.root)) == self.uploads.cut:
            self.uploads.cut, self.close_connection = None, True
            self.send(200, content, headers, len(content) // 2)
        else:
            self.send(200, content, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """Answers; `sent`: so many bytes of what the headers promise."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])


def publish_c4(root: Path, files: Mapping[str, Iterable[str]]) -> None:
    """C4 below a hub's root: the documents of each file, such as `train.00000-of-01024`."""
    folder = root / "datasets/allenai/c4/en"
    folder.mkdir(parents=True)
    splits = {"features": [{"name": "text", "dtype": "string"}], "splits": [{"name": "train", "num_examples": 99}]}
    card = f"---\nconfigs:\n- config_name: en\n  data_files: en/*.json.gz\ndataset_info:\n- {json.dumps(splits)}\n---\n"
    (folder.parent / "README.md").write_text(card)
    for name, documents in files.items():
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"} for text in documents]
        content = "\n".join(map(json.dumps, rows)).encode()
        (folder / f"c4-{name}.json.gz").write_bytes(gzip.compress(content))


def publish_wikitext2(root: Path, splits: Mapping[str, Iterable[str]]) -> None:
    """WikiText-2 below a hub's root: the lines of each split."""
    import pyarrow
    import pyarrow.parquet

    folder = root / "datasets/Salesforce/wikitext/wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    files = "\n".join(f"  - split: {name}\n    path: wikitext-2-raw-v1/{name}-*" for name in splits)
    card = f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}\n---\n"
    (folder.parent / "README.md").write_text(card)
    for name, lines in splits.items():
        table = pyarrow.table({"text": list(lines)})
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")


def row(file: Path, repository: Path) -> dict[str, object]:
    path = str(file.relative_to(repository))
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": "0" * 40}
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": tag(file)}


def tag(file: Path) -> str:
    return hashlib.sha1(str(file).encode() + file.read_bytes()).hexdigest()


def git_oid(file: Path) -> str | None:
    """As the hub names a file's content: of a large file its SHA-256, else git's."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    if file.name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(root: Path, uploads: Uploads | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yields the hub's address and the paths that were asked for."""
    asked: list[str] = []
    known = {"root": root, "asked": asked, "uploads": uploads or Uploads()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("At", (Hub,), known))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""The upload of a sparse folder to a hub on this machine, and all that is checked before."""

import json
import platform
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from expect import parametrize, slow
from huggingface_hub import constants, snapshot_download
from localhub import Uploads, serve
from tinystudy import CommandLine, finish, start, wait_until

import atp_tune
from atp_tune.folders import publishing
from atp_tune.folders.publishing import published, stage
from atp_tune.utils.cache import sha256_of

ALICE: dict[str, Any] = {
    "name": "alice",
    "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}
EVE: dict[str, Any] = {"name": "eve", "orgs": [], "auth": {"accessToken": {"role": "read"}}}


def grained(*permissions: str) -> dict[str, Any]:
    scopes = [{"entity": {"name": "fin"}, "permissions": list(permissions)}]
    return {
        "name": "fin",
        "orgs": [],
        "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scopes}}},
    }


class Site:
    """A hub with accounts; its repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uploads = Uploads(
            {"a": ALICE, "e": EVE, "f": grained("repo.content.read"), "g": grained("repo.content.read", "repo.write")}
        )
        self.asked: list[str] = []
        self.address = ""

    def folder(self, name: str) -> Path:
        return self.root / "models" / name


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    found = Site(tmp_path / "hub")
    found.root.mkdir()
    with serve(found.root, found.uploads) as (found.address, found.asked):
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no login"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "a")
        yield found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_ours(folder: Path) -> dict[str, bytes]:
    """The contents but for what names paths of this machine, which is not uploaded."""
    return {name: content for name, content in contents(folder).items() if name != "atp_tune.json"}


# --- the upload


@slow
def test_apply_uploads_what_it_writes(done: Path, site: Site, command: CommandLine, tmp_path: Path) -> None:
    words = ["apply", "--config", done / "tiny.best.json", "--out", tmp_path / "out", "--push", "lab/tiny", "--private"]
    answer = command.ok(*words)
    assert f"uploaded: {site.address}/lab/tiny" in answer.out
    assert site.uploads.private == {"lab/tiny": True}
    assert site.uploads.received == [sha256_of(tmp_path / "out" / "model.safetensors")]
    back = Path(snapshot_download("lab/tiny", cache_dir=tmp_path / "back"))
    assert without_ours(back) == without_ours(tmp_path / "out")
    assert {"model.safetensors", "README.md", "atp_tune.json"} <= contents(back).keys()

    weights = (tmp_path / "out" / "model.safetensors").stat()
    again = command.ok(*words)  # neither pruned nor uploaded again
    assert "was written before" in again.out
    assert (tmp_path / "out" / "model.safetensors").stat() == weights
    assert len(site.uploads.received) == len(site.uploads.commits) == 1

    (tmp_path / "out" / "notes.txt").symlink_to(done / "test.txt")
    assert command(*words).error.endswith("outside its folder; copy the file")
    assert len(site.uploads.commits) == 1


@pytest.fixture
def login(site: Site, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": site.address, "HF_TOKEN": "a", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}


@slow
def test_an_upload_that_was_killed_goes_on(
    sparse: Path, site: Site, login: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localhub.LARGE", (".safetensors", "tokenizer.json"))
    last, first = sha256_of(sparse / "tokenizer.json"), sha256_of(sparse / "model.safetensors")
    site.uploads.hold = last
    process = start("push", sparse, "alice/tiny", environment=login)
    wait_until(lambda: site.uploads.held.is_set() and site.uploads.received == [first])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert site.uploads.commits == []
    site.uploads.hold = None
    site.uploads.go_on.set()
    done = finish(start("push", sparse, "alice/tiny", environment=login))
    assert done.code == 0
    assert site.uploads.received == [first, last]  # each once
    assert without_ours(site.folder("alice/tiny")) == without_ours(sparse)


@slow
def test_ctrl_c_says_how_to_go_on(sparse: Path, site: Site, login: dict[str, str]) -> None:
    site.uploads.hold = sha256_of(sparse / "model.safetensors")
    process = start("push", sparse, "alice/tiny", "--private", environment=login)
    wait_until(site.uploads.held.is_set)
    process.send_signal(signal.SIGINT)
    site.uploads.go_on.set()
    done = finish(process)
    assert done.code == 130
    assert f"stopped: resume with: python tune.py push {sparse} alice/tiny --private" in done.out
    assert "Traceback" not in done.err


# --- what is refused, before anything is pruned or uploaded


@parametrize(
    ("name", "token", "said"),
    [
        ("tiny", "a", "the name on the hub must be ORG/NAME"),
        ("a/b/c", "a", "the name on the hub must be ORG/NAME"),
        ("alice/../x", "a", "the name on the hub must be ORG/NAME"),
        ("alice/x y", "a", "the name on the hub must be ORG/NAME"),
        ("alice/tiny", None, "alice/tiny: there is no login to the hub; run: hf auth login"),
        ("alice/tiny", "wrong", "alice/tiny: the hub does not accept the login; run: hf auth login"),
        ("bob/tiny", "a", "bob/tiny: the login is alice, which is not in bob; give alice/NAME, or run: hf auth login"),
        ("museum/tiny", "a", "museum/tiny: alice may only read in museum"),
        ("eve/tiny", "e", "eve/tiny: the token of eve may only read"),
        ("fin/tiny", "f", "fin/tiny: the token of fin may only read"),
    ],
)
def test_who_may_not_write_is_told_before(
    name: str,
    token: str | None,
    said: str,
    done: Path,
    site: Site,
    command: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    answer = command("apply", "--config", done / "tiny.best.json", "--out", done / "out", "--push", name)
    assert answer.error.startswith(said)
    assert answer.out == ""
    assert not (done / "out").exists()
    assert site.uploads.private == {}


def test_a_public_repository_is_no_place_for_a_private_folder(done: Path, site: Site, command: CommandLine) -> None:
    site.folder("alice/tiny").mkdir(parents=True)
    words = ["apply", "--config", done / "tiny.best.json", "--out", done / "out", "--push", "alice/tiny", "--private"]
    assert command(*words).error.startswith("alice/tiny: is public on the hub already; make it private there first")
    site.uploads.private["alice/tiny"] = True
    publishing.check_permission("alice/tiny", private=True)


def test_folders_that_are_no_sparse_checkpoints(done: Path, site: Site, command: CommandLine) -> None:
    (done / "model" / "atp_tune.json").write_bytes((done / "tiny.best.json").read_bytes())
    (done / "model" / "notes.txt").symlink_to(done / "test.txt")
    said = command("push", done / "model", "alice/tiny").error
    assert (
        said == f"{done / 'model' / 'notes.txt'}: is a link to {done / 'test.txt'}, outside its folder; copy the file"
    )
    assert site.asked == []


@slow
def test_nothing_of_this_machine_is_published(
    place: Path, site: Site, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder of each kind, pruned far from its study: a trained one had the user's name in its record."""
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setenv("USER", "secret-user")
    home = Path(shutil.copytree(place, tmp_path / "home/secret-user/clients"))
    told = json.loads((home / "model/config.json").read_text()) | {"_name_or_path": f"{home}/model"}
    (home / "model/config.json").write_text(json.dumps(told))
    train = {"recover.steps": 4, "recover.batch": 4, "recover.min_increase": 0.0, "recover.learning_rate": 0.01}
    trained = atp_tune.tune(home / "tiny.toml", settings=train, progress=False)
    trained.save(tmp_path / "out/trained")
    trained.save(tmp_path / "out/packed", packed=True)
    channels = {"prune.pattern": "channels", "sparsity": 0.25, "storage": "sqlite:///channels.db"}
    atp_tune.tune(home / "tiny.toml", settings=channels, progress=False).configuration().save(
        tmp_path / "out/slim", slim=True
    )
    more = ("--steps", "2", "--seqlen", "32", "--batch", "2", "--patience", "0")
    command.ok("finetune", tmp_path / "out/trained", "--out", tmp_path / "out/more", *more)
    for kind in ("trained", "packed", "slim", "more"):
        command.ok("push", tmp_path / "out" / kind, f"alice/{kind}")
        there = site.folder(f"alice/{kind}")
        for name, content in contents(there).items():
            for secret in ("secret-user", "secret-host", str(tmp_path), f"{Path.home()}/"):
                assert secret.encode() not in content, (kind, name, secret)
        command.ok("apply", "--verify", there)


@parametrize(
    ("name", "key", "value", "expected"),
    [
        ("config.json", "_name_or_path", "clients/acme/llama", "llama"),
        ("tokenizer_config.json", "name_or_path", "clients\\acme", "acme"),
        ("config.json", "_name_or_path", "acme/llama", "acme/llama"),
        ("trainer_state.json", "best_model_checkpoint", "clients/checkpoint-3", "checkpoint-3"),
    ],
)
def test_the_folders_that_a_dense_model_names_are_left_out(name: str, key: str, value: str, expected: str) -> None:
    """Relative ones too, and those of a `Trainer`: all its small files are copied."""
    assert json.loads(published({name: json.dumps({key: value})}, Path())[name]) == {key: expected}


def test_what_people_wrote_into_the_dense_folder_stays_here(tmp_path: Path) -> None:
    """Their notes were uploaded with whatever they name; then licences stayed here whose names are not in capitals."""
    terms = ("LICENSE.txt", "license.md", "LLAMA_LICENSE.txt", "Model-Licence.md", "LICENSES/MIT.txt", "NOTICE")
    terms += ("notice.txt", "ThirdPartyNotices.txt", "more/Copyright.txt", "COPYING.rst", "USE_POLICY.md")
    tokens = ("merges.txt", "vocab.txt", "spm.vocab.txt", "added_tokens.txt", "bpe_codes.txt", "Dict.txt")
    kept = (*terms, *tokens, "tokenizer/vocab.txt", "README.md", "config.json")
    left = ("notes.txt", "TODO.md", "train.log", "run.ipynb", "predictions.txt", "access_tokens.txt", "more/README.md")
    for name in (*kept, *left):
        (tmp_path / "sparse" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sparse" / name).write_text("{}")
    manifest = {"files": {name: sha256_of(tmp_path / "sparse" / name) for name in (*kept, *left)}}
    (tmp_path / "sparse/atp_tune.json").write_text(json.dumps({"manifest": manifest}))
    (tmp_path / "there").mkdir()
    stage(tmp_path / "sparse", tmp_path / "there")
    assert {*contents(tmp_path / "there")} == {*kept, "atp_tune.json"}
    assert {*json.loads((tmp_path / "there/atp_tune.json").read_text())["manifest"]["files"]} == {*kept}


@slow
def test_what_was_not_asked_for_is_not_uploaded(
    done: Path, sparse: Path, site: Site, command: CommandLine, tmp_path: Path
) -> None:
    """The folder that is not packed, in the place of the packed one; and one that was changed since it was written."""
    asked = ("apply", "--config", done / "tiny.best.json", "--out", sparse, "--push", "alice/tiny")
    assert "exists already" in command(*asked, "--packed").error
    command.ok("pack", sparse, "--out", tmp_path / "packed")
    there = ("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "packed", "--push", "alice/tiny")
    assert "exists already" in command(*there).error
    with (sparse / "config.json").open("a") as stream:
        stream.write(" ")
    assert "not what was written; changed: config.json" in command(*asked).error
    assert "not what was written; changed: config.json" in command("push", sparse, "alice/tiny").error
    assert site.uploads.commits == []


@slow
def test_from_python(done: Path, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """`Result.push` prunes again, and uploads what `apply` writes."""
    result = atp_tune.load_study(done / "tiny.toml")
    assert result.push("lab/ours").endswith("lab/ours")
    there = contents(site.folder("lab/ours"))
    assert {"README.md", "atp_tune.json", "config.json", "model.safetensors", "tokenizer.json"} <= there.keys()
    result.save(done / "sparse")
    assert there["model.safetensors"] == (done / "sparse" / "model.safetensors").read_bytes()
    assert capsys.readouterr().out == ""

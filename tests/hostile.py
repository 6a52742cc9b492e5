"""What strangers may hand over: a home folder with things in it that are nobody's business, and inputs of each kind.

An input changes a finished tiny study that was downloaded into that home. Its word says what becomes of it where a
command goes on all the same; what is refused is seen by the test.
"""

import hashlib
import json
import os
import pickle
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import load_file, save_file

ESCAPES = "\x1b[2J\x9b31m\u202e"
MARKUP = f"{ESCAPES}<img src=x onerror=alert(1)>\n# `x` | $y$ \\input{{x}} </script>"
SECRET = "the user's own words, which nobody else is to read"
SQL = "'; DROP TABLE studies; --"
UUID = "01234567-89ab-cdef-0123-456789abcdef"
DEEP = "[" * 100_000 + "]" * 100_000
MINE = "open('evil', 'w').write('I was run')"
SURE = "ignored", "link not followed", "code not run", "treated as text", "used"

Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Input:
    """Something hostile: its name in the table, what makes it of a study's folder, and what a command makes of it."""

    name: str
    change: Change
    word: str = "used"


class Evil:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def make_home(home: Path, study: Path) -> Path:
    """A user's home with a study in it that was downloaded; the study's folder."""
    place = home / "download" / "a" / "study"
    shutil.copytree(study, place, symlinks=True)
    for name in (".bashrc", ".ssh/id_rsa", "notes.txt", "README.md", "work/notes.txt", "download/notes.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(SECRET)
    (home / "download" / ".bashrc").write_text("of a stranger")
    with closing(sqlite3.connect(home / "other.db")) as connection, connection:
        connection.execute("CREATE TABLE cookies (name TEXT)")
    return place


def tree(home: Path) -> dict[str, object]:
    """All that lies in a folder: kinds, contents and where links lead."""
    return {str(path.relative_to(home)): _content(path) for path in sorted(home.rglob("*"))}


def _content(path: Path) -> object:
    if path.is_symlink():
        return "link", str(path.readlink())
    kind = path.lstat().st_mode
    return (kind, hashlib.sha256(path.read_bytes()).hexdigest()) if path.is_file() else kind


# --- ways to change things


def replaced(name: str, content: str | bytes) -> Change:
    def change(place: Path) -> None:
        _gone(place / name)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edited(name: str, **values: Any) -> Change:
    """Keys of a JSON file become other values; dots lead into tables."""

    def change(place: Path) -> None:
        document = json.loads((place / name).read_text())
        for key, value in values.items():
            *tables, last = key.split("__")
            table = document
            for step in tables:
                table = table.setdefault(step, {})
            table[last] = value
        (place / name).write_text(json.dumps(document))

    return change


def linked(name: str, target: str) -> Change:
    """A link; a target that begins with ~ lies in the user's home."""

    def change(place: Path) -> None:
        _gone(place / name)
        (place / name).symlink_to(target.replace("~", str(place.parents[2])))

    return change


def fifo(name: str) -> Change:
    def change(place: Path) -> None:
        _gone(place / name)
        os.mkfifo(place / name)

    return change


def folder(name: str) -> Change:
    def change(place: Path) -> None:
        _gone(place / name)
        (place / name).mkdir()

    return change


def _gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def both(*changes: Change) -> Change:
    def change(place: Path) -> None:
        for one in changes:
            one(place)

    return change


# --- databases


def sql(query: str, *values: Any) -> Change:
    def change(place: Path) -> None:
        with closing(sqlite3.connect(place / "tiny.db")) as connection, connection:
            connection.execute("PRAGMA writable_schema = 0")
            for one in query.split(";;"):
                connection.execute(one, values)

    return change


def attr(key: str, value: Any, table: str = "study_system") -> Change:
    owner = table.partition("_")[0]
    query = f"INSERT OR REPLACE INTO {table}_attributes ({owner}_id, key, value_json) VALUES (1, ?, ?)"
    return sql(query, key, value.decode() if isinstance(value, bytes) else json.dumps(value))  # bytes: JSON as it is


def artifact(name: str, table: str = "study_system", prefix: str = "artifacts:") -> Change:
    meta = {"artifact_id": name, "filename": "best.json", "mimetype": "text/html", "encoding": None}
    return attr(f"{prefix}{name}", json.dumps(meta), table)


def _cut(place: Path) -> None:
    with (place / "tiny.db").open("r+b") as stream:
        stream.truncate(20_000)


def _link_artifact(place: Path) -> None:
    (place / "tiny.artifacts").mkdir(exist_ok=True)
    (place / "tiny.artifacts" / UUID).symlink_to(place.parents[2] / ".ssh" / "id_rsa")
    artifact(UUID)(place)


def _all_of(table: str, value: str) -> Change:
    return sql(f"UPDATE {table} SET value_json = ?", value)


def _made_from(**values: Any) -> Change:
    def change(place: Path) -> None:
        query = "SELECT value_json FROM study_system_attributes WHERE key = 'atp_tune:made_from'"
        with closing(sqlite3.connect(place / "tiny.db")) as connection, connection:
            made = json.loads(connection.execute(query).fetchone()[0]) | values
        attr("atp_tune:made_from", made)(place)

    return change


DATABASE = [
    Input("artifact named ../../../.bashrc", artifact("../../../.bashrc"), "ignored"),
    Input("a trial's artifact of that name", artifact("../../../.bashrc", "trial_system"), "ignored"),
    Input("the same, as the dashboard stores it", artifact("../../../.bashrc", prefix="dashboard:artifacts:1:"),
          "ignored"),
    Input("artifact named /etc/passwd", artifact("/etc/passwd"), "ignored"),
    Input("artifact that is a link to ~/.ssh", _link_artifact, "link not followed"),
    Input("folder of artifacts that is a link to ~", linked("tiny.artifacts", "~"), "link not followed"),
    Input("artifact with invalid JSON", attr(f"artifacts:{UUID}", "no JSON"), "ignored"),
    Input("artifact that is a number", attr(f"artifacts:{UUID}", 5), "ignored"),
    Input("note without its first part", both(
        attr("dashboard:note_ver", 1), attr("dashboard:note_str:3", "x")), "ignored"),
    Input("note with an invalid version", attr("dashboard:note_ver", "x"), "ignored"),
    Input("markup and escapes as attributes", sql(
        "UPDATE trial_user_attributes SET value_json = ? WHERE key IN ('device', 'host')", json.dumps(MARKUP)),
        "treated as text"),
    Input("markup as the study's description", _made_from(name=MARKUP), "treated as text"),
    Input("a study file in /etc", _made_from(path="/etc/passwd"), "treated as text"),
    Input("SQL as a key", attr(SQL, SQL, "study_user"), "treated as text"),
    Input("SQL as a parameter", sql(
        "UPDATE trial_params SET param_name = ? WHERE trial_id = 3 AND param_name = 'beta'", SQL), "ignored"),
    Input("NaN and infinity", _all_of("trial_user_attributes", "[NaN, Infinity, -Infinity, 1e999]"), "ignored"),
    Input("numbers of 5000 digits", _all_of("trial_user_attributes", "9" * 5000), "ignored"),
    Input("attributes of the wrong type", _all_of("study_user_attributes", '{"x": [1]}'), "ignored"),
    Input("a system attribute of the wrong type", _all_of("trial_system_attributes", "7"), "ignored"),
    Input("JSON of 100,000 levels", attr("x", DEEP.encode(), "study_user"), "ignored"),
    Input("attributes with invalid JSON", _all_of("study_user_attributes", "{"), "ignored"),
    Input("system attributes with invalid JSON", _all_of("study_system_attributes", "{"), "ignored"),
    Input("invalid values", sql("UPDATE trial_values SET value = -5 WHERE trial_id = 2"), "ignored"),
    Input("an invalid state", sql("UPDATE trials SET state = 'NONSENSE'"), "ignored"),
    Input("invalid times", sql("UPDATE trials SET datetime_start = 'tomorrow'"), "ignored"),
    Input("a number of 19 digits", sql("UPDATE trials SET number = 9223372036854775807 WHERE number = 5"), "ignored"),
    Input("an invalid distribution", sql("UPDATE trial_params SET distribution_json = '{}'"), "ignored"),
    Input("different distributions of one parameter", sql(
        "UPDATE trial_params SET distribution_json = ? WHERE param_name = 'beta' AND trial_id = 3",
        '{"name": "CategoricalDistribution", "attributes": {"choices": [0.1, 0.2]}}'), "ignored"),
    Input("a missing table", sql("DROP TABLE trial_values"), "ignored"),
    Input("a missing column", sql("ALTER TABLE trials RENAME COLUMN state TO other"), "ignored"),
    Input("a view in place of a table", sql(
        "ALTER TABLE trial_params RENAME TO x;;CREATE VIEW trial_params AS SELECT * FROM x")),
    Input("a trigger that deletes trials", sql(
        "CREATE TRIGGER evil AFTER INSERT ON trial_user_attributes BEGIN DELETE FROM trials WHERE number = 0; END")),
    Input("a failed trial that repeats a missing one", sql(
        "UPDATE trials SET state = 'FAIL' WHERE number = 5;;"
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES "
        "(6, 'failure', '\"failed before, as trial 99: x\"')"), "treated as text"),
    Input("a truncated file", _cut),
    Input("a file of random bytes", replaced("tiny.db", np.random.default_rng(0).bytes(50_000))),
    Input("an empty file", replaced("tiny.db", b""), "ignored"),
    Input("a folder", folder("tiny.db")),
    Input("a pipe", fifo("tiny.db")),
    Input("a link to another program's database", linked("tiny.db", "~/other.db")),
]  # fmt: skip


# --- model folders


def tensors(header: str | bytes, data: bytes = bytes(64), length: int | None = None) -> Change:
    """A safetensors file by its header."""
    raw = header.encode() if isinstance(header, str) else header
    return replaced("model/model.safetensors", struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def weights(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(place: Path) -> None:
        found = load_file(place / "model/model.safetensors")
        change(found)
        save_file(found, place / "model/model.safetensors", {"format": "pt"})

    return apply


def config(**values: Any) -> Change:
    return edited("model/config.json", **values)


def code(name: str) -> Change:
    """Code in the folder that its configuration asks for."""
    table = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    return both(replaced("model/evil.py", MINE), edited(f"model/{name}", auto_map=table))


def _vocabulary(place: Path) -> None:
    file = place / "model" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["vocab"] = {token: id + 10**6 * (id > 50) for token, id in document["model"]["vocab"].items()}
    file.write_text(json.dumps(document))


def _pickles(place: Path) -> None:
    (place / "model" / "model.safetensors").unlink()
    (place / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def index(**places: Any) -> Change:
    return replaced("model/model.safetensors.index.json", json.dumps({"weight_map": places}))


HEADER = '{"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}'
MODEL = [
    Input("code of its own", both(code("config.json"), config(model_type="evil"))),
    Input("code for a known type", code("config.json"), "code not run"),
    Input("code for the tokenizer", code("tokenizer_config.json"), "code not run"),
    Input("code of another repository", config(auto_map={"AutoConfig": "evil/repo--evil.Evil"}), "code not run"),
    Input("auto_map of the wrong type", config(auto_map=[5, {}, None]), "code not run"),
    Input("a kernel of a repository", config(attn_implementation="evil/kernel")),
    Input("a pickle that runs code", _pickles),
    Input("a pickle beside safetensors", lambda place: (place / "model/pytorch_model.bin").write_bytes(
        pickle.dumps(Evil())), "code not run"),
    Input("an index of weights in other folders", index(a="../../../../other.safetensors")),
    Input("an index of absolute paths", index(a="/etc/x.safetensors")),
    Input("an index of the wrong type", index(a=[1], b={})),
    Input("an index with invalid JSON", replaced("model/model.safetensors.index.json", DEEP)),
    Input("a header of 2⁶³ bytes", tensors(HEADER, length=2**63)),
    Input("a header of 0 bytes", tensors("", length=0)),
    Input("a header of 100,000 levels", tensors(DEEP)),
    Input("a header of the wrong type", tensors("[1, 2]")),
    Input("entries of the wrong type", tensors('{"a": 5, "b": []}')),
    Input("shapes of 2⁶² values", tensors(HEADER.replace("[4, 4]", "[4611686018427387904, 4]"))),
    Input("offsets beyond the end", tensors(HEADER.replace("[0, 64]", "[0, 6400000000000]"))),
    Input("negative offsets", tensors(HEADER.replace("[0, 64]", "[-64, 0]"))),
    Input("an unknown number format", tensors(HEADER.replace("F32", "EVIL"))),
    Input("truncated weights", lambda place: os.truncate(place / "model/model.safetensors", 2000)),
    Input("weights that are a pipe", fifo("model/model.safetensors")),
    Input("weights that are a link to ~/.ssh", linked("model/model.safetensors", "~/.ssh/id_rsa")),
    Input("weights that are NaN", weights(lambda found: [tensor.fill(np.nan) for tensor in found.values()])),
    Input("weights that are infinite", weights(
        lambda found: [t.fill(np.inf) for name, t in found.items() if "embed" in name])),
    Input("weights of other shapes", weights(
        lambda found: found.update({name: tensor[:1].copy() for name, tensor in found.items()}))),
    Input("weights with other names", weights(lambda found: found.update({MARKUP: found.popitem()[1]}))),
    Input("a config with invalid JSON", replaced("model/config.json", "{")),
    Input("a config of 100,000 levels", replaced("model/config.json", DEEP)),
    Input("a config that is a list", replaced("model/config.json", "[]")),
    Input("a config that is a pipe", fifo("model/config.json")),
    Input("sizes that are words", config(hidden_size="x")),
    Input("negative sizes", config(hidden_size=-32)),
    Input("sizes of 0", config(num_attention_heads=0)),
    Input("sizes that are NaN", config(rms_norm_eps=float("nan"), hidden_size=float("nan"))),
    Input("no blocks", config(num_hidden_layers=0)),
    Input("10⁹ blocks", config(num_hidden_layers=10**9)),
    Input("a vocabulary of 10¹² tokens", config(vocab_size=10**12)),
    Input("a type that is a path", config(model_type="../../../../evil")),
    Input("a type that is a list", config(model_type=["llama"])),
    Input("settings of the wrong type", config(rope_parameters=[1], quantization_config="evil")),
    Input("a tokenizer with invalid JSON", replaced("model/tokenizer.json", "{")),
    Input("a tokenizer of 100,000 levels", replaced("model/tokenizer.json", DEEP)),
    Input("tokens that the model lacks", _vocabulary),
    Input("a tokenizer that is a link to ~/.ssh", linked("model/tokenizer.json", "~/.ssh/id_rsa")),
    Input("an unknown tokenizer class", edited("model/tokenizer_config.json", tokenizer_class="../../evil")),
    Input("tokenizer settings of the wrong type", replaced("model/tokenizer_config.json", "[1]")),
    Input("a folder among the tokenizer's files", folder("model/tokenizer.extra"), "ignored"),
    Input("a pipe among the tokenizer's files", fifo("model/vocab.txt"), "ignored"),
    Input("a link to nothing among the tokenizer's files", linked("model/merges.txt", "nothing"), "ignored"),
    Input("a file name with escapes", replaced(f"model/tokenizer{ESCAPES}.json", "{}"), "treated as text"),
    Input("a file that is a link to ~/.bashrc", linked("model/notes.txt", "~/.bashrc"), "link not followed"),
    Input("a chat template that accesses Python", replaced(
        "model/chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "code not run"),
    Input("a card with Python in its metadata", replaced(
        "model/README.md", f"---\nlicense: !!python/object/apply:os.mkdir [evil]\n---\n{MARKUP}"), "code not run"),
    Input("generation settings of the wrong type", replaced("model/generation_config.json", '{"do_sample": [1]}'),
          "ignored"),
]  # fmt: skip


# --- configurations


def best(**values: Any) -> Change:
    return edited("tiny.best.json", **values)


def text_of(source: str, **values: Any) -> Change:
    return best(calibration__source=source, **values)


def plugged(place: str) -> Change:
    """The pruner is a plug-in."""
    return best(plan__method="evil", plugins={"evil": {"kind": "pruner", "place": place, "sha256": "0" * 64}})


CONFIGURATION = [
    Input("invalid JSON", replaced("tiny.best.json", "{")),
    Input("invalid UTF-8", replaced("tiny.best.json", b'{"study": "\xff"}')),
    Input("100,000 levels", replaced("tiny.best.json", DEEP)),
    Input("a list", replaced("tiny.best.json", "[]")),
    Input("a number of 5000 digits", replaced("tiny.best.json", "9" * 5000)),
    Input("keys that allow pickles", best(model__allow_pickle=True, model__trust_remote_code=True)),
    Input("a model in /etc", best(model__id="/etc")),
    Input("a model that is a file of the user", best(model__id="../../../.ssh/id_rsa")),
    Input("a model of an unknown user", best(model__id="~nobody-at-all/x")),
    Input("a model name with NUL", best(model__id="a\0b")),
    Input("a model name of 5000 letters", best(model__id="x" * 5000)),
    Input("a model name with escapes", best(model__id=f"{ESCAPES}/x")),
    Input("a model of the hub", best(model__id="evil/model")),
    Input("a wheel of another name", best(model__id="pypi:../evil==1", model__sha256="0" * 64)),
    Input("an option of pip for a wheel", best(model__id="pypi:--index-url==http", model__sha256="0" * 64)),
    Input("a fingerprint that is a path", best(model__fingerprint="../../../../x")),
    Input("a folder with NUL", best(folder="a\0b")),
    Input("a folder of 5000 letters", best(folder="x" * 5000)),
    Input("the root folder", best(folder="/")),
    Input("a text that is ~/.ssh/id_rsa", text_of("file:~/.ssh/id_rsa")),
    Input("a text of an unknown user", text_of("file:~nobody-at-all/x.txt")),
    Input("a text name with NUL", text_of("file:a\0b.txt")),
    Input("a text name of 5000 letters", text_of(f"file:{'x' * 5000}.txt")),
    Input("a text of the hub", text_of("hub:evil/text", calibration__split="train")),
    Input("a text that is the environment", text_of("package:os:environ")),
    Input("a text of an invalid module", text_of("package:../evil:x")),
    Input("a text without a name", text_of("package:")),
    Input("10¹² windows", best(calibration__nsamples=10**12)),
    Input("10¹² windows at random", best(calibration__nsamples=10**12, calibration__sampling="random")),
    Input("windows of 10¹² tokens", best(calibration__seqlen=10**12)),
    Input("sparsities above 1", best(plan__levels=[2] * 4)),
    Input("sparsities that are NaN", best(plan__levels=[float("nan")] * 4)),
    Input("sparsities of another model", best(plan__levels=[0.5] * 999)),
    Input("sparsities of other linears", best(plan__levels=[{"sparsity": 0.5, "linears": [0.5]}] * 4)),
    Input("names of linears that are formulas and markup", best(
        plan__levels=[{"sparsity": 0.5, "linears": [0.5] * 7}] * 4,
        linears=[["=cmd|' /C calc'!A0", MARKUP, *"abcde"]] * 4, blocks="+1\n- x: &a"), "treated as text"),
    Input("a study name with markup", best(study=MARKUP), "treated as text"),
    Input("a study name that is a path", best(study="../../../x"), "treated as text"),
    Input("a trial of 19 digits", best(trial=10**18), "treated as text"),
    Input("a negative trial", best(trial=-1), "treated as text"),
    Input("invalid perplexities", best(scores={"best": {"perplexity": {"test": {"value": -1, "stderr": 0}}}})),
    Input("scores of the wrong type", best(speed=[5], zero_shot={"tasks": 1})),
    Input("markup in versions", best(versions={MARKUP: MARKUP}), "treated as text"),
    Input("a pruner in a file", both(replaced("evil.py", MINE), plugged("evil.py:evil")), "code not run"),
    Input("a pruner of a module", plugged("this:evil"), "code not run"),
    Input("a pruner whose place is no place", plugged("os.system('x')")),
    Input("a pruner that is a pipe", both(fifo("evil.py"), plugged("evil.py:evil")), "code not run"),
]  # fmt: skip


# --- study files


def toml(old: str, new: str) -> Change:
    def change(place: Path) -> None:
        text = (place / "tiny.toml").read_text()
        assert old in text
        (place / "tiny.toml").write_text(text.replace(old, new))

    return change


def source(value: str) -> Change:
    return toml('source = "model"', f"source = {json.dumps(value)}")


def calibration(value: str) -> Change:
    return toml('"file:calibration.txt"', json.dumps(value))


def stored(place: Path) -> None:
    home = place.parents[2]
    text = (place / "tiny.toml").read_text()
    (place / "tiny.toml").write_text(f'storage = "sqlite:///{home}/other.db"\n{text}')


STUDY = [
    Input("invalid TOML", replaced("tiny.toml", "= = [")),
    Input("invalid UTF-8", replaced("tiny.toml", b"description = '\xff'")),
    Input("binary", replaced("tiny.toml", np.random.default_rng(0).bytes(5000))),
    Input("100,000 levels", replaced("tiny.toml", f"x = {DEEP}")),
    Input("a number of 5000 digits", replaced("tiny.toml", f"sparsity = {'9' * 5000}")),
    Input("empty", replaced("tiny.toml", "")),
    Input("a folder", folder("tiny.toml")),
    Input("a pipe", fifo("tiny.toml")),
    Input("a link to a device", linked("tiny.toml", "/dev/null")),
    Input("a link to ~/.ssh", linked("tiny.toml", "~/.ssh/id_rsa")),
    Input("keys with escapes", toml("sparsity =", f'"{MARKUP!r}" = 1\nsparsity =')),
    Input("values of the wrong type", toml("sparsity = 0.5", "sparsity = [0.5]")),
    Input("a sparsity that is NaN", toml("sparsity = 0.5", "sparsity = nan")),
    Input("10¹² windows", toml("nsamples = 8", "nsamples = 1_000_000_000_000")),
    Input("10¹² trials", toml("trials = 6", "trials = 1_000_000_000_000")),
    Input("a description with markup", toml('description = "a tiny Llama"', f"description = {json.dumps(MARKUP)}"),
          "treated as text"),
    Input("a model in /etc", source("/etc")),
    Input("a model of an unknown user", source("~nobody-at-all/x")),
    Input("a model name with NUL", source("a\0b")),
    Input("a model name of 5000 letters", source("x" * 5000)),
    Input("a model of the hub", source("evil/model")),
    Input("a text that is ~/.ssh/id_rsa", calibration("file:~/.ssh/id_rsa")),
    Input("a text of an unknown user", calibration("file:~nobody-at-all/x.txt")),
    Input("a text name of 5000 letters", calibration(f"file:{'x' * 5000}.txt")),
    Input("a text that is the environment", calibration("package:os:environ")),
    Input("another program's database", stored),
    Input("a pruner in a file", both(
        replaced("evil.py", MINE), toml('"magnitude"]', '"evil.py:Evil"]')), "code not run"),
    Input("an allocation in a file", both(
        replaced("evil.py", MINE), toml("[allocation]", '[allocation]\nnames = "evil.py:Evil"')), "code not run"),
    Input("a sampler of a module", toml('sampler = "random"', 'sampler = "this:fly"'), "code not run"),
    Input("a text that is code", both(replaced("evil.py", MINE), calibration("evil.py:evil")), "code not run"),
    Input("a plug-in that is a pipe", both(fifo("evil.py"), toml('"magnitude"]', '"evil.py:Evil"]')), "code not run"),
    Input("a table of a plug-in with markup", both(
        toml('"magnitude"]', '"evil.py:Evil"]'), toml("[prune]", f"[prune]\nevil = {{ {json.dumps(MARKUP)} = 1 }}")),
        "code not run"),
]  # fmt: skip


# --- texts


def text(content: str | bytes, ending: str = "txt") -> Change:
    """The calibration text, under another ending too."""
    return both(replaced(f"calibration.{ending}", content), renamed(ending))


def renamed(ending: str) -> Change:
    def change(place: Path) -> None:
        for file in (place / "tiny.toml", place / "tiny.best.json", place / "sparse" / "atp_tune.json"):
            if file.is_file():
                file.write_text(file.read_text().replace("file:calibration.txt", f"file:calibration.{ending}"))

    return change


def parquet(values: list[Any], name: str = "text") -> Change:
    def change(place: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({name: values}), place / "calibration.parquet")
        renamed("parquet")(place)

    return change


def _broken_parquet(place: Path) -> None:
    parquet(["words " * 2000])(place)
    content = bytearray((place / "calibration.parquet").read_bytes())
    content[20:60] = b"\xff" * 40
    (place / "calibration.parquet").write_bytes(content)


WORDS = "the other words of a text, " * 500
TEXTS = [
    Input("a pipe", fifo("calibration.txt")),
    Input("a folder", folder("calibration.txt")),
    Input("a link to a device", linked("calibration.txt", "/dev/null")),
    Input("a link to /proc/self/mem", linked("calibration.txt", "/proc/self/mem")),
    Input("a link to nothing", linked("calibration.txt", "nothing")),
    Input("a link to itself", linked("calibration.txt", "calibration.txt")),
    Input("empty", text("")),
    Input("spaces", text(" \n" * 50), "treated as text"),
    Input("invalid UTF-8", text(b"\xff\xfe" * 5000)),
    Input("random bytes", text(np.random.default_rng(0).bytes(50_000))),
    Input("NUL and escapes", text(f"\0{ESCAPES}" * 2000), "treated as text"),
    Input("markup", text(MARKUP * 500), "treated as text"),
    Input("names of special tokens", text("<|endoftext|><s></s>[MASK]" * 500), "treated as text"),
    Input("a line of 2 MB", text("x" * 2_000_000), "treated as text"),
    Input("lines with invalid JSON", text("{", "jsonl")),
    Input("lines of 100,000 levels", text(DEEP, "jsonl")),
    Input("lines with numbers of 5000 digits", text('{"text": ' + "9" * 5000 + "}", "jsonl")),
    Input("lines of the wrong type", text("[1]\n5\n", "jsonl")),
    Input("texts of the wrong type", text('{"text": {"a": 1}}', "jsonl")),
    Input("half a surrogate pair", text(json.dumps({"text": "\ud800 " + WORDS}), "jsonl")),
    Input("column names with escapes", text(json.dumps({ESCAPES: "x"}), "jsonl")),
    Input("an invalid Parquet file", text(b"PAR1" + bytes(500) + b"PAR1", "parquet")),
    Input("a Parquet file with a broken page", _broken_parquet),
    Input("a column of numbers", parquet([1, 2, 3])),
    Input("a column name with escapes", parquet([WORDS], ESCAPES)),
]  # fmt: skip


# --- sparse folders


def about(**values: Any) -> Change:
    return edited("sparse/atp_tune.json", **values)


def in_sparse(one: Input) -> Input:
    """The same of the sparse folder as of a model's."""

    def change(place: Path) -> None:
        (place / "model").rename(place / "dense")
        (place / "sparse").rename(place / "model")
        try:
            one.change(place)
        finally:
            (place / "model").rename(place / "sparse")
            (place / "dense").rename(place / "model")

    return Input(one.name, change, one.word)


SPARSE = [
    *map(in_sparse, MODEL),
    Input("atp_tune.json with invalid JSON", replaced("sparse/atp_tune.json", DEEP), "ignored"),
    Input("atp_tune.json that is a pipe", fifo("sparse/atp_tune.json"), "ignored"),
    Input("atp_tune.json that is a folder", folder("sparse/atp_tune.json"), "ignored"),
    Input("atp_tune.json that is a link to ~/.ssh", linked("sparse/atp_tune.json", "~/.ssh/id_rsa"), "ignored"),
    Input("atp_tune.json of the wrong type", about(calibration=5), "ignored"),
    Input("a text that is ~/.ssh/id_rsa", about(calibration__source="file:~/.ssh/id_rsa"), "ignored"),
    Input("a folder with NUL", about(folder="a\0b"), "ignored"),
    Input("a dense model in /etc", about(model__id="/etc"), "ignored"),
    Input("a dense model of an unknown user", about(model__id="~nobody-at-all/x"), "ignored"),
    Input("a study name with markup", about(study=MARKUP), "treated as text"),
]  # fmt: skip

# --- pictures


def _bomb(place: Path) -> None:
    """A picture of a few kB that claims 4·10⁸ pixels."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 10_000)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    (place / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _cut_picture(place: Path) -> None:
    content = (place / "picture.png").read_bytes()
    (place / "picture.png").write_bytes(content[: len(content) // 2])


PICTURES = [
    Input("a pipe", fifo("picture.png")),
    Input("a folder", folder("picture.png")),
    Input("a link to a device", linked("picture.png", "/dev/zero")),
    Input("a link to ~/.ssh", linked("picture.png", "~/.ssh/id_rsa")),
    Input("a link to itself", linked("picture.png", "picture.png")),
    Input("empty", replaced("picture.png", "")),
    Input("half a picture", _cut_picture),
    Input("a text", replaced("picture.png", MARKUP)),
    Input("4·10⁸ pixels", _bomb),
    Input("classes with markup and escapes", edited("vit/config.json", id2label={"0": MARKUP, "1": "[/red]|"}),
          "treated as text"),
    Input("classes that are a list", edited("vit/config.json", id2label=[1, 2])),
    Input("a class too few", edited("vit/config.json", id2label={"0": "cat"})),
    Input("a processor with invalid JSON", replaced("vit/preprocessor_config.json", DEEP)),
    Input("a processor of its own code", edited(
        "vit/preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"}), "code not run"),
    Input("a processor of 10¹² pixels", edited(
        "vit/preprocessor_config.json", size={"height": 1_000_000, "width": 1_000_000})),
    Input("a processor with a mean that is NaN", edited(
        "vit/preprocessor_config.json", image_mean=[float("nan")] * 3)),
]  # fmt: skip

KINDS = {
    "study file": STUDY,
    "database": DATABASE,
    "configuration": CONFIGURATION,
    "model folder": MODEL,
    "sparse folder": SPARSE,
    "texts": TEXTS,
    "pictures": PICTURES,
}


# --- the table


DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- written by tests/test_hostile_inputs.py: -->\n", "<!-- : written by tests/test_hostile_inputs.py -->"


def known_cells(document: Path) -> dict[tuple[str, str], str]:
    """The table's cells by command and kind of input."""
    inside = document.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("|").split("|") for line in inside.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    return {
        (row[0].strip("`"), kind): cell for row in rows[2:] for kind, cell in zip(rows[0][1:], row[1:], strict=True)
    }


def write_cells(document: Path, cells: dict[tuple[str, str], str], commands: list[str]) -> None:
    """The table anew, and below it how many inputs there are."""
    text = document.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    head = [f"| command | {' | '.join(KINDS)} |", "|---|" + "---|" * len(KINDS)]
    rows = [f"| `{name}` | {' | '.join(cells.get((name, kind), '') for kind in KINDS)} |" for name in commands]
    document.write_text(f"{before}{BEGIN}" + "\n".join([*head, *rows, "", *listed()]) + f"\n{END}{after}", "utf-8")


def listed() -> list[str]:
    """How many inputs there are of each kind."""
    numbers = ", ".join(f"{len(inputs)} of a {kind.removesuffix('s')}" for kind, inputs in KINDS.items())
    return [f"The inputs, which [tests/hostile.py](../tests/hostile.py) lists: {numbers}."]


def seen(words: list[str]) -> str:
    """What a cell says of the inputs of a kind."""
    order = ["refused", *SURE]
    return ", ".join(sorted(set(words), key=order.index))

"""Model folders of strangers: real folders, loaded by transformers itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, refused, slow
from safetensors.torch import save_file
from test_models import checkpoint, message, pickled, tiny  # noqa: F401
from tinystudy import CommandLine, run

from atp_tune.checkpoints import files
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import resolve
from atp_tune.config import study

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path(__file__).parent / "marker").touch()
Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that is there once a model's own code has run; transformers copies the code to its cache first."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def with_code(place: Path, marker: Path) -> Path:
    """The tiny study, whose model is of a type that only its own code knows."""
    (place / "model" / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change(place / "model" / "config.json", model_type="own", auto_map=classes)
    return place


def test_code_is_not_run(with_code: Path, marker: Path, command: CommandLine) -> None:
    assert command("--study", with_code / "tiny.toml").error == (
        f"model.source: {with_code}/model needs code of its own, which is not run; read it, then allow it with "
        "model.trust_remote_code = true (--set model.trust_remote_code=true; apply: --trust-remote-code)"
    )
    assert not marker.exists()


@slow
def test_code_is_run_where_the_study_says_so(
    with_code: Path, marker: Path, command: CommandLine, tmp_path: Path
) -> None:
    done = run(with_code, "model.trust_remote_code=true")
    assert marker.exists()
    assert done.user_attrs["fingerprint"]["model.trust_remote_code"] is True
    assert len([trial for trial in done.trials if trial.value]) == 3
    marker.unlink()
    words = ("apply", "--config", with_code / "tiny.best.json", "--out", tmp_path / "sparse")
    assert "needs code of its own" in command(*words).error
    assert not (tmp_path / "sparse").exists()
    command.ok(*words, "--trust-remote-code")
    assert (tmp_path / "sparse" / "modeling_own.py").is_file()
    marker.unlink()
    study_file = with_code / "tiny.toml"
    study_file.write_text(study_file.read_text().replace("[model]", "[model]\ntrust_remote_code = true"))
    words = ("generate", "--study", study_file, "--tokens", "2")
    assert "needs code of its own" in command(*words).error
    assert not marker.exists()
    command.ok(*words, "--trust-remote-code")


def test_trusted_code_is_part_of_the_content(with_code: Path) -> None:
    model = study.ModelConfig(source="model", trust_remote_code=True)
    before = resolve(model, with_code)
    with (with_code / "model" / "modeling_own.py").open("a") as stream:
        stream.write("# changed\n")
    assert before.trusted
    assert resolve(model, with_code).content != before.content


@parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_never_run(name: str, with_code: Path) -> None:
    change(with_code / "model" / name, auto_map={"AutoConfig": "evil/code--own.Config", "AutoTokenizer": [None, "a.B"]})
    assert message(study.ModelConfig(source="model", trust_remote_code=True), with_code) == (
        "model.source: BASE/model wants code of another repository (evil/code); "
        "only code in the model's own folder is run"
    )


def test_a_tokenizer_with_code(place: Path, marker: Path, command: CommandLine) -> None:
    (place / "model" / "own.py").write_text(CODE.format(marker=str(marker)))
    change(
        place / "model" / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
    )  # fmt: skip
    command("--study", place / "tiny.toml")
    assert not marker.exists()


# Weights


def test_pickles_are_refused(pickled: Path, cache: Path, tmp_path: Path) -> None:  # noqa: F811
    assert message(study.ModelConfig(source="pickled"), tmp_path) == (
        "model.source: BASE/pickled has its weights in pickles only (pytorch_model.bin); take safetensors, or allow "
        "them with model.allow_pickle = true (--set model.allow_pickle=true; apply: --allow-pickle)"
    )
    assert not (cache / "models").exists()


def test_safetensors_of_another_name_do_not_let_pickles_in(pickled: Path, tmp_path: Path) -> None:  # noqa: F811
    """Transformers falls back to pytorch_model.bin where model.safetensors is not there."""
    save_file({f"x{k}": torch.ones(1000) for k in range(9)}, pickled / "extra.safetensors")
    folder = resolve(study.ModelConfig(source="pickled"), tmp_path)
    with refused("transformers cannot load it"):
        Checkpoint.load(folder.path, torch.float32, torch.device("cpu"))


BAD_PLACES: list[Any] = [
    "../../etc/passwd", "/etc/passwd", "sub/a.safetensors", "../model/a.safetensors", "pytorch_model.bin", "..", "",
    7, None, ["a.safetensors"],
]  # fmt: skip


@parametrize("place", BAD_PLACES)
def test_an_index_names_weights_of_its_own_folder_only(place: Any, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    shards = {"weight_map": {"x": "model.safetensors", "y": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert message(study.ModelConfig(source="model"), tmp_path) == (
        "model.source: BASE/model/model.safetensors.index.json names weights that are no *.safetensors of its folder; "
        "do not use it"
    )


@parametrize("content", ["", "[]", '{"weight_map": []}', "[" * 100_000, "\udcff"])
@parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_files_that_hold_no_object(name: str, content: str, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    (shutil.copytree(checkpoint, tmp_path / "model") / name).write_text(content, errors="surrogateescape")
    if content == '{"weight_map": []}' and "index" not in name:
        pytest.skip("an object")
    assert message(study.ModelConfig(source="model"), tmp_path).startswith("model.source: BASE/model/" + name)


# Links


@slow
def test_links_out_of_the_folder_are_not_copied(place: Path, command: CommandLine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    (place / "model" / "notes.txt").symlink_to(secret)
    words = ("prune", "--study", place / "tiny.toml", "--beta", "0.01", "--out", tmp_path / "sparse")
    assert command(*words).error == (
        f"model.source: {place}/model/notes.txt is a link to {secret}, outside its folder; copy the file"
    )
    assert not list(tmp_path.rglob("sparse*"))


def test_small_files_bring_a_folder_of_licences_and_no_other(tmp_path: Path) -> None:
    """A folder LICENSES/ of the dense model was left behind."""
    source, out = tmp_path / "model", tmp_path / "out"
    for name in ("config.json", "model.safetensors", "LICENSES/MIT.txt", "original/params.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    files.copy_small(source, out)
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) == [
        "LICENSES/MIT.txt",
        "config.json",
    ]
    (source / "my-README.md").write_text("of the dense model")  # no file of its own name is left
    files.copy_small(source, out, ("/README.md", "/config.json"))
    assert (out / "my-README.md").exists()
    (source / "LICENSES/out.txt").symlink_to("/etc/hostname")
    with refused("is a link to /etc/hostname, outside its folder; copy the file"):
        files.small_files(source)


@parametrize("kind", ["file", "full", "link", "dangling"])
def test_nothing_is_written_over(kind: str, done: Path, command: CommandLine, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("mine")
    match kind:
        case "file":
            out.write_text("mine")
        case "full":
            shutil.copytree(other, out)
        case "link":
            out.symlink_to(other)
        case "dangling":
            out.symlink_to(tmp_path / "nowhere")
    answer = command("apply", "--config", done / "tiny.best.json", "--out", out)
    assert answer.error == f"--out {out}: exists already; choose another folder or remove it"
    assert [file.name for file in other.iterdir()] == ["mine"]
    assert not (tmp_path / "nowhere").exists()

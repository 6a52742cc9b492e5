"""Writes a plan of types as a .gguf file, by llama.cpp itself: its converter, then its quantizer.

    NAME.gguf              the model, with metadata, tokenizer and chat template as the converter writes them
    NAME.imatrix.gguf      the importance matrix: of each matrix the mean square of each input on the calibration text
    NAME.tensor-types.txt  the type of each tensor

With the latter two `llama-quantize` makes the same bytes from the converter's float32 file:

    llama-quantize --imatrix NAME.imatrix.gguf --tensor-type-file NAME.tensor-types.txt F32.gguf NAME.gguf Q4_K_M

Each matrix of the converter's file is compared with the weights that were measured: its rows may come in another order.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.checkpoints.convert import as_user_error, write_gguf
from atp_tune.config.best import Config
from atp_tune.errors import UserError
from atp_tune.events import Message, Place
from atp_tune.folders.applying import Way, fit_plan, writing
from atp_tune.inputs.items import IDS
from atp_tune.measures import Perplexity, perplexity
from atp_tune.plan import Plan
from atp_tune.pruners.ggml import importances
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.scores.next_token import token_nlls
from atp_tune.utils.cache import rename_new, temporary_folder
from atp_tune.utils.system import check_free

RECIPE = (".imatrix.gguf", ".tensor-types.txt")  # endings of what stands beside the file
COPIES = 3  # of the dense model: a file in float32 of one in 16 bits, and the result
NEAR = 1e-2  # relative difference of mean squares that number formats make
TOKENS = 8192  # of the test text, that llama.cpp is run on
FAR = 0.02  # relative difference of perplexities that llama.cpp's rounding of activations does not make

Matrices = Mapping[str, tuple[str, Any]]  # type, and importance [columns] of each tensor


def save(config: Config, out: Path, place: Place, dtype: str | None) -> Perplexity:
    """Writes the files of a configuration, and returns the perplexity of the .gguf file by llama.cpp itself.

    It is of the first windows of the test text; a line says it, and what the plan has here. UserError if a file is
    there already, or if llama.cpp's converter does not know the model, or runs code of its folder.
    """
    if out.suffix != ".gguf" or dtype:
        raise UserError("--out: types of ggml are written as a file, --out NAME.gguf, without --packed and --dtype")
    files = [out, *(out.with_suffix(ending) for ending in RECIPE)]
    for file in files:
        check_free(file)
    setup = Setup.of_config(config, place, test=config.texts.test)
    setup = replace(setup, ask=Way(copies=COPIES).asked(out))
    with Session.open(setup) as context, writing(out), temporary_folder(out) as folder:
        plan = fit_plan(config, context)
        base = folder / "dense.gguf"
        context.watch(Message(f"converting the dense model by llama.cpp, to write {out}"))
        write_gguf(context.folder.path, base, "--outtype", "f32")
        matrices = matrices_of(context, plan, base)
        counts = Counter(kind for kind, _ in matrices.values()).most_common()
        context.watch(Message(f"types: {', '.join(f'{count} {kind}' for kind, count in counts)}"))
        made = [folder / file.name for file in files]
        write_imatrix(made[1], matrices)
        made[2].write_text("".join(f"{line}={kind.lower()}\n" for line, kind in patterns(matrices)), encoding="utf-8")
        quantize(base, made[0], matrices)
        # The model comes last: what stands there has its recipe.
        for file, written in reversed([*zip(files, made, strict=True)]):
            rename_new(written, file)
        return measured(context, plan, out)


def measured(context: Session, plan: Plan, file: Path) -> Perplexity:
    """The perplexity of the first test windows by llama.cpp on a file; a line warns if the plan's is far from it."""
    [scores] = context.measure(plan, [RoleScores("test")])
    windows = context.windows["test"].tensors[IDS].long()
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    pairs = zip(llama_logits(file, windows), windows, strict=True)
    there = perplexity([float(token_nlls(logits[:-1], window[1:]).mean()) for logits, window in pairs])
    here = perplexity(scores["nlls"][: len(windows)])
    warning = "warning: " if abs(there.value / here.value - 1) > FAR else ""
    what = f"{warning}perplexity on the first {len(windows)} windows of the test text"
    context.watch(Message(f"{what}: by llama.cpp on the file {there}, as it was searched {here}"))
    return there


def llama_logits(file: Path, windows: Tensor) -> Iterator[Tensor]:
    """Logits [tokens, vocabulary] of each window [windows, tokens] by llama.cpp on a file, on the CPU."""
    (ffi, library, _), length, wrong = _library(), windows.shape[1], as_user_error(f"{file}: llama.cpp cannot run it")
    load = import_module("llama_cpp_py_sync").Llama
    with wrong, load(str(file), length, length, torch.get_num_threads()) as llama:
        context, batch = llama._ctx, library.llama_batch_init(length, 0, 1)
        for window in windows.tolist():
            library.llama_memory_clear(library.llama_get_memory(context), True)
            batch.n_tokens = length
            for at, token in enumerate(window):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
                batch.seq_id[at][0] = 0
            if library.llama_decode(context, batch):
                raise RuntimeError("its decoder failed")
            values = bytearray(ffi.buffer(library.llama_get_logits(context), 4 * llama.n_vocab * length))
            yield torch.frombuffer(values, dtype=torch.float32).view(length, -1)
        library.llama_batch_free(batch)


def matrices_of(context: Session, plan: Plan, base: Path) -> Matrices:
    """The matrices of a plan by tensors of the converter's file; UserError if one is not there as it was measured."""
    import gguf

    reader, checkpoint = gguf.GGUFReader(base), context.checkpoint
    arch = str(reader.fields["general.architecture"].contents())
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = gguf.get_tensor_name_map(number, int(reader.fields[f"{arch}.block_count"].contents()))
    there = {tensor.name: tensor.data for tensor in reader.tensors}
    # Weight, type and importance of each matrix by its name in the model.
    planned = {
        name: (context.outer.weights[name], kind, context.outer.importance(name)) for name, kind in plan.outer.items()
    }
    statistics: Any = context.measured.statistics(context.methods.pruner(plan.method))
    for index, linears in enumerate(checkpoint.linears):
        weights = checkpoint.weights(index)
        for linear, level in zip(linears, plan.of(index, len(linears)), strict=True):
            own = linear.matrix(weights[linear.key]), str(level.type), importances(statistics[index][linear.name])
            planned[f"{checkpoint.block_names[index]}.{linear.name}"] = own
    matrices: dict[str, tuple[str, Any]] = {}
    for name, (weight, kind, importance) in planned.items():
        found = there.get(tensor := f"{known.get_name(name)}.weight")
        squares = weight.double().square().mean(0).cpu()
        if found is None or not np.allclose(squares, np.square(found, dtype=np.float64).mean(0), rtol=NEAR):
            raise UserError(f"--out: llama.cpp stores {name} otherwise than transformers, and it was not measured so")
        matrices[tensor] = kind, importance
    return matrices


def write_imatrix(out: Path, matrices: Matrices) -> None:
    """Writes importances in llama.cpp's format, which has sums and counts: here means, and 1."""
    import gguf

    writer = gguf.GGUFWriter(out, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for name, (_, importance) in matrices.items():
        writer.add_tensor(f"{name}.in_sum2", importance.numpy()[None])
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def patterns(matrices: Matrices) -> Iterator[tuple[str, str]]:
    """The regular expression of each tensor, as llama.cpp reads it, and its type."""
    return ((f"^{re.sub(r'[.]', '[.]', name)}$", kind) for name, (kind, _) in matrices.items())


@cache
def _library() -> tuple[Any, Any, Any]:
    """The bindings of llama.cpp, which then says nothing; its library; and what it logs by, which has to stay."""
    bindings = import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, library = bindings.get_ffi(), bindings.get_lib()
    silent = ffi.callback("void(enum ggml_log_level, const char*, void*)", lambda *_: None)
    library.llama_log_set(silent, ffi.NULL)
    library.llama_backend_init()
    return ffi, library, silent


def quantize(base: Path, out: Path, matrices: Matrices) -> None:
    """Writes the file by llama.cpp's own quantizer; UserError if a tensor has another type than the plan says."""
    import gguf

    ffi, library, _ = _library()
    words = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    words.ftype, words.nthread = int(gguf.LlamaFileType.MOSTLY_Q4_K_M), torch.get_num_threads()
    kept = list[Any]()

    def pointer(kind: str, value: Any) -> Any:
        kept.append(ffi.new(kind, value))
        return kept[-1]

    types = pointer("struct llama_model_tensor_override[]", len(matrices) + 1)  # the last is empty
    for place, (pattern, kind) in enumerate(patterns(matrices)):
        types[place].pattern = pointer("char[]", pattern.encode())
        types[place].type = int(gguf.GGMLQuantizationType[kind])
    imatrix = pointer("struct llama_model_imatrix_data[]", len(matrices) + 1)
    for place, (name, (_, importance)) in enumerate(matrices.items()):
        imatrix[place].name, imatrix[place].size = pointer("char[]", name.encode()), len(importance)
        imatrix[place].data = pointer("float[]", importance.tolist())
    words.tt_overrides, words.imatrix = types, imatrix
    if library.llama_model_quantize(str(base).encode(), str(out).encode(), words):
        raise UserError(f"--out: llama.cpp could not write {out.name}; is there room on the disk?")
    dense, found = (
        {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} for file in (base, out)
    )
    wanted = dense | {name: kind for name, (kind, _) in matrices.items()}
    if other := next((name for name in wanted if found.get(name) != wanted[name]), None):
        raise UserError(
            f"--out: llama.cpp gives {other} the type {found.get(other)}, where {wanted[other]} was measured"
        )

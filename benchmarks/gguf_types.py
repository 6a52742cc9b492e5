"""The types that the command finds for a model, beside llama.cpp's own mixes and other plans at the same bytes.

    pip install -e '.[gguf]'                                                llama.cpp, compiled; its converter
    python benchmarks/gguf_types.py run FOLDER [IQ4_XS Q4_K_M ...]          measures, into docs/gguf.jsonl
    python benchmarks/gguf_types.py run FOLDER Q3_K_M --evolve 1 10         also by EvoPress, in multiples of seconds
    python benchmarks/gguf_types.py tokenizer FILE.gguf FOLDER              its tokenizer.model, for the converter
    python benchmarks/gguf_types.py table                                   into docs/gguf.md

ggml rounds each matrix, embedding and head included, to each type that its rows can have, with the importance of each
column (the mean of the squares of its inputs), and the package gguf reads the values back. `command` is the best plan
of a study as `tune.py FOLDER --format gguf` makes it. The other plans are the cheapest within the bytes by costs from
the same calibration text; Δ the error of a matrix, x its inputs, g the gradient of the loss by its outputs, the labels
drawn from the model's own predictions, so that its mean square is the Fisher information:

    tokens           ½ mean over tokens of (gᵀ Δ x)²
    windows          ½ mean over windows of (Σ gᵀ Δ x)², divided by the tokens of a window
    squared errors   Σ Δ² weighted by importance, as llama.cpp's open pull request for a target size has it
    slopes           Σ |G Δ|, G the gradient of the text's loss by the weights, as AutoRound's AutoScheme has it
    evolution        EvoPress (2410.14649): types of a few matrices change, KL on parts of the calibration text chooses

KL is measured in float32 on kinds of text that calibration did not have, by windows, so that differences from
llama.cpp's plan are paired; and by llama.cpp itself on the files of its mix and of the command's plan.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import gguf
import torch
from engines import llama
from marked_page import write_between
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import atp_tune
from atp_tune.allocations.bits import cheapest
from atp_tune.allocations.types import BLOCKS, type_bits
from atp_tune.api.presets import PRESETS
from atp_tune.checkpoints.convert import write_gguf
from atp_tune.config.data import Text
from atp_tune.folders.gguf_file import llama_logits
from atp_tune.inputs.items import IDS
from atp_tune.inputs.windows import token_windows
from atp_tune.pruners.ggml import LEAST, encoded

ROOT = Path(__file__).parents[1]
RUNS, PAGE = ROOT / "docs" / "gguf.jsonl", ROOT / "docs" / "gguf.md"
MARKS = ("<!-- measured: python benchmarks/gguf_types.py -->", "<!-- end -->")
KINDS = ("news", "tales", "code")
MIXES = ("IQ3_XS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
TYPES = list(BLOCKS)
WAYS = ("tokens", "windows", "squared errors", "slopes")  # whose sums of costs are minimised
UNIFORM = "uniform"  # the same, by the bits of a type alone
COMMAND, THEIRS = "command", "llama.cpp"
OFFSPRING, STAGES = 16, ((2, 4), (8, 1))  # of a generation; windows that each stage sees, survivors
PARTS = {"calibration": (0.0, 0.4), "validation": (0.4, 0.7), "test": (0.7, 1.0)}
WINDOWS, BATCH, LENGTH = 32, 4, 256  # of the calibration text, and at a time; tokens of each
ROWS = 256  # tokens whose logits are computed at a time
HEAD = "lm_head"
Plan = Mapping[str, str]  # the type of each matrix
Costs = Mapping[tuple[str, str], float]  # by matrix and type
Encoded = dict[tuple[str, str], Any]  # bytes [rows, bytes of a row], likewise


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table")
    command = commands.add_parser("run")
    command.add_argument("folder", type=Path)
    command.add_argument("mixes", nargs="*", default=MIXES)
    command.add_argument("--calibration", default="mixed:manual,debates", help="a source of texts")
    command.add_argument("--windows", type=int, default=12, help="of each kind that is measured")
    command.add_argument("--evolve", type=float, nargs="*", default=[], help="multiples of the command's seconds")
    command = commands.add_parser("tokenizer")
    command.add_argument("file", type=Path)
    command.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        write_between(PAGE, MARKS, table())
        return
    if options.command == "tokenizer":
        write_tokenizer(options.file, options.folder)
        return
    text = windows(options.calibration, options.folder, WINDOWS, PARTS["calibration"])
    model = Rounded(options.folder, text)
    texts = [windows(f"mixed:{kind}", options.folder, options.windows) for kind in KINDS]
    with TemporaryDirectory() as folder:
        measure(model, File(model, Path(folder)), texts, options)


def windows(source: str, folder: Path, many: int, part: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Token ids [windows, tokens] of a part of a source."""
    text = Text(source=source, nsamples=many, seqlen=LENGTH, part=part, shuffle=True)
    return torch.as_tensor(token_windows(text, folder, Path()).tensors[IDS]).long()


def write_tokenizer(file: Path, folder: Path) -> None:
    """Writes the SentencePiece tokenizer of a .gguf file as the file that llama.cpp's converter reads."""
    fields = gguf.GGUFReader(file).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    model = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True  # BPE
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def by_command(folder: Path, calibration: str, bits: float) -> tuple[Plan, float]:
    """The best plan of a study as the command makes it, and its seconds."""
    texts = {
        role: {"source": calibration, "nsamples": WINDOWS, "seqlen": LENGTH, "part": part, "shuffle": True}
        for role, part in PARTS.items()
    }
    start = monotonic()
    study = {
        "model": {"source": str(folder.absolute()), "dtype": "float32"}, "bits": bits, "allocation": ["gradient"],
        "quantize": {"quantizers": ["ggml"]}, "prune": {"statistics": "dense"}, "texts": texts,
        "search": {"trials": PRESETS["quick"].trials, "objective": "kl"},
    }  # fmt: skip
    config = atp_tune.tune(atp_tune.Study.model_validate(study)).configuration().config
    found = {
        f"model.layers.{index}.{name}": str(level.type)
        for index, names in enumerate(config.linears or ())
        for name, level in zip(names, config.plan.of(index, len(names)), strict=True)
    }
    [head] = config.plan.outer.values()
    return {**found, HEAD: head}, monotonic() - start


def decode(stored: Any, kind: str) -> Tensor:
    """The values of bytes of a type, float32."""
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
            (name, kind): encoded(weight, kind, self.importances[name])
            for name, weight in self.dense.items()
            for kind in TYPES
            if weight.shape[1] % BLOCKS[kind][0] == 0
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
        costs = {way: dict.fromkeys(self.encoded, 0.0) for way in (*WAYS, UNIFORM)}
        whole, draw = self._gradients(calibration), torch.Generator().manual_seed(0)
        for batch in torch.split(calibration, BATCH):
            inputs, gradients = self._run(batch, draw)
            for (name, kind), stored in self.encoded.items():
                error = decode(stored, kind) - self.dense[name]
                near = error.bfloat16()  # fast on new cores, and the errors of products cancel in sums
                parts = zip(gradients[name], torch.split(inputs[name], ROWS), strict=True)
                slopes = torch.cat([((g.bfloat16() @ near).float() * x).sum(1) for g, x in parts]).double()
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
            costs["slopes"][name, kind] = float((whole[name] * error).abs().sum())
            costs[UNIFORM][name, kind] = error.numel() * 4 ** -type_bits(kind)
        return costs

    def _gradients(self, calibration: Tensor) -> dict[str, Tensor]:
        """The gradient of the mean NLL of the text by each matrix."""
        self.model.requires_grad_(True)
        for batch in torch.split(calibration, 2):
            (self.model(batch, labels=batch).loss * len(batch) / len(calibration)).backward()
        found: dict[str, Any] = {name: x.weight.grad for name, x in self.linears.items()}
        self.model.zero_grad()
        self.model.requires_grad_(False)
        return found

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
            scale = getattr(module, "embed_scale", 1.0)  # Gemma multiplies the rows
            output.requires_grad_().register_hook(lambda g: gradients.update(embedding=(scale * g.flatten(0, 1),)))

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

    def ladder(self, name: str, way: str) -> list[str]:
        """The types of a matrix by size, of equal sizes the one that costs least."""
        own = [(self.encoded[name, kind].nbytes, kind) for kind in TYPES if (name, kind) in self.encoded]
        same = ([kind for there, kind in own if there == size] for size in sorted({size for size, _ in own}))
        return [min(kinds, key=lambda kind: self.costs[way][name, kind]) for kinds in same]

    def plan(self, way: str, most: float) -> Plan:
        """The cheapest plan of at most so many bits."""
        choices = [[(name, kind) for kind in self.ladder(name, way)] for name in self.dense]
        costs = [[self.costs[way][each] for each in own] for own in choices]
        sizes = [[8.0 * self.encoded[each].nbytes for each in own] for own in choices]
        chosen = cheapest(costs, sizes, most)
        return dict(own[place] for own, place in zip(choices, chosen, strict=True))

    def evolved(self, most: float, text: Tensor, seconds: float) -> Plan:
        """The plan of at most so many bits that EvoPress finds from the uniform one in so much time."""
        ladders = {name: self.ladder(name, "squared errors") for name in self.dense}
        draw, dense, names = random.Random(0), [*self.logs({}, text)], [*ladders]

        def moved(plan: Plan) -> Plan:
            """One matrix a type larger, and others smaller until the plan fits."""
            up = draw.choice([name for name in names if plan[name] != ladders[name][-1]])
            plan = {**plan, up: ladders[up][ladders[up].index(plan[up]) + 1]}
            while self.bits(plan) > most:
                low = draw.choice([name for name in names if name != up and plan[name] != ladders[name][0]])
                plan = {**plan, low: ladders[low][ladders[low].index(plan[low]) - 1]}
            return plan

        def kl(plan: Plan, places: Sequence[int]) -> float:
            pairs = zip(places, self.logs(plan, text[[*places]]), strict=True)
            return fmean(float((dense[at].exp() * (dense[at] - q)).sum(-1).mean()) for at, q in pairs)

        best = self.plan(UNIFORM, most)
        end = monotonic() + seconds
        while monotonic() < end:
            found = [moved(best) for _ in range(OFFSPRING)]
            for many, survivors in STAGES:
                places = draw.sample(range(len(text)), many)
                found = [*found, *([best] if survivors == 1 else [])]
                found = sorted(found, key=lambda plan: kl(plan, places))[:survivors]
            [best] = found
        return best

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

    def measures(self, plans: Mapping[str, Plan], text: Tensor) -> dict[str, dict[str, Any]]:
        """What people compare, of each plan: KL (nats per token), share of same top tokens and NLL, all by window."""
        dense = [*self.logs({}, text)]
        return {name: compared(dense, [*self.logs(plan, text)], text) for name, plan in plans.items()}


def compared(dense: Sequence[Tensor], logs: Sequence[Tensor], text: Tensor) -> dict[str, Any]:
    """The measures of log-probabilities [tokens - 1, vocabulary] of windows beside those of the dense model."""
    kls = [(p.exp() * (p - q)).sum(-1) for p, q in zip(dense, logs, strict=True)]
    points = torch.cat(kls).quantile(torch.tensor([0.99, 0.999])).tolist()
    same = [float((p.argmax(-1) == q.argmax(-1)).float().mean()) for p, q in zip(dense, logs, strict=True)]
    nlls = [
        [float(-x[range(len(x)), ids[1:]].mean()) for x, ids in zip(own, text, strict=True)] for own in (logs, dense)
    ]
    return {"kl": [float(own.mean()) for own in kls], "points": points, "same": same, "nll": nlls[0], "dense": nlls[1]}


# --- Files, by llama.cpp itself.


class File:
    """The dense model's file, by llama.cpp's converter, and files that it rounds by `llama_model_quantize`."""

    def __init__(self, model: Rounded, folder: Path) -> None:
        self._model, self._base = model, folder / "dense.gguf"
        write_gguf(model.folder, self._base, "--outtype", "f32")
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
                model.encoded[name, kind] = encoded(model.dense[name], kind, model.importances[name])
        return plan

    def logs(self, plan: Plan, label: str, text: Tensor) -> list[Tensor]:
        """Log-probabilities [tokens - 1, vocabulary] of each window by llama.cpp on the file of a plan."""
        out = self._base.with_name("plan.gguf")
        self.write(out, label, plan)
        return by_llama(out, text)


def by_llama(file: Path, windows: Tensor) -> list[Tensor]:
    """Log-probabilities [tokens - 1, vocabulary] of each window by llama.cpp on a file."""
    return [logits[:-1].log_softmax(-1) for logits in llama_logits(file, windows)]


def measure(model: Rounded, file: File, texts: Sequence[Tensor], options: argparse.Namespace) -> None:
    """Measures llama.cpp's mixes, and plans at the bytes of each; keeps lines as they are found."""
    calibration = windows(options.calibration, options.folder, WINDOWS, PARTS["calibration"])
    for mix in options.mixes:
        theirs = file.plan_of(mix)
        most = model.bits(theirs)
        found, seconds = by_command(options.folder, options.calibration, most / model.weights)
        plans = {THEIRS: theirs, COMMAND: found} | {way: model.plan(way, most) for way in WAYS}
        plans |= {
            f"evolution × {times:g}": model.evolved(most, calibration, times * seconds) for times in options.evolve
        }
        measures = [model.measures(plans, text) for text in texts]
        for name, plan in plans.items():
            bits = model.bits(plan)
            line: dict[str, Any] = {"model": model.folder.name, "mix": mix, "plan": name, "bytes": int(bits / 8)}
            line |= {"bpw": bits / model.weights, "types": plan, "seconds": seconds if name == COMMAND else None}
            line |= {kind: own[name] for kind, own in zip(KINDS, measures, strict=True)}
            if name in (THEIRS, COMMAND):  # also by llama.cpp on their files
                line["file"] = {
                    kind: compared([*model.logs({}, text)], file.logs(plan, f"MOSTLY_{mix}", text), text)["kl"]
                    for kind, text in zip(KINDS, texts, strict=True)
                }
            print(mix, name, f"{line['bpw']:.3f}", *(f"{fmean(line[kind]['kl']):.4f}" for kind in KINDS), flush=True)
            with RUNS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def table() -> str:
    """Mean KL of llama.cpp's mixes, and of other plans as multiples of it with paired errors; then other measures."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in map(json.loads, RUNS.read_text(encoding="utf-8").splitlines()):
        groups.setdefault((line["model"], line["mix"]), {})[line["plan"]] = line
    others = [COMMAND, *WAYS, *sorted({name for own in groups.values() for name in own if name.startswith("evo")})]
    head = ["model", "mix", "MB", "bits a weight", f"its KL: {', '.join(KINDS)}", *others]
    rows, more = [row(head), "|---" * len(head) + "|"], list[str]()
    for (model, mix), lines in groups.items():
        theirs = lines[THEIRS]
        cells = [model, mix, f"{theirs['bytes'] / 1e6:.0f}", f"{theirs['bpw']:.2f}"]
        cells.append(", ".join(f"{fmean(theirs[kind]['kl']):.3f}" for kind in KINDS))
        cells += [", ".join(ratios(lines[way], theirs)) if way in lines else "" for way in others]
        rows.append(row(cells))
        more += [row([model, mix, name, *details(lines[name])]) for name in (THEIRS, COMMAND)]
    head = [
        "model",
        "mix",
        "plan",
        "99 % point",
        "99.9 % point",
        "same top token, %",
        "perplexity, × dense",
        "KL of the file",
    ]
    return "\n".join([*rows, "", row(head), "|---" * len(head) + "|", *more])


def row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """The ratio of mean KLs of each kind, with its standard error over pairs of windows."""
    return (ratio(ours[kind]["kl"], theirs[kind]["kl"]) for kind in KINDS)


def ratio(own: Sequence[float], other: Sequence[float]) -> str:
    """The ratio of means over windows, with its standard error over pairs of them."""
    value = fmean(own) / fmean(other)
    error = stdev(a - value * b for a, b in zip(own, other, strict=True)) / len(own) ** 0.5 / fmean(other)
    return f"{value:.2f} ± {error:.2f}"


def details(line: Mapping[str, Any]) -> Iterator[str]:
    """Points of KL, same tokens, perplexity, and KL by llama.cpp on the file; of each kind."""
    own = [line[kind] for kind in KINDS]
    for place in (0, 1):
        yield ", ".join(f"{x['points'][place]:.2f}" for x in own)
    yield ", ".join(f"{100 * fmean(x['same']):.0f}" for x in own)
    yield ", ".join(f"{math.exp(fmean(x['nll']) - fmean(x['dense'])):.3f}" for x in own)
    yield ", ".join(f"{fmean(line['file'][kind]):.3f}" for kind in KINDS)


if __name__ == "__main__":
    main()

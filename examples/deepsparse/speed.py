"""Tokens per second of a sparse checkpoint and its dense model in DeepSparse 1.8.0, beside torch: see README.md.

    python examples/deepsparse/speed.py DIR [--tokens 128] [--runs 5]

Both models are exported to ONNX; `worker.py` runs them in an environment of its own, which the first call makes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from atp_tune.cli.display import Display
from atp_tune.cli.evaluate import rates_table, speed_lines
from atp_tune.cli.terminal import quiet
from atp_tune.config.best import read_config
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, Place, Step
from atp_tune.folders.speed import (
    About,
    Pair,
    Workload,
    about,
    check_positions,
    dtypes,
    find_pair,
    measured,
    opened,
    random_ids,
)
from atp_tune.metrics import SIDES, Phase, Side, Sizes, Speed
from atp_tune.utils.cache import cache_dir, folder_atomically, temporary_folder
from atp_tune.utils.system import cpu_flags, cpu_name

VERSION = "1.8.0"
PACKAGES = (f"deepsparse=={VERSION}", "numpy<2")  # it needs onnx < 1.15 itself, which needs numpy 1
PYTHONS = ("3.11", "3.10", "3.9", "3.8")
LICENCE = (
    "DeepSparse is proprietary: its Community License allows evaluation, not production; read LICENSE in it. It is no "
    "longer developed. It is installed in an environment of its own, and its telemetry is turned off."
)
TOLERANCE = 1e-3  # of the largest logit; another order of float32 sums changes 1e-5 of it
OPSET = 14  # the newest that DeepSparse reads
NAMES = ("input_ids", "attention_mask", "positions", "causal_mask")
PHASES: tuple[Phase, ...] = ("prefill", "decode")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAR = 1e9  # subtracted from scores of masked positions


def main() -> None:
    """Measures the folder that the command line names, and prints tables as `speedup` does; stores nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="sparse checkpoint, as `apply` writes it")
    parser.add_argument("--tokens", type=int, default=Workload.tokens, help="length of the prompt")
    parser.add_argument("--runs", type=int, default=Workload.runs, help="dense and sparse take turns")
    options = parser.parse_args()
    with quiet(), Display() as display:
        try:
            found = measure(options.folder, Workload(tokens=options.tokens, runs=options.runs), display)
        except UserError as error:
            sys.exit(f"error: {error}")
    print(rates_table(found), *speed_lines(found), sep="\n")


def measure(folder: Path, task: Workload, watch: EventHandler) -> Speed:
    """Rates of both models of a folder, in torch and in DeepSparse."""
    path = about(folder)
    config = read_config(path)
    pair = find_pair(config, folder, Place(path.parent / config.folder, "cpu", watch=watch))
    check_positions(pair, task)
    python, cpu = environment(watch), torch.device("cpu")
    openings = [("torch", opened(pair, task, cpu, dtype)) for dtype in dtypes(cpu)]
    openings.append(("deepsparse", compiled(python, pair, task, watch)))
    rows = tuple(measured(opening, name, task, watch) for name, opening in openings)
    return Speed(sizes=Sizes(dense=0, sparse=0), engines=rows)  # bytes are not shown


# The environment


def environment(watch: EventHandler) -> Path:
    """The Python of DeepSparse's environment, which is made if it is not there; UserError if it cannot be."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or "avx2" not in cpu_flags():
        raise UserError("DeepSparse runs on Linux on x86-64 with AVX2 or AVX-512; `speedup` measures here")
    home = cache_dir("engines") / f"deepsparse-{VERSION}"
    if not (home / "bin" / "python").exists():
        watch(Message(LICENCE))
        named = (shutil.which(f"python{version}") for version in PYTHONS)
        own = sys.executable if ".".join(map(str, sys.version_info[:2])) in PYTHONS else None
        python = own or next(filter(None, named), None)
        if python is None:
            raise UserError(f"DeepSparse needs Python {PYTHONS[-1]} to {PYTHONS[0]} in PATH; install python3.11")
        watch(Message(f"installing DeepSparse {VERSION} by {python} into {home}"))
        with folder_atomically(home, shared=True) as folder:
            install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", *PACKAGES]
            for command in ([python, "-m", "venv", str(folder)], install):
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise UserError(f"DeepSparse cannot be installed: {(done.stderr or done.stdout).strip()[-200:]}")
    return home / "bin" / "python"


# The engine


class DeepSparse:
    """The process of DeepSparse, and its answers."""

    about: About
    phases = PHASES

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self._process, self._errors = process, errors

    def seconds(self, side: Side, phase: Phase) -> float:
        """Seconds of one run of a phase."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` reports why it died
            self._process.stdin.write(json.dumps([side, phase]) + "\n")
            self._process.stdin.flush()
        return float(self.answer())

    def answer(self) -> Any:
        """The next answer; UserError with the last line of stderr if the process has ended."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()] or [f"exit code {code}"]
        raise UserError(f"the process of DeepSparse has ended: {said[-1]}")


@contextmanager
def compiled(python: Path, pair: Pair, task: Workload, watch: EventHandler) -> Iterator[DeepSparse]:
    """Exports and compiles both models in float32; UserError if their logits differ from transformers'."""
    cores = torch.get_num_threads()
    with temporary_folder(cache_dir("engines") / "graphs") as folder, (folder / "errors").open("w+") as errors:
        # Graphs of both models, and what transformers computes
        graphs, wanted = {}, {}
        for side in SIDES:
            checkpoint = pair.load(side, torch.float32, torch.device("cpu"))
            (folder / side).mkdir()
            graphs[side] = export(checkpoint.model, task, folder / side)
            ids = random_ids(checkpoint, task)
            with torch.inference_mode():
                wanted[side] = checkpoint.model(ids[:, : task.tokens + 1], logits_to_keep=2).logits[0]
            watch(Step("export", len(graphs), len(SIDES)))
        told = {"graphs": graphs, "ids": ids[0].tolist(), "cores": cores, "folder": str(folder)}
        (folder / "task.json").write_text(json.dumps({**told, "tokens": task.tokens, "steps": task.steps}))
        # Its process, whose answers are compared before they are timed
        command = [str(python), "-I", str(Path(__file__).with_name("worker.py")), str(folder / "task.json")]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, **pipes, text=True, env={**os.environ, "NM_DISABLE_ANALYTICS": "1"})
        try:
            engine = DeepSparse(process, errors)
            for done in range(len(SIDES)):
                engine.answer()
                watch(Step("compile", done + 1, len(SIDES)))
            found = engine.answer()
            error = max(
                difference(folder / f"{side}.{phase}.npy", row)
                for side in SIDES
                for phase, row in zip(PHASES, wanted[side], strict=True)
            )
            if error > TOLERANCE:
                raise UserError(f"DeepSparse's logits differ from transformers' by {error:.2g} of the largest")
            device = f"{cpu_name()} ({found['isa']})"
            engine.about = About("deepsparse", found["version"], "float32", device, cores, error)
            yield engine
        finally:
            process.kill()
            process.communicate()


def difference(path: Path, wanted: Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    found = torch.from_numpy(np.load(path)).reshape(wanted.shape)
    return float((found - wanted).abs().max() / wanted.abs().max())


# A Llama-shaped model as two ONNX graphs: `prefill` takes the prompt, `decode` one token and the cached ones.
#
# Shapes are fixed. Names are DeepSparse's: inputs input_ids, attention_mask, positions, causal_mask,
# past_key_values.I.key and .value; outputs logits, present.I.key and .value. The inputs are T tokens at the end of a
# sequence of S positions; keys and values of the S - T before them come from the cache.


class Decoder(nn.Module):
    """Logits [1, 1, words] of the last token, then keys and values [1, heads, S, width] of each block.

    Embedding, norms, linears, MLP and head are the model's own modules. Attention is written here. Each key/value head
    is repeated for all query heads that share it: the result is the same, and DeepSparse's own cache crashes otherwise.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Any, positions: int) -> None:
        """`model`: of transformers; `positions`: length of the table of rotary embeddings."""
        super().__init__()
        check_family(model.config, positions)
        self.inner, self.head = model.model, model.lm_head
        config = model.config
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads = int(config.num_attention_heads)
        cos, sin = self.inner.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
        self.register_buffer("cos", cos[0], persistent=False)  # [positions, width]
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, causal_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Integers [1, T], [1, S], [1, T], [1, 1, T, S]: masks are 0 and 1; `past`: [1, heads, S - T, width] each."""
        states = self.inner.embed_tokens(input_ids)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        hidden = (1.0 - (causal_mask * attention_mask[:, None, None]).to(states.dtype)) * -FAR
        present: list[Tensor] = []
        for index, block in enumerate(self.inner.layers):
            attention, inputs = block.self_attn, block.input_layernorm(states)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (projection(inputs).unflatten(-1, (-1, self.width)) for projection in projections)
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            query, key, value = rotate(query, cos, sin), self._repeat(rotate(key, cos, sin)), self._repeat(value)
            if past:
                key = torch.cat((past[2 * index], key), 2)
                value = torch.cat((past[2 * index + 1], value), 2)
            present += [key, value]
            seen = (query @ key.transpose(2, 3) * self.width**-0.5 + hidden).softmax(-1) @ value
            states = states + attention.o_proj(seen.transpose(1, 2).flatten(2))
            states = states + block.mlp(block.post_attention_layernorm(states))
        return self.head(self.inner.norm(states)[:, -1:]), *present

    def _repeat(self, shared: Tensor) -> Tensor:
        """[1, key/value heads, T, width] → [1, heads, T, width]."""
        _, few, tokens, width = shared.shape
        if few == self.heads:
            return shared
        return shared[:, :, None].expand(-1, -1, self.heads // few, -1, -1).reshape(1, self.heads, tokens, width)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: rotates pairs of a head's first and second half by the angle of the position."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


def check_family(config: Any, positions: int) -> None:
    """UserError for a model that is not Llama-shaped, or whose sliding window is shorter than the sequence."""
    if config.model_type not in FAMILIES:
        raise UserError(f"{config.model_type} is not exported, only {', '.join(FAMILIES)}; `speedup` measures any")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < positions:
        raise UserError(f"--tokens: {positions} positions are more than the model's sliding window of {window}")


def capacity(task: Workload) -> int:
    """Positions of the decode graph: a power of two, since DeepSparse's cache doubles in size and overruns others."""
    return 1 << (task.tokens + task.steps).bit_length()


@torch.no_grad()
def export(model: Any, task: Workload, folder: Path) -> dict[Phase, str]:
    """Writes both graphs of a model in float32, and returns their paths by phase."""
    decoder = Decoder(model, capacity(task)).eval()
    paths: dict[Phase, str] = {}
    for phase, (tokens, positions) in zip(PHASES, ((task.tokens, task.tokens), (1, capacity(task))), strict=True):
        inputs, paths[phase] = list(example(decoder, tokens, positions)), str(folder / f"{phase}.onnx")
        kept = [f"{block}.{kind}" for block in range(len(decoder.inner.layers)) for kind in ("key", "value")]
        past = [f"past_key_values.{name}" for name in kept] if len(inputs) > len(NAMES) else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, but DeepSparse reads no graph of the new one
            torch.onnx.export(
                decoder, tuple(inputs), paths[phase], dynamo=False, opset_version=OPSET, input_names=[*NAMES, *past],
                output_names=["logits", *(f"present.{name}" for name in kept)],
            )  # fmt: skip
    return paths


def example(decoder: Decoder, tokens: int, positions: int) -> Iterator[Tensor]:
    """Example inputs of a graph in its order; cached keys and values are zeros."""
    yield torch.zeros(1, tokens, dtype=torch.int64)
    yield torch.ones(1, positions, dtype=torch.int64)
    yield torch.arange(positions - tokens, positions)[None]
    yield torch.ones(tokens, positions, dtype=torch.int64).tril(positions - tokens)[None, None]
    if positions > tokens:
        for _ in range(2 * len(decoder.inner.layers)):
            yield torch.zeros(1, decoder.heads, positions - tokens, decoder.width)


if __name__ == "__main__":
    main()

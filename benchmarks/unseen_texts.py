"""Zeros, bits, and zeros with bits, trained, on kinds of text that calibration never saw: a table of each way.

    python benchmarks/unseen_texts.py off-grid FOLDER OUT          takes a model off the grid of a quantized file
    python benchmarks/unseen_texts.py run FOLDER WAY ... --out FILE.jsonl [--seen manual,debates]
    python benchmarks/unseen_texts.py table FILE.jsonl                 into docs/bits.md

A WAY is a row of `WAYS`. Calibration, validation and training text are parts of the kinds of the source `mixed` that
are `--seen`; the others are unseen. A plan is made once; its folder is written as it was pruned or rounded, and as it
was trained, and both are measured in plain transformers, in float32.

Weights that come from a quantized file lie on its grid, so that rounding them again costs next to nothing. `off-grid`
multiplies the columns of what reads a norm by random numbers and divides its gain by them, likewise between v and o and
between up and down: the model computes the same, and its weights lie on no grid.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from marked_page import write_between
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import atp_tune
from atp_tune.config.data import KINDS, Text
from atp_tune.inputs.items import IDS
from atp_tune.inputs.windows import token_windows

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- benchmarks/unseen_texts.py -->", "<!-- end -->")
SPREAD = 0.25  # standard deviation of the logarithms of the factors
ZEROS = {"atp": '["atp"]', "gradient": '["gradient"]', "rows": '["gradient-rows"]'}
ROWS, BITS = '["gradient-rows"]', '["gradient"]'
GPTQ = {"quantizers": ["gptq"], "group_size": 64, "act_order": True}
WAYS = {  # name → sparsity or size, bits, allocation
    "2 bits": (None, 2, '["uniform"]'),
    "2.5 bits, gradient": (None, 2.5, BITS),
    "3 bits": (None, 3, '["uniform"]'),
    "3 bits, gradient": (None, 3, BITS),
    "3.5 bits, gradient": (None, 3.5, BITS),
    "4 bits": (None, 4, '["uniform"]'),
    "4 bits, gradient": (None, 4, BITS),
    "70 % zeros, rows, 4 bits": (0.7, 4, ROWS),
    "60 % zeros, rows, 4 bits": (0.6, 4, ROWS),
    "50 % zeros, rows, 4 bits": (0.5, 4, ROWS),
    "50 % zeros, rows, 3 bits": (0.5, 3, ROWS),
    "50 % zeros, rows, 6 bits": (0.5, 6, ROWS),
    **{f"size {size}": (size, None, ROWS) for size in ("2.78bpw", "3.3bpw", "3.8bpw", "4.3bpw")},
    **{f"{share} % zeros, {name}": (share / 100, None, own) for share in (50, 60) for name, own in ZEROS.items()},
}


@torch.no_grad()
def take_off_grid(model: Any, generator: torch.Generator) -> None:
    """Changes weights of a Llama-like model such that it computes the same, on no grid."""
    config = model.config.get_text_config()
    offset = 1.0 if config.model_type.startswith("gemma") else 0.0  # its gains are 1 + weight
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads

    def factors(count: int) -> Tensor:
        return torch.exp(SPREAD * torch.randn(count, generator=generator))

    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        before_mlp = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (before_mlp, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(norm.weight.numel())
            norm.weight.copy_((norm.weight + offset) / scale - offset)
            for reader in readers:
                reader.weight.mul_(scale)
        # Heads that share keys and values share the factors of these.
        scale = factors(attention.v_proj.weight.shape[0]).view(-1, width)
        attention.v_proj.weight.div_(scale.reshape(-1, 1))
        attention.o_proj.weight.mul_(scale.repeat_interleave(shared, 0).flatten())
        scale = factors(mlp.up_proj.weight.shape[0])
        mlp.up_proj.weight.div_(scale[:, None])
        mlp.down_proj.weight.mul_(scale)


def off_grid(folder: Path, out: Path) -> None:
    """Writes the model of a folder off its grid, and prints how far its logits moved."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(5, 10_000, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        take_off_grid(model, torch.Generator().manual_seed(0))
        print(f"largest change of a logit: {float((model(ids).logits - before).abs().max()):.1e}")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def windows(kind: str, folder: Path, bos: bool) -> Tensor:
    """Windows [16, 256] of the last third of a kind; `bos`: with BOS before them."""
    text = Text(source=f"mixed:{kind}", part=(0.65, 1.0), shuffle=True, nsamples=16, seqlen=256)
    return token_windows(text, folder, Path(), bos=bos).tensors[IDS]


@torch.no_grad()
def nlls(folder: Path, bos: bool) -> dict[str, list[float]]:
    """Mean NLL of each window of each kind, by plain transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for kind in KINDS:
        ids = windows(kind, folder, bos)
        parts = [nn.functional.cross_entropy(model(one[None]).logits[0, :-1].float(), one[1:]).item() for one in ids]
        found[kind] = parts
    return found


def study(folder: Path, way: str, seen: str) -> dict[str, Any]:
    """The tables of the study of a way."""
    sparsity, bits, allocation = WAYS[way]
    text = {"source": f"mixed:{seen}", "shuffle": True, "nsamples": 16, "seqlen": 256}
    parts = {"calibration": [0.0, 0.3], "validation": [0.3, 0.65], "test": [0.65, 1.0]}
    size = isinstance(sparsity, str)
    return {
        **({} if sparsity is None else {"size" if size else "sparsity": sparsity}),
        **({} if bits is None else {"bits": bits}),
        **({"quantize": GPTQ} if bits or size else {}),
        "model": {"source": str(folder.absolute())},
        "allocation": json.loads(allocation),
        "texts": {role: {**text, "part": part} for role, part in parts.items()},
        "search": {"trials": 6 if size else {'["uniform"]': 1, '["atp"]': 8}.get(allocation, 3)},
        "recover": {},
    }


def run(folder: Path, ways: list[str], out: Path, seen: str) -> None:
    """Measures the dense model and each way, and adds a line for each to `out`."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(row["model"], row["seen"], row["way"]) for row in rows}

    def add(way: str, **row: Any) -> None:
        line = {"model": folder.name, "seen": seen, "way": way, **row}
        print(way, {kind: round(math.exp(fmean(values)), 2) for kind, values in row["nlls"].items()}, flush=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for way in ways:
        if (folder.name, seen, way) in known:
            continue
        with TemporaryDirectory() as temporary:
            result = atp_tune.tune(atp_tune.Study.model_validate(study(folder, way, seen)))
            best = result.configuration()
            trained = best.config.recovered
            if (folder.name, seen, "dense") not in known:
                known.add((folder.name, seen, "dense"))
                add("dense", nlls=nlls(folder, best.config.bos))
            untrained = best.config.model_copy(update={"recovered": None})
            pruned, tuned = Path(temporary) / "pruned", Path(temporary) / "trained"
            replace(best, config=untrained).save(pruned)
            bits = best.config.bits.effective if best.config.bits else None
            add(way, nlls=nlls(pruned, best.config.bos), bits=bits)
            if trained is not None and trained.kept:
                best.save(tuned)
                add(f"{way}, trained", nlls=nlls(tuned, best.config.bos), bits=bits, seconds=trained.seconds)


def ratio(row: dict[str, Any], dense: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """Perplexity over the dense model's, with the paired error over windows, of some kinds together."""
    changes = [a - b for kind in kinds for a, b in zip(row["nlls"][kind], dense["nlls"][kind], strict=True)]
    value = math.exp(fmean(changes))
    return f"{value:.2f}±{value * stdev(changes) / math.sqrt(len(changes)):.2f}"


def table(file: Path) -> Iterator[str]:
    """Lines of Markdown: multiples of the dense perplexity on the kinds that were seen and on those that were not."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    yield "| model | seen | way | bits | seen kinds | unseen kinds | each |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["model"], row["seen"], row.get("bits") or 16, row["way"])):
        own = row["model"], row["seen"]
        dense = next(each for each in rows if (each["model"], each["seen"], each["way"]) == (*own, "dense"))
        if row is dense:
            continue
        seen = tuple(own[1].split(","))
        unseen = tuple(kind for kind in KINDS if kind not in seen)
        each = ", ".join(f"{kind} {ratio(row, dense, (kind,))}" for kind in unseen)
        bits = f"{row['bits']:.2f}" if row.get("bits") else ""
        cells = own[0], ", ".join(seen), row["way"], bits, ratio(row, dense, seen), ratio(row, dense, unseen), each
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["off-grid", "run", "table"])
    parser.add_argument("path", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seen", default="manual,debates")
    given = parser.parse_args()
    if given.command == "off-grid":
        off_grid(given.path, Path(given.names[0]))
    elif given.command == "run":
        run(given.path, given.names, given.out, given.seen)
    else:
        write_between(ROOT / "docs" / "bits.md", MARKS, "\n".join(table(given.path)))


if __name__ == "__main__":
    main()

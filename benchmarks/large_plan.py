"""What `plan` foretells of a study of Llama-2-7B or -70B on this machine, without their weights.

    python benchmarks/large_plan.py 7B
    python benchmarks/large_plan.py 70B --set model.offload=disk       blocks are read one by one
    python benchmarks/large_plan.py tiny                               the same code on a tiny shape

The checkpoint has the model's shapes, and zeros for weights, in --dtype or the number format that this machine computes
in: its files are holes, which take no room on the disk and are read as fast as the machine makes zeros, so that seconds
of reading from a disk are not in the forecast. Texts are of random words. The study is that of the papers in size: 128
windows of 2,048 tokens to calibrate on, 164 to validate and to test on, Wanda at 70 %, with `row-prices`. It lies in
build/large.
"""

import argparse
import json
import math
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp_tune.checkpoints.devices import find_device, find_dtype

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "large"
VOCABULARY, TOKENS = 32000, 2048
SHAPES = {  # width, width of the MLP, blocks, heads, heads of keys and values
    "7B": (4096, 11008, 32, 32, 32),
    "70B": (8192, 28672, 80, 64, 8),
    "tiny": (64, 160, 4, 4, 2),
}
FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16"}
WINDOWS = {"calibration": 128, "validation": 164, "test": 164}
STUDY = """\
description = "Llama-2-{name}, its shapes alone"
sparsity = 0.7
allocation = ["row-prices"]

[model]
source = "{folder}"

[prune]
pruners = ["wanda"]

[search]
trials = 12
sampler = "gp"

[continuations]
tokens = 0
"""
TEXT = """
[texts.{role}]
source = "file:{role}.txt"
nsamples = {windows}
seqlen = {tokens}
"""


def main() -> None:
    """Writes what is missing, and runs `plan`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--dtype", default="auto", help="the number format of the weights")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    dtype = find_dtype(options.dtype, find_device("auto"))
    named = str(dtype).removeprefix("torch.")
    folder = PLACE / f"{options.name}-{named}"
    if not folder.is_dir():
        write_model(folder, LlamaConfig(**facts(options.name), dtype=dtype), dtype)
        write_tokenizer(folder)
    for role, windows in WINDOWS.items():
        write_text(PLACE / f"{role}.txt", windows * TOKENS, role)
    study = PLACE / f"{folder.name}.toml"
    texts = "".join(TEXT.format(role=role, windows=windows, tokens=TOKENS) for role, windows in WINDOWS.items())
    study.write_text(STUDY.format(name=options.name, folder=folder.name) + texts, encoding="utf-8")
    words = [word for each in (f"model.dtype={named}", *options.set) for word in ("--set", each)]
    command = [sys.executable, ROOT / "tune.py", "plan", "--study", study, *words]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def facts(name: str) -> dict[str, Any]:
    """What the configuration of a model says."""
    width, inner, blocks, heads, keys = SHAPES[name]
    return {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": 2 * TOKENS,
        "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
    }  # fmt: skip


def write_model(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """A checkpoint of zeros, a file for each block and one for the rest."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    files, places = dict[str, dict[str, tuple[int, ...]]](), dict[str, str]()
    for name, parameter in model.named_parameters():
        block = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(f"block-{block[1]}" if block else "rest", {})[name] = tuple(parameter.shape)
    for name, shapes in files.items():
        write_holes(folder / f"{name}.safetensors", shapes, dtype)
        places |= dict.fromkeys(shapes, f"{name}.safetensors")
    listed = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(listed, encoding="utf-8")


def write_holes(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """A safetensors file whose numbers are a hole: zeros that take no room."""
    end, header = 0, dict[str, Any]()
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": FORMATS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        out.truncate(8 + len(head) + end)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words: a token for each number."""
    made = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="0").save_pretrained(folder)  # type: ignore[no-untyped-call]


def write_text(file: Path, tokens: int, seed: str) -> None:
    """A text of so many random words of that tokenizer."""
    if not file.is_file():
        draw = random.Random(seed)
        file.write_text(" ".join(str(draw.randrange(VOCABULARY)) for _ in range(tokens + 1)), encoding="utf-8")


if __name__ == "__main__":
    main()

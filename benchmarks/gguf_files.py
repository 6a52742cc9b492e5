"""KL of .gguf files from a dense one, all computed by llama.cpp itself on texts of one's own.

    python benchmarks/gguf_files.py DENSE.gguf FOLDER FILE.gguf ... --texts TEXT ...

FOLDER is the model's, with its tokenizer; each TEXT is one kind, of which some windows are taken, evenly. Ratios are to
the first file, their errors paired by windows.
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from atp_tune.folders.gguf_file import llama_logits

LENGTH, WINDOWS = 256, 6  # tokens of a window, BOS among them where there is one; windows of each text


def main() -> None:
    """Prints a line for each file and text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(options.folder)
    for text in options.texts:
        windows = windows_of(tokenizer, text.read_text(encoding="utf-8", errors="ignore"))
        dense = [logits[:-1].log_softmax(-1) for logits in llama_logits(options.dense, windows)]
        first = list[float]()
        for file in options.files:
            rows = [logits[:-1].log_softmax(-1) for logits in llama_logits(file, windows)]
            pairs = [*zip(dense, rows, strict=True)]
            kls = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]
            same = fmean(float((p.argmax(-1) == q.argmax(-1)).float().mean()) for p, q in pairs)
            first = first or kls
            ratio = fmean(kls) / fmean(first)
            rest = [own - ratio * other for own, other in zip(kls, first, strict=True)]
            error = stdev(rest) / len(rest) ** 0.5 / fmean(first)
            print(f"{text.name} {file.name}: KL {fmean(kls):.4f}, × {ratio:.2f} ± {error:.2f}, same top {same:.1%}")


def windows_of(tokenizer: Any, text: str) -> Tensor:
    """Token ids [windows, tokens] of a text, evenly spread."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids, length = tokenizer(text, add_special_tokens=False).input_ids, LENGTH - len(head)
    starts = [*range(0, len(ids) - length, max(length, len(ids) // WINDOWS))][:WINDOWS]
    return torch.tensor([head + ids[start : start + length] for start in starts])


if __name__ == "__main__":
    main()

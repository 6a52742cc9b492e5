"""KL of .gguf files from a dense one, all computed by llama.cpp itself on texts of one's own.

    python benchmarks/gguf_files.py DENSE.gguf FOLDER FILE.gguf ... --texts TEXT ...

FOLDER is the model's, with its tokenizer; each TEXT is one kind, of which some windows are taken, evenly. Ratios are to
the first file, their errors paired by windows.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from gguf_types import by_llama, compared, ratio
from torch import Tensor
from transformers import AutoTokenizer

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
        dense, first = by_llama(options.dense, windows), list[float]()
        for file in options.files:
            found = compared(dense, by_llama(file, windows), windows)
            first = first or found["kl"]
            means = f"KL {fmean(found['kl']):.4f}, × {ratio(found['kl'], first)}, same top {fmean(found['same']):.1%}"
            print(f"{text.name} {file.name}: {means}")


def windows_of(tokenizer: Any, text: str) -> Tensor:
    """Token ids [windows, tokens] of a text, evenly spread."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids, length = tokenizer(text, add_special_tokens=False).input_ids, LENGTH - len(head)
    starts = [*range(0, len(ids) - length, max(length, len(ids) // WINDOWS))][:WINDOWS]
    return torch.tensor([head + ids[start : start + length] for start in starts])


if __name__ == "__main__":
    main()

"""Small language models on which nothing is tuned, trained here on Debian's manuals: two Llamas and a GPT-NeoX.

    python benchmarks/language_models.py                    texts, tokenizers and all models, into build/language
    python benchmarks/language_models.py llama-small        one of them; the same command goes on where it was stopped
    python benchmarks/language_models.py --packages DIR     takes the packages from a folder, and does not call apt

`language_texts.py` has the packages and the parts; the models see of the part `training` as much as their steps take,
each token once. `llama-small` and `gpt-neox-small` take about ten minutes of one core each, `llama-wide` half an hour:
its rows are multiples of 256 weights, and llama.cpp's converter knows the kind of its tokenizer. AdamW, one cycle of
the learning rate, bfloat16 autocast, seed 0. Weights are not committed: on another machine the last digits differ.
benchmarks/studies has a study of the first two, for `allocations.py` and `finetuning.py`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from language_texts import PACKAGES, fetched, news, of_folder, of_package, once, parts_of, write_parts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from atp_tune.cli.terminal import quiet
from atp_tune.config.data import Text
from atp_tune.inputs.sources import read_jsonl
from atp_tune.utils.cache import file_atomically, folder_atomically, sha256_of

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "language"
END = "<|endoftext|>"  # after each page
VOCABULARY, SEQLEN, BATCH = 4096, 256, 4
DECAY, NORM = 0.1, 1.0  # weight decay, largest norm of a gradient
SAVED_EVERY = 120.0  # seconds


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and how long it is trained."""

    width: int = 320
    blocks: int = 8
    heads: int = 5
    steps: int = 0
    rate: float = 2e-3  # highest learning rate
    inner: int = 864  # of an MLP
    vocabulary: int = VOCABULARY
    spaces: bool = False  # a tokenizer as Llama 2 has it: spaces are "▁", unknown characters are bytes


def llama(shape: Shape) -> PreTrainedModel:
    """RMSNorm, gated MLP, no biases."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
            num_hidden_layers=shape.blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
            max_position_embeddings=2 * SEQLEN, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip


def gpt_neox(shape: Shape) -> PreTrainedModel:
    """LayerNorm, attention and MLP side by side, one linear for queries, keys and values, biases."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
            num_hidden_layers=shape.blocks, num_attention_heads=shape.heads, max_position_embeddings=2 * SEQLEN,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[Shape], PreTrainedModel], Shape]] = {
    "llama-small": (llama, Shape(steps=1600)),
    "gpt-neox-small": (gpt_neox, Shape(steps=2400, inner=1280)),
    "llama-wide": (llama, Shape(width=512, heads=8, steps=1600, rate=7e-4, inner=1536, spaces=True)),
}


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--packages", type=Path, default=BUILD / "packages", help="the folder of the .deb files")
    parser.add_argument("--folder", type=Path, help="take the .html and .txt files below it in the place of packages")
    parser.add_argument("--out", type=Path, default=BUILD)
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"{', '.join(sorted(unknown))}: is none of {', '.join(MODELS)}")
    with quiet():
        make_texts(options.out, options.packages, options.folder)
        for name in options.names or MODELS:
            weights = trained(name, options.out) / "model.safetensors"
            print(f"{weights}: sha256 {sha256_of(weights)}")


def make_texts(out: Path, packages: Path, folder: Path | None = None) -> None:
    """The files texts/PART.jsonl and, from packages, texts/news.jsonl; news come last."""
    if (out / "texts" / "news.jsonl").is_file():
        return
    if folder is not None:
        pages = [*of_folder(folder)]
    else:
        pages = [page for package in PACKAGES for page in of_package(package, fetched(package, packages))]
    parts = parts_of(once(pages))
    write_parts(parts, out / "texts")
    print({part: f"{len(texts)} pages, {sum(map(len, texts)):,} characters" for part, texts in parts.items()})
    if folder is None:
        write_parts({"news": news(packages)}, out / "texts")


def pages_of(out: Path, part: str) -> list[str]:
    """The pages of a part."""
    file = out / "texts" / f"{part}.jsonl"
    return read_jsonl(file, Text(source=f"file:{file}"))


def make_tokenizer(texts: list[str], shape: Shape) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the texts, or BPE of characters with bytes behind it; the end of a page is token 0."""
    if shape.spaces:
        found = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        ways = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
        found.decoder = decoders.Sequence([*ways])
        special, alphabet = [END, *(f"<0x{byte:02X}>" for byte in range(256))], list[str]()
    else:
        found = Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        special, alphabet = [END], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, clean_up_tokenization_spaces=False)


def windows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The ids of all pages, joined, in windows [windows, SEQLEN + 1] in random order: each token is predicted once."""
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    joined = np.concatenate([np.array([*own, tokenizer.eos_token_id], dtype=np.int64) for own in ids])
    count = (len(joined) - 1) // SEQLEN
    rows = np.arange(count)[:, None] * SEQLEN + np.arange(SEQLEN + 1)
    order = np.random.default_rng(0).permutation(count)
    return torch.from_numpy(joined[rows[order]])


@cache
def training_windows(out: Path, shape: Shape) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """The tokenizer of a model, and what it is trained on."""
    texts = pages_of(out, "training")
    tokenizer = make_tokenizer(texts, shape)
    return tokenizer, windows_of(texts, tokenizer)


def trained(name: str, out: Path = BUILD) -> Path:
    """The folder of a trained model."""
    target, (make, shape) = out / name, MODELS[name]
    if not target.is_dir():
        tokenizer, windows = training_windows(out, shape)
        torch.manual_seed(0)
        model = make(shape)
        print(f"{name}: {sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
        train(model, windows, shape, out / f"{name}.part")
        with folder_atomically(target) as place:
            model.to(torch.bfloat16).save_pretrained(place)
            tokenizer.save_pretrained(place)
        (out / f"{name}.part").unlink(missing_ok=True)
    return target


def train(model: PreTrainedModel, windows: Tensor, shape: Shape, part: Path) -> None:
    """Trains on windows [windows, SEQLEN + 1], from the file `part` if there is one."""
    steps, rate = shape.steps, shape.rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    states: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if part.is_file():
        kept = torch.load(part, weights_only=True)
        first = kept.pop("steps")
        if kept["schedule"]["total_steps"] != steps:
            raise SystemExit(f"{part} is of another number of steps; remove it")
        for key, state in kept.items():
            states[key].load_state_dict(state)
    model.train()
    began = saved = monotonic()
    recent: list[float] = []
    for step in range(first, steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)
        recent.append(step_of(model, windows[rows], optimizer))
        schedule.step()
        done, passed = step + 1, monotonic() - began
        if done % 50 == 0 or done == steps:
            left = passed / (done - first) * (steps - done)
            print(f"step {done} of {steps}: loss {np.mean(recent):.3f}, {passed:.0f} s, {left:.0f} s left", flush=True)
            recent.clear()
        if monotonic() - saved > SAVED_EVERY:
            with file_atomically(part) as place:
                torch.save({"steps": done, **{key: state.state_dict() for key, state in states.items()}}, place)
            saved = monotonic()


def step_of(model: PreTrainedModel, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step on ids [BATCH, SEQLEN + 1]; the loss before it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    main()

"""One β as the research scripts do it: load, two calibration passes, masks by sorting, evaluation window by window.

    python benchmarks/research_loop.py FOLDER SPARSITY BETA search|report      window NLLs on one line
    python benchmarks/research_loop.py FOLDER prepare [KEY=VALUE …]            model and windows of smol-60 into FOLDER

Written from the description of Wanda's and ATP's procedure, for a Llama; `search_cost.py` runs it for each β.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def loop(work: Path, sparsity: float, beta: float, role: str) -> list[float]:
    """Window NLLs of the pruned model."""
    dtype = getattr(torch, (work / "dtype").read_text())
    folder = (work / "model").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    calibration, text = (windows(work, folder, name) for name in ("calibration", role))
    body, blocks = model.model, len(model.model.layers)
    hidden = torch.cat([body.embed_tokens(window[None]) for window in calibration])
    after = torch.zeros_like(hidden)
    rotary = body.rotary_emb(hidden[:1], torch.arange(calibration.shape[1])[None])
    for i, block in enumerate(body.layers):
        share = sparsity + beta * (i - (blocks - 1) / 2)
        squares = gather(block, hidden, rotary)
        for name, linear in linears(block):
            scores = linear.weight.abs() * squares[name].sqrt()
            lowest = torch.sort(scores, dim=-1, stable=True)[1][:, : int(scores.shape[1] * share)]
            linear.weight.data.scatter_(1, lowest, 0)
        for j in range(len(hidden)):
            after[j] = block(hidden[j : j + 1], position_embeddings=rotary)
        hidden, after = after, hidden
    return [evaluate(model, window[None]) for window in text]


def windows(work: Path, folder: str, role: str) -> Tensor:
    """Tokenises a text, as each process does, and cuts it; where windows are drawn at random, they are the study's."""
    ids, drawn = (
        AutoTokenizer.from_pretrained(folder)((work / f"{role}.txt").read_text()).input_ids,
        work / f"{role}.npy",
    )
    found = np.load(drawn)
    if role == "calibration":
        return torch.from_numpy(found)
    cut = torch.tensor(ids[: found.size]).view(found.shape)
    assert torch.equal(cut, torch.from_numpy(found))
    return cut


def linears(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of a block by name."""
    return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def gather(block: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean squares of each linear's inputs, window by window, in float32."""
    squares = {name: torch.zeros(linear.in_features) for name, linear in linears(block)}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            squares[name] += torch.norm(args[0].reshape(-1, args[0].shape[-1]).T.float(), p=2, dim=1) ** 2

        return add

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears(block)]
    for j in range(len(hidden)):
        block(hidden[j : j + 1], position_embeddings=rotary)
    for handle in handles:
        handle.remove()
    return squares


def evaluate(model: nn.Module, window: Tensor) -> float:
    """NLL of a window from the model's full logits, nats per token."""
    logits = model(window).logits
    loss = nn.functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
    return float(loss)


def prepare(work: Path, changes: list[str]) -> None:
    """Writes where the model of smol-60 lies, its number format and its windows, some keys of the study changed."""
    from atp_tune.config.data import Text
    from atp_tune.config.study import Data
    from atp_tune.config.studyfile import load
    from atp_tune.events import Place
    from atp_tune.inputs.items import Items
    from atp_tune.inputs.sources import documents
    from atp_tune.run.session import Session, Setup

    study = (file := load("smol-60", changes)).study
    data = study.data
    texts: dict[str, Data] = {"calibration": data.calibration, "validation": data.validation, "test": study.test_text}
    context = Session.open(Setup(study.model, study.prune, texts, Place(file.folder, "cpu")))
    (work / "model").write_text(str(context.folder.path))
    (work / "dtype").write_text(context.dtype)
    for role, drawn in context.windows.items():
        text = texts[role]
        assert isinstance(drawn, Items) and isinstance(text, Text)
        np.save(work / f"{role}.npy", drawn.ids)
        (work / f"{role}.txt").write_text("\n\n".join(documents(text, file.folder)))


def main() -> None:
    """Prints the window NLLs, or prepares."""
    work = Path(sys.argv[1])
    if sys.argv[2] == "prepare":
        prepare(work, sys.argv[3:])
        return
    print(*loop(work, float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))


if __name__ == "__main__":
    main()

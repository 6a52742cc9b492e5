"""One trial of a study against the loop of the research scripts, in one run.

The loop is what a shell script per β does: load the checkpoint, gather norms with hooks on a full forward of every
block, sort each row for the mask, write the zeros into the model, run the block again, and evaluate with the model's
own loss. Both prune SmolLM2-135M with Wanda at the same β; seconds as ratios, in pairs. Perplexities differ by about
1 %, since float32 sums in another order turn near-ties over; in float64 all masks are equal (docs/log.md).
"""

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from atp_tune.bench import Bench, Setup
from atp_tune.perplexity import perplexity
from atp_tune.plan import Plan, make_plan
from atp_tune.studyfile import load

PAIRS = 3
BETA = 0.008


def trial(bench: Bench, plan: Plan) -> float:
    """Perplexity by this project, with the model at hand."""
    pruned = ((block.index, block.weights) for block in bench.prune(plan))
    return perplexity(bench.all_nlls(pruned, "search")).value


@torch.no_grad()
def loop(folder: Path, calibration: Tensor, search: Tensor, plan: Plan) -> float:
    """Perplexity by the loop of the research scripts, model loading included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body = model.model
    hidden = [body.embed_tokens(window[None]) for window in calibration]
    positions = torch.arange(calibration.shape[1])[None]
    rotary = body.rotary_emb(hidden[0], positions)
    for block, sparsity in zip(body.layers, plan.sparsities, strict=True):
        squares = gather(block, hidden, rotary)
        for name, linear in linears(block):
            scores = linear.weight.abs() * squares[name].sqrt()
            lowest = torch.sort(scores, dim=-1, stable=True)[1][:, : int(scores.shape[1] * sparsity)]
            linear.weight.data.scatter_(1, lowest, 0)
        hidden = [block(h, position_embeddings=rotary) for h in hidden]
    return evaluate(model, search)


def linears(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of a block by name."""
    return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def gather(block: nn.Module, hidden: list[Tensor], rotary: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Sums of squares of each linear's inputs, window by window."""
    squares = {name: torch.zeros(linear.in_features, dtype=linear.weight.dtype) for name, linear in linears(block)}

    def hook(name: str):
        def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            squares[name] += args[0].reshape(-1, args[0].shape[-1]).pow(2).sum(0)

        return add

    handles = [linear.register_forward_hook(hook(name)) for name, linear in linears(block)]
    for h in hidden:
        block(h, position_embeddings=rotary)
    for handle in handles:
        handle.remove()
    return squares


def evaluate(model: LlamaForCausalLM, search: Tensor) -> float:
    """Perplexity through the model's own loss, window by window."""
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in search]
    return float(torch.tensor(losses).mean().exp())


def main() -> None:
    """Times both in turn and prints the ratios."""
    file = load("smol")
    texts = {"calibration": file.study.texts.calibration, "search": file.study.texts.search}
    bench = Bench.open(Setup(file.study.model, file.study.prune, texts, file.folder, "cpu"))
    plan = make_plan("wanda", "atp", bench.budget(file.study.sparsity), {"beta": BETA})
    ids = [torch.from_numpy(bench.windows[role].ids) for role in ("calibration", "search")]
    trial(bench, plan)
    ratios = []
    for _ in range(PAIRS):
        began = time.perf_counter()
        ours = trial(bench, plan)
        middle = time.perf_counter()
        theirs = loop(bench.folder.path, ids[0], ids[1], plan)
        seconds = middle - began, time.perf_counter() - middle
        ratios.append(seconds[1] / seconds[0])
        print(f"trial {seconds[0]:.1f} s ({ours:.4f})   loop {seconds[1]:.1f} s ({theirs:.4f})   ×{ratios[-1]:.2f}")
    print(f"median ×{statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()

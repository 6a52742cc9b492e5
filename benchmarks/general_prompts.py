"""What zeros do to general prompts: twelve fixed ones, of no kind that calibration sees more of than of others.

    python benchmarks/general_prompts.py                     uniform and row-prices of `smol` at 30, 40, 50 and 60 %
    python benchmarks/general_prompts.py 0.5 --study NAME    another sparsity, another study's model and texts
    python benchmarks/general_prompts.py --texts             and each continuation

Printed are, with the standard error between prompts: the share of positions along the dense model's greedy continuation
where the pruned model, given the dense model's text so far, has the same most probable token; the share of 4-grams of
its own greedy continuation that stand in it before; and its perplexity on the study's test text.
"""

import argparse
import statistics
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch

from atp_tune.generation.decoding import end_tokens, generate
from atp_tune.generation.prompts import encode
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.measures import perplexity
from atp_tune.metrics import continuations
from atp_tune.run.session import Session, Setup
from atp_tune.search.space import make_space
from atp_tune.spec.studyfile import load

PROMPTS = (
    *continuations.PROMPTS,
    "Water boils at a temperature of",
    "The three branches of the United States government are",
    "Dear Sir or Madam, I am writing to you because",
    "In 1969, the first human beings landed on",
    "The main difference between a cat and a dog is that",
    "If you want to sleep better at night, you should",
    "The heart is an organ that",
    "She opened the door and saw",
    "Here are three reasons why reading books is good for you: first,",
)


def main() -> None:
    """Prints a table, and the texts if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sparsities", nargs="*", type=float, default=[0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--study", default="smol")
    parser.add_argument("--texts", action="store_true")
    asked = parser.parse_args()
    print("| plan | zeros | same top token | repeated 4-grams | test perplexity |\n|---|---|---|---|---|", flush=True)
    texts = []
    for sparsity in asked.sparsities:
        keys = [f"sparsity={sparsity}", 'allocation=["row-prices"]', "texts.calibration.draws=1"]
        file = load(asked.study, keys)
        with Session.open(Setup.of_study(file.study, file.folder, False)) as context:
            judge = _Judge(context)
            if sparsity == asked.sparsities[0]:
                texts += [("dense", 0.0, judge.dense_texts)]
                dense = perplexity(context.all_nlls(context.dense(), "test")).value
                print(f"| dense | 0 % | | {_mean(map(_repeated, judge.dense_ids))} | {dense:.2f} |", flush=True)
            space = make_space(file.study, context.budget(file.study.highest))
            for name, kappa in (("uniform", 0.0), ("row-prices", 1.0)):
                plan = space.plan({"pruner": "wanda", "allocation": "row-prices", "kappa": kappa})
                blocks = {block.index: block.weights for block in context.prune(plan)}
                same, own = judge.of(blocks)
                measured = perplexity(context.all_nlls(iter(blocks.items()), "test")).value
                row = [name, f"{sparsity:.0%}", _mean(same), _mean(map(_repeated, own)), f"{measured:.2f}"]
                print(f"| {' | '.join(row)} |", flush=True)
                texts.append((name, sparsity, judge.decoded(own)))
    for number, prompt in enumerate(PROMPTS if asked.texts else ()):
        print(f"\n{prompt}")
        for name, sparsity, found in texts:
            print(f"  {name} {sparsity:.0%}: {found[number]!r}")


class _Judge:
    """Continues the prompts by the dense model, and compares others with it."""

    def __init__(self, context: Session) -> None:
        self._context = context
        self._tokenizer = load_tokenizer(context.folder.path, context.folder.trusted)
        with context.replay.whole(context.checkpoint.weights) as model:
            ends = end_tokens(model, self._tokenizer)
            self._prompts = [encode(prompt, self._tokenizer, ends, context.bos) for prompt in PROMPTS]
            self.dense_ids = [self._continued(model, prompt) for prompt in self._prompts]
        self.dense_texts = self.decoded(self.dense_ids)

    def decoded(self, rows: Sequence[list[int]]) -> list[str]:
        """Texts of ids."""
        return [self._tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def of(self, blocks: Any) -> tuple[list[float], list[list[int]]]:
        """Shares of same tokens by prompt, and own continuations, of the model with these blocks."""
        same = []
        with self._context.replay.whole(blocks.__getitem__) as model, torch.inference_mode():
            for prompt, dense in zip(self._prompts, self.dense_ids, strict=True):
                logits = model(torch.tensor([prompt + dense])).logits[0, len(prompt) - 1 : -1]
                same.append(float((logits.argmax(-1) == torch.tensor(dense)).float().mean()))
            return same, [self._continued(model, prompt) for prompt in self._prompts]

    def _continued(self, model: Any, prompt: list[int]) -> list[int]:
        [row] = generate(model, self._tokenizer, torch.tensor([prompt]), continuations.TOKENS).tolist()
        return list(row)


def _repeated(row: list[int]) -> float:
    grams = [tuple(row[k : k + 4]) for k in range(len(row) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Any) -> str:
    found = list(values)
    return f"{statistics.mean(found):.1%} ± {statistics.stdev(found) / sqrt(len(found)):.1%}"


if __name__ == "__main__":
    main()

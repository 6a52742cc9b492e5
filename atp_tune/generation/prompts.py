"""Greedy continuations of prompts.

Prompts are plain text, without a chat template: a template adds instructions that one-shot pruning never saw, and chat
tuning hides the difference that is to be shown. Prompts of equally many tokens are a batch; none is padded, since some
families compute other numbers with padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.errors import UserError
from atp_tune.generation.decoding import end_tokens, generate
from atp_tune.inputs.windows import bos_of

WeightsOf = Callable[[int], dict[str, Tensor]]  # tensors of a block on the compute device


def continued(
    replay: Replay,
    weights_of: WeightsOf,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int,
    bos: bool,
    step: Callable[[int, int], None],
) -> tuple[str, ...]:
    """The continuation of each prompt by a model with these blocks, of at most `tokens` tokens.

    `bos`: prompts begin with BOS, as the study's windows do; else as the tokenizer begins a text. `step` is called with
    the number of tokens so far, over all batches, and their greatest number.
    """
    with replay.whole(weights_of) as model:
        rows = [encode(prompt, tokenizer, end_tokens(model, tokenizer), bos) for prompt in prompts]
        lengths = dict.fromkeys(map(len, rows))
        found: dict[int, str] = {}
        for batch, length in enumerate(lengths):
            numbers = [number for number, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[number] for number in numbers], device=replay.checkpoint.device)

            def count(done: int, before: int = batch * tokens) -> bool:
                step(before + done, len(lengths) * tokens)
                return False

            new = generate(model, tokenizer, ids, tokens, on_token=count)
            found.update(zip(numbers, (tokenizer.decode(row, skip_special_tokens=True) for row in new), strict=True))
    return tuple(found[number] for number in range(len(prompts)))


def encode(prompt: str, tokenizer: Any, ends: Sequence[int], bos: bool) -> list[int]:
    """The ids of a prompt; UserError if there are none."""
    ids = list(tokenizer(prompt, verbose=False).input_ids)
    while len(ids) > 1 and ids[-1] in ends:  # some tokenizers end each text
        ids.pop()
    first = bos_of(tokenizer) if bos else None
    ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    if not ids:
        raise UserError(f'prompt "{prompt}": has no tokens; give another text')
    return ids

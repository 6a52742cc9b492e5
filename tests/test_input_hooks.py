from contextlib import suppress
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from atp_tune.blocks.prune_pass import AllInputsSeen, InputCollector, stop_when_all_seen
from atp_tune.checkpoints.blocks import find_linears
from atp_tune.pruners.statistics import InputNorms


class Block(nn.Module):
    """Attention-like: a, b read one tensor, c another, d a copy of the first with the same values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(5, 4), nn.Linear(5, 5), nn.Linear(4, 3), nn.Linear(5, 2)
        self.ended = 0

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x) + self.b(x)[..., :4]
        total = self.c(first).sum() + self.d(x.clone()).sum()
        self.ended += 1
        return total


def gather(block: nn.Module, kind: Any, batches: list[Tensor]) -> dict[str, Any]:
    linears = find_linears(block)
    gathering = InputCollector(linears, kind, stop_when_all_seen(linears))
    with gathering.attached(block), torch.inference_mode():
        for x in batches:
            with suppress(AllInputsSeen):
                block(x)
    return gathering.result()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(windows, 3, 5, generator=generator) for windows in (2, 1, 4)]


def test_linears_that_read_the_same_tensor_share_statistics() -> None:
    found = gather(Block(), InputNorms, batches())
    assert found["a"] is found["b"]
    assert len({id(found[name]) for name in "acd"}) == 3


def test_listening_ends() -> None:
    block = Block()
    gather(block, InputNorms, batches())
    assert torch.isfinite(block(batches()[0]))
    assert block.ended == 1
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_no_input_is_kept_alive() -> None:
    block, seen = Block(), list[ref[Tensor]]()
    block.c.register_forward_pre_hook(lambda module, args: seen.append(ref(args[0])))
    gathering = InputCollector(find_linears(block), InputNorms, lambda found: None)
    with gathering.attached(block), torch.inference_mode():
        for x in batches():
            block(x)
            assert seen[-1]() is None
    assert set(gathering.result()) == set("abcd")

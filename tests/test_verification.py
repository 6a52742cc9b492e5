"""Models that the replay would get wrong are refused where they are loaded, by what they do, not by their name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expect import parametrize, refused
from families import ALL, bench_of, check, checkpoint_of, few, tiny
from test_replay import Toy
from torch import Tensor, nn

from atp_tune.blocks.verification import _recorded
from atp_tune.errors import UserError
from atp_tune.scores.next_token import is_causal


class Model(Toy):
    """A model of three linear blocks, each of which `between` may change the hidden states before."""

    def __init__(self) -> None:
        super().__init__(lambda ids: 1.0, False)

    def between(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden

    def order(self) -> list[int]:
        return [0, 1, 2]

    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        for index in self.order():
            hidden = self.blocks[index](self.between(index, hidden, input_ids), scale=1.0)
        return SimpleNamespace(logits=self.head(hidden, input_ids))


class Loops(Model):
    def order(self) -> list[int]:
        return [0, 1, 2, 0, 1, 2]


class Backwards(Model):
    def order(self) -> list[int]:
        return [2, 1, 0]


class Skips(Model):
    def order(self) -> list[int]:
        return [0, 1]


class Changes(Model):
    def between(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden * 2 if index == 1 else hidden


class AddsTokens(Model):
    def between(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden + self.embedding(ids) if index == 2 else hidden


class Streams(Model):
    def between(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([hidden, hidden]) if index == 0 else hidden


class LooksBack(Model):
    def between(self, index: int, hidden: Tensor, ids: Tensor) -> Tensor:
        self.first = hidden if index == 1 else getattr(self, "first", None)
        return hidden

    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return (hidden + self.first) @ self.embedding.weight.T


class MixesPositions(Model):
    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden.cumsum(1) @ self.embedding.weight.T


class NoLogits(Model):
    def head(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden.mean(1)


class Routes(nn.Module):
    """A block with two experts of its own kind, each of which gets the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
        after, chosen = hidden_states.clone(), (hidden_states[..., 0] > 0).long()
        for index, expert in enumerate(self.experts):
            after[chosen == index] += expert(hidden_states[chosen == index])
        return after


class RoutesTokens(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Routes()


class SeesTheFuture(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Bidirectional()


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
        return hidden_states + self.linear(hidden_states).mean(1, keepdim=True)


class Counts(nn.Module):
    """A block that remembers how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(6, 6), 0

    def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
        self.runs += 1
        return hidden_states + self.linear(hidden_states) * self.runs


class Remembers(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = Counts()


class Multiplies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
        return self.linear(hidden_states) + hidden_states @ self.other.weight


class ByItsWeight(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = Multiplies()


class WantsPictures(Model):
    def forward(self, input_ids: Tensor, use_cache: bool, pixel_values: Tensor | None = None) -> Any:
        if pixel_values is None:
            raise ValueError("give me\npixels")
        return super().forward(input_ids, use_cache)


REFUSED = {
    Loops: "runs its blocks several times, block 0 after block 2",
    Backwards: "runs its blocks in another order than they stand in, block 2 first",
    Skips: "runs 2 of 3 blocks on a text",
    Changes: "gives block 1 other hidden states than those that leave block 0",
    AddsTokens: "gives block 2 other hidden states than those that leave block 1",
    Streams: r"gives block 0 hidden states that are not \[windows, tokens, width\]",
    LooksBack: "computes its logits from more than the hidden states that leave its last block",
    MixesPositions: "does not compute its logits position by position",
    NoLogits: "has no logits for each token",
    SeesTheFuture: "predicts tokens from those that come later, so it is no causal language model",
    Remembers: "block 2 returns other numbers when it is run alone",
    ByItsWeight: "does not call 0.other on a text, so the inputs of its weights are not known",
    WantsPictures: "cannot be run block by block on a text alone: ValueError: give me pixels",
}


@parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_model_that_the_replay_is_not_is_refused_in_one_line(kind: type[Model]) -> None:
    with refused(f"^model {kind.__name__}: {REFUSED[kind]}") as caught:
        check(checkpoint_of(kind()))
    assert str(caught.value).isprintable()


@parametrize("kind", [Model, RoutesTokens])
def test_a_model_of_blocks_in_a_row_is_not_refused(kind: type[Model]) -> None:
    check(checkpoint_of(kind()))


def test_tokens_that_are_routed_may_differ_in_their_last_bits() -> None:
    """They are multiplied with those that chose the same expert, also with others of a later half."""
    logits, routes = torch.randn(2, 16, 9), checkpoint_of(RoutesTokens())
    with _recorded(routes, 2 * 16) as calls, _recorded(checkpoint_of(Model()), 2 * 16) as others:
        routes.blocks.get_submodule("1.experts.0")(torch.ones(5, 6))
    assert calls.is_routed and not others.is_routed
    noisy = logits * (1 + 1e-6)
    assert is_causal(logits, noisy, is_routed=True)
    assert not is_causal(logits, noisy, is_routed=False)
    assert not is_causal(logits, logits + 0.1, is_routed=True)


@parametrize("family", ALL)
@parametrize("dtype", few([torch.float32, torch.bfloat16, torch.float16], [torch.bfloat16]))
def test_families_are_verified_in_each_number_format(family: str, dtype: torch.dtype) -> None:
    check(checkpoint_of(tiny(family, dtype)))


@parametrize("offload", ["cpu", "disk"])
def test_a_streamed_model_passes_once(offload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    checkpoint = checkpoint_of(tiny("llama"), offload)
    weights = type(checkpoint).weights
    monkeypatch.setattr(type(checkpoint), "weights", lambda self, index: asked.append(index) or weights(self, index))
    check(checkpoint)
    assert asked == [0, 0, 1, 2, 3]  # block 0 also says what it returns beside the hidden states


def test_a_bench_has_no_other_replay() -> None:
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]  # one block, twice in the list
    with pytest.raises(
        UserError, match=r"model LlamaForCausalLM: shares self_attn.q_proj.weight between blocks 0 and 1;"
    ):
        bench_of(model)

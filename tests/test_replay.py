from functools import partial
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, refused
from families import ALL, TOKENS, VOCABULARY, check, checkpoint_of, random_ids, replay_of, tiny
from torch import Tensor, nn

from atp_tune.blocks.replay import Replay


@torch.inference_mode()
def replayed(replay: Replay, ids: Tensor) -> list[Tensor]:
    """Hidden states before block 0 and after each block."""
    states = [replay.embed(ids)]
    for index in range(len(replay.checkpoint.blocks)):
        states.append(replay.run(index, replay.checkpoint.weights(index), states[-1]))
    return states


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@parametrize("family", ALL)
def test_replay_is_the_model_to_the_last_bit(family: str) -> None:
    model = tiny(family)
    replay = replay_of(model)
    for windows, tokens in ((1, TOKENS), (3, TOKENS), (2, 7)):
        ids = random_ids(windows, tokens, seed=windows)
        states = replayed(replay, ids)
        dense = naive.states_of(model, replay.checkpoint.blocks, ids)
        assert [torch.equal(a, b) for a, b in zip(states[1:], dense, strict=True)] == [True] * len(dense)
        with torch.inference_mode():
            assert torch.equal(replay.logits(ids, states[-1]), logits_of(model, ids))


@parametrize("family", ALL)
def test_a_replayed_block_uses_the_weights_that_it_is_given(family: str) -> None:
    model, ids = tiny(family), random_ids(2)
    replay = replay_of(model)
    other = {name: torch.rand_like(tensor) for name, tensor in replay.checkpoint.weights(1).items()}
    states = replayed(replay, ids)
    with torch.inference_mode():
        after = replay.run(1, other, states[1])
    with torch.no_grad():
        replay.checkpoint.blocks[1].load_state_dict(other, strict=False)
    assert torch.equal(after, naive.states_of(model, replay.checkpoint.blocks, ids)[1])
    assert not torch.equal(after, states[2])


def test_a_forward_that_somebody_has_set_is_there_afterwards() -> None:
    """As accelerate's hooks are, and gradient checkpointing."""
    model, ids, calls = tiny("llama"), random_ids(2), list[int]()
    for index, block in enumerate(model.model.layers):
        block.forward = partial(
            lambda index, own, *args, **kwargs: calls.append(index) or own(*args, **kwargs), index, block.forward
        )
    before = [block.forward for block in model.model.layers]
    replay = check(checkpoint_of(model))
    with torch.inference_mode():
        replay.logits(ids, replayed(replay, ids)[-1])
    assert [block.forward for block in model.model.layers] == before
    calls.clear()
    logits_of(model, ids)
    assert calls == [0, 1, 2, 3]
    with replay.whole(replay.checkpoint.weights) as whole:
        logits_of(whole, ids)
    assert calls == [0, 1, 2, 3] * 2


@torch.inference_mode()
def test_arguments_are_kept_for_the_shapes_that_were_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of gemma2, [windows, 1, tokens, tokens] for each kind, would be kept for every shape that ever came."""
    model = tiny("gemma2")
    replay = replay_of(model)
    hidden, calls = replay.embed(random_ids(8)), list[int]()
    original = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **options: calls.append(len(options["input_ids"])) or original(**options)
    )
    for windows in (1, 2, 3, 4):
        replay.run(0, replay.checkpoint.weights(0), hidden[:windows])
    calls.clear()
    for windows in (4, 1, 3, 2, 1, 5, 1, 2, 3, 4):  # 5 takes the place of 4
        replay.run(0, replay.checkpoint.weights(0), hidden[:windows])
    assert calls == [5, 4]


class Toy(nn.Module):
    """A model that passes the hidden state by name, and what its blocks want beside it as a function of the tokens."""

    def __init__(self, extra: Any, returns_tuple: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList([ToyBlock(returns_tuple) for _ in range(3)])
        self.extra, self.returns_tuple = extra, returns_tuple

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            output = block(scale=self.extra(input_ids), hidden_states=hidden)
            hidden = output[0] if self.returns_tuple else output
            assert not self.returns_tuple or output[1] == "beside"
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


class ToyBlock(nn.Module):
    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.linear, self.returns_tuple = nn.Linear(6, 6), returns_tuple

    def forward(self, hidden_states: Tensor, scale: Any) -> Any:
        after = hidden_states + self.linear(hidden_states) * scale
        return (after, "beside") if self.returns_tuple else after


@parametrize("returns_tuple", [False, True])
@parametrize("extra", [lambda ids: 2.0, lambda ids: torch.full((ids.shape[0], 1, 1), 3.0)])
def test_a_hidden_state_that_is_passed_by_name(extra: Any, returns_tuple: bool) -> None:
    model, ids = Toy(extra, returns_tuple), random_ids(3)
    replay = replay_of(model)
    states = replayed(replay, ids)
    with torch.inference_mode():
        assert torch.equal(replay.logits(ids, states[-1]), logits_of(model, ids))


@parametrize("extra", [lambda ids: ids[..., None].float(), lambda ids: int(ids[0, 0])])
def test_blocks_that_are_told_the_tokens_are_refused(extra: Any) -> None:
    replay = replay_of(Toy(extra, False))
    with refused("model Toy: passes its blocks values that depend on the tokens"):
        replayed(replay, random_ids(2))


class Skipping(Toy):
    """A model that runs its last block on images alone."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embedding(input_ids)
        for block in list(self.blocks)[:2]:
            hidden = block(scale=1.0, hidden_states=hidden)
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


def test_blocks_that_do_not_run_on_a_text_are_refused() -> None:
    replay = replay_of(Skipping(None, False))
    with refused("model Skipping: runs 2 of 3 blocks on a text"):
        replay.embed(random_ids(2))

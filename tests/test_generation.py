"""Text from a model: exactly its greedy tokens, whatever its own settings are; answers piece by piece."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from expect import parametrize, refused, slow
from families import ALL, bench_of, few, replay_of, tiny
from plans import planned
from tinystudy import make_model, make_tokenizer
from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.run.generation import Answer, ChatOptions, Speaker, continued, encode, end_tokens, generate, longest
from atp_tune.run.observers import Kept

PROMPTS = ["ab cd", "xy", "cd ab", "pqrs"]
NEW = 6


class Letters:
    """A tokenizer of letters: the token of each is its number."""

    bos_token_id, eos_token_id, chat_template = 0, 1, None

    def __call__(self, text: str, verbose: bool = True) -> Any:
        return SimpleNamespace(input_ids=[2 + ord(letter) % 90 for letter in text])

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return ",".join(map(str, ids.tolist() if isinstance(ids, Tensor) else ids))


def greedy(model: Any, ids: list[int], ends: list[int], count: int = NEW) -> list[int]:
    """The likeliest token, one after another, each by the whole text: without a cache, a batch and transformers."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < count and not set(found) & set(ends):
            found.append(int(model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax()))
    return found


def said(replay: Replay, weights_of: Any = None, bos: bool = False) -> list[list[int]]:
    """The tokens that continue each prompt, up to the end of its text."""
    steps: list[tuple[int, int]] = []
    weights_of = weights_of or replay.checkpoint.weights
    texts = continued(replay, weights_of, Letters(), PROMPTS, NEW, bos, lambda *step: steps.append(step))
    assert steps[-1][0] <= steps[-1][1] == 3 * NEW  # three lengths
    return [[int(token) for token in text.split(",")] for text in texts]


def cut(tokens: list[int], ends: list[int]) -> list[int]:
    """Without what follows the end of a text that ends before the others of its batch."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens)) + 1]


@parametrize("family", few(ALL, ["llama"]))
def test_a_pruned_model_says_what_its_weights_say(family: str) -> None:
    model = tiny(family)
    work = bench_of(model)
    plan = planned("magnitude", "uniform", (0.6,) * len(work.checkpoint.blocks))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends, [weights_of] = end_tokens(model, Letters()), work.measure(plan, [Kept("a test", "another")])
    found = [cut(tokens, ends) for tokens in said(work.replay, weights_of)]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert found != [cut(tokens, ends) for tokens in said(work.replay)]
    with torch.no_grad():
        for block in work.prune(plan):
            for key, tensor in block.weights.items():
                work.checkpoint.blocks[block.index].state_dict()[key].copy_(tensor)
    assert found == [greedy(model, Letters()(prompt).input_ids, ends) for prompt in PROMPTS]


@slow
def test_prompts_begin_with_bos_where_windows_do() -> None:
    model = tiny("llama")
    ends = end_tokens(model, Letters())
    expected = [greedy(model, [0, *Letters()(prompt).input_ids], ends) for prompt in PROMPTS]
    found = [cut(tokens, ends) for tokens in said(replay_of(model), bos=True)]
    assert found == expected != [cut(tokens, ends) for tokens in said(replay_of(model))]


def test_all_tokens_that_end_a_text_are_known() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [7, 8]
    assert end_tokens(model, SimpleNamespace(eos_token_id=9)) == [7, 8, 1, 9]
    assert end_tokens(model, SimpleNamespace(eos_token_id=None)) == [7, 8, 1]
    assert longest(model) == 64


def test_an_end_that_the_tokenizer_adds_is_no_part_of_a_prompt() -> None:
    assert encode("\x4d", Letters(), [79], bos=False) == [79]  # the last token stays
    assert encode("a\x4d", Letters(), [79], bos=False) == Letters()("a").input_ids
    assert encode("a", Letters(), [], bos=True) == [0, *Letters()("a").input_ids]
    with refused('prompt "": has no tokens'):
        encode("", Letters(), [], bos=False)


def test_what_cannot_generate_is_refused() -> None:
    with refused("model Linear: cannot generate text"):
        generate(torch.nn.Linear(2, 2), Letters(), torch.ones(1, 2, dtype=torch.long), 3)
    with refused("prompt: the tokenizer makes token 500 of it, the model knows 97"):
        generate(tiny("llama"), Letters(), torch.full((1, 2), 500), 3)


# Conversations


def speaker(template: str | None = None) -> Speaker:
    tokenizer = make_tokenizer()
    replay = replay_of(make_model(tokenizer, steps=5))
    whole = partial(replay.whole, replay.checkpoint.weights)
    return Speaker(whole, replay.checkpoint.device, Chatty(tokenizer, template), bos=False)


class Chatty:
    """A tokenizer with a chat template of its own, since the tests share theirs."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self._tokenizer = tokenizer
        self.chat_template = template

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)


def answer(
    who: Speaker, *texts: str, tokens: int = 20, temperature: float = 0.0, stop: Callable[[], bool] = lambda: False
) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    roles = ("user", "assistant")
    messages: Any = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return who.answer(messages, ChatOptions(tokens, temperature), pieces.append, stop), pieces


def by_hand(who: Speaker, text: str, count: int) -> str:
    with who.opened() as model:
        tokens = greedy(model, who.tokenizer(text).input_ids, [], count)
    return str(who.tokenizer.decode(tokens, skip_special_tokens=True))


@slow
def test_an_answer_comes_in_pieces() -> None:
    who = speaker()
    found, pieces = answer(who, "the import statement")
    assert not who.has_template
    assert found == Answer(by_hand(who, "the import statement", 20), "length")
    assert "".join(pieces) == found.text
    assert len(pieces) > 1


def test_a_broken_template_is_one_line() -> None:
    with refused(r"^the chat template cannot write these messages: TemplateError: no$"):
        answer(speaker("{{ raise_exception('no') }}"), "one")


@slow
def test_an_answer_ends_where_a_person_stops_it() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 5

    who = speaker()
    found, _ = answer(who, "the import statement", stop=stop)
    assert found == Answer(by_hand(who, "the import statement", 5), "person")
    assert answer(who, "the import statement")[0].text == by_hand(who, "the import statement", 20)

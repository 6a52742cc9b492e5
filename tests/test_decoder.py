"""The next token by the kernel, in one call: as the family's own forward gives it, or left to that."""

import gc
import pickle
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from expect import parametrize
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atp_tune.packed import decoder, kernel
from atp_tune.packed.decoder import CACHE, Decoder
from atp_tune.packed.layout import packed_linear
from atp_tune.packed.modeling_atp_sparse import DenseLinear, speed_dense_linears

pytestmark = pytest.mark.skipif(kernel.kernel_name() not in kernel.FASTER, reason="this CPU has no loops for it")
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 4096, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# Families whose blocks are Llama's, and settings of each; then others, and why they are left to transformers.
LIKE = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
UNLIKE = {
    "gemma3_text": "attends to a window",
    "olmo2": "input_layernorm|post_feedforward_layernorm",
    "granite": "block 0 would differ",
    "granite_embeddings": "its states would differ",  # its blocks alone are Llama's
    "olmo": "no attribute 'weight'",
    "mistral_window": "attends to a window",
    "qwen3_window": "attends to a window",
    "smollm3": "block 3 would differ",
}
SETTINGS = {
    "granite": {"residual_multiplier": 0.5},
    "granite_embeddings": {"embedding_multiplier": 2.0},
    "smollm3": {"num_hidden_layers": 4},
    "mistral_window": {"sliding_window": 6},
    "qwen3_window": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
}
LOOSE = {torch.float32: {"rtol": 1e-3, "atol": 1e-3}, torch.bfloat16: {"rtol": 0.1, "atol": 0.1}}


def sparse(family: str = "llama", dtype: torch.dtype = torch.float32, zeros: float = 0.6, **settings: Any) -> Any:
    """A random model with packed linears, whose weights are so large that each block changes what comes out."""
    config = AutoConfig.for_model(family, **{**SIZES, **LIKE.get(family, {}), **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 1.5 / parameter.shape[-1] ** 0.5) if parameter.dim() > 1 else parameter.data.add_(
            torch.randn_like(parameter), alpha=0.1
        )
        if "proj.weight" in name:
            parameter.data[torch.rand_like(parameter) < zeros] = 0
    model.to(dtype)
    for name, module in [*model.model.layers.named_modules()]:
        if isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, packed_linear(module))
    speed_dense_linears(model)
    return model


def own(model: Any) -> Decoder:
    found = model.model.forward
    assert isinstance(found, Decoder)
    return found


def plain(model: Any) -> Any:
    """The same model with the family's own forward."""
    model = deepcopy(model)
    del model.model.forward
    return model


def taken(model: Any) -> list[Tensor]:
    """Collects what the kernel gives, from now on."""
    found, next_states = [], own(model)._next

    def spy(words: dict[str, Any]) -> Any:
        states = next_states(words)
        if states is not None:
            found.append(states)
        return states

    own(model)._next = spy  # type: ignore[method-assign]
    return found


def run(model: Any, ids: Tensor, prompt: int = 5, **words: Any) -> Tensor:
    """Logits [texts, tokens, vocabulary] of the tokens after a prompt, one after the other."""
    logits = []
    with torch.no_grad():
        past = DynamicCache()  # of plain layers, whatever the model has
        model(ids[:, :prompt], **{CACHE: past}, **{key: value[:, :prompt] for key, value in words.items()})
        for at in range(prompt, ids.shape[1]):
            given = {key: value[:, : at + 1] for key, value in words.items()}
            logits.append(model(ids[:, at : at + 1], **{CACHE: past}, **given).logits)
    return torch.cat(logits, 1)


def tokens(texts: int = 1, count: int = 14) -> Tensor:
    return torch.randint(1, 97, (texts, count))


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("family", LIKE)
def test_next_tokens_are_those_of_the_family(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one text and of several, by each instruction set and number of threads, over the end of the first room."""
    monkeypatch.setattr(decoder, "ROOM", 4)
    model = sparse(family, dtype)
    for texts in (1, 3, 8):
        ids, found = tokens(texts), taken(model)
        logits = run(model, ids)
        assert len(found) == 9
        assert_close(logits, run(plain(model), ids), **LOOSE[dtype])
        own(model)._next = Decoder._next.__get__(own(model))  # type: ignore[method-assign]
    for isa in set(kernel.variants()) & {*kernel.FASTER}:
        monkeypatch.setenv("ATP_TUNE_ISA", isa)
        other = deepcopy(model)
        found = taken(other)
        assert_close(run(other, ids), logits, **LOOSE[dtype])
        assert found


@parametrize("family", UNLIKE)
def test_other_families_keep_their_forward(family: str) -> None:
    model = sparse(family.partition("_embeddings")[0].removesuffix("_window"), **SETTINGS.get(family, {}))
    ids, found = tokens(), taken(model)
    assert torch.equal(run(model, ids), run(plain(model), ids)) and not found
    assert re.search(UNLIKE[family], own(model)._unlike)


def test_rows_of_many_positions_and_mixed_weights() -> None:
    """Positions beyond what was trained with stretched rotations, packed linears beside dense ones, and int8 values."""
    stretched = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}
    model = sparse(rope_parameters=stretched)
    first, second, _ = model.model.layers
    first.mlp.up_proj = DenseLinear.__new__(DenseLinear)
    nn.Linear.__init__(first.mlp.up_proj, 64, 128)
    second.self_attn.o_proj = packed_linear(nn.Linear(64, 64, bias=False), "int8")
    ids, found = tokens(2, 700), taken(model)
    assert_close(run(model, ids, 680), run(plain(model), ids, 680), **LOOSE[torch.float32])
    assert len(found) == 20


@parametrize("hole", [False, True])
def test_texts_of_unequal_lengths(hole: bool) -> None:
    """They are filled up on the left, or anywhere."""
    model, ids = sparse(), tokens(3)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1], mask[1, 7] = 0, 0, int(not hole)
    found = taken(model)
    assert_close(
        run(model, ids, attention_mask=mask), run(plain(model), ids, attention_mask=mask), **LOOSE[torch.float32]
    )
    assert len(found) == (8 if hole else 9)  # a token that is not seen itself is left to transformers


def test_bits_do_not_depend_on_threads() -> None:
    model, ids = sparse(intermediate_size=4096, hidden_size=512), tokens(2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                past = DynamicCache(config=model.config)
                run_prompt = plain(model)
                torch.set_num_threads(1)
                run_prompt(ids[:, :9], **{CACHE: past})
                torch.set_num_threads(threads)
                model.model(ids[:, :1], **{CACHE: deepcopy(past)})  # shown to be equal
                found.append(model.model(ids[:, 9:10], **{CACHE: past}).last_hidden_state)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@torch.no_grad()
def test_two_threads_have_a_cache_of_their_own() -> None:
    model, ids = sparse(hidden_size=256, intermediate_size=512), tokens(1, 60)
    run(model, ids)  # shown to be equal
    with ThreadPoolExecutor(4) as pool:
        both = [*pool.map(lambda text: run(model, text), [ids, ids.flip(1)] * 4)]
    for at in range(2):
        assert all(torch.equal(both[at], other) for other in both[at::2])


Change = Callable[[Any, DynamicCache], Any]


def cropped(model: Any, past: DynamicCache) -> Any:
    past.crop(-2)


def reordered(model: Any, past: DynamicCache) -> Any:
    past.batch_select_indices(torch.tensor([1, 0]))


def repeated(model: Any, past: DynamicCache) -> Any:
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([0, 2]))


def copied(model: Any, past: DynamicCache) -> Any:
    """What a copy writes is not seen."""
    other = deepcopy(past)
    model(torch.full((2, 1), 9), **{CACHE: other})


def shared(model: Any, past: DynamicCache) -> Any:
    """Two that begin with the same tensors, as from a prompt of many texts."""
    other = DynamicCache([(layer.keys, layer.values) for layer in past.layers])
    model(torch.full((2, 1), 9), **{CACHE: other})


def copied_alone(model: Any, past: DynamicCache) -> Any:
    """Copies of layers have the same tensors."""
    other = copy(past)
    other.layers = [copy(layer) for layer in past.layers]
    model(torch.full((2, 1), 9), **{CACHE: other})


def moved(model: Any, past: DynamicCache) -> Any:
    for parameter in model.model.parameters():
        parameter.data = parameter.data.clone()


def cast(model: Any, past: DynamicCache) -> Any:
    """The kernel's matrices are made anew, of tensors that stay where they are."""
    model.cpu()
    model.float()


def normed_otherwise(model: Any, past: DynamicCache) -> Any:
    model.model.norm = deepcopy(model.model.norm)
    model.model.norm.weight.mul_(2)


def block_replaced(model: Any, past: DynamicCache) -> Any:
    model.model.layers[1] = deepcopy(model.model.layers[1])
    model.model.layers[1].input_layernorm.weight.mul_(2)


def blocks_reordered(model: Any, past: DynamicCache) -> Any:
    model.model.layers = nn.ModuleList(model.model.layers[at] for at in (1, 0, 2))


def attends_otherwise(model: Any, past: DynamicCache) -> Any:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def by_another_attention(model: Any, past: DynamicCache) -> Any:
    ALL_ATTENTION_FUNCTIONS.register(
        "doubled", lambda *args, **words: (2 * sdpa_attention_forward(*args, **words)[0], None)
    )
    model.set_attn_implementation("doubled")


def scaled(model: Any, past: DynamicCache) -> Any:
    for parameter in model.model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1.1)


def replaced(model: Any, past: DynamicCache) -> Any:
    model.model.layers[1].mlp.up_proj = packed_linear(nn.Linear(64, 128, bias=False))


def wrapped(model: Any, past: DynamicCache) -> Any:
    """As PEFT's adapters are."""
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj, nn.Tanh())


def hooked(model: Any, past: DynamicCache) -> Any:
    model.model.layers[0].mlp.register_forward_hook(lambda module, x, y: y * 2)


def hooked_globally(model: Any, past: DynamicCache) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda module, x, y: y * 2 if isinstance(module, type(model.model.layers[0].mlp)) else None
    )


def dispatched(model: Any, past: DynamicCache) -> Any:
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def in_training(model: Any, past: DynamicCache) -> Any:
    model.train()


def pickled(model: Any, past: DynamicCache) -> Any:
    for part, other in zip(
        model.model.layers.parameters(), pickle.loads(pickle.dumps(model)).model.layers.parameters(), strict=True
    ):
        assert torch.equal(part, other)


CHANGES: dict[Change, bool] = {  # and whether the kernel goes on
    cropped: True, reordered: True, repeated: True, copied: True, shared: True, copied_alone: True, moved: True,
    cast: True, normed_otherwise: True, block_replaced: True, attends_otherwise: True, scaled: True, replaced: True,
    pickled: True, blocks_reordered: False, by_another_attention: False, wrapped: False, hooked: False,
    hooked_globally: False, dispatched: False, in_training: False,
}  # fmt: skip


@torch.no_grad()
@parametrize("change", CHANGES)
def test_what_was_changed_between_two_tokens_is_seen(change: Change) -> None:
    """In the model or in its cache; what the kernel would not see goes to transformers."""
    model, ids = sparse(), tokens(2)
    other, logits = plain(model), []
    for each in (model, other):
        past, handle = DynamicCache(config=each.config), None
        found = taken(each) if each is model else []
        each(ids[:, :5], **{CACHE: past})
        for at in range(5, 8):
            each(ids[:, at : at + 1], **{CACHE: past})
        torch.manual_seed(1)
        before, handle = len(found), change(each, past)
        own_found = [each(ids[:, at : at + 1], **{CACHE: past}).logits for at in range(8, 11)]
        logits.append(torch.cat(own_found, 1))
        if handle is not None:
            handle.remove()
        if each is model:
            assert (len(found) - before >= 3) == CHANGES[change]
    assert_close(*logits, **LOOSE[torch.float32])


ASKED: list[dict[str, Any]] = [
    {"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False}, {"return_dict": False},
]  # fmt: skip


@torch.no_grad()
@parametrize("words", ASKED)
def test_what_the_kernel_does_not_give_comes_from_the_family(words: dict[str, Any]) -> None:
    model, ids = sparse(attn_implementation="eager"), tokens()
    found, both = taken(model), []
    for each in (model, plain(model)):
        past = DynamicCache(config=each.config)
        each(ids[:, :5], **{CACHE: past})
        both.append(each(ids[:, 5:6], **{CACHE: past}, **words))
    assert len(found) == ("return_dict" in words)  # which transformers makes of what the kernel gives
    for ours, theirs in zip(*(each if isinstance(each, tuple) else each.values() for each in both), strict=True):
        if isinstance(ours, Tensor):
            assert_close(ours, theirs, **LOOSE[torch.float32])
        elif isinstance(ours, tuple):
            assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@torch.no_grad()
def test_a_first_call_that_is_not_for_the_kernel_leaves_it_there() -> None:
    """A prompt of one token, numbers that are not finite, and words that only the family knows."""
    model, ids = sparse(), tokens(2)
    found = taken(model)
    past = DynamicCache()
    model(ids[:, :1], **{CACHE: past})
    weight = model.model.embed_tokens.weight
    before = weight[3].clone()
    weight[3] = float("nan")
    model(torch.full((2, 1), 3), **{CACHE: deepcopy(past)})
    weight[3] = before
    model.model(input_ids=ids[:, 1:2], **{CACHE: deepcopy(past)}, cu_seq_lens_q=torch.tensor([0, 1]))
    assert not found
    model(ids[:, 1:2], **{CACHE: past})
    assert len(found) == 1


def test_a_model_is_freed_at_once() -> None:
    model, ids = sparse(), tokens()
    run(model, ids)
    place = weakref.ref(model.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert place() is None
    finally:
        gc.enable()


def test_gradients_autocast_and_numbers_that_are_not_finite() -> None:
    model, ids = sparse(), tokens()
    found, past = taken(model), DynamicCache(config=model.config)
    model(ids[:, :5], **{CACHE: past})
    model(ids[:, 5:6], **{CACHE: past})  # with gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids[:, 6:7], **{CACHE: past})
    assert not found
    with torch.no_grad():
        model(ids[:, 7:8], **{CACHE: past})
        assert len(found) == 1
        model.model.embed_tokens.weight[3, 0] = float("nan")
        assert model(torch.tensor([[3]]), **{CACHE: past}).logits.isnan().all()


@parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}],
)
def test_generate(options: dict[str, Any]) -> None:
    model, ids = sparse(), tokens(1, 12)
    results = []
    for each in (model, plain(model)):
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(each.generate(ids, max_new_tokens=12, **options))
    assert torch.equal(*results)


def test_wrong_arguments_are_refused() -> None:
    """By the library itself, whatever Python passes."""
    model, ids = sparse(), tokens()
    run(model, ids)
    blocks = own(model)._blocks
    assert blocks is not None
    x, turn, past = torch.zeros(1, 1, 64), (torch.ones(1, 1, 16),) * 2, DynamicCache(config=model.config)
    assert blocks.next(x, turn, None, past) is None  # a cache that nothing is in
    model.model(ids[:, :5], **{CACHE: past})
    assert blocks.next(x.bfloat16(), turn, None, past) is None
    assert blocks.next(x, tuple(part[..., :8] for part in turn), None, past) is None
    for field in ("width", "type"):
        before = getattr(blocks.fields, field)
        setattr(blocks.fields, field, 8)
        with pytest.raises(ValueError, match="wrong argument"):
            blocks.next(x, turn, None, past)
        setattr(blocks.fields, field, before)
    with torch.no_grad():
        assert blocks.next(x, turn, None, past) is not None

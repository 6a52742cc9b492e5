"""A model in memory is as it was after an error at any step of what was done with it."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from expect import parametrize, refused, slow
from tinystudy import TOPICS, few_steps, make_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import atp_tune
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError

PACKAGE = str(Path(atp_tune.__file__).parent)
TEXT = [TOPICS[:4_000]]
CALLS: dict[str, Callable[[PreTrainedModel], object]] = {
    "prune": lambda model: atp_tune.prune(model, make_tokenizer(), sparsity=0.5, texts=TEXT, nsamples=2, seqlen=8),
    "prune in place": lambda model: atp_tune.prune(
        model, make_tokenizer(), sparsity=0.5, texts=TEXT, nsamples=2, seqlen=8, in_place=True
    ),
    "perplexity": lambda model: atp_tune.perplexity(model, make_tokenizer(), TEXT, nsamples=2, seqlen=8),
    "tune": lambda model: atp_tune.tune(
        model, make_tokenizer(), texts=TEXT, sparsity=0.5, trials=1, progress=False, recover=False,
        settings={"texts.calibration.nsamples": 2, "continuations.tokens": 0},
    ),
}  # fmt: skip


class FaultError(BaseException):
    """As Ctrl-C: no `except Exception` stops it."""


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def mixture() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    further = {"max_position_embeddings": 32, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(vocab_size=320, **sizes, **heads, **further))


def in_training(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """In the midst of training: some modules in each mode, a frozen weight, a hook."""
    torch.manual_seed(0)
    model = make().train()
    next(iter(model.base_model.children())).eval().requires_grad_(False)
    model.lm_head.register_forward_pre_hook(lambda module, arguments: None)
    return model


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    modules = [(module.training, vars(module).get("forward"), hooks_of(module)) for module in model.modules()]
    tensors = tensors_of(model)
    return {
        "modules": modules, "config": model.config.to_dict(), "generation": model.generation_config.to_dict(),
        "places": [(id(x), x.device, x.dtype, x.requires_grad, x.grad) for x in tensors],
        "weights": [x.detach().clone() for x in tensors], "random": [torch.get_rng_state()],
        "names": [name for name, _ in model.named_modules()],
    }  # fmt: skip


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def hooks_of(module: nn.Module) -> list[list[int]]:
    return [[*hooks] for name, hooks in vars(module).items() if name.endswith("_hooks")]


def check_same(model: PreTrainedModel, before: dict[str, Any], where: object) -> None:
    now = state_of(model)
    for key, value in before.items():
        is_same = all(map(torch.equal, now[key], value)) if key in ("weights", "random") else now[key] == value
        assert is_same, (key, where)


@parametrize("call", ["prune", "perplexity"])
@parametrize("make", [gpt2, mixture])
def test_a_model_is_as_it_was_after_an_error_in_its_arguments(
    call: str, make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed in evaluation mode, and without its router's loss, where the context was made and not entered."""

    def refuse(*_: object) -> None:
        raise UserError("as windows that are too long")

    monkeypatch.setattr("atp_tune.inputs.windows.check_length", refuse)
    model = in_training(make)
    before = state_of(model)
    with refused("too long"):
        CALLS[call](model)
    check_same(model, before, call)


class Faults:
    """Raises at the first call of one function of the package that was not hit before, once the model is in use."""

    def __init__(self, hit: set[CodeType]) -> None:
        self._hit, self._is_in_use, self.at = hit, False, ""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        self._is_in_use |= code is Checkpoint.__init__.__code__
        if event != "call" or self.at or not self._is_in_use or code in self._hit or PACKAGE not in code.co_filename:
            return
        self._hit.add(code)
        self.at = f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname}"
        raise FaultError


@slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@parametrize("make", [gpt2, mixture])
@parametrize("call", CALLS)
def test_a_model_is_as_it_was_after_an_error_at_any_call(
    call: str, make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_steps(monkeypatch)
    model, hit, count = in_training(make), set[CodeType](), 0
    before = state_of(model)
    while True:
        faults = Faults(hit)
        gc.disable()  # Python 3.11.2 crashes if it collects where a nested generator begins that is watched
        sys.setprofile(faults)
        try:
            CALLS[call](model)
        except BaseException:
            assert faults.at
        else:  # the end, or Python has swallowed the fault, as in a generator that is deleted
            for parameter, weight in zip(tensors_of(model), before["weights"], strict=True):
                parameter.data.copy_(weight)
        finally:
            sys.setprofile(None)
            gc.enable()
        check_same(model, before, faults.at)
        if not faults.at:
            break
        count += 1
    assert count > 2

"""The Python interface: the same trials and the same bits as the command line, and a model that is left as it was."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from expect import parametrize, refusal, slow
from tinystudy import CommandLine, make_tokenizer, run
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

import atp_tune
from atp_tune import UserError
from atp_tune.config.best import read_config
from atp_tune.pruners.wanda import Wanda

ROLES = ("calibration", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def trained(tiny_place: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_place / "model")


@pytest.fixture
def model(trained: LlamaForCausalLM) -> LlamaForCausalLM:
    made = LlamaForCausalLM(trained.config)
    made.load_state_dict(trained.state_dict())
    return made.eval()


@pytest.fixture(scope="module")
def texts(tiny_place: Path) -> dict[str, list[str]]:
    return {role: [(tiny_place / f"{role}.txt").read_text()] for role in ROLES}


SETTINGS = {
    "texts.calibration.nsamples": 8, "texts.calibration.seqlen": 32, "texts.calibration.draws": 1,
    "texts.validation.nsamples": 16, "texts.validation.seqlen": 32,
    "texts.test.nsamples": 16, "texts.test.seqlen": 32,
    "continuations.tokens": 0, "search.sampler": "random",
}  # fmt: skip


def tuned(model: Any, tokenizer: Any, texts: Any, **more: Any) -> atp_tune.Result:
    settings = {**SETTINGS, **more.pop("settings", {})}
    asked = {"sparsity": 0.6, "trials": 3, "progress": False, "recover": False} | more
    return atp_tune.tune(model, tokenizer, texts=texts, settings=settings, **asked)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# The same as the command line


@slow
@parametrize(("pruner", "way"), [("wanda", "block"), ("sparsegpt", "block"), ("wanda", "sequential")])
def test_the_masks_are_those_of_the_command_line(
    place: Path, model: Any, tokenizer: Any, texts: dict[str, list[str]], command: CommandLine, pruner: str, way: str
) -> None:
    out = place / "out"
    command.ok(
        "prune", "--study", place / "tiny.toml", "--pruner", pruner, "--beta", "0.05", "--out", out,
        "--set", f"prune.statistics={way}",
    )  # fmt: skip
    before = weights(model)
    pruned = atp_tune.prune(
        model, tokenizer, sparsity=0.6, pruner=pruner, allocation=("atp", {"beta": 0.05}),
        texts=texts["calibration"], nsamples=8, seqlen=32, settings={"prune.statistics": way},
    )  # fmt: skip
    there = AutoModelForCausalLM.from_pretrained(out)
    assert are_equal(weights(pruned), weights(there))
    assert are_equal(weights(model), before) and not are_equal(weights(pruned), before)
    loaded = atp_tune.prune(
        place / "model", sparsity=0.6, pruner=pruner, allocation=("atp", {"beta": 0.05}), device="cpu",
        texts=place / "calibration.txt", nsamples=8, seqlen=32,
        settings={"prune.statistics": way, "model.dtype": "float32"},  # also where bfloat16 is fast
    )  # fmt: skip
    assert are_equal(weights(loaded), weights(there))
    assert all(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


@slow
def test_the_trials_are_those_of_the_study_file(
    place: Path, model: Any, tokenizer: Any, texts: dict[str, list[str]]
) -> None:
    """Values, window by window, and the final numbers; an argument more or less in the file changes nothing."""
    study = run(place)
    result = tuned(model, tokenizer, texts, allocation="atp")
    assert result.is_complete
    for here, there in zip(result.study.trials, study.trials, strict=True):
        assert here.params == there.params
        assert here.user_attrs["nlls"] == there.user_attrs["nlls"]
    assert result.study.user_attrs["test_nlls"] == study.user_attrs["test_nlls"]
    assert result.best.plan.amounts == read_config(place / "tiny.best.json").plan.amounts


# The caller's model


class Hook:
    """Counts calls, as a user's own forward hook."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def state(model: nn.Module) -> list[Any]:
    """All that a call must leave as it was."""
    hooks = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    tensors = [(name, t.dtype, t.device, t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()]
    return [hooks, modes, tensors, model.config.to_dict()]


def prepared(model: Any) -> Hook:
    """In training mode but for one block, with a hook, and with some parameters frozen."""
    hook = Hook()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].register_forward_hook(hook)
    model.model.embed_tokens.requires_grad_(False)
    return hook


@slow
def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    prepared(model)
    before, own = weights(model), state(model)
    result = tuned(model, tokenizer, texts)
    pruned = result.apply()
    assert state(model) == own and are_equal(weights(model), before)
    assert [module.training for module in pruned.modules()] == own[1]
    assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in model.parameters()]
    assert pruned.model.layers[0]._forward_hooks
    zeros = sum(int((tensor == 0).sum()) for name, tensor in weights(pruned).items() if "layers" in name)
    assert zeros / (4 * 7680) == pytest.approx(result.best.sparsity.realised, abs=1e-9)


@slow
def test_the_model_is_left_as_it_was_after_an_error(
    model: Any, tokenizer: Any, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(model)
    before, own = weights(model), state(model)
    seen: list[object] = []

    def breaks(*arguments: Any) -> torch.Tensor:
        seen.append(arguments)
        if len(seen) > 9:  # in the second block
            raise RuntimeError("a pruner that breaks")
        return torch.zeros_like(arguments[1])

    monkeypatch.setattr(Wanda, "prune", breaks)
    with pytest.raises(RuntimeError, match="a pruner that breaks"):
        atp_tune.prune(model, tokenizer, sparsity=0.5, texts=texts["calibration"], nsamples=4, seqlen=32, in_place=True)
    assert len(seen) == 10
    assert state(model) == own and are_equal(weights(model), before)


@slow
def test_in_place_writes_into_the_parameters(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    own = state(model)
    copied = atp_tune.prune(model, tokenizer, sparsity=0.5, texts=texts["calibration"], nsamples=4, seqlen=32)
    same = atp_tune.prune(
        model, tokenizer, sparsity=0.5, texts=texts["calibration"], nsamples=4, seqlen=32, in_place=True
    )
    assert same is model and state(model) == own
    assert are_equal(weights(model), weights(copied))


@slow
def test_a_model_that_changed_is_refused(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    result = tuned(model, tokenizer, texts, trials=1)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    assert refusal(result.apply) == (
        "model: its weights or its config have changed since the study measured it; give it as it was"
    )


def test_models_that_are_not_treated(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    def refused(given: Any) -> str:
        return refusal(atp_tune.prune, given, tokenizer, sparsity=0.5, texts=texts["test"])

    assert refused(nn.Linear(2, 2)) == (
        "model: Linear is no PreTrainedModel; give a transformers model, its hub id or its folder"
    )
    assert "model._orig_mod" in refused(torch.compile(model, backend="eager"))
    assert "model.module" in refused(nn.DataParallel(model))
    model.is_quantized = True
    assert "is quantized" in refused(model)
    model.is_quantized = False
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    assert "parametrized weights" in refused(model)
    with torch.device("meta"):
        assert "meta device" in refused(LlamaForCausalLM(model.config))
    pruned = LlamaForCausalLM(model.config)
    torch_prune.l1_unstructured(pruned.model.layers[0].mlp.up_proj, "weight", 0.5)
    assert "prune.remove" in refused(pruned)


# Results


@pytest.fixture(scope="module")
def found(
    tiny_place: Path, tokenizer: PreTrainedTokenizerFast, trained: LlamaForCausalLM, texts: dict[str, list[str]]
) -> atp_tune.Result:
    return tuned(trained, tokenizer, texts)


@slow
def test_trials_are_rows(found: atp_tune.Result) -> None:
    table = found.trials
    assert isinstance(table, pd.DataFrame)
    assert list(table.trial) == [0, 1, 2] and set(table.state) == {"complete"}
    assert list(table.perplexity) == [trial.value for trial in found.study.trials]
    assert found.front.empty


def test_a_trial_that_is_chosen(found: atp_tune.Result) -> None:
    assert found.configuration(trial=0).config.plan.allocation == "uniform"
    assert refusal(found.configuration, trial=9).endswith("trial 9 is not measured in full; `status` lists all")
    for wrong in (1.7, "abc", "1"):  # no trial of that number, whatever it might be rounded to
        assert "is not measured in full" in refusal(lambda wrong=wrong: found.configuration(trial=wrong))  # type: ignore[misc]
    assert refusal(found.configuration, sparsity="foo").startswith("sparsity: must be a share of zeros")  # type: ignore[arg-type]
    assert "measures plans only at 0.6" in refusal(found.configuration, sparsity=0.5)
    assert refusal(found.configuration, trial=0, sparsity=0.5) == (
        "sparsity: names one trial, and trial another; leave one out"
    )


@slow
def test_a_configuration_of_a_model_in_memory(
    found: atp_tune.Result, model: Any, tokenizer: Any, texts: dict[str, list[str]], tmp_path: Path
) -> None:
    best = found.configuration()
    again = best.generate(["t1 t2"], tokens=4)
    path = tmp_path / "best.json"
    best.write(path)
    loaded = atp_tune.load_config(path, model=model, tokenizer=tokenizer, texts=texts)
    assert loaded.generate(["t1 t2"], tokens=4).prompts == again.prompts
    assert are_equal(weights(loaded.apply()), weights(best.apply()))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert "have changed since the study measured it" in refusal(loaded.generate, ["t1"])


# Storage


@slow
def test_a_storage_is_resumed(model: Any, tokenizer: Any, texts: dict[str, list[str]], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    seen: list[int] = []

    def interrupt(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        seen.append(trial.number)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(model, tokenizer, texts, storage=url, study_name="mine", callbacks=[interrupt])
    result = tuned(model, tokenizer, texts, storage=url, study_name="mine", callbacks=[interrupt])
    assert seen == [0, 1, 2] and result.is_complete
    loaded = atp_tune.load_study("mine", storage=url, model=model, tokenizer=tokenizer, texts=texts)
    assert repr(loaded) == repr(result)
    assert are_equal(weights(loaded.apply()), weights(result.apply()))
    assert "lay in the memory of a Python process" in refusal(atp_tune.load_study("mine", storage=url).apply)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert "model.source is" in refusal(tuned, model, tokenizer, texts, storage=url, study_name="mine")


@slow
@parametrize("error", [ValueError("of mine"), AssertionError("of mine"), UserError("of mine")])
def test_an_error_of_a_callback_is_raised(
    model: Any, tokenizer: Any, texts: dict[str, list[str]], error: Exception
) -> None:
    def breaks(*_: object) -> None:
        raise error

    with pytest.raises(type(error), match="of mine"):
        tuned(model, tokenizer, texts, callbacks=[breaks])


# Arguments


@slow
def test_wrong_arguments(model: Any, tokenizer: Any, texts: dict[str, list[str]], place: Path) -> None:
    def wrong(**more: Any) -> str:
        return refusal(tuned, model, more.pop("by", tokenizer), more.pop("on", texts), **more)

    assert wrong(sparsity=1.5).startswith("sparsity: must be between 0 and 1, got 1.5")
    assert wrong(sparsity=(0.8, 0.3)) == "sparsity: 0.8..0.3 must run from the lower sparsity to the higher"
    assert wrong(max_increase="5%").startswith("sparsity: 0.6 is one sparsity, and max_increase finds the highest")
    assert wrong(pruner="wand").startswith("pruner: wand is none of magnitude, wanda")
    assert wrong(preset="fast").startswith("preset: fast is none of quick")
    assert wrong(settings={"search.trails": 3}).startswith("search.trails: unknown key; did you mean search.trials?")
    assert wrong(settings={"search.seed": object()}).startswith("settings: search.seed: <object object")
    assert wrong(settings={"model.dtype": "float16"}).startswith("model.dtype: the model in memory is float32")
    assert wrong(by=None).startswith("tokenizer: is needed beside a model in memory")
    assert wrong(by="tokenizer").startswith("tokenizer: is a str")
    assert wrong(on=[1, 2]) == "texts: is a list; give no token ids, a list of str, or a datasets.Dataset of them"
    assert wrong(on=[]) == "texts: hold no text"
    assert wrong(on={"train": ["a"]}).startswith("texts: give calibration, validation and test")
    assert wrong(on=["a short text"]).startswith("the part of")
    assert refusal(atp_tune.tune, place / "model", tokenizer).startswith("tokenizer: goes with a model in memory")
    assert refusal(atp_tune.tune, place / "tiny.toml", sparsity=0.5).startswith("sparsity: a study says it itself")
    assert refusal(atp_tune.tune, "no/such-model-here", texts="packaged", progress=False).startswith("model.source")
    assert wrong(on="a text, and no list").endswith("give documents as a list, as in [text]")

    def pruned(**more: Any) -> str:
        return refusal(atp_tune.prune, model, tokenizer, **{"sparsity": 0.5, "texts": texts["test"], **more})

    assert pruned(allocation="atp").startswith("allocation: atp without parameters is uniform; give some")
    assert pruned(sparsity=50).startswith("sparsity: must be between 0 and 1, got 50; 50 % is 0.5")
    assert pruned(sparsity="30%..50%").startswith("sparsity: 30%..50% is an interval")
    assert pruned(pruner="wandaa").startswith("prune.pruners[0]: must be one of")
    assert pruned(settings={"device": "gpu"}).startswith("device: ")  # settings come over arguments
    assert pruned(settings={"prune.pruners": None}).startswith("prune.pruners: must be a list")
    assert pruned(texts=["a short text"]).startswith("texts: seqlen: memory:")
    assert pruned(allocation=("atp", {"alpha": 1})).startswith("parameter alpha: the allocation atp has no alpha")
    assert refusal(atp_tune.load_study, "smoll").startswith("smoll: no such study")
    assert refusal(atp_tune.prune, place / "model", sparsity=0.5, in_place=True).startswith("in_place: there is no")


@slow
@pytest.mark.usefixtures("mixed")
def test_without_a_network_texts_are_the_same_in_every_function(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`tune` fell back without a word in a notebook, and the others raised."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: tuned(model, tokenizer, None, trials=1),
        lambda: atp_tune.prune(model, tokenizer, sparsity=0.5, nsamples=4, seqlen=32),
        lambda: atp_tune.perplexity(model, tokenizer, nsamples=4, seqlen=32, bos=False),
    )
    line = "warning: texts: manual, news, tales, debates, code, since the hub is out of reach (texts= takes your own)"
    found = []
    for call in calls:
        caplog.clear()
        found.append(call())
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [line]
    assert "; texts: parts of manual, news, tales, debates and code</caption>" in found[0]._repr_html_()
    assert atp_tune.perplexity(model, tokenizer, "mixed", nsamples=4, seqlen=32, bos=False) == found[2]


@slow
def test_datasets_are_texts(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    def value(given: Any) -> float:
        return atp_tune.perplexity(model, tokenizer, given, nsamples=8, seqlen=32, bos=False).value

    rows = texts["test"][0].split("\n\n")
    table = Dataset.from_dict({"text": rows, "title": rows})
    assert value(table) == value(rows) == value(table["title"])
    assert refusal(value, table.rename_column("text", "body")) == (
        'texts: the dataset has no column "text", but body, title; give one, as in dataset["body"]'
    )
    assert "is streamed" in refusal(value, table.to_iterable_dataset())
    split = DatasetDict(
        calibration=Dataset.from_dict({"text": texts["calibration"]}),
        validation=Dataset.from_dict({"text": texts["validation"]}),
        test=Dataset.from_dict({"text": texts["test"]}),
    )
    one, other = tuned(model, tokenizer, split, trials=1), tuned(model, tokenizer, texts, trials=1)
    assert one.study.trials[0].user_attrs["nlls"] == other.study.trials[0].user_attrs["nlls"]


@slow
def test_bars_and_verbosity_of_libraries_are_as_before(
    model: Any, tokenizer: Any, found: atp_tune.Result, tmp_path: Path
) -> None:
    hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    before = hf_logging.get_verbosity(), dict(os.environ)
    found.save(tmp_path / "sparse")
    assert hf_logging.is_progress_bar_enabled()  # type: ignore[no-untyped-call]
    assert (hf_logging.get_verbosity(), dict(os.environ)) == before


@slow
def test_it_runs_in_a_thread(model: Any, tokenizer: Any, texts: dict[str, list[str]]) -> None:
    found: list[atp_tune.Result] = []
    thread = Thread(target=lambda: found.append(tuned(model, tokenizer, texts, trials=1)))
    thread.start()
    thread.join()
    assert found[0].is_complete


# What is said


@slow
def test_importing_it_imports_nothing_heavy() -> None:
    script = (
        "import sys, atp_tune\n"
        "heavy = {'torch', 'transformers', 'optuna', 'pydantic', 'numpy', 'plotly', 'typer', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert dir(atp_tune) == sorted([*atp_tune.__all__, '__version__'])\n"
        "try:\n    atp_tune.nonsense\n"
        "except AttributeError as error:\n    assert 'nonsense' in str(error)\n"
        "assert all(getattr(atp_tune, name) for name in atp_tune.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

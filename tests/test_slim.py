"""Slim folders: equal to the masked ones, loaded everywhere or nowhere, and refused where they are not exact."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import image_families
import pytest
import torch
from expect import parametrize, refused, slow
from families import bench_of, few, random_ids, tiny
from plans import linears_of, planned
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from atp_tune.cli.terminal import quiet
from atp_tune.config.best import Config, read_config
from atp_tune.config.prune import PruneConfig, make_plan, parse
from atp_tune.events import Event, EventHandler, Message, ignore_events
from atp_tune.folders import slim
from atp_tune.folders.applying import OURS, fit_plan, write_sparse
from atp_tune.folders.slim import write_slim
from atp_tune.packed.modeling_atp_sparse import auto_map
from atp_tune.plan import Plan
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.run.session import Session

GOLDEN = Path(__file__).parent / "golden/config.json"
HEADLESS = ("gpt2", "olmo2", "falcon", "opt", "bloom")
FAMILIES = ("llama", "llama-tied", "qwen3", "gemma3", "mistral", "opt", "gpt2", "gpt_neox", "olmo2", "falcon", "bloom")
Make = Callable[..., tuple[Path, Path]]


def config_of(prune: PruneConfig, plan: Plan) -> Config:
    """A configuration of a plan."""
    return read_config(GOLDEN).model_copy(update={"prune": prune, "plan": plan.model_copy(update={"method": "wanda"})})


def prepared(
    family: str,
    place: Path,
    beta: float,
    sparsity: float,
    dtype: torch.dtype = torch.float32,
    watch: EventHandler = ignore_events,
    **keys: Any,
) -> tuple[Session, Plan, Config]:
    model = tiny(family, dtype)
    model.save_pretrained(place / "dense")
    channels = ChannelSettings(**{"round_to": 4, "heads": family not in HEADLESS, **keys})
    work = bench_of(model, PruneConfig(pattern="channels", channels=channels), watch, place / "dense")
    plan = make_plan("wanda", "atp", work.budget(sparsity), {"beta": beta}, parse("channels"))
    return work, plan, config_of(work.prune_settings, plan)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes the masked and the slim folder of a tiny model."""

    def made(family: str, beta: float = 0.02, sparsity: float = 0.3, **keys: Any) -> tuple[Path, Path]:
        with quiet():
            work, plan, config = prepared(family, tmp_path, beta, sparsity, **keys)
            write_sparse(work, plan, tmp_path / "masked", config)
            write_slim(work, plan, tmp_path / "slim", config)
        return tmp_path / "masked", tmp_path / "slim"

    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The dense, the masked and the slim folder of a tiny llama without heads that go; to be read only."""
    home = tmp_path_factory.mktemp("llama")
    with quiet():
        work, plan, config = prepared("llama", home, 0.02, 0.3, heads=False)
        write_sparse(work, plan, home / "masked", config)
        write_slim(work, plan, home / "slim", config)
    return home / "dense", home / "masked", home / "slim"


@pytest.fixture
def folder(llama: tuple[Path, ...], tmp_path: Path) -> Path:
    """A copy of the slim folder."""
    return Path(shutil.copytree(llama[-1], tmp_path / "slim"))


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_ids(3, 11, seed=5)).logits
    return found


def same(one: Any, other: Any) -> None:
    """Of weights, not of logits: their last bits depend on where in memory a weight begins, on AMD's CPUs at least."""
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@slow
@parametrize("family", few(FAMILIES, ("llama",)))
def test_a_slim_model_is_the_masked_one(family: str, make: Make, tmp_path: Path) -> None:
    masked, folder = (load(place) for place in make(family))
    before, after = (sum(p.numel() for p in model.parameters()) for model in (masked, folder))
    assert after < before
    assert_close(logits(folder), logits(masked), rtol=1e-10, atol=1e-12)
    ids, options = random_ids(2, 5, seed=1), {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = masked.generate(ids, **options, use_cache=False)
    assert torch.equal(folder.generate(ids, **options), expected)  # with cached keys and values
    folder.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    same(again, folder)
    assert_close(logits(again), logits(folder), rtol=1e-10, atol=1e-12)


CLASSIFIERS = ("vit", "deit", "dinov2", "beit", "convnext", "swin", "swinv2", "hiera")
WITH_HEADS = ("vit", "deit", "dinov2", "beit")  # of the others heads are refused


def classifier(family: str, place: Path, heads: bool) -> tuple[Session, Plan, Config]:
    """A tiny classifier in `place`, and what to prune of it."""
    model: Any = image_families.make(family)
    model.save_pretrained(place / "dense")
    work = image_families.context_of(family, model, pattern="channels", channels={"round_to": 2, "heads": heads})
    work.folder = replace(work.folder, path=place / "dense")
    plan = make_plan("wanda", "atp", work.budget(0.3), {"beta": -0.03}, parse("channels"))
    return work, plan, config_of(work.prune_settings, plan)


@slow
@parametrize(("family", "heads"), [*((name, False) for name in CLASSIFIERS), *((name, True) for name in WITH_HEADS)])
def test_a_slim_classifier_is_the_masked_one(family: str, heads: bool, tmp_path: Path) -> None:
    pixels = image_families.images(family, 3, 3).tensors["pixel_values"]
    with quiet():
        work, plan, config = classifier(family, tmp_path, heads)
        write_sparse(work, plan, tmp_path / "masked", config)
        write_slim(work, plan, tmp_path / "slim", config)
        load_ = partial(AutoModelForImageClassification.from_pretrained, dtype=torch.float64)
        masked, slim = load_(tmp_path / "masked").eval(), load_(tmp_path / "slim").eval()
        slim.save_pretrained(tmp_path / "again")
        again = load_(tmp_path / "again").eval()
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in masked.parameters())
    with torch.inference_mode():
        expected, found, third = (each(pixel_values=pixels.double()).logits for each in (masked, slim, again))
    assert_close(found, expected, rtol=1e-8, atol=1e-9)
    same(again, slim)
    assert_close(third, found, rtol=1e-10, atol=1e-12)


@parametrize("heads", few([False, True], [True]))
def test_blocks_of_equal_widths_make_an_ordinary_folder(heads: bool, make: Make) -> None:
    masked, folder = make("qwen3", beta=0.0, sparsity=0.5 if heads else 0.25, heads=heads, round_to=1)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert "auto_map" not in config
    assert config["intermediate_size"] < 40
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == ((2, 1) if heads else (4, 2))
    assert not list(folder.glob("*.py"))
    assert_close(logits(load(folder)), logits(load(masked)), rtol=1e-10, atol=1e-12)


# no silent failure


PLAIN = """
import sys
sys.modules["atp_tune"] = None  # as where it is not installed
from transformers import AutoModelForCausalLM
for trusted in (False, True):
    try:
        print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trusted)).__name__)
    except ValueError as error:
        print("trust_remote_code=True" in str(error))
"""


@slow
def test_without_atp_tune_it_needs_trust(folder: Path) -> None:
    words = [sys.executable, "-I", "-c", PLAIN, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.split()[-2:]) == (0, ["True", "SlimLlamaForCausalLM"]), done.stderr


NO_FAMILIES = ("marsian", "vit", "t5", "atp_slim", "atp_sparse", None, 7, ["llama"], {"llama": 1})


def test_a_damaged_table_or_file_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    for change, said in (
        ({"version": 2}, "has no table atp_slim of version 1"),
        ({"linears": {name: [0, 24]}}, "is damaged"),
        ({"linears": {f"{name}x": [8, 24]}}, f"has no linear {name}x"),
        ({"linears": {name: [4000, 24]}}, f"{name} is wider than in its family's model"),
        ({"linears": {"model.layers.0.mlp": [8, 24]}}, "model.layers.0.mlp is no linear"),
        *(({"family": name}, rf"has no models {re.escape(str(name))}$") for name in NO_FAMILIES),
        ({"linears": config["atp_slim"]["linears"] | {name: [4, 24]}}, "have no model.layers.0.mlp.up_proj.weight of"),
    ):
        table = {**config, "atp_slim": config["atp_slim"] | change}
        (folder / "config.json").write_text(json.dumps(table))
        with quiet(), pytest.raises(ValueError, match=said):
            AutoModelForCausalLM.from_pretrained(folder)


# a stranger's slim folder


def stranger_s(folder: Path) -> None:
    """Puts code into a slim folder that its config, and those of its tokenizer and processor, name."""
    for name in ("evil.py", OURS.name):
        (folder / name).write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    evil = {"AutoConfig": "someone/else--evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": evil, "custom_pipelines": {"x": 1}}))
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"kept": 1, "auto_map": {"AutoTokenizer": ["evil.T", None]}}))


def check_own(folder: Path) -> None:
    """A folder holds the code of this package alone, and nothing in it names other code."""
    assert {file.name: file.read_bytes() for file in folder.glob("*.py")} == {OURS.name: OURS.read_bytes()}
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["auto_map"]) == ("atp_slim", auto_map("atp_slim"))
    assert "evil" not in "".join(file.read_text() for file in folder.glob("*.json"))


@slow
def test_code_of_a_stranger_is_not_handed_on(folder: Path, tmp_path: Path) -> None:
    """A model card that recommends `trust_remote_code` lies beside code of ours alone."""
    stranger_s(folder)
    with quiet():
        work = bench_of(AutoModelForCausalLM.from_pretrained(folder), PruneConfig(), folder=folder)
        plan = make_plan("wanda", "uniform", work.budget(0.5), {})
        write_sparse(work, plan, tmp_path / "out", config_of(PruneConfig(), plan))
    check_own(tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"kept": 1}
    assert "or `trust_remote_code=True` in the call" in (tmp_path / "out/README.md").read_text()
    assert logits(load(tmp_path / "out")).isfinite().all()


# what is not exact is not written


@slow
def test_a_slim_model_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, plan, config = prepared("llama", tmp_path, 0.02, 0.3)
    real = slim.Cut.of

    def wrong(cut: Any, tensor: Tensor) -> Tensor:
        found = real(cut, tensor)
        return found.flip(1) if cut.dim == 1 and tensor.dim() > 1 else found

    monkeypatch.setattr(slim.Cut, "of", wrong)
    with (
        quiet(),
        refused(r"^--slim: LlamaForCausalLM computes other logits .* apart\)"),
    ):
        write_slim(work, plan, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def said_by(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Message)]


@parametrize("fits", few([True, False], [True]))
def test_a_small_difference_is_not_hidden_by_bfloat16(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    work, plan, config = prepared("llama", tmp_path, 0.02, 0.3, torch.bfloat16, events.append, heads=False)
    real = slim.Cut.of
    monkeypatch.setattr(slim.Cut, "of", lambda cut, tensor: real(cut, tensor) * (1.01 if tensor.dim() > 1 else 1))
    if not fits:
        monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "40k")
    with quiet():
        if fits:
            with refused(r"^--slim: .* other logits .*without cached keys: 0.0[0-4]\d* apart"):
                write_slim(work, plan, tmp_path / "out", config)
            assert not said_by(events)
        else:
            write_slim(work, plan, tmp_path / "out", config)
            assert said_by(events) == [
                "--slim: float32 does not fit into memory: compared in bfloat16, where 5% of difference passes",
                "--slim: not compared with cached keys and values: the blocks are copied to the device one by one",
            ]


def test_a_configuration_of_no_whole_channels_is_refused(tmp_path: Path) -> None:
    work, plan, config = prepared("llama", tmp_path, 0.02, 0.3)
    config = config.model_copy(update={"model": config.model.model_copy(update={"fingerprint": "content"})})
    assert fit_plan(config, work) == config.plan
    (*attention, gate, up, down), *others = linears_of(plan) or ()
    names = [name for name, _ in work.channels[0].linears]
    assert names[-3:] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for row, said in (
        ((*attention, gate, up, down + 0.01), rf"plan.levels: block 0: {down + 0.01:g} of mlp.down_proj, by"),
        ((*attention, gate, up + 1 / 40, down), rf"plan.levels: block 0: {up + 1 / 40:g} of mlp.up_proj, by"),
        (
            (0.5, *attention[1:], gate, up, down),
            rf"plan.levels: block 0: 0.5 of {names[0]}, by whole channels",
        ),
        (
            (*attention, 1.0, 1.0, 1.0),
            r"plan.levels: block 0: 1 of mlp.gate_proj, by whole channels 0.975",
        ),
        ((*attention, 0.0, 0.0, 0.0), r"plan.levels: block 0 has 0.\d+, by its linears 0"),
    ):
        wrong = config.model_copy(update={"plan": planned("wanda", "atp", plan.amounts, None, (row, *others))})
        with refused(f"^{said}.*; take the file that a study or `export` wrote$"):
            fit_plan(wrong, work)
    with refused(r"^plan\.levels: block 0: needs the shares of its 7 linears"):
        fit_plan(config.model_copy(update={"plan": planned("wanda", "atp", plan.amounts)}), work)


@slow
def test_a_family_whose_code_counts_its_heads_is_refused(tmp_path: Path) -> None:
    """OPT reshapes by the number of heads in its config: without some it is masked, but not slim."""
    work, plan, config = prepared("opt", tmp_path, 0.02, 0.5, heads=True)
    with quiet(), refused(r"^--slim: this model cannot run with fewer channels"):
        write_slim(work, plan, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# by the command line

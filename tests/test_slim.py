"""Slim folders: equal to the masked ones, loaded everywhere or nowhere, and refused where they are not exact."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CPU, bench_of, few, random_ids, tiny
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import resolve
from atp_tune.cli.runtime import quiet
from atp_tune.errors import UserError
from atp_tune.plan import Plan, make_plan
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.search.context import TrialContext
from atp_tune.sparse import slim
from atp_tune.sparse.applying import write_sparse
from atp_tune.sparse.slim import write_slim
from atp_tune.spec.config import Config, read_config
from atp_tune.spec.patterns import parse
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import ModelConfig

GOLDEN = Path(__file__).parent / "golden/config.json"
HEADLESS = ("gpt2", "olmo2", "falcon", "opt", "bloom")
FAMILIES = ("llama", "llama-tied", "qwen3", "gemma3", "mistral", "opt", "gpt2", "gpt_neox", "olmo2", "falcon", "bloom")
Make = Callable[..., tuple[Path, Path]]


def config_of(prune: PruneConfig, plan: Plan) -> Config:
    """A configuration of a plan."""
    shares = {"block_sparsities": plan.sparsities, "linear_sparsities": plan.linear_sparsities}
    return read_config(GOLDEN).model_copy(update={"prune": prune, "pruner": "wanda", **shares})


def prepared(family: str, place: Path, beta: float, sparsity: float, **keys: Any) -> tuple[TrialContext, Plan, Config]:
    model = tiny(family)
    model.save_pretrained(place / "dense")
    channels = ChannelSettings(**{"round_to": 4, "heads": family not in HEADLESS, **keys})
    work = bench_of(model, PruneConfig(pattern="channels", channels=channels), folder=place / "dense")
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


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=random_ids(3, 11, seed=5)).logits
    return found


@pytest.mark.parametrize("family", few(FAMILIES, ("llama", "gpt2", "gpt_neox")))
def test_a_slim_model_is_the_masked_one(family: str, make: Make, tmp_path: Path) -> None:
    masked, folder = (load(place) for place in make(family))
    before, after = (sum(p.numel() for p in model.parameters()) for model in (masked, folder))
    assert after < before
    torch.testing.assert_close(logits(folder), logits(masked), rtol=1e-10, atol=1e-12)
    ids, options = random_ids(2, 5, seed=1), {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = masked.generate(ids, **options, use_cache=False)
    assert torch.equal(folder.generate(ids, **options), expected)  # with cached keys and values
    folder.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(folder), rtol=0, atol=0)


def test_tensors_that_lost_nothing_are_those_of_the_dense_model(make: Make, tmp_path: Path) -> None:
    masked, folder = make("llama", heads=False)
    dense, cut = load_file(tmp_path / "dense/model.safetensors"), load_file(folder / "model.safetensors")
    assert dense.keys() == cut.keys()
    changed = {name for name in dense if dense[name].shape != cut[name].shape}
    assert changed
    assert all(re.search(r"mlp\.(gate|up|down)_proj\.weight$", name) for name in changed)
    assert all(torch.equal(dense[name], cut[name]) for name in dense.keys() - changed)
    table = json.loads((folder / "config.json").read_text())["atp_slim"]
    assert {f"{name}.weight": shape for name, shape in table["linears"].items()} == {
        name: list(cut[name].shape) for name in changed
    }
    zeros = sum(int((tensor == 0).sum()) for tensor in load_file(masked / "model.safetensors").values())
    assert sum(t.numel() for t in dense.values()) - sum(t.numel() for t in cut.values()) == zeros


@pytest.mark.parametrize("heads", [False, True])
def test_blocks_of_equal_widths_make_an_ordinary_folder(heads: bool, make: Make) -> None:
    masked, folder = make("qwen3", beta=0.0, sparsity=0.5 if heads else 0.25, heads=heads, round_to=1)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert "auto_map" not in config
    assert config["intermediate_size"] < 40
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == ((2, 1) if heads else (4, 2))
    assert not list(folder.glob("*.py"))
    torch.testing.assert_close(logits(load(folder)), logits(load(masked)), rtol=1e-10, atol=1e-12)


def test_equal_widths_that_no_config_says_make_a_slim_folder(make: Make) -> None:
    masked, folder = make("gpt2", beta=0.0, sparsity=1 / 3, round_to=1)  # n_inner is null there
    assert json.loads((folder / "config.json").read_text())["model_type"] == "atp_slim"
    torch.testing.assert_close(logits(load(folder)), logits(load(masked)), rtol=1e-10, atol=1e-12)


def test_a_slim_model_can_lose_further_channels(make: Make, tmp_path: Path) -> None:
    _, folder = make("llama", heads=False)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder)
        work = bench_of(model, PruneConfig(pattern="channels", channels=ChannelSettings(round_to=1)), folder=folder)
        plan = make_plan("wanda", "uniform", work.budget(0.1), {}, parse("channels"))
        config = config_of(work.prune_settings, plan)
        write_sparse(work, plan, tmp_path / "masked2", config)
        write_slim(work, plan, tmp_path / "slim2", config)
    before, after = (load(tmp_path / name) for name in ("slim", "slim2"))
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())
    torch.testing.assert_close(logits(after), logits(load(tmp_path / "masked2")), rtol=1e-10, atol=1e-12)


# no silent failure


def test_a_class_of_the_family_does_not_load_it(make: Make) -> None:
    _, folder = make("llama")
    with quiet(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(folder)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM
trusted = sys.argv[2] == "trusted"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trusted)
assert "atp_tune" not in sys.modules
print(type(model).__name__)
"""


@pytest.mark.slow
def test_without_atp_tune_it_needs_trust(make: Make) -> None:
    _, folder = make("llama")

    def run(word: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-I", "-c", PLAIN, str(folder), word]
        return subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    trusted, plain = run("trusted"), run("plain")
    assert trusted.stdout.split()[-1] == "SlimLlamaForCausalLM"
    assert plain.returncode
    assert "trust_remote_code=True" in plain.stderr


def test_a_damaged_table_or_file_is_refused(make: Make) -> None:
    _, folder = make("llama", heads=False)
    config = json.loads((folder / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    for change, said in (
        ({"version": 2}, "has no table atp_slim of version 1"),
        ({"linears": {name: [0, 24]}}, "is damaged"),
        ({"linears": {f"{name}x": [8, 24]}}, f"has no linear {name}x"),
        ({"linears": {name: [4000, 24]}}, f"{name} is wider than in its family's model"),
        ({"linears": {"model.layers.0.mlp": [8, 24]}}, "model.layers.0.mlp is no linear"),
        ({"family": "marsian"}, "has no models marsian"),
        ({"linears": config["atp_slim"]["linears"] | {name: [4, 24]}}, "have no model.layers.0.mlp.up_proj.weight of"),
    ):
        table = {**config, "atp_slim": config["atp_slim"] | change}
        (folder / "config.json").write_text(json.dumps(table))
        with quiet(), pytest.raises(ValueError, match=said):
            AutoModelForCausalLM.from_pretrained(folder)


def test_atp_tune_reads_a_slim_folder_as_any_model(make: Make) -> None:
    masked, folder = make("llama")
    found = resolve(ModelConfig(source=str(folder)), Path())
    assert not found.trusted
    with quiet(), Checkpoint.load(found.path, torch.float32, CPU) as checkpoint:
        assert len({tuple(x.in_features for x in row) for row in checkpoint.linears}) > 1  # widths of each block's own
        torch.testing.assert_close(logits(checkpoint.model).double(), logits(load(masked)), rtol=1e-3, atol=1e-4)


def test_code_in_a_slim_folder_is_not_run(make: Make) -> None:
    """What runs is the module of the package."""
    _, folder = make("llama")
    (folder / "modeling_atp_slim.py").write_text("raise SystemExit")
    with quiet(), Checkpoint.load(resolve(ModelConfig(source=str(folder)), Path()).path, torch.float32, CPU) as found:
        assert type(found.model).__name__ == "SlimLlamaForCausalLM"


def test_the_config_says_the_family(make: Make) -> None:
    _, folder = make("llama")
    config = AutoConfig.from_pretrained(folder)
    assert config.to_dict()["model_type"] == "atp_slim"
    assert type(config).__name__ == "SlimLlamaConfig"
    assert config.num_hidden_layers == 4


# what is not exact is not written


def test_a_slim_model_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, plan, config = prepared("llama", tmp_path, 0.02, 0.3)
    real = slim._cut

    def wrong(tensor: Tensor, cut: Any) -> Tensor:
        found = real(tensor, cut)
        return found.flip(1) if cut is not None and cut.columns is not None else found

    monkeypatch.setattr(slim, "_cut", wrong)
    with (
        quiet(),
        pytest.raises(UserError, match=r"^--slim: LlamaForCausalLM computes other logits .* apart\)"),
    ):
        write_slim(work, plan, tmp_path / "out", config)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_family_whose_code_counts_its_heads_is_refused(tmp_path: Path) -> None:
    """OPT reshapes by the number of heads in its config: without some it is masked, but not slim."""
    work, plan, config = prepared("opt", tmp_path, 0.02, 0.5, heads=True)
    with quiet(), pytest.raises(UserError, match=r"^--slim: this model cannot run with fewer channels") as caught:
        write_slim(work, plan, tmp_path / "out", config)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_other_patterns_are_refused(tmp_path: Path) -> None:
    work, plan, config = prepared("llama", tmp_path, 0.02, 0.3)
    config = config.model_copy(update={"prune": PruneConfig(pattern="2:4")})
    with pytest.raises(UserError, match=r'^--slim: only whole channels can be cut, and prune.pattern is "2:4"'):
        write_slim(work, plan, tmp_path / "out", config)


# by the command line


@pytest.fixture(scope="module")
def studied(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of channels, run to its end."""
    from tinystudy import run

    home = tmp_path_factory.mktemp("channels")
    for name in ("calibration.txt", "validation.txt", "test.txt"):
        shutil.copyfile(tiny_place / name, home / name)
    shutil.copytree(tiny_place / "model", home / "model")
    text = (tiny_place / "tiny.toml").read_text()
    text = text.replace("sparsity = 0.6", "sparsity = 0.25").replace(
        "[texts.calibration]", '[prune]\npattern = "channels"\nchannels = { round_to = 4 }\n\n[texts.calibration]', 1
    )
    (home / "tiny.toml").write_text(text)
    run(home)
    return home


@pytest.mark.slow
def test_a_study_of_channels_is_run_exported_and_applied(studied: Path, command: Any, tmp_path: Path) -> None:
    best = read_config(studied / "tiny.best.json")
    assert best.prune.pattern == "channels"
    assert best.sparsity.realised == pytest.approx(0.25, abs=0.005)
    for options, name in (([], "masked"), (["--slim"], "slim")):
        said = command("apply", "--config", studied / "tiny.best.json", "--out", tmp_path / name, *options)
        assert said.code == 0, said.err
        assert "(+0.000%)" in said.out or "(-0.000%)" in said.out
    card = (tmp_path / "slim/README.md").read_text()
    assert "The pruned channels are not stored" in card
    assert "--out DIR --slim" in card
    assert "`apply --slim` makes the same folder" in (tmp_path / "masked/README.md").read_text()
    assert command("apply", "--verify", tmp_path / "slim").code == 0
    refused = command("export", "--study", studied / "tiny.toml", "--format", "llm-compressor")
    assert refused.error.startswith("--format llm-compressor: prune.pattern = channels: llm-compressor zeroes single")
    for words in (("status", "--json"), ("report", "--out", str(tmp_path / "page.html"))):
        assert command(words[0], "--study", studied / "tiny.toml", *words[1:]).code == 0
    config = str(studied / "tiny.best.json")
    both = command("apply", "--config", config, "--out", tmp_path / "x", "--slim", "--packed")
    assert "a slim model has no zeros to pack" in both.error
    engine = command("speedup", "--model", tmp_path / "slim", "--engine", "packed")
    assert engine.error.startswith("--engine packed: runs models with zeros, and this one has fewer channels")


@pytest.mark.slow
def test_a_front_over_sparsities_of_channels(studied: Path, tmp_path: Path) -> None:
    from tinystudy import run

    home = tmp_path / "front"
    shutil.copytree(studied, home, ignore=shutil.ignore_patterns("*.db*", "*.best.json"))
    study = run(home, "sparsity=[0.1, 0.4]", "search.trials=6")
    counts = [trial.user_attrs["realised"] for trial in study.trials if "realised" in trial.user_attrs]
    assert len(set(counts)) > 2
    for trial in study.trials:
        assert trial.user_attrs["realised"] == pytest.approx(trial.params["sparsity"], abs=0.01)

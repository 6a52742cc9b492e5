"""The real 135M Llama: parity on its first blocks, and the way from a study to a sparse checkpoint, to its answers and
to its fine-tuning, through the commands.
"""

import json
from hashlib import sha256
from pathlib import Path
from time import process_time
from typing import Any

import naive
import optuna
import pytest
import torch
from families import nlls_of
from safetensors.torch import load_file
from synthetic import storage_in
from test_applying import block_of
from tinystudy import HANGS, finish, settings, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_tune.blocks import prune_pass
from atp_tune.config.prune import make_plan
from atp_tune.config.studyfile import load
from atp_tune.cost import probe
from atp_tune.cost.planning import foresee
from atp_tune.events import Place, ignore_events
from atp_tune.folders.card import FINETUNED, Finetuned
from atp_tune.measures import perplexity
from atp_tune.pruners.sparsegpt import SparseGPT
from atp_tune.pruners.statistics import Hessian
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.search.objective import Record

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
# In float32 also where bfloat16 is fast: the references compute in it.
SHORT = [
    "model.dtype=float32", "texts.calibration.nsamples=4", "texts.validation.nsamples=2", "texts.validation.seqlen=128",
    "continuations.tokens=4", "texts.test.nsamples=2", "texts.test.seqlen=128", "texts.calibration.draws=1",
]  # fmt: skip
MEASURED = (
    '{source = "package:pydoc_data.topics:topics", part = [0.65, 1.0], shuffle = true, nsamples = 6, seqlen = 128}'
)
STRIDE = 4  # rows of a linear are looked at: each is pruned by itself
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def cache(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model is downloaded and converted once."""
    monkeypatch.setenv("ATP_TUNE_CACHE", str(smollm2))
    return smollm2


@pytest.fixture(scope="module")
def context(smollm2: Path) -> Session:
    file = load("smol-60", SHORT)
    spec = file.study
    texts = {"calibration": spec.texts.calibration, "validation": spec.texts.validation}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(smollm2))
        return Session.open(Setup(spec.model, spec.prune, texts, Place(file.folder, "cpu")))


def run(*arguments: str | Path) -> str:
    answer = finish(start(*arguments), 3 * HANGS)  # the real model, on a machine however slow
    assert answer.is_clean
    return answer.out


@pytest.fixture(scope="module")
def tuned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a short study that has run, and what the command printed."""
    place = tmp_path_factory.mktemp("smol")
    (place / "smol-60.toml").write_text((ROOT / "studies" / "smol-60.toml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(smollm2))
        return place, run("--study", place / "smol-60.toml", "--trials", "2", *settings(*SHORT))


@pytest.fixture(scope="module")
def sparse(tuned: tuple[Path, str], smollm2: Path) -> Path:
    """The folder that `apply` makes of its best; to be read only."""
    place = tuned[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(smollm2))
        run("apply", "--config", place / "smol-60.best.json", "--out", place / "sparse")
    return place / "sparse"


def names_of(block: int) -> dict[str, str]:
    """Name in the block → name in the model."""
    return {
        f"{part}.{name}": f"model.layers.{block}.{part}.{name}"
        for name in LINEARS
        for part in (["self_attn"] if name[0] in "qkvo" else ["mlp"])
    }


def first_blocks(context: Session, count: int) -> Any:
    """The model up to a block, whose inputs do not depend on those that follow."""
    model = AutoModelForCausalLM.from_pretrained(context.folder.path, dtype=torch.float32)
    model.model.layers = model.model.layers[:count]
    return model


def test_wanda_masks_of_the_first_blocks_equal_a_double_loop(context: Session) -> None:
    plan = make_plan("wanda", "atp", context.budget(0.6), {"beta": 0.008})
    model = first_blocks(context, 2)
    ids = torch.from_numpy(context.windows["calibration"].ids)
    for block in context.prune(plan):
        if block.index == 2:
            break
        inputs = naive.inputs_of(model, list(names_of(block.index).values()), ids)
        for name, full in names_of(block.index).items():
            dense, pruned = model.get_submodule(full).weight.data, block.weights[f"{name}.weight"]
            mask = naive.wanda_mask(dense[::STRIDE], inputs[full], plan.amounts[block.index])
            assert torch.equal(mask, pruned[::STRIDE] == 0), full
            dense.masked_fill_(pruned == 0, 0)  # block 1 has the inputs that come out of block 0


def sparsegpt_by_us(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(weight.shape[1], weight.device)
    hessian.add(x)
    return SparseGPT().prune(weight, 0.6, hessian)


def test_sparsegpt_of_the_first_block_equals_brain_surgery(context: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last mask bit in float64; in float32 near-ties turn over (10 of 110,592 weights were seen)."""
    model = first_blocks(context, 1)
    full = names_of(0)["self_attn.k_proj"]
    x = naive.inputs_of(model, [full], torch.from_numpy(context.windows["calibration"].ids))[full]
    dense = model.get_submodule(full).weight.detach()
    weight, mask = naive.sparsegpt(dense, x, 0.6, 0.01, 128)
    assert int(((sparsegpt_by_us(x, dense) == 0) != mask).sum()) < 1e-3 * mask.numel()
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact = sparsegpt_by_us(x.double(), dense.double())
    assert torch.equal(exact == 0, mask)
    assert torch.allclose(exact, weight, rtol=0, atol=1e-9)


def test_perplexity_equals_the_models_own_loss(context: Session) -> None:
    model = AutoModelForCausalLM.from_pretrained(context.folder.path, dtype=torch.float32)
    expected = naive.nlls_of(model, torch.from_numpy(context.windows["validation"].ids))
    assert nlls_of(context, context.blocks(None), "validation") == pytest.approx(expected, rel=1e-5)


def test_plan_foretells_a_trial(context: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds of this process, which other work does not change; docs/speed.md has real ones."""
    for module in (probe, prune_pass):
        monkeypatch.setattr(module, "perf_counter", process_time)
    found = foresee(load("smol-60", [*SHORT, "device=cpu"]), "smol-60", ignore_events)
    plan = make_plan("wanda", "atp", context.budget(0.6), {"beta": 0.004})
    list(context.prune(plan))  # what is measured once is not a trial's
    record = Record(context)
    context.measure(plan, [record, RoleScores("validation")])
    assert found.trial[0].seconds is not None
    assert 0.5 < found.trial[0].seconds.total / sum(record.close()["seconds"].values()) < 2


def test_the_grid_of_the_paper_equals_prune(tmp_path: Path) -> None:
    """A β of a paper-protocol study, against a command of its own that loads and prunes once."""
    path = tmp_path / "paper-smol-60.toml"
    path.write_text((ROOT / "studies" / "paper-smol-60.toml").read_text())
    overrides = [word for key in (*SHORT[:5], "search.step=0.027") for word in ("--set", key)]
    run("--study", str(path), *overrides)
    trials = optuna.load_study(study_name="paper-smol-60", storage=storage_in(tmp_path / "paper-smol-60.db")).trials
    trial = max(trials, key=lambda trial: trial.params["beta"])
    assert sorted(trial.params["beta"] for trial in trials) == [0.0, 0.027]
    printed = run("prune", "--study", str(path), "--beta", "0.027", *overrides)
    assert f"perplexity {trial.value:.2f} ± {trial.user_attrs['stderr']:.2f} on the test text" in printed


def test_from_study_to_sparse_checkpoint(tuned: tuple[Path, str], sparse: Path) -> None:
    place, printed = tuned
    assert "[2/2]" in printed and "| wanda + uniform " in printed
    best = json.loads((place / "smol-60.best.json").read_text())
    assert_zeros(sparse, best["plan"]["levels"])
    assert_perplexity(sparse, best)


def assert_zeros(out: Path, sparsities: list[float]) -> None:
    """Zeros per row, counted from the safetensors alone."""
    tensors = load_file(out / "model.safetensors")
    for block, sparsity in enumerate(sparsities):
        for full in names_of(block).values():
            weight = tensors[f"{full}.weight"]
            assert ((weight == 0).sum(1) == int(weight.shape[1] * sparsity)).all(), full


def assert_perplexity(out: Path, best: dict) -> None:  # type: ignore[type-arg]
    """Plain transformers come to the perplexity that the file promises."""
    import pydoc_data.topics

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    topics = pydoc_data.topics.topics.values()
    documents = sorted(topics, key=lambda document: sha256(document.encode(errors="replace")).hexdigest())
    total, start, part = sum(map(len, documents)), 0, []
    for document in documents:
        if start / total >= best["texts"]["test"]["part"][0]:
            part.append(document)
        start += len(document)
    tokens = best["texts"]["test"]["seqlen"]
    windows = torch.tensor(tokenizer("\n\n".join(part)).input_ids)[: 2 * tokens].view(2, tokens)
    measured = perplexity(naive.nlls_of(model, windows)).value
    assert abs(measured / best["scores"]["best"]["perplexity"]["test"]["value"] - 1) < 0.001


def test_fine_tuning_makes_it_better(sparse: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (
        "--train",
        "lora",
        "--loss",
        "next-token",
        "--steps",
        "10",
        "--batch",
        "2",
        "--seqlen",
        "64",
        "--learning-rate",
        "0.001",
    )
    run("finetune", sparse, "--out", out, "--test-text", MEASURED, *options)
    done = Finetuned.model_validate_json((out / FINETUNED).read_text())
    assert sum(done.losses[-5:]) < sum(done.losses[:5])
    assert done.change.value + 2 * done.change.stderr < -0.05
    assert done.zeros.before == done.zeros.after
    before, after = (load_file(folder / "model.safetensors") for folder in (sparse, out))
    assert before.keys() == after.keys()
    for name, was in before.items():
        if block_of(name) is not None:
            assert torch.equal(was == 0, after[name] == 0)

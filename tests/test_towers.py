"""Pruning of vision towers: the replay of both parts, a study on pairs, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, refused, slow
from families import CPU, few, nlls_of, scores_of
from test_pairs import FAMILIES, STUDY, TOKENS, check_half_pruned, norms_of, wanted, write_model, write_pairs
from tinystudy import CommandLine
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from atp_tune.blocks.verification import verified_with_tower
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.best import read_config
from atp_tune.config.prune import PruneConfig, make_plan
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError
from atp_tune.events import Place
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import TOKEN_WINDOWS, has_text, read_pairs
from atp_tune.run.session import Session, Setup
from atp_tune.scores import SCORES

BOTH = ("language", "vision")
PAIRS = """source = "file:pairs.parquet"
images = "image"
column = "caption"
"""
TEXT = 'source = "package:pydoc_data.topics:topics"\n'
STUDY_OF_BOTH = (
    STUDY.replace('source = "model"', 'source = "model"\nprune = ["language", "vision"]')
    .replace("nsamples = 5\n", "nsamples = 5\npart = [0.0, 0.4]\n")
    .replace(f"{TEXT}part = [0.0, 0.5]", f"{PAIRS}part = [0.4, 0.7]")
    .replace(f"{TEXT}part = [0.5, 1.0]", f"{PAIRS}part = [0.7, 1.0]")
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(family, tmp_path_factory.mktemp(family) / "model") for family in FAMILIES}


def context(folder: Path, place: Path, **prune: Any) -> Session:
    file = write_pairs(place / "p.parquet", count=24)
    texts = {
        "calibration": wanted(file, part=(0, 0.5), nsamples=5),
        "validation": wanted(file, part=(0.5, 1), nsamples=7),
    }
    model = ModelConfig(source=str(folder), dtype="float32", prune=BOTH)
    return Session.open(Setup(model, PruneConfig(**prune), texts, Place(place, "cpu")))


@slow
@parametrize("family", FAMILIES)
def test_scores_are_those_of_the_pruned_model(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Weights of both parts go into the model itself: its loss on the text of the pairs is the score."""
    with context(models[family], tmp_path) as work:
        assert work.checkpoint.in_tower == 2 and len(work.checkpoint.blocks) == 5
        plan = make_plan("wanda", "atp", work.budget(0.5), {"beta": 0.1}, work.pattern)
        blocks = [(block.index, block.weights) for block in work.prune(plan)]
        scores = scores_of(work, blocks, "validation", kl=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(models[family], dtype=torch.float32)
        batch = work.items("validation")
        with torch.no_grad():
            dense = model(**batch.in_dtype(model.dtype), use_cache=False).logits
            for index, weights in blocks:
                model.get_submodule(work.checkpoint.block_names[index]).load_state_dict(weights)
            logits = model(**batch.in_dtype(model.dtype), use_cache=False).logits
        ids, nlls, kls = batch.tensors["input_ids"], [], []
        for row in range(len(ids)):
            places = [k for k in range(TOKENS - 1) if ids[row, k + 1] != batch.image]
            assert len(places) < TOKENS - 1
            nlls.append(sum(float(functional.cross_entropy(logits[row, k], ids[row, k + 1])) for k in places))
            own, true = logits[row, places].log_softmax(-1), dense[row, places].log_softmax(-1)
            kls.append(float((true.exp() * (true - own)).sum()) / len(places))
            nlls[-1] /= len(places)
        assert scores["nlls"] == pytest.approx(nlls, rel=1e-5) and scores["kls"] == pytest.approx(
            kls, rel=1e-3, abs=1e-6
        )
        other = nlls_of(work, [*((i, work.checkpoint.weights(i)) for i in range(2)), *blocks[2:]], "validation")
        assert other != scores["nlls"]  # the tower's zeros count


@slow
@parametrize("statistics", ["block", "sequential", "dense"])
def test_wanda_in_a_tower_is_a_naive_loop(statistics: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Each linear, of the tower first, loses its lowest |W|·‖X‖ by the inputs in the model as it is pruned so far."""
    with context(models["llava"], tmp_path, statistics=statistics) as work:
        plan = make_plan("wanda", "uniform", work.budget(0.5), {}, work.pattern)
        model: Any = AutoModelForImageTextToText.from_pretrained(models["llava"], dtype=torch.float32)
        tensors = work.items("calibration").in_dtype(model.dtype)
        dense = {name: norms_of(model, model.get_submodule(name), tensors) for name in work.checkpoint.block_names}
        for block in work.prune(plan):
            name = work.checkpoint.block_names[block.index]
            norms = dense[name] if statistics == "dense" else norms_of(model, model.get_submodule(name), tensors)
            for linear in work.checkpoint.linears[block.index]:
                if statistics == "sequential":
                    norms = norms_of(model, model.get_submodule(name), tensors)
                weight = model.get_submodule(f"{name}.{linear.name}").weight
                check_half_pruned(weight, norms[linear.name], block.weights[linear.key], linear.name)


@parametrize("family", few(FAMILIES, ("llava",)))
def test_the_replay_of_a_tower_is_the_model_itself(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    """To the last bit: block by block through the tower, and from what the model makes of it through the rest."""
    pairs = read_pairs(wanted(write_pairs(tmp_path / "p.parquet")), ModelFolder(models[family], "x", family), tmp_path)
    with Checkpoint.load(models[family], torch.float32, CPU, with_tower=True) as checkpoint, torch.inference_mode():
        batch, first = pairs.batch(CPU), checkpoint.in_tower
        replay = verified_with_tower(checkpoint, TOKEN_WINDOWS, SCORES["next-token"], {"calibration": batch})
        seen: list[Any] = []
        last = checkpoint.blocks[first - 1].register_forward_hook(lambda *args: seen.append(args[-1]))
        own = checkpoint.model(**batch.in_dtype(checkpoint.model.dtype), use_cache=False).logits
        last.remove()
        weights = [checkpoint.weights(index) for index in range(len(checkpoint.blocks))]
        hidden = replay.embed(batch)
        for index in range(first):
            hidden = replay.run(index, weights[index], hidden)
        assert torch.equal(hidden, seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0])
        hidden = replay.embed(batch, weights[:first])
        for index in range(first, len(weights)):
            hidden = replay.run(index, weights[index], hidden)
        assert torch.equal(replay.logits(batch, hidden), own)


def test_two_images_for_a_pair_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    batch = {"input_ids": torch.zeros(3, TOKENS, dtype=torch.long), "pixel_values": torch.randn(3, 2, 3, 16, 16)}
    with Checkpoint.load(models["idefics3"], torch.float32, CPU, with_tower=True) as checkpoint:
        image = checkpoint.config.image_token_id
        batch["input_ids"][:, 1:9] = image
        with refused(r"runs its vision tower on \(4, 4, 32\) for 2 pairs, not on one image"):
            verified_with_tower(checkpoint, TOKEN_WINDOWS, SCORES["next-token"], {"test": Items.of(batch, image=image)})


def test_a_tower_with_something_between_its_blocks_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """What enters a block is not what left the one before: the replay would measure other inputs."""
    pairs = read_pairs(
        wanted(write_pairs(tmp_path / "p.parquet")), ModelFolder(models["llava"], "x", "llava"), tmp_path
    )
    with Checkpoint.load(models["llava"], torch.float32, CPU, with_tower=True) as checkpoint:
        checkpoint.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] + 0.1, *args[1:]))
        said = r"^texts.test.images: LlavaForConditionalGeneration: gives block 1 of its tower other numbers than when"
        items = {"test": pairs.batch(CPU)}
        with refused(said):
            verified_with_tower(checkpoint, TOKEN_WINDOWS, SCORES["next-token"], items)


def test_a_tower_that_does_not_fit_its_pairs_is_refused(models: dict[str, Path]) -> None:
    """Images of another size than the tower was made for: one line, whatever transformers raises."""
    with Checkpoint.load(models["llava"], torch.float32, CPU, with_tower=True) as checkpoint:
        ids = torch.full((2, TOKENS), checkpoint.config.image_token_id)
        items = {"test": Items.of({"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24)}, image=int(ids[0, 0]))}
        with pytest.raises(
            UserError, match=r"^model LlavaForCond.*: cannot be run block by block on its pairs: "
        ) as raised:
            verified_with_tower(checkpoint, TOKEN_WINDOWS, SCORES["next-token"], items)
        assert "\n" not in str(raised.value)


def test_a_model_without_a_tower_is_refused(tiny_place: Path) -> None:
    with refused(r"^model.prune: LlamaForCausalLM has no vision tower"):
        Checkpoint.load(tiny_place / "model", torch.float32, CPU, with_tower=True)


def test_pairs_of_two_roles_are_distinct() -> None:
    """By ids and image together; one role alone is not compared with itself."""
    ids, image = torch.arange(6).reshape(3, 2), torch.randn(3, 1, 2, 2)
    pairs = Items.of({"input_ids": ids, "pixel_values": image})
    other = Items.of({"input_ids": ids.flip(0), "pixel_values": image})
    TOKEN_WINDOWS.check_disjoint({"test": Items.of({"input_ids": ids[[0, 0]], "pixel_values": image[[0, 0]]})})
    with refused(r"^texts.test: pair 1 is also in texts.calibration"):
        TOKEN_WINDOWS.check_disjoint({"calibration": pairs, "test": other})


def test_pairs_without_text_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of them would be predicted; as calibration they may be."""
    file = write_pairs(tmp_path / "p.parquet")
    texts = {"calibration": wanted(file, part=(0, 0.5), nsamples=2), "test": wanted(file, part=(0.5, 1), nsamples=2)}
    folder = ModelFolder(models["llava"], "x", "llava")
    pairs = read_pairs(texts["calibration"], folder, tmp_path)
    assert has_text(pairs) and pairs.image is not None
    ids = torch.full_like(pairs.tensors["input_ids"], pairs.image)
    blank = Items.of({**pairs.tensors, "input_ids": ids}, image=pairs.image)
    with Checkpoint.load(models["llava"], torch.float32, CPU, with_tower=True) as checkpoint:
        TOKEN_WINDOWS.check_fit(checkpoint, {"calibration": blank}, lambda batch: torch.zeros(1))
        with refused(r"^texts.test.seqlen: 24 tokens of a pair hold no text; raise seqlen"):
            TOKEN_WINDOWS.check_fit(checkpoint, {"test": blank}, lambda batch: torch.zeros(1))


@slow
@parametrize("family", list(FAMILIES))
def test_a_study_of_both_parts(
    family: str, models: dict[str, Path], tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds a plan, `apply` writes both parts and measures the same, and the answers name the blocks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(models[family])
    (tmp_path / "pairs.toml").write_text(STUDY_OF_BOTH)
    write_pairs(tmp_path / "pairs.parquet", count=24)
    assert "best:" in command.ok("--study", "pairs.toml", "--set", 'allocation=["atp", "owl"]').out
    config = read_config(tmp_path / "pairs.best.json")
    assert len(config.plan.amounts) == 5 and config.model.prune == BOTH
    assert "(+0.000%)" in command.ok("apply", "--config", "pairs.best.json", "--out", "sparse").out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse")
    command.ok("export", "--config", "sparse/atp_tune.json", "--format", "csv", "--out", "table.csv")
    rows = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines()[1:]]
    for row in rows:
        block = model.get_submodule(row[1])
        linears = [x.weight for x in block.modules() if isinstance(x, torch.nn.Linear)]
        zeros = sum(int((weight == 0).sum()) for weight in linears) / sum(weight.numel() for weight in linears)
        assert zeros == pytest.approx(float(row[2]), abs=0.05), row
    assert "the blocks of its vision tower and its language model" in (tmp_path / "sparse/README.md").read_text()
    command.ok("report", "--study", "pairs.toml", "--out", "page.html")
    assert "block (0 to 1: vision tower)" in (tmp_path / "page.html").read_text()
    command.ok("plan", "--study", "pairs.toml")

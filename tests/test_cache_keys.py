"""Keys of the cache: whatever changes an entry changes its key, setting by setting of a study."""

import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from families import same_bits
from tinystudy import few_steps, study_file

from atp_tune.api.configuration import pruned_weights
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config.best import read_config
from atp_tune.config.data import ImageSet
from atp_tune.config.prune import RecoverConfig
from atp_tune.config.study import Study
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError
from atp_tune.events import Place
from atp_tune.folders import speed
from atp_tune.folders.applying import plan_config
from atp_tune.folders.finetuning import FinetuningJob, read_items
from atp_tune.folders.speed import find_pair, passing_pair
from atp_tune.inputs import windows
from atp_tune.run import session as contexts
from atp_tune.run.dense_model import CalibrationGradients
from atp_tune.run.session import Session, Setup
from atp_tune.search.space import make_space
from atp_tune.storage.fingerprint import _flat
from atp_tune.utils import cache as entries
from atp_tune.utils.cache import FOLDERS, key


def lines_of(text: str) -> dict[str, str]:
    """Settings by name, as a study file has them."""
    return dict(line.split(" = ", 1) for line in text.splitlines())


TEXT = lines_of("""\
source = "file:long.txt"
part = [0.0, 0.9]
shuffle = true
sampling = "random"
nsamples = 7
seqlen = 30
stride = 2
seed = 1
""")
# So that each key of a text matters.
PART = (
    "texts.calibration.part=[0.0, 0.8]", 'texts.calibration.sampling="random"', 'search.sampler="gp"',
)  # fmt: skip
BASES = {  # allocation and pruner: what the descent asks of the pruner
    "rows": ('allocation=["gradient-rows"]', 'recover.train="lora"'),
    "own": ('allocation=["gradient"]', 'prune.gradient_at="own"', 'prune.pruners=["sparsegpt"]', "prune.refine=1"),
    "groups": ('allocation=["gradient"]', 'prune.gradient_at="own"', 'prune.pattern="mixed:8"'),
}
CHANGES = lines_of("""\
description = "another"
sparsity = 0.55
bits = 4
device = "auto"
speed = true
storage = "sqlite:///a.db"
model.source = "other"
model.dtype = "bfloat16"
model.offload = "cpu"
model.allow_pickle = true
model.trust_remote_code = true
prune.pruners = ["alps"]
prune.statistics = "dense"
prune.pattern = "mixed:4"
prune.refine = 3
prune.gradient_at = "own"
prune.loss = "kl"
prune.sparsegpt.damping = 0.1
prune.sparsegpt.columns = 8
prune.wanda.compare = "matrix"
prune.dsnot.initial = "magnitude"
prune.dsnot.cycles = 3
prune.dsnot.threshold = 0.5
prune.dsnot.power = 2.0
prune.alps.damping = 0.1
prune.alps.rho = 0.3
prune.alps.iterations = 3
prune.alps.steps = 2
allocation.names = ["gradient", "atp"]
allocation.beta = [0.0, 0.1]
search.trials = 9
search.objective = ["kl"]
search.sampler = "tpe"
search.seed = 5
search.step = 0.1
search.stopper = "wilcoxon"
search.early_termination = true
search.screen = {trials = 2}
continuations.tokens = 4
continuations.prompts = ["Once"]
recover.train = "scales"
recover.loss = "next-token"
recover.steps = 9
recover.batch = 3
recover.seqlen = 16
recover.learning_rate = 0.5
recover.rank = 3
recover.alpha = 3
recover.eval_every = 2
recover.patience = 7
recover.min_increase = 0.3
recover.seed = 4
""")  # a setting, and another value of it
CHANGES |= {
    f"texts.{role}.{name}": value for role in ("calibration", "validation", "test") for name, value in TEXT.items()
}
CHANGES["texts.calibration.sampling"] = '"consecutive"'
OF_PRUNING = "sparsity", "bits", "model", "prune", "allocation", "texts.calibration"
REFUSED = "prune.pruners", "bits", "recover.rank", "recover.alpha"  # which do not go with each base
ELSEWHERE = (  # settings of texts of the hub, of images, of channels and of bits alone, which have tests of their own
    r"texts\.\w+\.(config|split|column|revision|images|draws)|images.*|model\.(revision|sha256|prune)|limit.*|protocol|"
    r"texts\.bos|prune\.channels\..*|quantize\..*|search\.score|search\.screen\..*|recover|size"
)


def leaves(study: Study) -> Iterator[str]:
    yield from dict(_flat(study.model_dump(mode="json")))
    yield from (f"recover.{name}" for name in RecoverConfig.model_fields)


def test_every_setting_of_a_study_is_changed_here_or_elsewhere(tiny_place: Path) -> None:
    known = {*leaves(study_file(tiny_place).study)}
    assert {name for name in known - CHANGES.keys() if not re.fullmatch(ELSEWHERE, name)} == set()
    assert CHANGES.keys() - known == set()


LOAD = ModelFolder.checkpoint


class FoundKeyError(Exception):
    """The key of a descent, before it is made."""


class Keys:
    """The keys of all folders that a study asks for; `loaded`: the dense model, loaded once for all of them."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._place, self._patch = place, monkeypatch
        few_steps(monkeypatch)
        monkeypatch.setattr(contexts, "POOL", 512)
        monkeypatch.setattr(windows, "load_tokenizer", functools.cache(windows.load_tokenizer))
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def file(self, overrides: Sequence[str]) -> StudyFile:
        return study_file(self._place, *overrides)

    def of(self, overrides: Sequence[str]) -> dict[str, Any]:
        file = self.file(overrides)
        with self._patch.context() as patch:
            patch.setattr(ModelFolder, "checkpoint", lambda _, model, *__: self._model(model)[0])
            patch.setattr(contexts, "verified", lambda *_: self._model(file.study.model)[1])
            patch.setattr(Session, "release", lambda _: None)
            patch.setattr(CalibrationGradients, "cached", self._stop)
            with Session.open(setup_of(file)) as context:
                return {name: made(file, context) for name, made in MAKERS.items()}

    def _model(self, model: Any) -> tuple[Any, Any]:
        """Checkpoint and verified replay of a model."""
        name = f"{model.source} {model.dtype}"
        if name not in self._loaded:
            checkpoint = LOAD(resolve(model, self._place), model, torch.device("cpu"))
            self._loaded[name] = checkpoint, contexts.Replay(checkpoint, contexts.KINDS["tokens"])
        return self._loaded[name]

    @staticmethod
    def _stop(gradients: CalibrationGradients, measure: object, **own: object) -> None:
        raise FoundKeyError(gradients._key(**own))


def setup_of(file: StudyFile) -> Setup:
    return Setup.of_study(file.study, file.folder, bool(file.study.bos))


def of_windows(file: StudyFile, context: Session) -> list[str]:
    folder, texts = context.folder, setup_of(file).texts
    return [windows._key(text, folder.path, file.folder, folder.trusted, context.bos, 1) for text in texts.values()]


def of_statistics(file: StudyFile, context: Session) -> list[str]:
    pruners = [context.methods.pruner(name) for name in file.study.methods.short_names]
    return [context.measured.statistics_key(each) for each in pruners if each.measures]


def of_prices(file: StudyFile, context: Session) -> list[Any]:
    return [descent(file, context, name) for name in file.study.methods.short_names]


def descent(file: StudyFile, context: Session, pruner: str) -> Any:
    rows = file.study.prune.by_rows(pruner) and "gradient-rows" in file.study.allocation.names
    targets = (file.study.highest,) if file.study.bits is None else (0.5,)
    try:
        return context._priced(targets, pruner, rows)
    except FoundKeyError as found:
        return str(found)


def of_training(file: StudyFile, context: Session) -> str:
    study = file.study
    config, folder = plan_config(file, context, plan_of(file, context)), context.folder
    recover = study.recover or RecoverConfig()
    texts = study.data.calibration.text, study.data.test or study.data.validation
    filled = recover.filled(getattr(config.texts.validation, "seqlen", None))
    if isinstance(texts[0], ImageSet):
        filled = filled.model_copy(update={"seqlen": None})
    items = read_items(texts[0], {"test": texts[1]}, folder, filled, file.folder, context.bos)
    teacher = folder if filled.has_teacher else None
    own = (setup_of(file), folder, Path(), texts[0], items, filled, None, teacher, True, None)
    return FinetuningJob(*own).part.name  # type: ignore[arg-type]


def of_sparse(file: StudyFile, context: Session) -> str:
    config = plan_config(file, context, plan_of(file, context))
    return speed._cached(config, context.folder, Place(file.folder, file.study.device)).name


def plan_of(file: StudyFile, context: Session) -> Any:
    space = make_space(file.study, context.budget(file.study.highest))
    return space.plan(space.uniform()[0])


MAKERS: dict[str, Callable[[StudyFile, Session], Any]] = {
    "windows": of_windows, "statistics": of_statistics, "gradient": of_prices, "recovered": of_training,
    "sparse": of_sparse,
}  # fmt: skip


def statistics(file: StudyFile, context: Session) -> list[Any]:
    pruners = [context.methods.pruner(name) for name in file.study.methods.short_names]
    blocks = [block for each in pruners if each.measures for block in context.measured.statistics(each)]
    return [tensor for block in blocks for each in block.values() for tensor in each.tensors().values()]


ENTRIES: dict[str, Callable[[StudyFile, Session], list[Any]]] = {
    "windows": lambda _, context: [torch.from_numpy(each.ids) for each in context.windows.values()],
    "statistics": statistics,
    "gradient": of_prices,
    "sparse": lambda file, context: [*pruned_weights(context, plan_of(file, context)).values()],
}


def entry(folder: str, file: StudyFile) -> list[Any]:
    """What a folder would hold for a study."""
    with Session.open(setup_of(file)) as context, torch.inference_mode():
        return ENTRIES[folder](file, context)


def equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(same_bits(a.reshape(-1), b.reshape(-1)) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture
def place(tiny_place: Path, tmp_path: Path) -> Path:
    """The tiny study, with another model beside its own."""
    from safetensors.torch import load_file, save_file

    place = Path(shutil.copytree(tiny_place, tmp_path / "place"))
    shutil.copytree(place / "model", place / "other")
    weights = load_file(place / "other" / "model.safetensors")
    save_file(
        {name: 1.5 * tensor for name, tensor in weights.items()},
        place / "other" / "model.safetensors",
        {"format": "pt"},
    )
    return place


@slow
@parametrize("base", BASES)
def test_a_setting_changes_a_key_or_no_bit_of_the_entry(
    base: str, place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prune.gradient_at = "own"` gave refine = 1 and refine = 40 one descent."""
    keys, own = Keys(place, monkeypatch), (*PART, *BASES[base])
    first = keys.of(own)
    same: dict[str, list[str]] = {folder: [] for folder in MAKERS}
    for setting, value in CHANGES.items():
        if base != "rows" and not setting.startswith(OF_PRUNING):
            continue
        try:
            found = keys.of([*own, f"{setting}={value}"])
        except UserError as error:
            assert setting in REFUSED, error
            continue
        for folder in MAKERS:
            if found[folder] == first[folder]:
                same[folder].append(f"{setting}={value}")
    assert (base == "rows") == ("prune.refine=3" in same["gradient"])
    known = {folder: entry(folder, keys.file(own)) for folder in ENTRIES}

    def check(folder: str, overrides: list[str]) -> None:
        """That the entry stays as it is under all of them, or, where they do not go together, under each half."""
        try:
            together = keys.of([*own, *overrides])[folder]
        except UserError:
            together = None
        if together == first[folder]:
            shutil.rmtree(cache)
            assert equal(entry(folder, keys.file([*own, *overrides])), known[folder]), (folder, overrides)
            return
        assert len(overrides) > 1
        for half in (overrides[::2], overrides[1::2]):
            check(folder, half)

    for folder in known:
        check(folder, same[folder])


def test_a_key_is_made_of_all_its_ingredients_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, (number, names) in FOLDERS.items():
        given = {name: name for name in names if name != "versions"}
        made = {key(folder, **given)} | {key(folder, **{**given, name: "another"}) for name in given}
        monkeypatch.setitem(FOLDERS, folder, (number + 1, names))
        made.add(key(folder, **given))  # entries of the former format are not read
        assert len(made) == len(given) + 2
        for wrong in ({**given, "other": 1}, dict(list(given.items())[1:])):
            with pytest.raises(TypeError, match=f"{folder}: its key is of {names[0]}"):
                key(folder, **wrong)


@slow
def test_versions_and_formats_of_products_are_in_the_keys_and_threads_are_not(
    place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `recover` trained was taken by other versions, and on devices that multiply in another format."""
    keys, own = Keys(place, monkeypatch), BASES["rows"]
    first, known = keys.of(own), entry("gradient", keys.file(own))

    def changed() -> set[str]:
        found = keys.of(own)
        return {folder for folder in MAKERS if found[folder] != first[folder]}

    computed = {"statistics", "gradient", "recovered", "sparse"}
    with monkeypatch.context() as patch:
        patch.setattr(entries, "versions", lambda: {"torch": "another"})
        assert changed() == computed
    with monkeypatch.context() as patch:
        patch.setattr("atp_tune.folders.finetuning.find_dtype", lambda *_: torch.float16)  # as on another device
        assert changed() == {"recovered"}
    with torch.autocast("cpu", torch.bfloat16):
        assert changed() == computed
    torch.set_float32_matmul_precision("medium")
    try:
        assert changed() == computed
        with Session.open(setup_of(keys.file(own))) as context:
            assert context.contents()["model.products"] == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert changed() == set()
        shutil.rmtree(cache)
        ((other,),) = entry("gradient", keys.file(own))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(torch.tensor(other.linears), torch.tensor(known[0][0].linears), atol=1e-3)


@slow
def test_a_sparse_model_of_speedup_is_of_its_text_and_no_other_process_removes_it(
    tiny_done: Path, tmp_path: Path
) -> None:
    """The key had the name of the calibration text alone, and `speedup --study` removed what others read."""
    place = Path(shutil.copytree(tiny_done, tmp_path / "place"))
    config = read_config(place / "tiny.best.json")
    own: Any = config, None, Place(place, "cpu")
    first = find_pair(*own).sparse
    (place / "calibration.txt").write_text((place / "long.txt").read_text()[50_000:70_000])
    with passing_pair(config, own[2]) as passing:
        other = find_pair(*own)
        assert len({first, passing.sparse, other.sparse}) == 3
        weights = [folder / "model.safetensors" for folder in (first, passing.sparse, other.sparse)]
        assert weights[0].read_bytes() != weights[1].read_bytes() == weights[2].read_bytes()
    assert other.sparse.is_dir() and not passing.sparse.exists()
    with passing_pair(config, own[2]) as passing:
        assert passing.sparse == other.sparse
    assert other.sparse.is_dir()

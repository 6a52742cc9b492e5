"""Every test has a cache of its own, it and what it starts one thread; hypothesis and torch draw the same each time."""

import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from localhub import serve
from plugging import forgotten
from processes import scope

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU and little else: tests/gpu draws nothing
    settings = None
if TYPE_CHECKING:
    import optuna
    from pgserver import PostgreSQL
    from tinystudy import CommandLine

ROOM = 8 << 30  # bytes of memory that temporary files may take

if "TMPDIR" not in os.environ and (memory := Path("/dev/shm")).is_dir() and shutil.disk_usage(memory).free > ROOM:
    os.environ["TMPDIR"] = str(memory)  # else most of a tiny study's time is SQLite waiting for the disk
    tempfile.tempdir = None  # pytest has asked already
# Files whose slow tests take longest, each in one process: these first, or one is left over at the end. What computes
# and what waits for others alternate, so that there is always something to compute.
LONGEST = (
    "unchanged", "hostile_inputs", "ray", "smollm2", "workers", "faults", "slurm", "runner", "applying", "kills",
    "docs_run", "readme", "network", "termination", "database", "examples", "interval_studies", "site",
    "model_command", "api", "cli", "zeroshot", "finetuning", "example_plugins", "every_family",
)  # fmt: skip
# The run of the slow tests leaves out files whose text names none, the fast run those that are slow as a whole: to
# import them takes each process seconds.
MAY_BE_SLOW = re.compile(r"\bslow\b|\bfew\b")  # the mark, under whatever name, and `families.few`
IS_SLOW = re.compile(r"^pytestmark = \[?pytest\.mark\.slow\b", re.M)
MANY_MODULES = 100  # that tests have imported since; then they are frozen too
frozen = [0]  # modules when the imported was frozen
if settings is not None:
    settings.register_profile("repeatable", max_examples=25, derandomize=True, database=None, deadline=None)
    settings.load_profile("repeatable")
sys.dont_write_bytecode = False  # to rewrite the assertions of all files takes each process 5 s
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a script's `pytest &`: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # two that wait for each other on busy cores take two thirds more of them
os.environ.pop("COLUMNS", None)  # xdist sets it, and what the tests set themselves would count no more


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Processes and plug-ins of a test end with it, so that one that fails is one failure."""
    if len(sys.modules) > frozen[-1] + MANY_MODULES:
        freeze()
    with scope(), forgotten():
        yield


def freeze() -> None:
    """What is imported stays: the collector goes over it once, not each time that a command lets go of its model."""
    frozen.append(len(sys.modules))
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing is collected while all is imported."""
    gc.disable()
    result = yield
    freeze()
    gc.enable()
    return result


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a file has no test for this run; one that the command line names is looked at in any case."""
    is_named = any(collection_path == config.invocation_params.dir / word.partition("::")[0] for word in config.args)
    if is_named or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    has_none = {"slow": not MAY_BE_SLOW.search(text), "not slow and not gpu": bool(IS_SLOW.search(text))}
    return has_none.get(config.option.markexpr) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Hands out the longest files first; a slow test that the run of the slow ones would not see is an error."""
    files = {item.path for item in items if item.get_closest_marker("slow")}
    if unseen := sorted(file.name for file in files if not MAY_BE_SLOW.search(file.read_text(encoding="utf-8"))):
        raise pytest.UsageError(f"slow tests in files that do not name the mark: {', '.join(unseen)}")
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random models are the same in every run: a bound that holds for most of them would fail in one run of many."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Says at once what failed, in the process that prints: a run that is cut off says nothing at its end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        reasons = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        sys.stderr.write(f"\n{report.nodeid}, {report.when}: {' '.join(reasons[:3])[:500]}\n")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """What was frozen is freed at the end, or extensions complain of leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATP_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mixed(cache: Path) -> dict[str, list[str]]:
    """Documents of the kinds of `mixed`, other than the real ones, in the cache; a word has the kind."""
    from atp_tune.inputs.sources import PACKAGED

    made = {}
    for kind, packaged in PACKAGED.items():
        made[kind] = ["\n\n".join(f"{kind}ish {number}.{line} " * 9 for line in range(5)) for number in range(40)]
        (cache / "texts").mkdir(parents=True, exist_ok=True)
        (cache / "texts" / f"{packaged.content}.json").write_text(json.dumps(made[kind]))
    return made


@pytest.fixture
def without_warnings() -> Iterator[None]:
    """Optuna's storages and samplers say nothing of what is experimental."""
    from tinystudy import quiet

    with quiet():
        yield


@pytest.fixture
def quiet_optuna() -> Iterator[None]:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """The folder of a hub on this machine, and the paths it was asked for."""
    import datasets
    from huggingface_hub import constants

    root, cache = tmp_path / "hub", str(tmp_path / "hf")
    root.mkdir()
    with serve(root) as (url, asked):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", cache)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # of a test before, if that imported it
        yield root, asked


def made_once(name: str, make: Callable[[Path], object], factory: pytest.TempPathFactory) -> Path:
    """A folder that the first of all processes of this run makes, and all others wait for; to be read only."""
    from filelock import FileLock

    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (whole := folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its texts and the study tiny.toml; to be read only."""
    from tinystudy import make_place

    return made_once("tiny", lambda folder: make_place(folder / "tiny"), tmp_path_factory) / "tiny"


@pytest.fixture(scope="session")
def tiny_done(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a finished study of two pruners whose best is not uniform; to be read only."""
    from tinystudy import run

    def make(folder: Path) -> None:
        place = Path(shutil.copytree(tiny_place, folder / "tiny"))
        toml = (place / "tiny.toml").read_text().replace("trials = 3", "trials = 6\nseed = 2").replace("= 0.6", "= 0.5")
        tables = '\n[prune]\npruners = ["wanda", "magnitude"]\n\n[allocation]\nbeta = [0.0, 0.1]\n'
        (place / "tiny.toml").write_text(toml + tables)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATP_TUNE_CACHE", str(folder / "cache"))
            run(place)

    return made_once("done", make, tmp_path_factory) / "tiny"


@pytest.fixture(scope="session")
def tiny_sparse(tiny_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny study with the folder `sparse` that `apply` makes of it; to be read only."""
    from tinystudy import copied

    from atp_tune.config.best import read_config
    from atp_tune.events import Place
    from atp_tune.folders.applying import apply

    with copied(tiny_done, tmp_path_factory) as place:
        apply(read_config(place / "tiny.best.json"), place / "sparse", Place(place, "cpu"))
        return place


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the 135M model of `studies/smol.toml`, which is downloaded and converted once for all processes."""
    from atp_tune.checkpoints.models import resolve
    from atp_tune.config.studyfile import load

    def make(folder: Path) -> None:
        file = load("smol", ())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATP_TUNE_CACHE", str(folder))
            resolve(file.study.model, file.folder)

    return made_once("smollm2", make, tmp_path_factory)


@pytest.fixture(scope="session")
def long() -> "optuna.Study":
    """A made-up study of 500 trials, in memory: SQLite takes seconds to store them; to be read only."""
    from synthetic import long_study
    from tinystudy import quiet

    with quiet():
        return long_study(None, 500)


@pytest.fixture(scope="session")
def postgres() -> "Iterator[PostgreSQL]":
    """A PostgreSQL server for all tests."""
    from pgserver import running

    with running() as server:
        yield server


@pytest.fixture
def windows(tiny_done: Path, cache: Path) -> None:
    """A cache that knows the token windows of the tiny study."""
    shutil.copytree(tiny_done.parent / "cache" / "windows", cache / "windows")


@pytest.fixture
def place(tiny_place: Path, tmp_path: Path, windows: None) -> Path:
    """A copy of `tiny_place` for one test."""
    return Path(shutil.copytree(tiny_place, tmp_path / "tiny"))


@pytest.fixture
def done(tiny_done: Path, tmp_path: Path, windows: None) -> Path:
    """A copy of `tiny_done` for one test."""
    return Path(shutil.copytree(tiny_done, tmp_path / "done"))


@pytest.fixture
def sparse(tiny_sparse: Path, done: Path) -> Path:
    """The sparse folder of `done`, within it."""
    return Path(shutil.copytree(tiny_sparse / "sparse", done / "sparse"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> "CommandLine":
    from tinystudy import CommandLine

    return CommandLine(capsys, monkeypatch)

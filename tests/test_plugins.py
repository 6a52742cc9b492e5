"""Plug-ins: how they are named and found, who may run them, what they may not do, and what is recorded of them."""

import hashlib
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
import torch
from expect import parametrize, refusal, slow
from plans import planned
from plugging import forgotten
from pydantic import Field
from tinystudy import CommandLine
from torch import Tensor

from atp_tune import plugins
from atp_tune.allocations import ALLOCATIONS, Budget, CheckedAllocation, Shape, finished
from atp_tune.config.best import Config, read_config
from atp_tune.config.plugged import named_in, plug_in, plug_in_config, records
from atp_tune.config.prune import NLL_SHARES, PruneConfig
from atp_tune.config.search import SAMPLERS
from atp_tune.config.study import Study
from atp_tune.config.studyfile import from_settings, load, study_text
from atp_tune.config.studyfile import settings as settings_of
from atp_tune.errors import PluginError
from atp_tune.inputs.sources import documents
from atp_tune.pruners import PRUNERS, make_pruner
from atp_tune.pruners.selection import CheckedPruner
from atp_tune.pruners.statistics import InputNorms
from atp_tune.scores import SCORES
from atp_tune.search.samplers import make_sampler
from atp_tune.search.space import make_space
from atp_tune.storage.fingerprint import facts
from atp_tune.utils.registry import STORED, Origin, SettingsTable, entry_points_by_name

GUIDE = Path(__file__).parents[1] / "docs" / "plugins.md"
GOLDEN = Path(__file__).parent / "golden" / "config.json"
STUDY = """
sparsity = 0.6
[model]
source = "org/model"
[texts]
calibration = {{ source = "c4" }}
validation = {{ source = "wikitext2", split = "validation" }}
test = {{ source = "wikitext2", split = "test" }}
[search]
trials = 5
{search}
[prune]
{prune}
[allocation]
{allocation}
"""
PRUNER = '''\
from typing import ClassVar
from pydantic import Field
from atp_tune import SettingsTable
from atp_tune.plugins import pruner
from atp_tune.pruners.selection import lowest_in_matrix, zeroed


@pruner("mine")
class Mine(SettingsTable):
    """Zeroes what is small. It has a setting."""

    strength: float = Field(2.0, gt=0, description="how strong")
    group: int | None = None
    measures: ClassVar = None

    def prune(self, weight, sparsity, statistics):
        return zeroed(weight, lowest_in_matrix(weight.float().abs() ** self.strength, sparsity, self.group))
'''
MARKED = "from pathlib import Path\nPath({marker!r}).touch()\n" + PRUNER
ALLOCATION = '''\
class Flat:
    """Half of the blocks a little more."""

    def bounds(self, budget):
        return {"tilt": (0.0, 0.1)}

    def sparsities(self, budget, tilt):
        return [budget.target] * len(budget.sizes)
'''
SHAPE = Shape(3, 4, attention=False)
BUDGET = Budget(0.5, (24, 24), ((SHAPE, SHAPE),) * 2)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a study file, beside a pruner and an allocation."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(PRUNER)
    (tmp_path / "own" / "flat.py").write_text(ALLOCATION)

    def written(prune: str = 'pruners = ["wanda", "own/mine.py:Mine"]', allocation: str = "", search: str = "") -> Path:
        path = tmp_path / "s.toml"
        path.write_text(STUDY.format(prune=prune, allocation=allocation, search=search))
        return path

    return written


# Names


def test_reading_a_study_runs_no_plug_in(write: Callable[..., Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write('pruners = ["wanda", "own/mine.py:Mine"]\nmine = { strength = 3 }', 'names = ["own/flat.py:Flat"]')
    (tmp_path / "own" / "mine.py").write_text(MARKED.format(marker=str(marker)))
    file = load(str(path))
    assert file.study.prune.short_names == ("wanda", "mine")
    assert file.study.prune.settings("mine") == {"strength": 3, "group": None}
    assert file.study.allocation.short_names == ("flat",)
    assert facts(file.study, file.folder)["prune.pruners"] == ["wanda", "mine"]
    assert from_settings(settings_of(file)).study == file.study
    assert tomllib.loads(study_text(file.study, ()))["prune"]["mine"] == {"strength": 3}
    assert Study.model_validate(tomllib.loads(study_text(file.study, ()))) == file.study
    assert not marker.exists()
    assert refusal(load, str(path), plugins=False) == (
        f"{path}: prune.pruners: own/mine.py:Mine is Python code, which is not run; read it, then allow it with "
        "--trust-plugins"
    )
    assert not marker.exists()
    assert load(str(path), plugins=True).trusts_plugins
    assert marker.exists()


@parametrize(
    ("key", "names", "said"),
    [
        ("prune", ["x.py:Wanda"],
         "prune.pruners: x.py:Wanda has the name of the built-in pruner wanda; rename the plug-in"),
        ("prune", ["x.py:Mine", "y.py:mine"],
         "prune.pruners: x.py:Mine and y.py:mine are both called mine; rename one of the plug-ins"),
        ("prune", ["x.py:Mine", "x.py:Mine"], 'prune.pruners: holds "x.py:Mine" 2 times'),
        ("prune", ["mine"], "prune.pruners[0]: must be one of magnitude, wanda, sparsegpt, dsnot, alps, got \"mine\""),
        ("allocation", ["x.py:OWL"],
         "allocation.names: x.py:OWL has the name of the built-in allocation owl; rename the plug-in"),
    ],
)  # fmt: skip
def test_names_that_are_refused(key: str, names: list[str], said: str, write: Callable[..., Path]) -> None:
    path = write(**{key: f"{'pruners' if key == 'prune' else 'names'} = {json.dumps(names)}"})
    assert refusal(load, str(path)) == f"{path}: {said}"


def test_two_kinds_cannot_share_a_name(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "own" / "flat.py").write_text(ALLOCATION.replace("Flat", "Mine"))
    path = write(allocation='names = ["own/flat.py:Mine"]')
    assert refusal(load, str(path), plugins=True) == (
        f"{path}: allocation.names: own/mine.py:Mine, in prune.pruners, and own/flat.py:Mine are both called mine; "
        "rename one of the plug-ins"
    )


# Settings


@parametrize(
    ("override", "said"),
    [
        ("prune.mine.strength=0", "prune.mine.strength: must be greater than 0, got 0"),
        ("prune.mine.strength=true", "prune.mine.strength: must be a number, got true"),
        ("prune.mine.strenght=1", "prune.mine.strenght: unknown key; did you mean prune.mine.strength?"),
        ("prune.mine.group=4", "prune.mine.group: unknown key; known here are strength"),
        ("prune.mine=3", "prune.mine: is not valid, got 3"),
        ("prune.other.strength=1", "prune.other: unknown key; known here are pruners, "),
        ("prune.magnitude.x=1", "prune.magnitude: unknown key; known here are pruners, "),
        ("prune.mine.wanda=1", "prune.mine.wanda: unknown key; did you mean prune.wanda?"),
    ],
)
def test_settings_are_checked_like_all_keys(override: str, said: str, write: Callable[..., Path]) -> None:
    path = write()
    assert refusal(load, str(path), [override], plugins=True).startswith(f"{path} with --set {override}: {said}")


# Facts


def test_the_content_is_a_fact_and_the_folder_is_not(write: Callable[..., Path], tmp_path: Path) -> None:
    file = load(str(write()), plugins=True)
    here = facts(file.study, file.folder)
    assert here["plugins.mine.content"] == hashlib.sha256(PRUNER.encode()).hexdigest()
    (tmp_path / "own").rename(tmp_path / "moved")
    moved = load(str(write_moved(tmp_path)), plugins=True)
    assert facts(moved.study, moved.folder) == here
    with (tmp_path / "moved" / "mine.py").open("a") as stream:
        stream.write("# changed\n")
    unread = load(str(tmp_path / "s.toml"))
    assert facts(unread.study, unread.folder)["plugins.mine.content"] == here["plugins.mine.content"]  # what has run
    again = load(str(tmp_path / "s.toml"), plugins=True)
    assert facts(again.study, again.folder)["plugins.mine.content"] != here["plugins.mine.content"]
    assert records(again.study, again.folder)["mine"]["place"] == "moved/mine.py:Mine"


def write_moved(folder: Path) -> Path:
    path = folder / "s.toml"
    path.write_text(path.read_text().replace("own/mine.py", "moved/mine.py"))
    return path


# Files that cannot be run


@parametrize(
    ("code", "place", "said"),
    [
        ("x = (", "x.py:Mine", "line 1: SyntaxError: '(' was never closed"),
        ("import torch\nimport no_such_module", "x.py:Mine", "line 2: ModuleNotFoundError: No module named"),
        ("1 / 0", "x.py:Mine", "line 1: ZeroDivisionError: division by zero"),
        (PRUNER, "x.py:Mien", "has no pruner Mien; did you mean mine?"),
        ("y = 1", "x.py:Mine", "has no pruner Mine"),
        (
            "mine = 3",
            "x.py:mine",
            "is no pruner: must be a class that inherits from atp_tune.SettingsTable",
        ),
        (PRUNER.replace("def prune", "def other"), "x.py:Mine", "is no pruner: has no method prune"),
        (PRUNER.replace("    measures: ClassVar = None\n", ""), "x.py:Mine", "has no class variable measures"),
        (
            PRUNER.replace("ClassVar = None", "ClassVar = 3"),
            "x.py:Mine",
            "measures must be None or a class of statistics",
        ),
        (PRUNER.replace("Field(2.0, ", "Field("), "x.py:Mine", "its setting strength needs a default"),
    ],
)
def test_a_file_that_is_no_pruner(code: str, place: str, said: str, write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(code)
    found = refusal(load, str(write(f'pruners = ["{place}"]')), plugins=True)
    assert said in found and "x.py" in found


@parametrize("place", ["no.py:Mine", "own:Mine", "own.no_such:Mine", "~nobody/x.py:Mine", "own/mine.py/x.py:Mine"])
def test_a_file_that_is_not_there(place: str, write: Callable[..., Path]) -> None:
    found = refusal(load, str(write(f'pruners = ["{place}"]')), plugins=True)
    assert place.partition(":")[0].split("/")[0] in found


def test_an_installed_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]) -> None:
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "__init__.py").touch()
    (tmp_path / "own_pack" / "rule.py").write_text(PRUNER)
    monkeypatch.syspath_prepend(tmp_path)
    path = write('pruners = ["own_pack.rule:Mine"]')
    assert "is Python code, which is not run" in refusal(load, str(path), plugins=False)
    file = load(str(path), plugins=True)
    assert facts(file.study)["plugins.mine.content"] == hashlib.sha256(PRUNER.encode()).hexdigest()
    assert load(str(path), plugins=True).study == file.study


# Decorators


class Zero(SettingsTable):
    """Zeroes the first inputs of each row."""

    measures: ClassVar = None

    def prune(self, weight: Tensor, sparsity: float, statistics: Any) -> Tensor:
        weight[:, : int(weight.shape[1] * sparsity)] = 0
        return weight


def test_a_decorator_registers_for_the_process(write: Callable[..., Path]) -> None:
    assert plugins.pruner("zero")(Zero) is Zero
    assert plugins.pruner("zero")(Zero) is Zero  # as a cell of a notebook that runs twice
    assert PRUNERS["zero"] is Zero and "zero" in PRUNERS and list(PRUNERS)[-1] == "zero"
    origin = PRUNERS.origin("zero")
    assert origin is not None and origin.file == Path(__file__) and origin.via == "decorator"
    file = load(str(write('pruners = ["zero"]')), plugins=False)  # it needs no permission
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert facts(file.study)["plugins.zero.content"] == digest
    assert PruneConfig(pruners=("zero",)).short_names == ("zero",)
    assert records(file.study, Path(__file__).parent)["zero"] == {
        "kind": "pruner", "place": "test_plugins.py:zero", "sha256": digest,
    }  # fmt: skip


@parametrize(
    ("decorate", "said"),
    [
        (lambda: plugins.pruner("wanda")(Zero), "there is a built-in pruner wanda; choose another name"),
        (lambda: plugins.pruner("Zero"), 'the pruner "Zero": its name must be of lower-case letters'),
        (lambda: plugins.allocation("zero")(Zero), "is no allocation: has no method sparsities"),
        (lambda: plugins.sampler("zero")(Zero()), "is no sampler: must be a function from a seed"),
        (lambda: plugins.text_source("zero")(Zero), "is no source of texts: must be a function"),
        (lambda: plugins.score("zero")(Zero), "is no score: has no method probes"),
    ],
)
def test_what_decorators_refuse(decorate: Callable[[], Any], said: str) -> None:
    assert said in refusal(decorate)


def in_a_notebook(code: str) -> str:
    """The hash of the code of a cell, which has no file."""
    exec(compile(code, "<cell>", "exec"), {"__name__": "own_notebook"})
    origin = PRUNERS.origin("mine")
    assert origin is not None and origin.file is None and str(origin) == "pruner mine (own_notebook:Mine)"
    return origin.sha256


def test_a_cell_of_a_notebook() -> None:
    first = in_a_notebook(PRUNER)
    assert in_a_notebook(f"# {PRUNER}".replace("# from", "#\nfrom", 1)) == first
    assert in_a_notebook(PRUNER.replace("Field(2.0", "Field(2.5")) != first
    assert in_a_notebook(PRUNER.replace("sparsity, self", "sparsity / 2, self")) != first


REACHED = """
from functools import partial
from types import MethodType
from typing import ClassVar
import torch
from pydantic import PrivateAttr
from atp_tune import SettingsTable
def power(x, p=1): return x ** p
def scaled(): return lambda x: x * kept
kept, part, used = 1, partial(power, p=1), [1]
def made(cell=1):
    class Mine(SettingsTable):
        measures: ClassVar = None
        POWER: ClassVar = 1
        _hidden: int = PrivateAttr(1)
        def prune(self, weight, sparsity, statistics, sign=1, *, add=1):
            try:
                return part(weight) * cell + scaled()(used[0]) + torch.topk(weight, 1)
            finally:
                self.clean()
        @staticmethod
        def clean(): return 1
        @property
        def half(self): return 1
    return Mine
def bound(self): return 1
Mine = made()
Mine.also = MethodType(bound, 1)
"""
VALUES = (
    "p=1)", "kept, part, used = 1", "p=1), [", "[1]", "cell=1", "POWER: ClassVar = 1", "PrivateAttr(1", "sign=1",
    "add=1", "clean(): return 1", "half(self): return 1", "x ** p",
    "bound(self): return 1",
)  # fmt: skip


@parametrize("value", VALUES)
def test_a_plug_in_without_a_file_is_all_that_it_can_reach(value: str) -> None:
    """Class attributes, defaults, closures and the values of names were left out, so that other code had one hash."""

    def content(code: str) -> str:
        own: dict[str, Any] = {"__name__": "own_notebook"}
        exec(compile(code, "<cell>", "exec"), own)
        return plugins.content_of_object(own["Mine"])

    assert value in REACHED
    other = value.replace("1", "2").replace("**", "//")
    assert content(REACHED) == content(f"# again\n{REACHED}") != content(REACHED.replace(value, other, 1))


def test_a_pruner_is_named_with_settings_that_its_own_repr_hides() -> None:
    """The key of what it makes of the weights had the plug-in's own `repr`."""

    class Mute(SettingsTable):
        measures: ClassVar = None
        strength: float = Field(1.0, repr=False)

        def prune(self, weight: Tensor, sparsity: float, statistics: Any) -> Tensor:
            return weight

    origin = Origin("pruner", "mute", "file", "mute.py:Mute", None, "0" * 64)
    one, same, other = (CheckedPruner.of(Mute, origin, {"strength": value}) for value in (1.0, 1.0, 2.0))
    assert repr(one) == repr(same) != repr(other)


def test_what_cannot_be_known_is_another_object_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(__file__).open() as stream:
        first = plugins.content_of_object([stream])
        assert plugins.content_of_object([stream]) == first
        monkeypatch.setattr(plugins, "_PROCESS", "another")
        assert plugins.content_of_object([stream]) != first


def test_a_name_of_a_decorator_is_unknown_elsewhere(write: Callable[..., Path]) -> None:
    """In a worker, or to the command line: what is stored is read all the same."""
    plugins.pruner("zero")(Zero)
    file = load(str(write('pruners = ["zero"]')), plugins=False)
    kept = settings_of(file)
    with forgotten():
        PRUNERS._added.clear()
        assert from_settings(kept).study.prune.short_names == ("zero",)
        assert refusal(plug_in, file.study, file.folder, True) == (
            "prune.pruners: no pruner zero is known in this process; install its package, or name it as FILE.py:NAME"
        )


# Entry points


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a package with entry points, `group` → lines."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(name: str, code: str, **groups: str) -> None:
        site = tmp_path / "site"
        info = site / f"own_{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: own-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "".join(f"[atp_tune.{group}]\n{lines}\n" for group, lines in groups.items())
        )
        (site / f"own_{name}.py").write_text(code)
        entry_points_by_name.cache_clear()

    return install


def test_an_entry_point(package: Callable[..., None], write: Callable[..., Path], command: CommandLine) -> None:
    package(
        "pack",
        PRUNER.replace("@pruner", "#") + ALLOCATION,
        pruners="packed = own_pack:Mine",
        allocations="even = own_pack:Flat",
    )
    assert "packed" in PRUNERS and "own_pack" not in sys.modules
    path = write('pruners = ["packed"]\npacked = { strength = 3 }', 'names = ["even"]')
    assert load(str(path)).study.prune.short_names == ("packed",) and "own_pack" not in sys.modules
    file = load(str(path), plugins=False)  # it needs no permission: the package was installed
    assert PRUNERS["packed"].__name__ == "Mine"
    assert {"plugins.packed.content", "plugins.even.content"} <= facts(file.study).keys()
    assert records(file.study, file.folder)["even"]["place"] == "own_pack:Flat"
    listed = json.loads(command("plugins", "--json").out)
    found = {(row["kind"], row["name"]): row for row in listed}
    row = found["pruner", "packed"]
    assert (row["origin"], row["about"]) == ("entry point of own-pack", "Zeroes what is small")
    assert row["settings"] == [{"name": "strength", "type": "number > 0", "default": 2.0, "description": "how strong"}]
    assert found["allocation", "even"]["parameters"] == {"tilt": [0.0, 0.1]}
    assert {name for kind, name in found if kind == "pruner"} == {*PRUNERS}


def test_entry_points_that_clash(package: Callable[..., None], write: Callable[..., Path]) -> None:
    package("pack", PRUNER, pruners="wanda = own_pack:Mine")
    said = "pruner wanda, of the package own-pack: is built in; uninstall one of the packages"
    assert said in refusal(load, str(write()), plugins=True)
    assert load(str(write('pruners = ["wanda"]'))).study.prune.pruners == ("wanda",)


def test_an_entry_point_that_cannot_be_imported(package: Callable[..., None]) -> None:
    package("pack", "1 / 0", pruners="packed = own_pack:Mine")
    assert refusal(lambda: PRUNERS["packed"]) == (
        "pruner packed, of the package own-pack: own_pack:Mine: ZeroDivisionError: division by zero"
    )


# What a pruner may not do


WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def pruner(body: str, tmp_path: Path, group: int | None = None) -> Any:
    """A pruner with this body of `prune`."""
    code = PRUNER[: PRUNER.index("        return zeroed")] + f"        {body}\n"
    (tmp_path / "bad.py").write_text(f"import torch\n{code}")
    plugins.load("pruner", "bad.py:Mine", tmp_path, "prune.pruners")
    return make_pruner("mine", {"group": group})


@parametrize(
    ("body", "said"),
    [
        ("return weight[:, :3]", "prune returned a weight of shape (6, 3) for one of (6, 8)"),
        ("return weight.double() * 0", "prune returned a weight of dtype torch.float64 for one of torch.float32"),
        ("return weight * float('nan')", "prune returned a weight with NaN or infinity"),
        ("return None", "prune returned NoneType, not a tensor"),
        ("return weight", "prune left 0 zeros of 48 weights at sparsity 0.5, where there must be 24"),
        ("return weight * 0", "prune left 48 zeros of 48 weights at sparsity 0.5, where there must be 24"),
        ("return weight @ weight", "prune at sparsity 0.5: line 18: RuntimeError: "),
        ("raise KeyError('x')", "prune at sparsity 0.5: line 18: KeyError: 'x'"),
    ],
)
def test_a_pruner_that_breaks_the_rules(body: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        pruner(body, tmp_path).prune(WEIGHT, 0.5, None)
    assert str(caught.value).startswith(f"pruner mine ({tmp_path}/bad.py): {said}")


@parametrize("sparsity", [0.0, 0.29, 0.3, 0.5, 0.999, 1.0])
@parametrize("count", [math.floor, math.ceil])
def test_a_pruner_may_round_either_way(count: Callable[[float], int], sparsity: float, tmp_path: Path) -> None:
    found = pruner(f"weight[:, :{count(8 * sparsity)}] = 0; return weight", tmp_path).prune(WEIGHT, sparsity, None)
    assert int((found == 0).sum()) == 6 * count(8 * sparsity)


def test_groups(tmp_path: Path) -> None:
    half = pruner("weight[:, ::2] = 0; return weight", tmp_path, group=4)
    assert int((half.prune(WEIGHT, 0.5, None) == 0).sum()) == 24
    assert "left 0 zeros in a group of 4 at sparsity 0.5, where there must be 2" in refusal(
        pruner("weight[:, :4] = 0; return weight", tmp_path, group=4).prune, WEIGHT, 0.5, None
    )
    more = pruner("weight[:, :7] = 0; return weight", tmp_path, group=4)
    assert "left 42 zeros at sparsity 0.5, where there must be 24 at most" in refusal(more.prune, WEIGHT, 0.5, None)
    plugins.pruner("zero")(Zero)
    assert "makes no patterns, having no field group" in refusal(make_pruner, "zero", {"group": 4})
    assert int((make_pruner("zero", {"group": None}).prune(WEIGHT, 0.5, None) == 0).sum()) == 24


# What an allocation may not do


def flat(**methods: Any) -> CheckedAllocation:
    own = {"sparsities": lambda self, budget, **values: [budget.target] * 2} | methods
    origin = Origin("allocation", "flat", "file", "flat.py:Flat", Path("/x/flat.py"), "0" * 64)
    return finished(type("Flat", (), own), origin)


@parametrize(
    ("found", "said"),
    [
        ([0.5], "returned 1 values, where there must be 2, one per block"),
        ([0.5, 0.5, 0.5], "returned 3 values, where there must be 2, one per block"),
        ([[0.5], [0.5]], "returned 2 values, where there must be one row per block, of one value per linear"),
        ([[0.5, 0.5], 0.5], "line"),
        ([0.4, 1.2], "returned 1.2, which is no sparsity in [0, 1]"),
        ([-0.1, 1.1], "returned -0.1, which is no sparsity in [0, 1]"),
        ([math.nan, 0.5], "returned nan, which is no sparsity in [0, 1]"),
        (["a", 0.5], "returned 'a', which is no sparsity in [0, 1]"),
        ([0.4, 0.5], "returned a mean of 0.45 by size, the target is 0.5"),
        (None, "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_an_allocation_that_breaks_the_rules(found: Any, said: str) -> None:
    with pytest.raises(PluginError) as caught:
        flat(sparsities=lambda self, budget: found).sparsities(BUDGET)
    assert str(caught.value).startswith("allocation flat (/x/flat.py): sparsities")
    assert said in str(caught.value) or said == "line"


@parametrize(
    ("found", "said"),
    [
        ({"a": (1.0, 0.0)}, "bounds gave a the interval (1.0, 0.0)"),
        ({"a": (0.0, math.inf)}, "bounds gave a the interval (0.0, inf)"),
        ({"a": 3}, "bounds: TypeError"),
        ({"pruner": (0, 1)}, "bounds names a parameter 'pruner'; choose another name"),
        ({"a b": (0, 1)}, "bounds names a parameter 'a b'; choose another name"),
        ({"beta": (0, 1)}, "bounds names a parameter beta, which is the progression of atp; choose another name"),
        ([("a", 0, 1)], "bounds returned"),
    ],
)
def test_bounds_that_are_refused(found: Any, said: str) -> None:
    assert refusal(lambda: flat(bounds=lambda self, budget: found).bounds(BUDGET)).startswith(
        f"allocation flat (/x/flat.py): {said}"
    )


def test_the_search_space_of_plug_ins(write: Callable[..., Path]) -> None:
    path = write(allocation='names = ["own/flat.py:Flat"]')
    space = make_space(load(str(path), plugins=True).study, BUDGET)
    assert space.pruners == ("wanda", "mine")
    assert space.intervals == {"uniform": {}, "flat": {"tilt": (0.0, 0.1)}}
    assert space.starts()[0] == {"pruner": "wanda", "allocation": "flat", "tilt": 0.05}
    assert space.within(space.uniform()[0], "flat") is None  # it does not say that it contains uniform
    (path.parent / "own" / "flat.py").write_text(f"{ALLOCATION}\n    contains = ('uniform',)\n")
    both = make_space(load(str(path), ['allocation=["atp", "own/flat.py:Flat"]'], plugins=True).study, BUDGET)
    assert both.uniform()[1] == {"pruner": "mine", "allocation": "atp", "beta": 0.0}
    assert both.within(both.uniform()[1], "flat") == {"pruner": "mine", "allocation": "flat", "tilt": 0.0}
    assert both.within({**both.uniform()[1], "beta": 0.1}, "flat") is None
    assert space.plan({"pruner": "mine", "allocation": "flat", "tilt": 0.0}).is_uniform
    assert not planned("mine", "flat", (0.4, 0.6), {"tilt": 0.0}).is_uniform


def test_a_sampler(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(
        "import optuna\n\n\ndef make(seed):\n    return optuna.samplers.RandomSampler(seed=seed)\n\n\n"
        "def none(seed):\n    return seed\n\n\nclass Far(optuna.samplers.RandomSampler):\n"
        "    def sample_independent(self, study, trial, name, kind):\n        return 7.0\n"
    )
    study = optuna.create_study()
    kind = optuna.distributions.FloatDistribution(0, 1)
    for name in ("make", "none", "far"):
        plugins.load("sampler", f"s.py:{'Far' if name == 'far' else name}", tmp_path, "search.sampler")
    draws = [SAMPLERS["make"](seed).sample_independent(study, study.ask(), "x", kind) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert "made int, not an Optuna sampler" in refusal(lambda: SAMPLERS["none"](1))
    assert "proposed x = 7.0, which is outside FloatDistribution" in refusal(
        lambda: SAMPLERS["far"](1).sample_independent(study, study.ask(), "x", kind)
    )


def test_a_score(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(
        "from atp_tune.scores.next_token import NextToken\n\n\n"
        "class Short(NextToken):\n    def items(self, replay, batch, hidden, dense):\n"
        '        return {"nlls": [1.0]}\n'
    )
    plugins.load("score", "s.py:Short", tmp_path, "search.score")
    said = "items returned 1 nlls, where there must be 2 nlls"
    assert said in refusal(lambda: SCORES["short"].items(None, None, torch.ones(2, 3, 4), None))
    assert SCORES["short"].items(None, None, torch.ones(1, 3, 4), None)["nlls"] == [1.0]


# Samplers, texts and scores


@parametrize(
    ("takes", "of_kl", "of_both"),
    [
        ("dense=None, share=0.5", ["dense", "share"], ["dense", "share"]),
        ("**more", ["dense", "share"], ["dense", "share"]),
        ("dense=None", "share", ["dense"]),
        ("share=0.5", "dense", ["share"]),
        ("own=1", "dense", []),
    ],
)
def test_the_loss_of_a_score(takes: str, of_kl: str | list[str], of_both: list[str], tmp_path: Path) -> None:
    """`prune.loss` was ignored where `gradient` cannot follow it; the NLL alone, of `gradient` too, has no `dense`."""
    (tmp_path / "s.py").write_text(
        "from atp_tune.scores.next_token import NextToken\n\n\nclass Own(NextToken):\n"
        f"    def gradient(self, replay, batch, hidden, {takes}):\n"
        "        given = locals()\n        given.update(given.get('more', {}))\n"
        "        self.given = [name for name in ('dense', 'share') if name in given]\n        return hidden\n"
    )
    plugins.load("score", "s.py:Own", tmp_path, "search.score")
    own, hidden = SCORES["own"], torch.ones(2, 3, 4)
    if isinstance(of_kl, str):
        said = f"gradient takes no {of_kl}, which prune.loss needs; add it, or leave prune.loss out"
        assert said in refusal(own.gradient, None, None, hidden, hidden, NLL_SHARES["kl"])
    else:
        own.gradient(None, None, hidden, hidden, NLL_SHARES["kl"])
        assert own._plugin.given == of_kl
    for dense, loss in ((hidden, "both"), (None, "next-token")):
        own.gradient(None, None, hidden, dense, NLL_SHARES[loss])
        assert own._plugin.given == of_both


def test_all_kinds_in_one_study(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("s", "t"):
        (tmp_path / f"{name}.py").write_text("def one(*given):\n    return given\n\n\ntwo = one\n")
    file = load(str(write(search='sampler = "s.py:one"')), ['texts.test.source="t.py:two:x"'], plugins=True)
    assert [(named.kind, named.short) for named in named_in(file.study)] == [
        ("pruner", "mine"), ("sampler", "one"), ("source of texts", "two"),
    ]  # fmt: skip
    found = facts(file.study, file.folder)
    assert (found["search.sampler"], found["texts.test.source"]) == ("one", "two:x")
    assert "search.score" not in found
    space = make_space(file.study, BUDGET)
    assert make_sampler(file.study.search, space).make is SAMPLERS["one"]  # type: ignore[attr-defined]


# Configurations


def configured(**changes: Any) -> dict[str, Any]:
    ref = {"kind": "pruner", "place": "own/mine.py:Mine", "sha256": hashlib.sha256(PRUNER.encode()).hexdigest()}
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return {**content, "plan": {**content["plan"], "method": "mine"}, "plugins": {"mine": ref}, **changes}


def test_a_configuration_names_its_plug_ins(write: Callable[..., Path], tmp_path: Path) -> None:
    write()
    (tmp_path / "best.json").write_text(json.dumps(configured()))
    read = read_config(tmp_path / "best.json")
    assert Config.model_validate_json(read.to_json(), context=STORED) == read
    assert "is not run" in refusal(plug_in_config, read, {}, tmp_path, False)
    plug_in_config(read, {}, tmp_path, True)
    assert make_pruner("mine", read.prune.settings("mine")).group is None
    with (tmp_path / "own" / "mine.py").open("a") as stream:
        stream.write("# changed\n")
    assert refusal(plug_in_config, read, {}, tmp_path, True).startswith(
        f"plugins.mine.sha256: {tmp_path}/own/mine.py is "
    )
    (tmp_path / "own" / "mine.py").unlink()
    assert "there is no file" in refusal(plug_in_config, read, {}, tmp_path, True)


@parametrize(
    ("changes", "said"),
    [
        ({"plugins": {}}, "plan.method: Input should be 'magnitude', "),
        (
            {"plan": {"method": "wanda", "allocation": "mine", "levels": [0.5]}},
            "plan.allocation: Input should be 'uniform', ",
        ),
        (
            {"plan": {"method": "wanda", "allocation": "atp", "levels": [0.5]}, "score": "other"},
            "score: Input should be 'next-token'",
        ),
        (
            {"plugins": {"mine": {"kind": "pruner", "place": "x", "sha256": "0" * 64}}},
            "plugins.mine.place: Value error, must",
        ),
        ({"plugins": {"mine": {"kind": "pruner", "place": "x.py:Y", "sha256": "0"}}}, "plugins.mine.sha256: "),
    ],
)
def test_a_configuration_of_what_it_does_not_describe(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(json.dumps(configured(**changes)))
    assert refusal(read_config, tmp_path / "best.json").startswith(f"{tmp_path}/best.json: {said}")


# The guide


def blocks(language: str) -> list[str]:
    text = GUIDE.read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_code_of_the_guide_runs(tmp_path: Path, package: Callable[..., None]) -> None:
    (tmp_path / "own.py").write_text("\n".join(blocks("python")))
    (tmp_path / "calibration.txt").write_text("one\ntwo\n")
    keys, points = map(tomllib.loads, blocks("toml"))
    study = tomllib.loads(STUDY.format(prune="", allocation="", search=""))
    study |= {key: keys[key] for key in ("prune", "allocation")}
    study["texts"]["calibration"] = keys["texts"]["calibration"]
    found = plug_in(Study.model_validate(study), tmp_path, trusted=True)
    assert found.prune.settings("soft") == {"power": 0.4, "group": None}
    assert documents(found.texts.calibration, tmp_path) == ["one", "two"]
    statistics = InputNorms(8, torch.device("cpu"))
    statistics.add(torch.ones(3, 8))
    assert int((make_pruner("soft", found.prune.settings("soft")).prune(WEIGHT, 0.5, statistics) == 0).sum()) == 24
    assert ALLOCATIONS["steps"].sparsities(BUDGET, height=0.2) == pytest.approx((0.4, 0.6))
    for group in points["project"]["entry-points"]:
        assert group in {known._group for known in map(plugins.registry, plugins.REGISTRIES)}
    named = re.findall(r"`(atp_tune\.\w+)`", GUIDE.read_text().partition("The groups are")[2])[:5]
    assert sorted(named) == sorted(known._group for known in map(plugins.registry, plugins.REGISTRIES))


def test_the_command_lists_files_with_permission(
    write: Callable[..., Path], command: CommandLine, tmp_path: Path
) -> None:
    path, file = write(), tmp_path / "own" / "mine.py"
    assert command("plugins", file).error == (
        f"{file}: is Python code, which is not run; read it, then allow it with --trust-plugins"
    )
    for words in ((file,), ("--study", path)):
        said = command("plugins", *words, "--trust-plugins").out
        assert f"  mine       Zeroes what is small ({file})" in said
        assert "    strength = 2.0, number > 0: how strong" in said


# Elsewhere


# A study of plug-ins that break the rules


@slow
def test_a_mended_file_goes_on_as_long_as_nothing_is_measured(place: Path, command: CommandLine) -> None:
    """The loop in which a plug-in is written: its first trial fails, the file is mended, the same command again."""
    head = (
        "from typing import ClassVar\nfrom atp_tune import SettingsTable\nfrom atp_tune.plugins import pruner\n"
        "@pruner('mended')\nclass Mended(SettingsTable):\n    measures: ClassVar = None\n"
        "    def prune(self, weight, sparsity, _):\n"
    )
    wrong, right = (
        "        return weight[:1]\n",
        "        weight[:, : int(sparsity * weight.shape[1])] = 0\n        return weight\n",
    )
    words = ("--study", place / "tiny.toml", "--set", 'prune.pruners=["own.py:mended"]', "--trust-plugins")
    (place / "own.py").write_text(head + wrong)
    assert "returned a weight of shape" in command(*words).error
    (place / "own.py").write_text(head + right)
    command.ok(*words)
    with (place / "own.py").open("a") as stream:
        stream.write("# changed\n")
    assert "plugins.mended.content is " in command(*words).error

"""What the modules of the package may import, and how their code is written: read from the source, not run."""

import ast
import importlib
import importlib.machinery
import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from expect import parametrize, slow
from processes import output

import atp_tune

ROOT = Path(atp_tune.__file__).parent
REPO = ROOT.parent
LONGEST = 60  # lines of a function's body
LARGEST = 640  # lines of a file
COPIED = {"atp_tune.packed.modeling_atp_sparse": 812}  # one file, since each packed and slim folder has a copy of it

# The packages and modules of atp_tune, each above all that it may import. The only place where the order is written.
LAYERS = [
    "errors",
    "utils",
    "plugins",
    "measures",
    "metrics",
    "allocations",
    "pruners",
    "packed",
    "plan",
    "config",
    "events",
    "storage",
    "checkpoints",
    "inputs",
    "blocks",
    "scores",
    "run",
    "results",
    "search",
    "report",
    "folders",
    "cost",
    "api",
    "cli",
    "__main__",
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = ["atp_tune", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 30
    for name in (
        "atp_tune",
        "atp_tune.search.objective",
        "atp_tune.pruners",
        "atp_tune.pruners.wanda",
        "atp_tune.cli.tune",
    ):
        assert name in FILES


# Imports


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: also in `if` and `try` and class bodies, not in functions or TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.Lambda) or (isinstance(node, ast.stmt) and is_type_checking(node)):
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting += ast.iter_child_nodes(node)


def imported(nodes: Iterator[ast.AST], module: str) -> set[str]:
    """Full names of modules that import statements name; `from a import b` names `a` and, if it is one, `a.b`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in FILES}
    return found


@cache
def anywhere() -> dict[str, set[str]]:
    return {name: imported(ast.walk(tree), name) for name, tree in trees().items()}


@cache
def on_import() -> dict[str, set[str]]:
    return {name: imported(top_level(tree), name) for name, tree in trees().items()}


def with_parents(name: str) -> set[str]:
    """Importing a.b.c runs a and a.b too."""
    parts = name.split(".")
    return {".".join(parts[: k + 1]) for k in range(len(parts))}


def reached(module: str) -> dict[str, str]:
    """All modules that importing `module` imports through the package's own modules, and through which."""
    through: dict[str, str] = {}
    waiting = sorted(with_parents(module))
    seen = set(waiting)
    while waiting:
        here = waiting.pop()
        for name in on_import()[here]:
            for part in with_parents(name) if name in FILES else {name}:
                through.setdefault(part, here)
                if part in FILES and part not in seen:
                    seen.add(part)
                    waiting.append(part)
    return through


def libraries(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def reached_libraries(module: str, heavy: set[str]) -> dict[str, str]:
    """Which of these libraries importing `module` imports, and through which module."""
    return {name: via for name, via in reached(module).items() if name.split(".")[0] in heavy}


def modules_of(*packages: str) -> list[str]:
    """The modules of some subpackages, which have some."""
    found = [name for name in FILES if name.split(".")[1:2] in [[package] for package in packages]]
    assert len(found) > len(packages)
    return found


def test_the_helpers_see_what_they_should() -> None:
    source = """
import a.b
if TYPE_CHECKING:
    import hidden
try:
    from c import d
except ImportError:
    import e
class F:
    import g
    def h(self):
        import i
"""
    tree = ast.parse(source)
    assert imported(top_level(tree), "x") == {"a.b", "c", "e", "g"}
    assert imported(ast.walk(tree), "x") == {"a.b", "hidden", "c", "e", "g", "i"}
    assert "atp_tune.pruners.selection" in reached("atp_tune.search.objective")
    assert {"torch", "optuna", "transformers"} <= libraries(set(reached("atp_tune.search.objective")))


def test_no_package_imports_one_above_it() -> None:
    """Not within functions either, nor for types."""
    assert {name.split(".")[1] for name in FILES if "." in name} == set(LAYERS)
    wrong = [
        f"{name} imports {other}"
        for name, others in anywhere().items()
        for other in others
        if other.startswith("atp_tune.") and "." in name and place_of(other) > place_of(name)
    ]
    assert wrong == []


def place_of(module: str) -> int:
    """How high a module's package stands."""
    return LAYERS.index(module.split(".")[1])


def test_torch_and_optuna_meet_in_the_objective_alone() -> None:
    """No module imports both, and one alone calls Optuna and imports what computes."""
    assert not [name for name, names in anywhere().items() if {"torch", "optuna"} <= libraries(names)]
    optunas = [name for name, names in anywhere().items() if "optuna" in libraries(names)]
    assert [name for name in optunas if "torch" in libraries(set(reached(name)))] == ["atp_tune.search.objective"]


@parametrize("kind", ["pruners", "allocations"])
def test_the_tensor_core_knows_no_study(kind: str) -> None:
    for name in modules_of(kind):
        libs = libraries(anywhere()[name])
        assert not libs & {"optuna", "transformers", "typer", "rich"}, name
        assert "pydantic" not in libs or name == "atp_tune.pruners.settings", name
        assert kind != "allocations" or "torch" not in libs, name
        own = {module for module in anywhere()[name] if module.startswith("atp_tune")}
        below = {"atp_tune.errors", "atp_tune.plugins", *modules_of("utils")}
        assert {module for module in own if not module.startswith(f"atp_tune.{kind}")} <= below, name


LIGHT = [
    "checkpoints.files",
    "cost.forecast",
    "cost.planning",
    "api.environment",
    "errors",
    "events",
    "report",
    "results.status",
    "results.summary",
    "search.samplers",
    "search.space",
    "search.runner",
    "report.servers",
    "folders.card",
    "folders.exporting",
    "folders.publishing",
    "config.best",
    "config.study",
    "config.studyfile",
    "metrics",
    "storage.opening",
    "storage.fingerprint",
    "storage.progress",
]


def test_reports_and_exports_need_no_torch() -> None:
    for name in [*(f"atp_tune.{name}" for name in LIGHT), *modules_of("cli", "report")]:
        assert not reached_libraries(name, {"torch", "transformers"}), name


HEAVY = {  # libraries whose import takes longer than all that `--help` needs
    "torch", "transformers", "optuna", "datasets", "numpy", "scipy", "sqlalchemy", "plotly", "safetensors",
    "huggingface_hub", "grpc", "optuna_dashboard",
}  # fmt: skip


def test_help_needs_no_library_but_its_own() -> None:
    for name in ("atp_tune", "atp_tune.cli.application", "atp_tune.cli.tune", "atp_tune.__main__"):
        assert name != "atp_tune.cli.application" or reached_libraries(name, {"typer"})  # or the search is broken
        assert not reached_libraries(name, HEAVY | {"pydantic", "rich"}), name


def test_the_package_and_its_entry_need_no_library() -> None:
    """So that a Python without any can say what is missing."""
    third_party = [
        name
        for module in ("atp_tune", "atp_tune.cli", "atp_tune.utils.system")
        for name in libraries(set(reached(module)))
        if name not in {"atp_tune", *sys.stdlib_module_names}
    ]
    assert third_party == []


def test_progress_is_shown_without_optuna_or_figures() -> None:
    assert not reached_libraries("atp_tune.cli.display", HEAVY)


def test_what_may_not_be_installed_is_imported_where_it_is_needed() -> None:
    """A module that imports what no dependency brings on every system is itself imported within functions alone."""
    waiting = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    there = set[str]()
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop())[0].lower().replace("_", "-")
        if name not in there:
            there.add(name)
            waiting += [line for line in metadata.requires(name) or () if ";" not in line]
    packages = metadata.packages_distributions()
    brought = {name for name, owners in packages.items() if there & {x.lower().replace("_", "-") for x in owners}}
    known = brought | set(sys.stdlib_module_names) | {"atp_tune"}
    special = {name for name, names in on_import().items() if libraries(names) - known}
    assert "atp_tune.folders.lora" in special
    assert [(name, via) for name in FILES for other, via in reached(name).items() if other in special] == []


@slow
def test_a_study_file_is_read_without_torch() -> None:
    """Run, not read from the source: what is registered is imported by its name."""
    script = (
        "import sys\n"
        "from atp_tune.config.studyfile import from_settings, load, settings\n"
        "file = load('smol', ['prune.pruners=[\"wanda\", \"alps\"]', 'prune.alps.rho=1', 'allocation=owl'])\n"
        "assert from_settings(settings(file)).study == file.study\n"
        "found = {'torch', 'transformers', 'optuna', 'numpy'} & set(sys.modules)\n"
        "assert not found, found\n"
        "from atp_tune.storage.fingerprint import facts\n"  # beside Optuna, and without torch
        "assert facts(file.study)['prune.alps.rho'] == 1\n"
        "assert 'torch' not in sys.modules\n"
    )
    output(sys.executable, "-c", script, cwd=REPO)


@slow
@parametrize(
    ("options", "said", "others"),
    [
        (["--help"], "python tune.py --study smol", {"rich", "markdown_it", "pygments", "pydantic", "jinja2"}),
        (["prune", "--help"], "prune", {"rich"}),  # typer itself imports pydantic to read options
    ],
)
def test_help_imports_no_heavy_library(options: list[str], said: str, others: set[str]) -> None:
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['tune.py', *{options}]\n"
        "try:\n"
        "    runpy.run_path('tune.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"found = {HEAVY | others} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    shown = output(sys.executable, "-c", script, cwd=REPO)
    assert "Usage" in shown and said in shown


def test_what_runs_elsewhere_imports_names_that_are_there() -> None:
    """Tests of a GPU, benches, scripts and examples are run by no fast test; a name that went would be seen late."""
    places = ("tests/gpu", "benchmarks", "scripts", "examples")
    files = [path for place in places for path in sorted((REPO / place).rglob("*")) if path.suffix in {"", ".py"}]
    scripts = [path for path in files if path.suffix or (path.is_file() and b"python" in path.read_bytes()[:40])]
    names = [
        (str(path.relative_to(REPO)), node.module, alias.name)
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "atp_tune"
        for alias in node.names
    ]
    assert len(names) > 100
    there = FILES.keys()
    assert [x for x in names if ".".join(x[1:]) not in there and not hasattr(importlib.import_module(x[1]), x[2])] == []


# Code


def test_only_the_command_line_prints() -> None:
    def is_print(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        return ast.unparse(node.func) in {
            "print",
            "typer.echo",
            "click.echo",
            "sys.stdout.write",
            "sys.stderr.write",
            "console.print",
            "echo",
        }

    found = {name for name, tree in trees().items() if any(map(is_print, ast.walk(tree)))}
    assert "atp_tune.cli" in found  # or the search is broken
    assert {name for name in found if not name.startswith("atp_tune.cli")} == set()


def test_the_package_may_only_shrink() -> None:
    """`scripts/size --write` lowers the numbers of tests/size.json; a person who raises one says why in the commit."""
    loader = importlib.machinery.SourceFileLoader("size", str(REPO / "scripts" / "size"))
    size = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("size", loader) or pytest.fail("no scripts/size")
    )
    loader.exec_module(size)
    today, _ = size.measured()
    highest = json.loads((REPO / "tests" / "size.json").read_text())
    assert today.keys() == highest.keys()
    assert {name: count for name, count in today.items() if count > highest[name]} == {}


def test_files_can_be_read_in_one_sitting() -> None:
    assert [
        (name, lines)
        for name, path in FILES.items()
        if (lines := len(path.read_bytes().splitlines())) > COPIED.get(name, LARGEST)
    ] == []


def test_functions_tell_one_story() -> None:
    """Lines without the docstring; ruff counts statements alone."""

    def lines(function: Function) -> int:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0

    functions = [
        (name, node) for name, tree in trees().items() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    assert len(functions) > 1000
    assert [(name, f.name, lines(f)) for name, f in functions if lines(f) > LONGEST] == []

"""What the README and docs/ say about commands, keys, functions and files holds; what they show runs."""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml
from expect import parametrize
from pages import LINK, PAGES, REPO, Block, anchors, blocks, commands, named, prose

import atp_tune
from atp_tune.cli.application import app
from atp_tune.config.finding import known
from atp_tune.config.study import Study
from atp_tune.config.studyfile import choices, load

README = REPO / "README.md"
STUDIES = {*known()}
PLACEHOLDERS = {"NAME", "FILE", "A", "B"}  # what people put a study's name for
GROUP: Any = typer.main.get_command(app)
CODE = [block for path in PAGES for block in blocks(path)]
SHOWN = [(named(path), words) for path in PAGES for words in commands(path)]
with (REPO / "pyproject.toml").open("rb") as file:
    PROJECT = tomllib.load(file)["project"]
EXTRAS = set(PROJECT["optional-dependencies"])

NEEDED = {  # parts of commands, with the extra that they need
    "finetune .*lora": "finetune", "speedup": "speed", "evaluate": "eval", "classify": "images", "png": "png",
    "(fashion|imagenet)": "images", "ray ": "ray", "tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb",
    r"postgresql\+": "postgres",
}  # fmt: skip


def of_language(*languages: str) -> list[Block]:
    return [block for block in CODE if block.language in languages]


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1300
    for command in ("pip install -e . && python tune.py --study smol", "pip install -e '.[dev]' && python -m pytest"):
        assert f"    {command}" in text.splitlines()
    assert text.count("ot yet run on a GPU") == 1


def test_the_figures_of_the_readme_are_those_of_the_measurements() -> None:
    text = README.read_text()
    results, rows_, speedup = (
        (REPO / "docs" / name).read_text() for name in ("results.md", "allocations.md", "speedup.md")
    )
    rows = [line for line in text.splitlines() if re.match(r"\| \d0 % ", line)]
    assert len(rows) == 3
    for row in rows:
        section = results.partition(f"## {row[2:4]}%, wanda\n")[2].partition("\n## ")[0]
        *figures, by_rows = re.findall(r"\d+\.\d+", row)
        assert len(figures) == 3 and all(f" {figure} ± " in section for figure in figures)
        assert f" {by_rows} ± " in rows_.partition("### Rows\n")[2].partition("\n### ")[0]
    for figure in re.findall(r"[\d.]+×", text):
        assert figure in speedup


def test_the_citation_is_of_this_version() -> None:
    """In the format that GitHub reads: https://citation-file-format.github.io, version 1.2.0."""
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    told = {"title": "atp_tune", "abstract": PROJECT["description"], "repository-code": PROJECT["urls"]["Homepage"]}
    told |= {key: PROJECT[key] for key in ("version", "license", "authors")}
    assert told.items() <= cited.items() and {"cff-version", "message"} < cited.keys()


@parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        place, _, anchor = link.partition("#")
        if re.match(r"\w+:", place):
            continue
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@parametrize("page", sorted({page for page, _ in SHOWN}))
def test_commands_have_these_options_and_studies(page: str) -> None:
    for words in [words for there, words in SHOWN if there == page]:
        try:
            check_command(words)
        except Exception as error:
            raise AssertionError(f"{page}: tune.py {' '.join(words)}: {error}") from error


def check_command(words: list[str]) -> None:
    """Parses the words as the command line would, and reads the study with the keys that they set."""
    words = ["ORG/NAME" if word == "MODEL" else word for word in words if word != "--help"]
    if words in ([], ["COMMAND"]):
        return
    context = GROUP.make_context("tune.py", list(words))
    given = context.params
    rest = [*context._protected_args, *context.args]
    if rest:
        _, command, arguments = GROUP.resolve_command(context, rest)
        given = command.make_context(command.name, arguments, parent=context).params
    names = given.get("study") or []
    overrides = given.get("set_") or []
    for name in [names] if isinstance(names, str) else names:
        if name not in PLACEHOLDERS and not name.endswith(".toml"):
            assert name in STUDIES
            load(name, overrides)


@parametrize("block", [block for block in of_language("toml") if "[project" not in block.text], ids=str)
def test_study_files_are_read(block: Block) -> None:
    """A part of a study file stands in `smol-60`; a model or a text takes the place of its own."""
    study = tomllib.loads((REPO / "studies/smol-60.toml").read_text())
    table = tomllib.loads(block.text)
    if "images" in table:
        del study["texts"]
    if {"bits", "size"} & table.keys() and "sparsity" not in table:
        del study["sparsity"], study["prune"]
    if "size" in table:
        study["allocation"] = "gradient-rows"
    for key, value in table.items():
        if key == "texts":
            study[key] |= value
        else:
            study[key] = study.get(key, {}) | value if isinstance(value, dict) and "source" not in value else value
    Study.model_validate(study)


@parametrize("block", of_language("python"), ids=str)
def test_python_compiles_and_its_names_exist(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atp_tune"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module or ""), alias.name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "atp_tune":
            if not hasattr(atp_tune, "__all__"):
                pytest.skip("the Python interface is not in this version")
            assert node.attr in atp_tune.__all__


def test_no_placeholder_is_left() -> None:
    """Figures that were to be filled in."""
    text = {suffix: [*REPO.glob(f"docs/**/*{suffix}"), *REPO.glob(f"studies/*{suffix}")] for suffix in (".md", ".toml")}
    assert text[".md"] and text[".toml"]
    for path in [README, *text[".md"], *text[".toml"]]:
        assert "@@" not in path.read_text(), path


@parametrize("path", PAGES, ids=named)
def test_extras_exist_and_are_named_where_a_command_needs_them(path: Path) -> None:
    """In the README in the line of the command, on other pages there or before it."""
    for extras in re.findall(r"(?:'\.|atp-tune)\[([\w,]+)\]", path.read_text()):
        assert set(extras.split(",")) <= EXTRAS, extras
    said = ""
    for line in [line for block in blocks(path) if block.language in ("", "sh") for line in block.text.splitlines()]:
        said = line if path == README else f"{said}\n{line}"
        for extra in [extra for part, extra in NEEDED.items() if re.search(rf"\w+\.py.* {part}", line)]:
            assert re.search(rf"'\.\[([\w,]+,)?{extra}\b", said), f"{line}: needs '.[{extra}]'"


def test_the_list_of_folders_is_complete() -> None:
    """Each folder of the package has a row in docs/architecture.md, which names no other."""
    text = (REPO / "docs/architecture.md").read_text()
    rows = {
        name for row in re.findall(r"^\| (`\w+/`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)/`", row)
    }
    assert rows == {path.parent.name for path in (REPO / "atp_tune").glob("*/__init__.py")}


@pytest.fixture
def theme(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of docs/theme by its name."""
    monkeypatch.syspath_prepend(REPO / "docs" / "theme")

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


def test_the_page_of_settings_has_every_key(theme: Any) -> None:
    sections = theme("setting_pages").page().split("\n### ")[1:]
    assert sorted([section[1:].partition("`")[0] for section in sections]) == sorted(choices())
    for section in sections:
        _, facts, meaning, *_ = section.strip().split("\n\n")
        assert facts.endswith("{ .facts }") and facts[0] not in "·{"
        assert len(meaning) > 5 and meaning[-1] in ".?!", section


def test_the_page_of_commands_has_every_option(theme: Any) -> None:
    page = theme("command_pages").page()
    for name, command in GROUP.commands.items():
        section = page.partition(f"\n## `{name}` {{")[2].partition("\n## ")[0]
        for option in [option for param in command.params for option in param.opts if option.startswith("--")]:
            assert re.search(rf"^`[^`]*{option}\b[^`]*`\n:   \w", section, re.M), (name, option)


def test_links_out_of_the_folder_lead_to_pages_of_the_site(theme: Any) -> None:
    links = theme("outside_links")
    text = "[a](../atp_tune/config/study.py#x) [b](bos.md) [c](../README.md)\n\n    [d](../e)\n"
    inside = "[a](source/atp_tune/config/study.py.md#x) [b](bos.md) [c](index.md)\n\n    [d](../e)\n"
    assert links.rewritten(text, "chat.md") == inside
    assert links.rewritten("[a](docs/bos.md)", "index.md") == "[a](bos.md)"
    assert links.linked([("chat.md", text)]) == {"atp_tune/config/study.py"}

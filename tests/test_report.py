import re
import tomllib
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from expect import parametrize, refused, slow
from optuna.trial import TrialState, create_trial
from synthetic import made_up, new_study

from atp_tune import report
from atp_tune.errors import UserError
from atp_tune.report import formats
from atp_tune.report.formats import gather, toml

NOW = datetime(2026, 1, 2, 3, 4, 5)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
MAKERS = {"html": formats.html, "md": formats.markdown, "json": formats.machine, "latex": formats.latex}


pytestmark = pytest.mark.usefixtures("without_warnings")


@pytest.fixture
def study() -> optuna.Study:
    return new_study(None)


@pytest.fixture
def found(study: optuna.Study) -> optuna.Study:
    """A study with a best trial that beats uniform, and one that failed."""
    study.add_trials([made_up(0.0), made_up(0.006), made_up(0.02), made_up(0.01, state=TrialState.FAIL, failure="no")])
    return study


def page(*studies: optuna.Study) -> str:
    return formats.html([gather(study, NOW) for study in studies]).decode()


class Page(HTMLParser):
    """What a page loads, its ids, and the text of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        self.ids += [str(value) for name, value in attrs if name == "id"]


def own(text: str) -> str:
    """A page without plotly.js."""
    return re.sub(r"<script>/\*\*\n\* plotly\.js.*?</script>", "", text, flags=re.DOTALL)


# All formats


@slow
@parametrize("kind", MAKERS)
def test_studies_that_are_not_whole(study: optuna.Study, kind: str) -> None:
    contents = gather(study, NOW)
    assert MAKERS[kind]([contents])  # empty
    study.add_trial(create_trial(state=TrialState.RUNNING))
    study.add_trial(create_trial(state=TrialState.FAIL))
    study.add_trial(create_trial(state=TrialState.WAITING))
    assert MAKERS[kind]([gather(study, NOW)])
    study.add_trial(made_up(0.0))
    assert MAKERS[kind]([gather(study, NOW)])  # one trial
    old = optuna.create_study(study_name="old")
    for trial in (made_up(0.0), made_up(0.01)):
        trial.user_attrs = {}
        old.add_trial(trial)
    assert MAKERS[kind]([gather(old, NOW), contents])


# What is said


def test_toml_keeps_every_value() -> None:
    values = {"a": [0.0, 0.3], "b": {"c": ['x,\n"]', "y"], "d": True}, "e": "line\n[\n   1,\n]"}
    assert tomllib.loads(toml({**values, "f": None})) == values


# The page


@slow
def test_the_page_needs_nothing_else(found: optuna.Study) -> None:
    read = Page(page(found))
    assert read.loaded == []
    assert "link" not in read.tags
    assert "iframe" not in read.tags
    assert not re.search(r"@import|url\(", own(page(found)))


@slow
def test_hostile_names_and_failures_are_text() -> None:
    study, other = new_study(None, HOSTILE), new_study(None, "other")
    for one in (study, other):
        one.add_trials([made_up(0.0), made_up(0.006), made_up(0.01, state=TrialState.FAIL, failure=HOSTILE)])
    study.set_user_attr("fingerprint", {HOSTILE: HOSTILE})
    for text in (page(study), page(study, other)):
        assert HOSTILE not in text
        assert "img" not in Page(text).tags
        assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    scripts = [tag for tag in Page(page(study)).tags if tag == "script"]
    assert len(scripts) == 5 + 2  # the figures, plotly.js and the page's own


@slow
def test_several_studies_are_compared() -> None:
    studies = [new_study(None, name) for name in ("first", "second")]
    for study in studies:
        study.add_trials([made_up(0.0), made_up(0.006)])
    text = page(*studies)
    assert Page(text).ids == ["study-1", "study-2"]
    assert Page(text).loaded == ["#study-1", "#study-2"]
    assert "<h1>2 studies compared</h1>" in text
    assert re.findall(r'<figure class="(\w+)">', text)[:2] == ["perplexities", "sparsities"]


def test_perplexities_of_different_texts_are_not_drawn_together() -> None:
    studies = [new_study(None, name) for name in ("first", "second")]
    for study in studies:
        study.add_trials([made_up(0.0), made_up(0.006)])
    studies[1].set_user_attr("fingerprint", {"model.content": "ab" * 32, "texts.validation.content": "other"})
    assert list(formats.overlays([gather(study, NOW) for study in studies])) == ["sparsities"]
    assert formats.overlays([gather(studies[0], NOW)]) == {}


# JSON, Markdown, LaTeX


def test_latex_is_escaped() -> None:
    studies = [new_study(None, name) for name in (r"a_b & 50% #1 {x} \y ~^$", "second")]
    text = formats.latex([gather(study, NOW) for study in studies]).decode()
    escaped = r"a\_b \& 50\% \#1 \{x\} \textbackslash{}y \textasciitilde{}\textasciicircum{}\$"
    assert f"\\multicolumn{{5}}{{l}}{{{escaped}, sparsity 60\\%}}" in text
    assert text.isascii()


# Files and the command


def test_what_cannot_be_written_leaves_nothing(found: optuna.Study, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    before = sorted(tmp_path.iterdir())
    with refused(r"folder: Is a directory; choose another place with --out FILE"):
        report.write([gather(found, NOW)], "md", folder)
    assert sorted(tmp_path.iterdir()) == before


@slow
def test_the_picture_is_drawn_where_there_is_a_browser(found: optuna.Study, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    try:
        report.write([gather(found, NOW)], "png", tmp_path / "x.png")
    except UserError as error:
        pytest.skip(str(error))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

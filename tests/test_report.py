import json
import re
import tomllib
from collections.abc import Iterator
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from pydantic import ValidationError
from synthetic import made_up, new_study
from test_summary import stored
from tinystudy import Answer, CommandLine, quiet

from atp_tune import report
from atp_tune.config.studyfile import load, settings
from atp_tune.errors import UserError
from atp_tune.metrics import Answers
from atp_tune.report import contents as tables
from atp_tune.report import html, latex, machine, markdown
from atp_tune.report.contents import gather, toml
from atp_tune.results import status
from atp_tune.results.status import Best, Status, TrialStatus, status_of, to_json
from atp_tune.results.summary import summarise

NOW = datetime(2026, 1, 2, 3, 4, 5)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
MAKERS = {"html": html.make, "md": markdown.make, "json": machine.make, "latex": latex.make}


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def study() -> optuna.Study:
    return new_study(None)


@pytest.fixture
def found(study: optuna.Study) -> optuna.Study:
    """A study with a best trial that beats uniform, and one that failed."""
    study.add_trials([made_up(0.0), made_up(0.006), made_up(0.02), made_up(0.01, state=TrialState.FAIL, failure="no")])
    return study


def page(*studies: optuna.Study) -> str:
    return html.make([gather(study, NOW) for study in studies]).decode()


def document(*studies: optuna.Study) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(machine.make([gather(study, NOW) for study in studies]))
    return read


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_a_real_study(done: Path, kind: str) -> None:
    made = MAKERS[kind]([gather(stored(done), NOW)]).decode()
    summary = gather(stored(done), NOW).summary
    best = summary.results.score(summary.best_trial, "test")
    assert best is not None
    assert best.alone in made or str(best.value) in made


@pytest.mark.slow
def test_the_page_says_what_the_line_of_the_search_is(found: optuna.Study) -> None:
    words = "the thin line and its band are the mean of the search’s Gaussian process ± 2 standard deviations"
    assert words not in page(found)
    found.set_user_attr("gp_posterior", {"before": 3, "curves": {}})
    assert words in page(found)


@pytest.mark.slow
def test_a_long_study(long: optuna.Study) -> None:
    contents = gather(long, NOW)
    assert all(len(make([contents])) < 6_000_000 for make in MAKERS.values())
    assert contents.summary.done == 500
    assert set(contents.importance) == {"beta", "pruner", "allocation", "lam"}


# What is said


def test_the_words_of_a_study(found: optuna.Study) -> None:
    found.add_trial(create_trial(state=TrialState.RUNNING))
    contents = gather(found, NOW)
    assert contents.state == "4 of 16 trials done, 1 running, 1 failed"
    assert re.fullmatch(
        r"The best plan’s perplexity is \d+\.\d%\u00a0±\u00a0\d\.\d% below uniform’s on the validation text\.",
        contents.verdict,
    )
    assert (contents.target, contents.realised, contents.devices) == (0.6, 0.5991, "cpu (2 threads)")
    assert contents.seconds == pytest.approx(3 * 4.6)
    assert contents.versions["torch"] == "2.13.0"
    assert contents.importance == {}  # too few trials to say


def test_the_verdict_follows_what_is_known(study: optuna.Study) -> None:
    assert gather(study, NOW).verdict == "No trial has been measured yet."
    study.add_trial(made_up(0.006))
    assert gather(study, NOW).verdict == "Uniform has not been measured yet."
    study.add_trial(made_up(0.0, nlls=[1.0]))
    assert "±" not in gather(study, NOW).verdict  # other windows: not paired


def test_uniform_may_be_the_best(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.02)])
    assert gather(study, NOW).verdict == "No trial is better than uniform."


def test_changes_are_those_of_the_report_text(found: optuna.Study) -> None:
    found.set_user_attr("test_nlls", {"dense": [2.0, 2.1], "0": [4.0, 4.2], "1": [3.9, 4.15]})
    contents = gather(found, NOW)
    said = "The best plan’s perplexity is 7.2%\u00a0±\u00a02.3% below uniform’s on the test text."
    assert contents.verdict == f"{said} That may be chance: zero lies in its 95\u00a0% interval."  # two windows
    assert tables.comparison([contents]).rows[0][4].startswith("55.98 ± ")


def test_the_study_file_can_be_read_again(found: optuna.Study) -> None:
    text = gather(found, NOW).study_file
    assert text is not None
    overrides = ['prune.pruners=["wanda", "sparsegpt"]', 'allocation=["atp", "owl"]']
    expected = settings(load("smol-60", overrides))["settings"]
    assert tomllib.loads(text) == expected
    assert 'pruners = ["wanda", "sparsegpt"]' in text


def test_toml_keeps_every_value() -> None:
    values = {"a": [0.0, 0.3], "b": {"c": ['x,\n"]', "y"], "d": True}, "e": "line\n[\n   1,\n]"}
    assert tomllib.loads(toml({**values, "f": None})) == values


def test_commands_survive_a_shell(study: optuna.Study) -> None:
    contents = gather(study, NOW)
    assert dict(tables.commands(contents.summary))["run or resume"] == "python tune.py --study made-up.toml"
    odd = new_study(None, "a b/c'$(x)")
    command = tables.commands(gather(odd, NOW).summary)[0][1]
    assert command == """python tune.py --study 'a b_c'"'"'$(x).toml'"""


# The page


@pytest.mark.slow
def test_the_page_needs_nothing_else(found: optuna.Study) -> None:
    read = Page(page(found))
    assert read.loaded == []
    assert "link" not in read.tags
    assert "iframe" not in read.tags
    assert not re.search(r"@import|url\(", own(page(found)))


def test_figures_and_tables_of_a_page(found: optuna.Study) -> None:
    text = page(found)
    assert re.findall(r'<figure class="(\w+)">', text) == ["perplexity", "sparsity", "error", "history", "seconds"]
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text):
        figure = json.loads(data)
        assert figure["data"]
        assert "title" not in figure["layout"]
    best = found.trials[1]
    assert f"{best.value:.2f}" in text
    assert "too few trials" in text
    assert own(text).count("<tr") > 4


def test_an_empty_page_says_so(study: optuna.Study) -> None:
    text = own(page(study))
    assert "No trial has been measured yet." in text
    assert "There are no trials yet." in text
    assert "<figure" not in text


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert list(html.overlays([gather(study, NOW) for study in studies])) == ["sparsities"]
    assert html.overlays([gather(studies[0], NOW)]) == {}


# JSON, Markdown, LaTeX


def test_the_keys_of_the_json(found: optuna.Study) -> None:
    read = document(found)
    assert list(read) == ["format", "made", "studies"]
    assert (read["format"], read["made"]) == ("atp_tune.report/3", "2026-01-02T03:04:05")
    (study,) = read["studies"]
    assert list(study) == [
        *[key for key in json.loads(to_json(status_of(summarise(found), NOW))) if key != "format"],
        "description", "state", "realised", "zero_shot", "speed", "recovered", "continuations", "importance", "time",
        "devices", "study_file", "fingerprint", "versions",
    ]  # fmt: skip
    assert (study["done"], study["total"]) == (4, 16)
    assert study["state"] == {"running": 0, "failed": 1}
    scores = study["best"]["scores"]["perplexity"]
    assert scores == {"validation": {"value": found.trials[1].value, "stderr": 3.5}, "test": None}
    against = study["best"]["against_uniform"]["perplexity"]
    assert against["on"] == "validation" and against["value"] < 0
    assert [rank["allocation"] for rank in study["ranks"]] == ["atp", "uniform"]
    assert list(study["trials"][0]) == [
        "number", "state", "params", "parameters", "plan", "scores", "realised", "seconds", "remark", "cut_off",
        "sparsity", "packed_bytes", "bits", "effective_bits", "quantized_bytes", "levels", "times", "errors", "device",
        "dtype",
    ]  # fmt: skip
    assert study["trials"][1]["params"]["beta"] == 0.006
    assert study["trials"][3]["remark"] == "no"


def test_every_key_is_documented(found: optuna.Study) -> None:
    documented = "".join(str(part.__doc__) for part in (machine, status, Status, TrialStatus, Best))
    (study,) = document(found)["studies"]
    for key in (*study, *study["trials"][0], *study["ranks"][0]):
        assert re.search(rf"\b{key}\b", documented), key


def test_json_has_no_number_that_is_none() -> None:
    assert machine.finite({"a": [float("inf"), 1.5], "b": (float("nan"),)}) == {"a": [None, 1.5], "b": [None]}


def test_markdown_tables_are_whole(found: optuna.Study) -> None:
    found.add_trial(made_up(0.01, state=TrialState.FAIL, failure="a|b\n# *c*"))
    text = markdown.make([gather(found, NOW)]).decode()
    head = "| method | trial | sparsity | validation perplexity | test perplexity | against uniform |"
    assert f"{head}\n| :-- | --: | --: | --: | --: | --: |" in text
    assert r"a\|b \# \*c\*" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 7, 8}
    assert "```toml\ndescription = " in text
    assert "python tune.py --study made-up.toml\n" in text


def test_markdown_of_several_studies() -> None:
    studies = [new_study(None, name) for name in ("a_b", "c")]
    text = markdown.make([gather(study, NOW) for study in studies]).decode()
    assert re.findall(r"^# .*", text, flags=re.MULTILINE) == ["# Comparison", r"# a\_b", "# c"]


def test_the_table_for_a_paper(found: optuna.Study) -> None:
    lines = latex.make([gather(found, NOW)]).decode().splitlines()
    best = next(line for line in lines if line.startswith("wanda + atp"))
    assert re.fullmatch(
        r"wanda \+ atp \(\$\\beta\$ = 0\.00600\) & [\d.]+\\% & \d+\.\d\d \$\\pm\$ 3\.50 & -- & "
        r"\$-\$\d+\.\d\\% \$\\pm\$ \d\.\d\\% \(validation\) \\\\",
        best,
    )
    assert sum(line.endswith(r"\\") for line in lines) == 4  # head, dense, uniform, best
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_latex_is_escaped() -> None:
    studies = [new_study(None, name) for name in (r"a_b & 50% #1 {x} \y ~^$", "second")]
    text = latex.make([gather(study, NOW) for study in studies]).decode()
    escaped = r"a\_b \& 50\% \#1 \{x\} \textbackslash{}y \textasciitilde{}\textasciicircum{}\$"
    assert f"\\multicolumn{{5}}{{l}}{{{escaped}, sparsity 0.6}}" in text
    assert text.isascii()


# Files and the command


def test_names_of_files() -> None:
    assert report.name_of(["a"], "html") == "a.report.html"
    assert report.name_of(["a", "b"], "latex") == "a+b.report.tex"
    assert report.name_of(["a", "b", "c"], "md") == "a+b+1-more.report.md"


@pytest.mark.parametrize(
    ("given", "out", "kind"),
    [
        (None, None, "html"),
        (None, "x.md", "md"),
        (None, "x.TEX", "latex"),
        ("json", "x.md", "json"),
    ],
)
def test_the_format_follows_the_file(given: str | None, out: str | None, kind: str) -> None:
    assert report.kind_of(given, Path(out) if out else None) == kind


def test_what_cannot_be_written_leaves_nothing(found: optuna.Study, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"folder: Is a directory; choose another place with --out FILE"):
        report.write([gather(found, NOW)], "md", folder)
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_of_nothing_is_one_line(study: optuna.Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="study made-up: no trial has been measured yet, so there is nothing to draw"):
        report.write([gather(study, NOW)], "png", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_the_command_writes_beside_the_database(done: Path, command: CommandLine) -> None:
    answer: Answer = command("report", "--study", done / "tiny.toml")
    assert (answer.code, answer.out) == (0, f"{done / 'tiny.report.html'}\n")
    assert (done / "tiny.report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ending"), [("md", "md"), ("json", "json"), ("latex", "tex")])
def test_the_command_in_other_formats(done: Path, command: CommandLine, kind: str, ending: str) -> None:
    assert command("report", "--study", done / "tiny.toml", "--format", kind).code == 0
    assert (done / f"tiny.report.{ending}").stat().st_size > 400
    out = done / "new" / f"x.{ending}"
    assert command("report", "--study", done / "tiny.toml", "--out", out).out == f"{out}\n"
    assert out.exists()


@pytest.mark.slow
def test_the_command_compares(done: Path, command: CommandLine) -> None:
    toml = done / "tiny.toml"
    answer = command("report", "--study", toml, "--study", toml, "--format", "md")
    assert answer.out == f"{done / 'tiny+tiny.report.md'}\n"
    answer = command("report", "--study", toml, "--study-name", "tiny", "--study-name", "tiny", "--format", "md")
    assert answer.out == f"{done / 'tiny+tiny.report.md'}\n"


@pytest.mark.slow
def test_what_the_command_refuses(done: Path, command: CommandLine) -> None:
    toml, before = done / "tiny.toml", sorted(done.iterdir())
    tiny = ["report", "--study", toml]
    assert command(*tiny, "--format", "pdf").error == "--format pdf: must be one of html, md, json, png, latex"
    assert command("report", "--study", "nothing").error.startswith("nothing: no such study; known are ")
    assert command(*tiny, "--study-name", "x").error.startswith("study x: has no trials yet; run: ")
    wrong = command(*tiny, *tiny[1:], "--study-name", "tiny")
    assert wrong.error == "--study-name: must be given once for each --study, got 1 for 2"
    unwritable = command(*tiny, "--out", toml / "x.html")
    assert unwritable.error.endswith("; choose another place with --out FILE")
    assert sorted(done.iterdir()) == before


@pytest.mark.slow
def test_the_picture_is_drawn_where_there_is_a_browser(found: optuna.Study, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    try:
        report.write([gather(found, NOW)], "png", tmp_path / "x.png")
    except UserError as error:
        pytest.skip(str(error))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_an_ending_that_is_no_format() -> None:
    with pytest.raises(UserError, match=r"--out x\.pdf: its ending must be one of html, md, json, png, tex"):
        report.kind_of(None, Path("x.pdf"))


def test_answers_are_pictures_and_words_alone() -> None:
    answer = {"name": "cat", "index": 1, "probability": 0.5}
    models = {key: [answer] for key in ("dense", "uniform", "best")}
    good = {"pictures": ["aGk="], "labels": ["dog"], "indices": [0], **models}
    assert Answers.model_validate(good).best[0].name == "cat"
    for wrong in (
        {"pictures": ['x" onerror="alert(1)']}, {"pictures": ["aGk=", "aGk="]}, {"best": []}, {"labels": ["x" * 1001]},
        {"dense": [{**answer, "probability": 2}]}, {"pictures": []}, {"indices": [0, 1]},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            Answers.model_validate({**good, **wrong})

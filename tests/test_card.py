"""What a sparse folder says of itself, to programs and on the hub's page."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from plans import planned
from test_config import config, scores
from tinystudy import BLOCKS, CommandLine

from atp_tune.config.best import Config, EvaluationTexts, read_config
from atp_tune.config.data import Text
from atp_tune.config.manifest import Manifest, environment
from atp_tune.config.prune import PruneConfig
from atp_tune.folders.card import model_card
from atp_tune.measures import TaskScore
from atp_tune.metrics import Continuations, Measured, Rates, Sizes, Speed

REPORT = "file:ünïcode.txt, part 0.25 to 1, all windows of 2048 tokens"
BROKEN = ["no card", "---\n[1, 2]\n---\n", "---\nlicense: {a: 1}\n---\n", "---\n: :\n---"]
COMMIT = "c0ffee" * 7
UNKNOWN = {"license": "other", "license_name": "that-of-the-dense-model"}
DENSE_CARD = """---
license: other
license_name: someone-s-own
license_link: LICENSE
language: [en, de]
model-index: [{name: dense, results: 7}]
tags: [conversational]
---
# The dense model
"""


def card(changed: Config | None = None, revision: str | None = COMMIT, folder: Path = Path("nowhere")) -> ModelCard:
    made = changed or config()
    return model_card(made.model_copy(update={"model": made.model.model_copy(update={"revision": revision})}), folder)


def body(made: ModelCard) -> str:
    return str(made.text)


# --- the front matter


def test_the_front_matter_is_the_hub_s() -> None:
    made = config(texts=EvaluationTexts(validation=Text(source="c4"), test=Text(source="wikitext2", split="test")))
    found = yaml.safe_load(str(card(made)).split("---")[1])
    assert found == {
        "base_model": "org/name",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        **UNKNOWN,
        "pipeline_tag": "text-generation",
        "tags": ["atp-tune", "sparse", "pruned", "sparsegpt", "atp"],
        "model-index": [
            {
                "name": "name at 60.0% sparsity",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {
                            "type": "Salesforce/wikitext", "name": "wikitext2", "config": "wikitext-2-raw-v1",
                            "split": "test",
                        },
                        "metrics": [
                            {"type": "perplexity", "value": 13.25, "name": "perplexity, 2048 tokens a window"}
                        ],
                    }
                ],
            }
        ],
    }  # fmt: skip


def test_it_reads_as_it_was_written(tmp_path: Path) -> None:
    made = card()
    made.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == made.data.to_dict()
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 13.25)
    assert (result.dataset_type, result.dataset_name) == (
        "text",
        REPORT,
    )


@pytest.mark.parametrize("text", [DENSE_CARD, *BROKEN])
def test_what_the_dense_model_s_card_gives(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    found = card(folder=tmp_path).data.to_dict()
    kept = {key: found[key] for key in found if key.startswith("l") and key != "library_name"}
    expected = {
        "license": "other",
        "license_name": "someone-s-own",
        "license_link": "LICENSE",
        "language": ["en", "de"],
    }
    assert kept == (expected if text == DENSE_CARD else UNKNOWN)
    assert found["tags"][0] == "atp-tune"
    assert ("licence applies" in body(card(folder=tmp_path))) == (text != DENSE_CARD)
    (tmp_path / "LICENSE.txt").touch()
    expected = expected if text == DENSE_CARD else UNKNOWN | {"license_link": "LICENSE.txt"}
    assert expected.items() <= card(folder=tmp_path).data.to_dict().items()


def test_a_licence_that_a_person_gave_stays(tmp_path: Path) -> None:
    """In the place of `other`, as the card asks."""
    (tmp_path / "README.md").write_text(str(card(folder=tmp_path)).replace("license: other", "license: mit"))
    found = card(folder=tmp_path)
    assert found.data.license == "mit" and "license_name" not in found.data.to_dict()
    assert "licence applies" not in body(found)


def test_of_a_gguf_file_the_card_names_the_source(tmp_path: Path) -> None:
    """It had neither licence nor base model. Another folder's card may name a path, so it does not count."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: org/tiny\n---\n")
    assert "base_model" not in card(revision=None, folder=tmp_path).data.to_dict()
    (tmp_path / "origin.json").write_text("{}")
    found = card(revision=None, folder=tmp_path).data.to_dict()
    assert (found["license"], found["base_model"], found["base_model_relation"]) == ("mit", "org/tiny", "finetune")


def test_folders_of_the_machine_are_not_told(tmp_path: Path) -> None:
    """A base model is named where the hub has it."""
    model = config().model.model_copy(update={"id": "/home/me/secret/llama-x.gguf", "revision": None})
    made = card(config(model=model), revision=None)
    assert "base_model" not in made.data.to_dict()
    assert "has to lie where `model.id`" in body(made) and "has to lie" not in body(card())
    assert "secret" not in str(made)
    assert "texts/" not in str(made)
    assert "llama-x at 60.0% sparsity" in body(made)


# --- whole channels


def channels(**changes: Any) -> Config:
    plan = planned("wanda", "atp", (0.25, 0.26, 0.25), {"beta": 0.0125}, ((0.3, 0.2), (0.3, 0.21), (0.3, 0.2)))
    prune = PruneConfig(pattern="channels", pruners=("wanda", "magnitude"))
    return config(**{"plan": plan, "prune": prune, "linears": None, **changes})


def test_settings_of_channels_are_told() -> None:
    told = "heads = False, {}refit = True, damping = 0.01, round\\_to = 8"
    facts = dict(rows(card(channels()), "## How it was made"))
    assert facts["pruner"] == "wanda, " + told.format("score = norm, ")
    facts = dict(
        rows(card(channels(plan=channels().plan.model_copy(update={"method": "magnitude"}))), "## How it was made")
    )
    assert facts["pruner"] == "magnitude, " + told.format("")


def test_uniform_channels_are_called_uniform() -> None:
    made = card(
        channels(plan=planned("wanda", "uniform", (0.25, 0.26, 0.25), None, ((0.3, 0.2), (0.3, 0.21), (0.3, 0.2))))
    )
    assert "Every block has the same share of zeros, but for rounding." in body(made)
    assert "its own share" not in body(made)
    assert made.data.tags[-1] == "uniform"
    assert "its own share" in body(card(channels()))


def test_a_slim_folder_claims_what_was_measured() -> None:
    said = " ".join(body(card(channels(slim=True))).split())
    assert "usually faster, without a kernel of its own. Measured once, on a CPU in float32: SmolLM2-135M" in said
    assert "every device" not in said


# --- the page


def rows(made: ModelCard, head: str) -> list[list[str]]:
    """The cells of the table below a line."""
    lines = body(made).split(head)[1].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_perplexities_side_by_side() -> None:
    made = card(config(scores={"dense": scores(8.0, 8.5), "uniform": scores(14.0, 14.5), "best": scores(12.5, 13.25)}))
    assert rows(made, "## Evaluation")[2:5] == [
        ["dense", "8.50 ± 0.25"],
        ["sparsegpt, uniform", "14.50 ± 0.25"],
        ["**this model** (sparsegpt, atp β=0.01250)", "13.25 ± 0.25"],
    ]
    assert REPORT in body(made)


def test_zero_shot_scores() -> None:
    measures = {"dense": (0.7, 0.02), "uniform": (0.5, 0.0), "best": (0.61234, 0.02)}
    found = {name: TaskScore(value=value, stderr=stderr) for name, (value, stderr) in measures.items()}
    task = SimpleNamespace(
        task="arc_easy", metric="acc", num_fewshot=0, scores={name: {"acc": one} for name, one in found.items()}
    )
    made = card(config(zero_shot=SimpleNamespace(tasks=(task,), mean={"dense": found["dense"]})))
    assert rows(made, "± is the standard error")[:4] == [
        ["zero-shot", "dense", "uniform", "**this model**"],
        [":--", "--:", "--:", "--:"],
        ["arc\\_easy, acc", "70.0% ± 2.0%", "50.0%", "61.2% ± 2.0%"],
        ["mean", "70.0% ± 2.0%", "–", "–"],
    ]
    result = made.data.eval_results[1]
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("arc_easy", "acc", 0.6123)


def test_size_and_speed_as_they_were_measured() -> None:
    rates = {"prefill": Rates(dense=(10, 20, 30), sparse=(20, 40, 30)), "decode": Rates(dense=(5,), sparse=(4,))}
    rows_of = [
        Measured(engine=name, version="1", dtype="float32", device=device, cores=cores, tokens=8, steps=4,
                 logits=None, prefill=rates["prefill"], decode=rates["decode"])
        for name, device, cores in (("torch", "a_CPU", 2), ("semi-structured", "a GPU", None))
    ]  # fmt: skip
    sizes = Sizes(dense=9, sparse=9, dense_zstd=300_000_000, sparse_zstd=200_000_000)
    made = card(config(speed=Speed(sizes=sizes, zeros={}, engines=tuple(rows_of))))
    assert rows(made, "faster on a CPU. Measured:")[2:7] == [
        ["weight files, zstd, MB", "300.0", "200.0", "1.50× smaller"],
        [
            "prefill, tokens per second: torch, float32, a\\_CPU, 2 cores",
            "20.0",
            "30.0",
            "2.00 (1.00 to 2.00)× as fast",
        ],
        ["decode, tokens per second: torch, float32, a\\_CPU, 2 cores", "5.0", "4.0", "0.80 (0.80 to 0.80)× as fast"],
        ["prefill, tokens per second: semi-structured, float32, a GPU", "20.0", "30.0", "2.00 (1.00 to 2.00)× as fast"],
        ["decode, tokens per second: semi-structured, float32, a GPU", "5.0", "4.0", "0.80 (0.80 to 0.80)× as fast"],
    ]
    assert "| |:--|" not in body(made)
    page = MarkdownIt("commonmark").enable("table").render(body(made))
    assert page.count("<table>") == 3
    assert "Measured:" not in body(card())


def test_what_is_not_measured_is_not_told() -> None:
    none = scores(1.0, None)
    made = card(config(scores=dict.fromkeys(("dense", "uniform", "best"), none)))
    assert "model-index" not in made.data.to_dict()
    assert "± is" not in body(made)
    infinite = config().scored().model_copy(update={"value": float("inf"), "stderr": float("inf")})  # type: ignore[union-attr]
    made = card(config(scores={"best": {"perplexity": {"test": infinite}}}))
    assert "model-index" not in made.data.to_dict()


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt", "alps"])
def test_what_became_of_the_weights_that_stay(pruner: str) -> None:
    text = body(card(config(plan=planned(pruner, "atp", (0.575, 0.6, 0.625)))))
    assert ("changed to make up" in text) == (pruner != "wanda")


def test_prices_and_refinement_are_named() -> None:
    plan = planned("sparsegpt", "gradient", (0.3, 0.2), {"kappa": 1.0}, ((0.4, 0.2), (0.2, 0.2)))
    text = body(card(config(plan=plan, linears=None, prune=PruneConfig(refine=5))))
    assert (
        "Each linear has its own share of zeros, chosen by the allocation `gradient κ=1` of atp_tune, by gradients"
        in text
    )
    assert "conjugate gradients changed to make up" in text and "ICML 2025" not in text
    assert "ICML 2025" in body(card())


def test_a_text_that_was_searched_on_is_confessed() -> None:
    text = Text(source="wikitext2", split="test")
    assert "on this same text" in body(card(config(texts=EvaluationTexts(validation=text, test=text))))
    assert "on this same text" not in body(card())


def test_it_says_that_zeros_gain_nothing() -> None:
    assert "By themselves they make nothing smaller and nothing faster" in body(card())


WRITTEN = {
    "dense": ("girl named Emma who loved to play in the sun. She had a big smile on her face", "", "Paris."),
    "uniform": ("the capital of" * 9, ", a little" * 16, "very, " * 20),
    "best": (
        "the capital of" * 9,
        "but you don't.\nThe story story is very, " * 4,
        "Paris, the city of light.",
    ),
}


def test_texts_that_repeat_themselves_are_confessed() -> None:
    written = Continuations(prompts=("A", "B", "C"), tokens=48, dtype="bfloat16", **WRITTEN)
    said = "2 of the 3 texts of **this model** repeat themselves, of the dense model's none.\nEach text is greedy"
    assert said in body(card(config(continuations=written)))
    better = written.model_copy(update={"best": written.dense})
    assert "repeat themselves" not in body(card(config(continuations=better)))


def made_on(device: str) -> Manifest:
    return Manifest(files={}, environment=environment(device))


FINEWEB = Text(source="hub:org/fineweb", seqlen=512)
PIQA = SimpleNamespace(tasks=[SimpleNamespace(task="piqa", metric="acc", scores={})], mean=None)
TIMED = Speed(sizes=Sizes(dense=9, sparse=9, dense_zstd=9, sparse_zstd=9), zeros={}, engines=())
ADMITTED: list[tuple[dict[str, Any], dict[str, Any], str, bool]] = [  # configuration, config.json, line, is there
    ({}, {}, "Text unlike hub:org/fineweb: other subjects, other languages.", True),
    ({}, {"max_position_embeddings": 4096}, "Contexts of more than 512 tokens; the dense model takes 4,096.", True),
    ({}, {"text_config": {"max_position_embeddings": 4096}}, "the dense model takes 4,096.", True),
    ({}, {"max_position_embeddings": 512}, "Contexts", False),
    ({}, {}, "Contexts", False),
    ({}, {}, "Tasks: no benchmark was run.", True),
    ({"zero_shot": PIQA}, {}, "Tasks other than piqa.", True),
    ({}, {}, "GPU", False),
    ({"manifest": made_on("cpu (2 threads)")}, {}, "A GPU: it was pruned and measured on a CPU.", True),
    ({"manifest": made_on("NVIDIA H100")}, {}, "A CPU: it was pruned and measured on NVIDIA H100.", True),
    ({}, {}, "Speed and memory.", True),
    ({"speed": TIMED}, {}, "Speed and memory.", False),
    ({}, {}, "What it writes: no text was generated.", True),
]


@pytest.mark.parametrize(("changes", "table", "line", "there"), ADMITTED)
def test_what_was_not_tested_follows_from_the_record(
    changes: dict[str, Any], table: dict[str, Any], line: str, there: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(table))
    made = card(config(texts=EvaluationTexts(validation=Text(source="c4"), test=FINEWEB), **changes), folder=tmp_path)
    section = body(made).partition("## What was not tested")[2].partition("## ")[0]
    assert (line in section.replace("\\", "")) == there


def test_zeros_by_block() -> None:
    bars = re.findall(r"block +(\d+) +([\d.]+)% +(█+)", body(card()))
    assert [(int(index), float(share), len(bar)) for index, share, bar in bars] == [
        (0, 57.5, 23),
        (1, 60, 24),
        (2, 62.5, 25),
    ]


@pytest.mark.parametrize("name", ["a|b", "<script>alert(1)</script>", "`x`", "[a](http://b)", "# head", "{{ 7 * 7 }}"])
def test_names_of_others_are_only_names(name: str) -> None:
    """In a Markdown renderer that lets HTML through, as the hub's does."""
    model = config().model.model_copy(update={"id": name.replace("/", "")})
    made = card(config(study=name, model=model, prune=PruneConfig()), revision=None)
    shown = MarkdownIt("commonmark").enable("table").render(body(made))
    assert "<script>" not in shown
    assert "http://b</a>" not in shown and 'href="http://b"' not in shown
    assert "49" not in shown.replace("0.49", "")
    cells = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    assert {row.count("<td") for row in cells} <= {0, 2, 3}


# --- the folder


@pytest.mark.slow
def test_apply_says_what_it_measured(done: Path, command: CommandLine, tmp_path: Path) -> None:
    (done / "model" / "README.md").write_text(DENSE_CARD)
    worse = read_config(done / "tiny.best.json")
    promised = worse.scored()
    assert promised
    off = {"perplexity": {"test": promised.model_copy(update={"value": promised.value * 1.5})}}
    worse.model_copy(update={"scores": {**worse.scores, "best": off}}).write(done / "worse.json")
    assert command("apply", "--config", done / "worse.json", "--out", tmp_path / "sparse").code == 0
    made = ModelCard.load(tmp_path / "sparse" / "README.md")
    assert made.data.license == "other"
    (result,) = made.data.eval_results
    assert result.metric_value == pytest.approx(promised.value, rel=1e-3)
    assert rows(made, "## Evaluation")[4][1] == str(read_config(tmp_path / "sparse" / "atp_tune.json").scored())
    assert len(re.findall("block +[0-9]+ ", body(made))) == BLOCKS


@pytest.mark.slow
def test_a_plan_without_a_search_has_a_card_too(done: Path, command: CommandLine, tmp_path: Path) -> None:
    (done / "model" / "atp_tune.finetune.json").write_text("{}")  # of the dense model, which was trained
    words = ["prune", "--study", done / "tiny.toml", "--beta", "0.05", "--out", tmp_path / "sparse"]
    assert command(*words).code == 0
    assert not (tmp_path / "sparse" / "atp_tune.finetune.json").exists()
    made = ModelCard.load(tmp_path / "sparse" / "README.md")
    assert ["found by", "no search"] in rows(made, "## How it was made")
    assert len(rows(made, "## Evaluation")[:3]) == 3
    assert made.data.eval_results[0].metric_value > 1


@pytest.mark.slow
def test_the_hub_s_page_is_the_folder_s_card(
    done: Path, command: CommandLine, tmp_path: Path, hub: tuple[Path, Any]
) -> None:
    """Once uploaded it is what transformers finds, so that its own push leaves it as it is."""
    from transformers.utils.hub import create_and_tag_model_card

    assert command("apply", "--config", done / "tiny.best.json", "--out", tmp_path / "sparse").code == 0
    shutil.copytree(tmp_path / "sparse", hub[0] / "models" / "org" / "sparse")
    kept = create_and_tag_model_card("org/sparse")
    assert str(kept) == str(ModelCard.load(tmp_path / "sparse" / "README.md"))
    assert huggingface_hub.metadata_load(tmp_path / "sparse" / "README.md")["tags"][:2] == ["atp-tune", "sparse"]

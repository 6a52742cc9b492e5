"""What a sparse folder says of itself, to programs and on the hub's page."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import yaml
from expect import parametrize, slow
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from plans import planned
from test_config import config

from atp_tune.config.best import Config, EvaluationTexts
from atp_tune.config.data import Text
from atp_tune.config.manifest import Manifest, environment
from atp_tune.config.prune import PruneConfig
from atp_tune.folders.card import model_card
from atp_tune.measures import TaskScore
from atp_tune.metrics import Measured, Rates, Sizes, Speed

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
    assert yaml.safe_load(str(card(made)).split("---")[1]) == {
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


@parametrize("text", [DENSE_CARD, *BROKEN])
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


# --- the page


def rows(made: ModelCard, head: str) -> list[list[str]]:
    """The cells of the table below a line."""
    table = [line for line in body(made).split(head)[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


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
    assert MarkdownIt("commonmark").enable("table").render(body(made)).count("<table>") == 3
    assert "Measured:" not in body(card())


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


@parametrize(("changes", "table", "line", "there"), ADMITTED)
def test_what_was_not_tested_follows_from_the_record(
    changes: dict[str, Any], table: dict[str, Any], line: str, there: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(table))
    made = card(config(texts=EvaluationTexts(validation=Text(source="c4"), test=FINEWEB), **changes), folder=tmp_path)
    section = body(made).partition("## What was not tested")[2].partition("## ")[0]
    assert (line in section.replace("\\", "")) == there


@parametrize("name", ["a|b", "<script>alert(1)</script>", "`x`", "[a](http://b)", "# head", "{{ 7 * 7 }}"])
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


@slow
def test_the_hub_s_page_is_the_folder_s_card(sparse: Path, hub: tuple[Path, Any]) -> None:
    """Once uploaded it is what transformers finds, so that its own push leaves it as it is."""
    from transformers.utils.hub import create_and_tag_model_card

    shutil.copytree(sparse, hub[0] / "models" / "org" / "sparse")
    assert str(create_and_tag_model_card("org/sparse")) == str(ModelCard.load(sparse / "README.md"))
    assert huggingface_hub.metadata_load(sparse / "README.md")["tags"][:2] == ["atp-tune", "sparse"]

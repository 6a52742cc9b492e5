"""Questions about images: a tiny Llava that learned to name colours, asked by lm-eval through `evaluate`."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tinystudy import TOPICS, CommandLine, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    LlavaProcessor,
)

SIDE, PATCH, COUNT = 16, 8, 40
COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}
QUESTION = "<image> The colour is"
TASK = """\
task: colours
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{question}"
doc_to_image: [image]
doc_to_target: "{{{{colour}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: {longest}}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
"""
pytestmark = pytest.mark.slow


def picture(colour: str, draw: random.Random) -> Image.Image:
    """A square of almost one colour, wider than high."""
    return Image.new("RGB", (24, 18), tuple(value + draw.randrange(-30, 30) for value in COLOURS[colour]))


def make_model(place: Path) -> Path:
    """A Llava that answers by the colour of a picture, with its processor."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_special_tokens({
        "additional_special_tokens": ["<image>"], "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>",
    })  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    tower = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = AutoConfig.for_model("llava", text_config=text, vision_config=tower, image_token_id=image)
    model = AutoModelForImageTextToText.from_config(config)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        answers = [draw.choice(list(COLOURS)) for _ in range(12)]
        words = [f"{QUESTION} {answer}." for answer in answers]
        pictures = [picture(answer, draw) for answer in answers]
        batch = processor(text=words, images=pictures, padding="longest", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : len(tokenizer("<image>" * 4 + QUESTION.removeprefix("<image>")).input_ids)] = -100
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the data of the task."""
    made, draw = tmp_path_factory.mktemp("colours"), random.Random(1)
    make_model(made / "model")
    colours = [draw.choice(list(COLOURS)) for _ in range(COUNT)]
    rows = {"image": [picture(colour, draw) for colour in colours], "colour": colours}
    features = datasets.Features({"image": datasets.Image(), "colour": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(made / "colours.parquet"))
    return made


@pytest.fixture(autouse=True)
def data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def make_task(place: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    words = {"data": place / "colours.parquet", "kind": "generate_until", "question": QUESTION, "longest": 8, **changes}
    (folder / "colours.yaml").write_text(TASK.format(**words))
    return folder


def naive_hits(folder: Path, place: Path) -> list[bool]:
    """Whether each answer is right, one picture at a time, with transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    found = []
    for row in datasets.load_dataset("parquet", data_files=str(place / "colours.parquet"), split="train"):
        batch = processor(text=[QUESTION], images=[row["image"]], return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(ids, skip_special_tokens=True).split(".")[0]
        found.append(answer.strip() == row["colour"])
    return found


def test_a_folder_answers_as_by_hand(place: Path, tmp_path: Path, command: CommandLine) -> None:
    tasks = make_task(place, tmp_path / "tasks")
    answer = command.ok("evaluate", place / "model", "--tasks", f"{tasks}/", "--json", "--batch", 3)
    [task] = json.loads(answer.out)["tasks"]
    hits = naive_hits(place / "model", place)
    assert (task["metric"], task["items"]) == ("exact_match", COUNT)
    assert task["scores"]["model"]["exact_match"]["value"] == sum(hits) / COUNT > 0.9


def test_a_study_s_models_answer_and_the_sparse_folder_as_the_best(
    place: Path, tmp_path: Path, command: CommandLine
) -> None:
    for index, role in enumerate(("calibration", "validation", "test")):
        start = 100_000 + 20_000 * index
        (tmp_path / f"{role}.txt").write_text(TOPICS[start : start + 20_000])
    texts = "\n".join(
        f'[texts.{role}]\nsource = "file:{role}.txt"\nnsamples = 4\nseqlen = 32\n'
        for role in ("calibration", "validation", "test")
    )
    toml = f'sparsity = 0.6\n[model]\nsource = "{place / "model"}"\n{texts}\n[search]\ntrials = 3\nsampler = "random"\n'
    (tmp_path / "eyes.toml").write_text(toml)
    command.ok("--study", tmp_path / "eyes.toml", "--set", "continuations.tokens=0")
    tasks = make_task(place, tmp_path / "tasks")
    words = ("--tasks", f"{tasks}/", "--json", "--batch", 4)
    answer = command.ok("evaluate", "--config", tmp_path / "eyes.best.json", *words)
    [task] = json.loads(answer.out)["tasks"]
    shares = {name: scores["exact_match"]["value"] for name, scores in task["scores"].items()}
    assert shares["dense"] > 0.9
    assert task["best_minus_uniform"]["value"] == pytest.approx(shares["best"] - shares["uniform"])
    sparse = tmp_path / "sparse"
    command.ok("apply", "--config", tmp_path / "eyes.best.json", "--out", sparse)
    again = command.ok("evaluate", sparse, *words)
    assert json.loads(again.out)["tasks"][0]["scores"]["model"]["exact_match"]["value"] == shares["best"]
    assert shares["best"] == sum(naive_hits(sparse, place)) / COUNT


def lacking_processor(folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def other_token(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 5, "image_token_index": 5}))


@pytest.mark.parametrize(
    ("changes", "spoil", "said"),
    [
        ({"kind": "multiple_choice"}, None, "it is of type multiple_choice, and lm-eval asks about images by gener"),
        ({"longest": 250}, None, "--tasks: a question has "),
        ({"question": "The colour is"}, None, "--tasks: the model's processor does not take a question: ValueError: "),
        ({}, lacking_processor, "--tasks: colours asks about images, and "),
        ({}, other_token, "--tasks: the model's processor does not take a question: ValueError: "),
    ],
    ids=["type", "long", "unseen", "no processor", "other token"],
)
def test_what_would_be_answered_without_seeing_is_refused(
    place: Path, tmp_path: Path, command: CommandLine, changes: dict[str, Any], spoil: Any, said: str
) -> None:
    folder = Path(shutil.copytree(place / "model", tmp_path / "model"))
    if spoil:
        spoil(folder)
    tasks = make_task(place, tmp_path / "tasks", **changes)
    answer = command("evaluate", folder, "--tasks", f"{tasks}/")
    assert answer.code == 2
    [line] = answer.err.splitlines()
    assert said in line


def test_a_processor_that_drops_images(
    place: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be scored on the words alone."""

    def blind(self: Any, images: Any = None, text: Any = None, **options: Any) -> Any:
        words = [one.replace("<image>", "") for one in text]
        return BatchFeature(dict(self.tokenizer(words, padding="longest", return_tensors="pt")))

    monkeypatch.setattr(LlavaProcessor, "__call__", blind)
    answer = command("evaluate", place / "model", "--tasks", f"{make_task(place, tmp_path / 'tasks')}/")
    assert answer.code == 2
    said = "error: --tasks: a question has an image, and the processor makes no image token (<image>) of it\n"
    assert answer.err == said

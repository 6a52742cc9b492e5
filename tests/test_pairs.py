"""Calibration on pairs of image and text: the replay of the models themselves, studies, and what is refused."""

import copy
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from expect import parametrize, refused, slow
from families import CPU, few, multimodal
from PIL import Image
from tinystudy import make_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

from atp_tune.blocks.verification import check_batch, verified
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import Text
from atp_tune.config.prune import PruneConfig, make_plan
from atp_tune.config.study import ModelConfig
from atp_tune.events import Place
from atp_tune.inputs.items import Items
from atp_tune.inputs.windows import TOKEN_WINDOWS, _stacked, read_items, read_pairs
from atp_tune.run.session import Session, Setup
from atp_tune.scores import SCORES

SIDE, PATCH, TOKENS = 16, 8, 24
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]


WORDS = "The import statement combines two operations; it searches for the named module, then it binds"


def tokenizer() -> Any:
    made = copy.deepcopy(make_tokenizer())
    made.add_special_tokens({
        "additional_special_tokens": SPECIAL, "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>",
    })  # fmt: skip
    return made


def llava(words: Any) -> tuple[Any, Any]:
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        words, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return processor, {"vision_config": {**TOWER, "model_type": "clip_vision_model"}, "text": {"model_type": "llama"}}


def idefics3(words: Any) -> tuple[Any, Any]:
    size = {"longest_edge": SIDE}
    image = transformers.Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    processor = transformers.Idefics3Processor(image, words, image_seq_len=4)
    return processor, {"vision_config": TOWER, "text": {"model_type": "llama"}, "scale_factor": 1}


FAMILIES = {"llava": llava, "idefics3": idefics3}


def write_model(family: str, place: Path) -> Path:
    """A tiny random model with its processor."""
    words = tokenizer()
    processor, config = FAMILIES[family](words)
    text = {
        **TEXT, "vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id, **config.pop("text"),
    }  # fmt: skip
    tokens = {"image_token_id": words.convert_tokens_to_ids("<image>")}
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, text_config=text, **tokens, **config))
    with torch.no_grad():
        for tensor in made.parameters():
            if tensor.dim() >= 2:
                tensor.copy_(torch.randn_like(tensor) * 2 / tensor[0].numel() ** 0.5)
    made.eval().save_pretrained(place)
    processor.save_pretrained(place)
    return place


def write_pairs(file: Path, count: int = 12) -> Path:
    """Images of noise, and texts of which every third is too short."""
    draw = np.random.default_rng(0)
    images, texts = [], []
    words = WORDS.split()
    for index in range(count):
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (20, 20, 3)).astype(np.uint8)).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
        texts.append(
            " ".join(draw.permutation(words)[: 3 if index % 3 == 2 else 60].repeat(1 if index % 3 == 2 else 4))
        )
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": texts}), file)
    return file


def wanted(file: Path, **more: Any) -> Text:
    found = {"source": f"file:{file}", "images": "image", "column": "caption", "nsamples": 5, "seqlen": TOKENS}
    return Text.model_validate({**found, **more})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(family, tmp_path_factory.mktemp(family) / "model") for family in FAMILIES}


@parametrize("family", few(["llava", "idefics3"], ["idefics3"]))
def test_the_replay_is_the_model_itself(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder = ModelFolder(models[family], "content", family)
    pairs = read_pairs(wanted(write_pairs(tmp_path / "p.parquet")), folder, tmp_path)
    assert len(pairs) == 5 and pairs.positions == TOKENS
    checkpoint = Checkpoint.load(folder.path, torch.float32, CPU)
    replay, batch = verified(checkpoint, TOKEN_WINDOWS, SCORES["next-token"]), pairs.batch(CPU)
    check_batch(replay, batch, "texts.calibration.images")
    with torch.inference_mode():
        own = checkpoint.model(**batch.in_dtype(checkpoint.model.dtype)).logits
        blind = checkpoint.model(input_ids=batch.tensors["input_ids"]).logits if family == "llava" else None
        hidden = replay.embed(batch)
        for index in range(len(checkpoint.blocks)):
            hidden = replay.run(index, checkpoint.weights(index), hidden)
        assert torch.equal(replay.logits(batch, hidden), own)
    assert blind is None or not torch.allclose(blind, own)  # the images reach the language model


def test_pairs_are_those_of_the_processor(models: dict[str, Path], tmp_path: Path) -> None:
    """Cut to one length; too short ones are left out; drawn by the seed, in the part."""
    file, folder = write_pairs(tmp_path / "p.parquet"), ModelFolder(models["llava"], "content", "llava")
    table = pyarrow.parquet.read_table(file).to_pydict()
    processor = transformers.AutoProcessor.from_pretrained(models["llava"], backend="pil")

    def own(index: int) -> Any:
        image = Image.open(io.BytesIO(table["image"][index]["bytes"]))
        return processor(text=f"<image>{table['caption'][index]}", images=[image], return_tensors="pt")

    found = read_pairs(wanted(file), folder, tmp_path)
    for row, index in enumerate((0, 1, 3, 4, 6)):
        assert found.ids[row].tolist() == own(index)["input_ids"][0, :TOKENS].tolist()
        assert torch.equal(found.tensors["pixel_values"][row], own(index)["pixel_values"][0])
    assert set(found.tensors) == {"input_ids", "pixel_values"} and own(2)["input_ids"].shape[1] < TOKENS
    assert found.content == read_pairs(wanted(file), folder, tmp_path).content
    later = read_pairs(wanted(file, part=[0.5, 1.0], nsamples=3), folder, tmp_path)
    assert later.ids[0].tolist() == own(6)["input_ids"][0, :TOKENS].tolist()
    drawn = [read_pairs(wanted(file, sampling="random", seed=seed), folder, tmp_path) for seed in (0, 1)]
    assert drawn[0].content != drawn[1].content and len(drawn[0].thinned(2)) == 3


def test_a_chat_template_puts_the_image_before_the_text(models: dict[str, Path], tmp_path: Path) -> None:
    """As transformers does it itself; a BOS that the template writes is not written twice."""
    place = tmp_path / "model"
    shutil.copytree(models["idefics3"], place)
    processor = transformers.AutoProcessor.from_pretrained(place, backend="pil")
    processor.chat_template = (
        "<bos>{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}<image>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(place)
    file = write_pairs(tmp_path / "p.parquet")
    found = read_pairs(wanted(file), ModelFolder(place, "content", "idefics3"), tmp_path)
    table = pyarrow.parquet.read_table(file).to_pydict()
    image = Image.open(io.BytesIO(table["image"][0]["bytes"]))
    content = [{"type": "image", "image": image}, {"type": "text", "text": table["caption"][0]}]
    own = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert found.ids[0].tolist() == own["input_ids"][0, :TOKENS].tolist()
    assert torch.equal(found.tensors["pixel_values"][0], own["pixel_values"][0])
    assert found.ids[0].tolist().count(processor.tokenizer.bos_token_id) == 1


@slow
def test_wanda_on_pairs_is_a_naive_loop(models: dict[str, Path], tmp_path: Path) -> None:
    """Each linear loses its lowest |W|·‖X‖ by the inputs in the model as it is pruned so far, on images and text."""
    text = Text(source="package:pydoc_data.topics:topics", nsamples=2, seqlen=TOKENS)
    texts = {"calibration": wanted(write_pairs(tmp_path / "p.parquet")), "validation": text}
    setup = Setup(
        ModelConfig(source=str(models["idefics3"]), dtype="float32"), PruneConfig(), texts, Place(tmp_path, "cpu")
    )
    with Session.open(setup) as work:
        batch, plan = work.items("calibration"), make_plan("wanda", "uniform", work.budget(0.5), {}, work.pattern)
        model: Any = AutoModelForImageTextToText.from_pretrained(models["idefics3"], dtype=torch.float32)
        for block in work.prune(plan):
            name = work.checkpoint.block_names[block.index]
            norms = norms_of(model, model.get_submodule(name), batch.in_dtype(model.dtype))
            for linear in work.checkpoint.linears[block.index]:
                weight = model.get_submodule(f"{name}.{linear.name}").weight
                check_half_pruned(weight, norms[linear.name], block.weights[linear.key], linear.name)


def check_half_pruned(weight: torch.Tensor, norms: torch.Tensor, found: torch.Tensor, name: str) -> None:
    """By a loop over the rows: the half with the lowest |W|·‖X‖ is zero; the model goes on with what was found."""
    expected, scores = weight.detach().clone(), weight.abs() * norms
    for row in range(len(weight)):
        expected[row, scores[row].sort(stable=True)[1][: weight.shape[1] // 2]] = 0
    assert (found == expected).float().mean() > 0.99, name  # near-ties: other batches
    weight.data.copy_(found)


def norms_of(model: Any, block: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.update(
                {name: args[0].reshape(-1, args[0].shape[-1]).square().sum(0).sqrt()}
            )
        )
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(**tensors, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_a_model_whose_masks_depend_on_the_image_is_refused() -> None:
    model = multimodal("gemma3")
    checkpoint, ids = Checkpoint(model, CPU), torch.arange(24).reshape(2, 12)
    ids[:, 3:7] = model.config.image_token_id
    types = (ids == model.config.image_token_id).long()
    batch = Items.of({"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "token_type_ids": types})
    replay = verified(checkpoint, TOKEN_WINDOWS, SCORES["next-token"])
    said = r"^x: Gemma3ForConditionalGeneration passes its blocks values that depend on the image; leave the images out"
    with refused(said):
        check_batch(replay, batch, "x")


def test_pixels_without_a_row_for_each_image_are_refused() -> None:
    """Such as the patches of all images in one tensor, as Qwen-VL's processor makes them."""
    row = {"input_ids": torch.zeros(1, 6), "pixel_values": torch.zeros(16, 8)}
    with refused(r"^images: pixel_values of the processor has not one row for each image"):
        _stacked([row, row])
    with refused(r"^images: the processor cuts images of other sizes otherwise"):
        _stacked([row, {**row, "pixel_values": torch.zeros(12, 8)}])


@parametrize(
    ("more", "said"),
    [
        ({"seqlen": 3}, r"seqlen: 3 tokens do not hold the image of row 0 of .*; raise seqlen"),
        ({"nsamples": 11}, "nsamples: 8 of 12 pairs have 24 tokens with their image, 11 are asked for; lower it"),
        ({"images": "picture"}, 'images: .* has no "picture"; it has image, caption'),
        ({"column": "words"}, 'column: .* has no "words"; it has image, caption'),
        ({"source": "file:nix.parquet"}, "source: there is no file .*nix.parquet"),
    ],
)
def test_pairs_that_are_refused(more: dict[str, Any], said: str, models: dict[str, Path], tmp_path: Path) -> None:
    file, folder = write_pairs(tmp_path / "p.parquet"), ModelFolder(models["llava"], "content", "llava")
    with refused(rf"^texts\.calibration\.{said}"):
        read_items("calibration", wanted(file, **more), folder, tmp_path, False)


def test_a_model_of_text_alone_is_refused(tiny_place: Path, tmp_path: Path) -> None:
    with refused(r"^images: tiny reads text alone"):
        read_pairs(wanted(tmp_path / "p.parquet"), ModelFolder(tiny_place / "model", "content", "tiny"), tmp_path)


STUDY = """\
sparsity = 0.5
device = "cpu"

[model]
source = "model"
dtype = "float32"

[texts]
bos = false

[texts.calibration]
source = "file:pairs.parquet"
images = "image"
column = "caption"
nsamples = 5
seqlen = 24

[texts.validation]
source = "package:pydoc_data.topics:topics"
part = [0.0, 0.5]
nsamples = 4
seqlen = 24

[texts.test]
source = "package:pydoc_data.topics:topics"
part = [0.5, 1.0]
nsamples = 4
seqlen = 24

[search]
trials = 4
sampler = "random"

[continuations]
tokens = 0
"""

import json
import shutil
from pathlib import Path
from typing import Any

import naive
import torch
from expect import parametrize, slow
from families import (
    MULTIMODAL,
    multimodal,
    random_ids,
    replay_of,
    same_bits,
)
from tinystudy import CommandLine, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

from atp_tune.checkpoints.blocks import auto_class

IMAGE = 319  # the last token of the tiny tokenizer, which stands for a piece of an image


@parametrize("family", MULTIMODAL)
def test_replay_is_the_model_to_the_last_bit(family: str) -> None:
    model, ids = multimodal(family), random_ids(3)
    replay = replay_of(model)
    with torch.inference_mode():
        hidden = replay.embed(ids)
        for index, dense in enumerate(naive.states_of(model, replay.checkpoint.blocks, ids)):
            hidden = replay.run(index, replay.checkpoint.weights(index), hidden)
            assert torch.equal(hidden, dense)
        assert torch.equal(replay.logits(ids, hidden), model(input_ids=ids, use_cache=False).logits)


LANGUAGE, IMAGES = AutoModelForCausalLM, AutoModelForImageTextToText


@parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, LANGUAGE),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, IMAGES),
        ({"model_type": "llava"}, IMAGES),
        ({"model_type": "llava", "architectures": None}, IMAGES),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, IMAGES),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, LANGUAGE),
        ({"model_type": "mllama", "architectures": ["MllamaForCausalLM"]}, LANGUAGE),
        ({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]}, IMAGES),
        ({"model_type": "mllama"}, LANGUAGE),
        ({"model_type": "mllama", "architectures": 7}, LANGUAGE),
        ({"model_type": ["llava"]}, LANGUAGE),
        ({"model_type": "llava", "auto_map": {"AutoModelForCausalLM": "code.Own"}}, LANGUAGE),
        ({"model_type": "unheard-of"}, LANGUAGE),
        ({}, LANGUAGE),
    ],
)
def test_a_folder_says_which_class_it_is_of(config: dict[str, Any], expected: type, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert auto_class(tmp_path) is expected


def to_llava(place: Path) -> Any:
    """Makes a LLaVA of the place's model: the same language model, with a tower in front; the LLaVA."""
    small = LlamaForCausalLM.from_pretrained(place / "model")
    text = small.config.to_dict() | {"dtype": None}
    llava = multimodal("llava", **text)
    llava.config.image_token_id = IMAGE
    llava.model.language_model.load_state_dict(small.model.state_dict())
    llava.lm_head.load_state_dict(small.lm_head.state_dict())
    shutil.rmtree(place / "model")
    llava.save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    return llava


@slow
def test_a_llava_is_tuned_as_its_language_model_and_applied_with_its_tower(
    done: Path, tmp_path: Path, command: CommandLine
) -> None:
    language = json.loads((done / "tiny.best.json").read_text())
    command.ok("apply", "--config", done / "tiny.best.json", "--out", done / "sparse")
    sparse = LlamaForCausalLM.from_pretrained(done / "sparse").state_dict()
    place = tmp_path / "llava"
    shutil.copytree(done, place, ignore=shutil.ignore_patterns("tiny.db*", "tiny.best*", "sparse"))
    llava = to_llava(place)

    command.ok("--study", place / "tiny.toml")
    own = json.loads((place / "tiny.best.json").read_text())
    assert own["blocks"] == "model.language_model.layers"
    for key in ("scores", "plan", "sparsity"):
        assert own[key] == language[key], key

    out = place / "sparse"
    command.ok("apply", "--config", place / "tiny.best.json", "--out", out)
    pruned = AutoModelForImageTextToText.from_pretrained(out)
    for name, tensor in pruned.state_dict().items():
        part = name.removeprefix("model.language_model.")
        expected = sparse[name if name == "lm_head.weight" else f"model.{part}"] if part != name else None
        assert same_bits(tensor, llava.state_dict()[name] if expected is None else expected), name
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "the blocks of its language model" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "tokenizer = AutoTokenizer.from_pretrained" in card  # the place has no processor of images
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 7]])  # an image of 16 × 16 is 4 pieces of 8 × 8
    with torch.inference_mode():
        seen = pruned(input_ids=ids, pixel_values=torch.rand(1, 3, 16, 16)).logits
        assert seen.shape == (1, 6, 320)
        assert not torch.equal(seen, pruned(input_ids=ids, pixel_values=torch.rand(1, 3, 16, 16)).logits)

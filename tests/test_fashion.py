"""examples/fashion: the conversion of its graph, its classifier, and what the study says before it was run."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from tinystudy import CommandLine

SCRIPT = Path(__file__).parents[1] / "examples" / "fashion" / "prepare.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_fashion", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_names_the_command_that_it_needs(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "studies" / "fashion.toml"
    study.parent.mkdir()
    study.write_text((SCRIPT.parents[2] / "studies" / "fashion.toml").read_text())
    assert command("plan", "--study", study).error == (
        f"model.source: there is no folder {tmp_path}/build/fashion/model; make it with: python {SCRIPT}"
    )


@pytest.mark.slow
def test_a_backbone_in_onnx_is_that_of_transformers(script: ModuleType, tmp_path: Path) -> None:
    """A graph with the names that the exporter gives: the folder's hidden states are the model's own."""
    import onnx
    from onnx import helper, numpy_helper

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    former = {new: old for old, new in script.RENAMED.items()}
    tensors, nodes = [], []
    for present, tensor in model.state_dict().items():
        name = present
        for new, old in former.items():
            name = name.replace(new, old)
        if name.endswith(".weight") and tensor.dim() == 2:
            tensors.append(numpy_helper.from_array(tensor.T.contiguous().numpy(), f"onnx::MatMul_{len(tensors)}"))
            place = "/backbone/" + name.removesuffix(".weight").replace(".", "/")
            nodes.append(helper.make_node("MatMul", ["x", tensors[-1].name], ["y"], name=f"{place}/MatMul"))
        elif name == "embeddings.position_embeddings":
            tensors += [
                numpy_helper.from_array(part.contiguous().numpy(), f"onnx::{key}")
                for key, part in (("Reshape_2", tensor[:, 1:]), ("Concat_1", tensor[:, :1]))
            ]
        elif name != "embeddings.mask_token":
            tensors.append(numpy_helper.from_array(tensor.numpy(), f"backbone.{name}"))
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "m.onnx")
    script.save_backbone(tmp_path / "m.onnx", tmp_path / "out")
    found = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(found(pixels).last_hidden_state, model(pixels).last_hidden_state)

from pathlib import Path

import pytest
import torch
from families import ALL, checkpoint_of, tiny
from safetensors.torch import save_file

from atp_tune.checkpoints.headers import read_sizes
from atp_tune.errors import UserError


@pytest.mark.parametrize("family", ALL)
def test_sizes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sizes = read_sizes(tmp_path)
    blocks = checkpoint_of(model).blocks
    assert sizes.blocks == tuple(sum(t.numel() for t in block.state_dict().values()) for block in blocks)
    assert sizes.total == sum(t.numel() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert sizes.bytes == 4 * sizes.total
    assert sizes.shell == sizes.total - sum(sizes.blocks)


def test_ten_and_more_blocks_are_in_order(tmp_path: Path) -> None:
    save_file({f"h.{i}.w": torch.ones(i + 1) for i in range(12)}, tmp_path / "a.safetensors")
    assert read_sizes(tmp_path).blocks == tuple(range(1, 13))


@pytest.mark.parametrize("content", [b"", b"nonsense that is long enough", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 20])
def test_what_is_no_header_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"is no safetensors file; download it again$"):
        read_sizes(tmp_path)


def test_a_model_without_blocks(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="name no blocks"):
        read_sizes(tmp_path)

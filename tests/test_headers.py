import json
from pathlib import Path
from typing import Any

from expect import parametrize, refusal, refused
from families import ALL, checkpoint_of, tiny

from atp_tune.checkpoints.files import check_claims, read_sizes


@parametrize("family", ALL)
def test_sizes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sizes = read_sizes(tmp_path)
    blocks = checkpoint_of(model).blocks
    assert sizes.blocks == tuple(sum(t.numel() for t in block.state_dict().values()) for block in blocks)
    assert sizes.total == sum(t.numel() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert sizes.bytes == 4 * sizes.total


@parametrize("content", [b"", b"nonsense that is long enough", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 20])
def test_what_is_no_header_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with refused(r"is no safetensors file; download it again$"):
        read_sizes(tmp_path)


def header(**entry: Any) -> bytes:
    text = json.dumps({"a.0.w": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@parametrize(
    "content",
    [
        header(), header(shape=5, data_offsets=[0, 4]), header(shape=[1], data_offsets=[0]),
        header(shape=["x"], data_offsets=[0, 4]), header(shape=[-1], data_offsets=[0, 4]),
        header(shape=[1], data_offsets=[-4, 0]), (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)  # fmt: skip
def test_entries_of_another_kind_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with refused(r"is no safetensors file; download it again$"):
        read_sizes(tmp_path)


@parametrize(
    ("changed", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09, but its files hold "),
        ({"text_config": {"vocab_size": 10**12}}, "vocab_size is 1e+12, but its files hold "),
    ],
)
def test_a_config_that_claims_more_than_there_is(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    check_claims(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    assert words in refusal(check_claims, tmp_path)


@parametrize("family", ALL)
def test_a_config_that_claims_what_there_is(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    check_claims(tmp_path)

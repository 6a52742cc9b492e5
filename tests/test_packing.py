"""Packed folders: the bits of the format, packing and unpacking, every way to load one, and damaged folders."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from expect import parametrize, refused, slow
from families import ALL, MULTIMODAL, TOKENS, VOCABULARY, bench_of, few
from plans import planned
from safetensors.torch import load_file, save_file
from tinystudy import CommandLine
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    logging,
)

from atp_tune.checkpoints import convert
from atp_tune.checkpoints.convert import ABOUT, unpack_folder
from atp_tune.checkpoints.models import resolve
from atp_tune.config.study import ModelConfig
from atp_tune.folders.packing import pack_folder
from atp_tune.packed import register
from atp_tune.packed.layout import pack, zero_share
from atp_tune.packed.modeling_atp_sparse import (
    BITMASK,
    SCALES,
    VALUES,
    SparseLinear,
    unpack,
)
from atp_tune.search.objective import Record

REPO = Path(__file__).parents[1]
KNOWN = {**{name: name for name in ALL}, **{name: name for name in MULTIMODAL}}
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    logging.set_verbosity_error()


def sparse_model(name: str, share: float = 0.6) -> Any:
    """A tiny random model of a family whose matrices, but for embeddings and head, have a share of zeros."""
    torch.manual_seed(0)
    if name in ALL:
        kind, settings = ALL[name]
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    else:
        text, tower, rest = MULTIMODAL[name]
        config = AutoConfig.for_model(name, text_config=text, vision_config=tower, **rest)
        model = AutoModelForImageTextToText.from_config(config)
    make_sparse(model.get_decoder() or model, share)
    return model.eval()


@torch.no_grad()
def make_sparse(model: Any, share: float) -> None:
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and not any(word in key for word in ("embed", "wte", "wpe", "word", "lm_head")):
            parameter[torch.rand_like(parameter) < share] = 0
            parameter.view(-1)[0] = -0.0


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the sparse folder of a family in several shards and the packed one; returns the latter."""

    def made(name: str = "llama-tied", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        sparse_model(name).to(dtype).save_pretrained(tmp_path / "sparse", max_shard_size="40KB")
        pack_folder(tmp_path / "sparse", tmp_path / "packed", **options)
        return tmp_path / "packed"

    return made


def auto(name: str) -> Any:
    return AutoModelForCausalLM if name in ALL else AutoModelForImageTextToText


def logits(model: Any, variant: str = "torch") -> Tensor:
    """By torch's products with the unpacked weights, so that bits can be compared; `variant`: of the kernel, or ""."""
    ids = torch.randint(2, VOCABULARY - 7, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("ATP_TUNE_ISA", variant)
        choose_again(model)
        found: Tensor = model(input_ids=ids).logits
    choose_again(model)
    return found


def choose_again(model: Any) -> None:
    """Packed linears take a variant of the kernel when they are first used."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module._matrix = None


def bytes_of(folder: Path) -> int:
    """Bytes of all tensors of a folder."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def same_files(one: Path, other: Path) -> bool:
    names, others = ({file.name for file in folder.iterdir()} for folder in (one, other))
    _, wrong, errors = filecmp.cmpfiles(one, other, names, shallow=False)
    return names == others and not wrong and not errors


# the format


@parametrize("columns", [1, 7, 8, 9, 33])
@parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_equals_packbits(columns: int, dtype: torch.dtype) -> None:
    dense = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    dense[dense < 0.3] = 0
    dense[1], dense[2, 0] = 0, -0.0
    found = pack(dense, "same")
    kept = (dense != 0).numpy()
    kept[2, 0] = True
    assert np.array_equal(found[BITMASK].numpy(), np.packbits(kept, axis=-1, bitorder="little"))
    assert found[VALUES].tolist() == [
        float(w) for row, bits in zip(dense, kept, strict=True) for w in row[torch.tensor(bits)]
    ]
    again = unpack(found[VALUES], found[BITMASK], columns)
    integers = {2: torch.int16, 4: torch.int32}[dense.element_size()]
    assert torch.equal(again.view(integers), dense.view(integers))
    assert zero_share(dense) == pytest.approx(1 - kept.mean())


@parametrize("group_size", [None, 32, 96])
def test_int8_is_the_nearest_code_of_each_group(group_size: int | None) -> None:
    dense = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    dense[dense.abs() < 0.5] = 0
    dense[1] = 0
    found = pack(dense, "int8", group_size)
    groups = 2 if group_size == 32 else 1  # 96 does not divide 64: one for the row
    assert found[SCALES].shape == (3, groups)
    again = unpack(found[VALUES], found[BITMASK], 64, found[SCALES])
    for row in range(3):
        for column in range(64):
            step = float(dense[row].view(groups, -1)[column * groups // 64].abs().max()) / 127
            code = round(float(dense[row, column]) / step) if step else 0
            assert float(again[row, column]) == pytest.approx(code * step, rel=1e-6)


def test_bits_that_disagree_with_the_values_are_refused() -> None:
    found = pack(torch.eye(4, 9), "same")
    with pytest.raises(ValueError, match="3 values of 9 columns, but the bitmask has 4 bits"):
        unpack(found[VALUES][:3], found[BITMASK], 9)
    found[BITMASK][0, 1] |= 128  # behind the last column
    with pytest.raises(ValueError, match="has 5 bits"):
        unpack(torch.ones(5), found[BITMASK], 9)


@slow
def test_the_reader_in_the_documentation(make: Make, tmp_path: Path) -> None:
    text = (REPO / "docs/formats.md").read_text()
    (code,) = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    for options in ({}, {"kind": "int8", "group_size": 32}):
        shutil.rmtree(tmp_path / "packed", ignore_errors=True)
        folder = make("gpt2", **options)
        unpack_folder(folder, tmp_path / f"again{len(options)}")
        found: dict[str, Any] = {"sys": None}
        exec(code.replace("sys.argv[1]", repr(str(folder))), found)
        expected = {
            k: v for f in (tmp_path / f"again{len(options)}").glob("*.safetensors") for k, v in load_file(f).items()
        }
        assert found["tensors"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert np.array_equal(found["tensors"][name], tensor.numpy()), name


# every family


@parametrize("name", few(KNOWN, ("llama-tied", "mixtral")))
def test_a_family_is_packed_loaded_saved_and_unpacked(name: str, make: Make, tmp_path: Path) -> None:
    packed = make(name)
    sparse, load = tmp_path / "sparse", auto(name).from_pretrained
    expected = logits(load(sparse))
    model = load(packed)
    assert torch.equal(logits(model), expected)
    assert_close(logits(model, ""), expected, rtol=1e-4, atol=1e-5)
    table = json.loads((packed / "config.json").read_text())["atp_sparse"]
    kept = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(kept) == len(table["linears"]) and len(kept) + len(table["stored"]) >= 12
    assert type(model).__mro__[1] is type(load(sparse)) and model.config.model_type == load(sparse).config.model_type
    dense = load(packed, dequantize=True)
    assert type(dense) is type(load(sparse)) and torch.equal(logits(dense), expected)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    unpack_folder(packed, tmp_path / "unpacked")
    assert same_files(sparse, tmp_path / "unpacked")


def test_two_processes_unpack_one_folder_into_the_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one takes what the other has written."""
    model, begin = ModelConfig(source=str(make())), convert._write_shard

    def late(*given: Any) -> Any:
        monkeypatch.setattr(convert, "_write_shard", begin)
        resolve(model, Path())
        return begin(*given)

    monkeypatch.setattr(convert, "_write_shard", late)
    folder = resolve(model, Path()).path
    assert [*folder.parent.iterdir()] == [folder]


@slow
@parametrize("options", [{"kind": "bf16"}, {"kind": "int8"}, {"kind": "int8", "group_size": 32}])
def test_rounded_values(options: dict[str, Any], make: Make, tmp_path: Path) -> None:
    packed = make(**options)
    unpack_folder(packed, tmp_path / "unpacked")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert rounded.dtype == torch.float32
    assert torch.equal(logits(model), logits(rounded))
    assert_close(logits(model, ""), logits(rounded), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")))
    linear = next(module for module in model.modules() if isinstance(module, SparseLinear))
    assert linear.weight_values.dtype == (torch.int8 if options["kind"] == "int8" else torch.bfloat16)
    low = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    kept = [module for module in low.modules() if isinstance(module, SparseLinear)]
    assert {module.weight_values.dtype for module in kept} == {linear.weight_values.dtype}
    assert all(module.weight_scales is None or module.weight_scales.dtype == torch.float32 for module in kept)


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("name", few(["llama-tied", "gpt2", "mixtral", "gpt_oss"], ["gpt2"]))
def test_a_trial_foretells_the_bytes_of_its_packed_folder(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Counted from its zeros and the headers of the dense files; the first block has too few zeros to be packed."""
    model = sparse_model(name, 0.0).to(dtype)
    for key, parameter in model.named_parameters():
        parameter.data += 0.1 * ("bias" in key)  # those of gpt_oss's experts are matrices, of zeros when they are new
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    context = bench_of(model.float(), folder=tmp_path / "dense")
    record = Record(context)
    sparsities = (0.3, *([0.6] * (len(context.checkpoint.blocks) - 1)))
    for block in context.prune(planned("wanda", "uniform", sparsities)):
        record.block(block)
        for key, tensor in block.weights.items():
            context.checkpoint.blocks[block.index].get_parameter(key).data = tensor
    model.to(dtype).save_pretrained(tmp_path / "sparse", max_shard_size="40KB")
    pack_folder(tmp_path / "sparse", tmp_path / "packed")
    dense, packed = (bytes_of(tmp_path / folder) for folder in ("dense", "packed"))
    assert context.stored_bytes == (dense, dtype.itemsize)
    assert record.close()["packed_bytes"] == packed < dense


# ways to load it


LOADS = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
packed, out, trusts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
said = []
for number, trusted in enumerate(trusts):
    try:
        model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=trusted)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
        said.append("refused")
        continue
    ids = torch.randint(2, VOCABULARY - 7, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    save_file({"logits": model(input_ids=ids).logits.detach()}, f"{out}/{number}.safetensors")
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.save_pretrained(f"{out}/saved{number}")
    AutoModelForCausalLM.from_pretrained(f"{out}/saved{number}", trust_remote_code=trusted)
    said.append("loaded")
json.dump(said, open(f"{out}/said.json", "w"))
assert not {"optuna", "datasets"} & set(sys.modules)
"""


@slow
@parametrize(
    ("lines", "said"),
    [
        ("import atp_tune; import transformers", ["loaded"] * 3),
        ("import transformers.models.auto.modeling_auto; import atp_tune", ["loaded"] * 3),
        ("import sys; sys.modules['atp_tune'] = None", ["refused", "refused", "loaded"]),
    ],
)
def test_with_and_without_atp_tune(lines: str, said: list[str], make: Make, tmp_path: Path) -> None:
    """In a process that has imported nothing; without trust in the folder's code first, then with it."""
    words = [str(make()), str(tmp_path), json.dumps([False, None, True])]
    code = f"{lines}\nVOCABULARY, TOKENS = {VOCABULARY}, {TOKENS}{LOADS}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "said.json").read_text()) == said
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"))
    for number, word in enumerate(said):
        if word == "loaded":
            assert torch.equal(load_file(tmp_path / f"{number}.safetensors")["logits"], expected)


def test_without_the_kernel_torch_multiplies(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_TUNE_ISA", "torch")
    model = AutoModelForCausalLM.from_pretrained(make())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, dense(ids).logits)


def test_weights_that_are_loaded_into_it(make: Make, tmp_path: Path) -> None:
    """The kernel keeps where the values of each row start, which other bits change."""
    model = AutoModelForCausalLM.from_pretrained(make())
    linear = next(module for module in model.modules() if isinstance(module, SparseLinear))
    x = torch.randn(2, linear.in_features)
    linear(x)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    state["weight_bitmask"] = state["weight_bitmask"].flip(0)
    linear.load_state_dict(state)
    assert_close(linear(x), x @ linear.weight.T, rtol=1e-5, atol=1e-6)


# folders that are damaged, or a stranger's


def edited(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    table = json.loads((folder / name).read_text())
    change(table)
    (folder / name).write_text(json.dumps(table))


def first(table: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(table["atp_sparse"]["linears"].values()))
    return found


def changed_tensor(folder: Path, end: str, change: Callable[[Tensor], Tensor | None]) -> None:
    file = next(file for file in sorted(folder.glob("*.safetensors")) if any(k.endswith(end) for k in load_file(file)))
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.endswith(end))
    if (new := change(tensors.pop(name))) is not None:
        tensors[name] = new
    save_file(tensors, file, metadata={"format": "pt"})


def flipped(mask: Tensor) -> Tensor:
    mask[0, 0] ^= 1
    return mask


WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    ("version", lambda f: edited(f, lambda t: t["atp_sparse"].update(version=3)), "version 1 or 2"),
    ("no table", lambda f: edited(f, lambda t: t.pop("atp_sparse")), "version 1"),
    ("another count", lambda f: edited(f, lambda t: first(t).update(nonzeros=5)), "its files have no"),
    ("another shape", lambda f: edited(f, lambda t: first(t).update(shape=[8, 8])), r"no linear of shape \[8, 8\]"),
    (
        "another name",
        lambda f: edited(f, lambda t: t["atp_sparse"]["linears"].update({"x.weight": first(t)})),
        "no linear x",
    ),
    ("bits", lambda f: changed_tensor(f, BITMASK, flipped), "but the bitmask has"),
    ("missing values", lambda f: changed_tensor(f, VALUES, lambda _: None), "its files have no"),
    ("cut values", lambda f: changed_tensor(f, VALUES, lambda t: t[:-1].clone()), "its files have no"),
]


@parametrize(("change", "said"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_damaged_folder_is_not_loaded(change: Callable[[Path], None], said: str, make: Make) -> None:
    folder = make()
    change(folder)
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(folder)


DAMAGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("a value", lambda f: changed_tensor(f, VALUES, lambda t: t + 1), "is not what was packed"),
    ("bits", lambda f: changed_tensor(f, BITMASK, flipped), "but the bitmask has"),
    ("another tensor", lambda f: changed_tensor(f, "norm.weight", lambda t: t + 1), "is not what was packed"),
    ("missing", lambda f: changed_tensor(f, VALUES, lambda _: None), "has no tensor"),
    ("no list", lambda f: edited(f, lambda t: t["atp_sparse"].pop("stored")), "is damaged"),
    ("no values", lambda f: edited(f, lambda t: t["atp_sparse"].pop("values")), "is damaged"),
    ("no class", lambda f: edited(f, lambda t: t["atp_sparse"].pop("class")), "is damaged"),
    ("a list", lambda f: edited(f, lambda t: t["atp_sparse"].update(linears=[])), "is damaged"),
    ("no shape", lambda f: edited(f, lambda t: first(t).pop("shape")), "is damaged"),
    ("an empty shape", lambda f: edited(f, lambda t: first(t).update(shape=[])), "is damaged"),
    ("a large shape", lambda f: edited(f, lambda t: first(t).update(shape=[10**9, 10**9])), "is not of"),
    ("a word", lambda f: edited(f, lambda t: first(t).update(shape=[24, "24"])), "is damaged"),
    ("floating bits", lambda f: changed_tensor(f, BITMASK, lambda t: t.float()), "is not of"),
    ("the folder above", lambda f: edited(f, lambda t: t["added"].append(".."), ABOUT), "is not what `pack` writes"),
    ("outside", lambda f: edited(f, lambda t: t["files"].update({"../x": ""}), ABOUT), "is not what `pack` writes"),
    (
        "a header",
        lambda f: edited(f, lambda t: t["headers"].update({next(iter(t["headers"])): "{"}), ABOUT),
        "safetensors",
    ),
]


@parametrize(("change", "said"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_a_damaged_folder_is_not_unpacked(
    change: Callable[[Path], None], said: str, make: Make, tmp_path: Path
) -> None:
    folder = make()
    change(folder)
    with refused(said):
        unpack_folder(folder, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() and not (tmp_path.parent / "x").exists()


def test_what_cannot_be_packed_is_refused(make: Make, tmp_path: Path) -> None:
    packed = make()
    cases = [(packed, "is packed already"), (tmp_path, "holds no config.json"), (tmp_path / "x", "is no folder")]
    for source, said in cases:
        with refused(said):
            pack_folder(source, tmp_path / "out")
    with refused("is no packed folder"):
        unpack_folder(tmp_path / "sparse", tmp_path / "out")
    with refused("exists already"):
        pack_folder(tmp_path / "sparse", packed)
    assert not (tmp_path / "out").exists()


# in the rest of the program


@slow
def test_the_commands(done: Path, command: CommandLine) -> None:
    command.ok("apply", "--config", done / "tiny.best.json", "--out", done / "sparse")
    answer = command.ok("pack", done / "sparse", "--out", done / "packed")
    assert "linears" in answer.out and "load it: import atp_tune" in answer.out
    command.ok("apply", "--verify", done / "packed")
    card, packed_card = ((done / name / "README.md").read_text() for name in ("sparse", "packed"))
    of_dense_files = ("**The zeros are stored in dense files. By themselves", "No other library is needed.")
    of_packed = (
        "## Packed",
        "**The zeros are not stored**",
        "It needs `import atp_tune` before it, or `trust_remote_code",
    )
    assert all(words in card and words not in packed_card for words in of_dense_files)
    assert all(words in packed_card and words not in card for words in of_packed)
    again = "apply --config atp_tune.json --out DIR"
    assert f"{again}\n" in card and f"{again} --packed\n" in packed_card
    command.ok("unpack", done / "packed", "--out", done / "again")
    assert same_files(done / "sparse", done / "again")
    command.ok("apply", "--config", done / "tiny.best.json", "--out", done / "direct", "--packed")
    for file in (done / "packed").glob("*.safetensors"):
        assert file.read_bytes() == (done / "direct" / file.name).read_bytes()
    assert not [path for path in done.iterdir() if path.name.startswith(".")]
    answer = command("pack", done / "sparse", "--out", done / "rounded", "--values", "int8")
    assert re.search(r"perplexity on the test text: \S+ ± \S+ before rounding, \S+ ± \S+ after", answer.out)
    assert "before rounding" in (done / "rounded" / "README.md").read_text()
    answer = command("pack", done / "sparse", "--out", done / "x", "--group-size", "64")
    assert answer.code == 2 and "only with --values int8" in answer.err

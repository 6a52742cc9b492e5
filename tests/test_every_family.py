"""Every causal and image-text type that transformers knows, as a tiny random model: pruned right, or refused.

The fast suite sees those in `FAST`, and one hybrid from folder to folder; the slow one sees all.
This file writes `docs/families.md`: ATP_TUNE_WRITE_DOCS=1 python -m pytest tests/test_every_family.py -n 0 -m ''
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import naive
import pytest
import torch
import transformers
from everytype import model_of, types
from expect import parametrize, slow
from families import CPU, bench_of, check, few, nlls_of, same_bits
from safetensors.torch import load_file
from tinystudy import CommandLine, make_tokenizer, settings
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.config.prune import make_plan
from atp_tune.errors import UserError

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
WRITES = os.environ.get("ATP_TUNE_WRITE_DOCS") == "1"
LEAST = 110  # types that are to be equal
EQUAL = "llama gemma3_text gpt2 deepseek_v3 gpt_oss nemotron_h qwen3_next mamba llava qwen2_5_vl"
REFUSED = "bert hrm_text gemma4_text llama4_text florence2 blt hy_v4 git kosmos-2"  # each for another reason
FAST = {*EQUAL.split(), *REFUSED.split()}  # the types that the fast suite sees
HEAD = f"""# Model families

`tests/test_every_family.py` builds every causal and image-text type of transformers {transformers.__version__}, as a tiny random model in float32 on a CPU,
and writes this table.

- **equal**: run block by block, the model gives logits bit-identical to those of its own forward, for batches of several shapes. After
  Wanda at 50 %, the windows' NLLs are those of the model with the same zeros in its own weights. The second column names the list of
  blocks.
- **refused**: loading the model ends with one line and exit code 2, before anything is measured.
- **not built**: no tiny model could be built, so the type is not tested.

Whenever a model is loaded, its replay block by block is compared with its own forward on one short text. This check also covers
models that are not in this table and models with their own code.

"""  # noqa: E501 - as long as the lines of the other documents


class Seen(NamedTuple):
    """What came of one type."""

    result: str
    why: str


WORDS = re.compile(
    r"^model (?!module)\w+: |^model (?=module)|; such a model cannot be pruned block by block$"
)  # said of all
SEEN: dict[str, Seen] = {}


@pytest.fixture(autouse=True, scope="module")
def table() -> Iterator[None]:
    yield
    if WRITES and len(SEEN) == len(types()):
        DOCUMENT.write_text(written(SEEN))


def written(seen: dict[str, Seen]) -> str:
    """The document, from what was seen."""
    counts = Counter(found.result for found in seen.values())
    sums = ", ".join(f"{counts[result]} {result}" for result in ("equal", "refused", "not built"))
    rows = [
        f"| {found.result} | {found.why} | {', '.join(kind for kind in sorted(seen) if seen[kind] == found)} |"
        for found in sorted(set(seen.values()))
    ]
    return "\n".join([f"{HEAD}{len(seen)} types: {sums}, 0 wrong.\n", "| | | types |", "|---|---|---|", *rows, ""])


def known() -> dict[str, Seen]:
    """The rows of the committed table, if it is of this version of transformers."""
    text = DOCUMENT.read_text()
    if f"transformers {transformers.__version__}," not in text:
        return {}
    rows = re.findall(r"^\| ([a-z ]+) \| (.+) \| (.+) \|$", text, re.M)
    return {kind: Seen(result, why) for result, why, kinds in rows for kind in kinds.split(", ")}


@slow
@parametrize("kind", few(types(), FAST))
@pytest.mark.filterwarnings("ignore")
def test_a_type_is_pruned_right_or_refused(kind: str) -> None:
    SEEN[kind] = found = see(kind)
    rows = {} if WRITES else known()
    assert found == rows.get(kind, found)


def test_most_types_are_equal() -> None:
    counts = Counter(found.result for found in known().values())
    assert not known() or (counts["equal"] >= LEAST and sum(counts.values()) == len(types()))


def see(kind: str) -> Seen:
    """Builds a type and prunes it; AssertionError where a number is wrong."""
    try:
        model = model_of(kind).requires_grad_(False)  # torch rounds products of what wants a gradient otherwise
    except Exception as error:
        return Seen("not built", reason(error))
    try:
        context = bench_of(model, ids=text)
    except UserError as error:
        line = str(error)
        assert line.isprintable()
        return Seen("refused", WORDS.sub("", line))
    check_logits(model, context.replay)
    check_pruned(model, context)
    linears = {linear.module.partition(".")[2] or linear.module for row in context.checkpoint.linears for linear in row}
    return Seen("equal", f"{context.checkpoint.blocks_name}; {len(linears)} kinds of linears")


def reason(error: Exception) -> str:
    """The last line of an error, short."""
    line = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    return f"{type(error).__name__}: {line[:100]}".replace("|", "/")


def text(windows: int, tokens: int = 13, seed: int = 0) -> Tensor:
    """Random ids that stand for no image."""
    return torch.randint(3, 60, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def check_logits(model: Any, replay: Any) -> None:
    for windows, tokens in ((1, 13), (3, 13), (2, 7)):
        ids = text(windows, tokens, seed=windows)
        with torch.inference_mode():
            hidden = replay.embed(ids)
            for index in range(len(replay.checkpoint.blocks)):
                hidden = replay.run(index, replay.checkpoint.weights(index), hidden)
            own = model(input_ids=ids, use_cache=False).logits
            assert own.isfinite().all()
            assert torch.equal(replay.logits(ids, hidden), own)


def check_pruned(model: Any, context: Any) -> None:
    """NLLs of the pruned blocks are those of the model with these weights; half of each block's linears is zero."""
    pruned = list(context.prune(make_plan("wanda", "uniform", context.budget(0.5), {})))
    found = nlls_of(context, ((block.index, block.weights) for block in pruned), "validation")
    own = dict(model.named_parameters(remove_duplicate=False))
    for block in pruned:
        for linear in context.checkpoint.linears[block.index]:
            weight = linear.matrix(block.weights[linear.key])
            assert int((weight == 0).sum()) >= linear.out_features * (linear.in_features // 2)
        with torch.no_grad():
            for key in {linear.key for linear in context.checkpoint.linears[block.index]}:
                own[f"{context.checkpoint.blocks_name}.{block.index}.{key}"].copy_(block.weights[key])
    assert found == pytest.approx(naive.nlls_of(model, text(7, 13, seed=1)), rel=1e-5)


HYBRIDS = {
    "qwen3_next": (),
    "qwen3_5_text": ("model.offload=cpu",),
    "jamba": ("prune.statistics=sequential",),
    "falcon_h1": ("prune.pruners=['sparsegpt']",),
    "nemotron_h": ("prune.statistics=dense",),
    "lfm2": ("model.offload=disk",),
    "lfm3": ("prune.pruners=['magnitude']",),
    "olmo_hybrid": ("prune.statistics=sequential", "model.offload=cpu"),
    "mamba": ("search.objective=['perplexity', 'kl']",),
}
HYBRIDS = {kind: options for kind, options in HYBRIDS.items() if kind in CONFIG_MAPPING}  # this transformers has them


KEPT = r"conv(1d)?\.weight|dt_proj|A_log|\bD\b|norm|embed|lm_head|router|\bgate\.weight"


def exchange(place: Path, kind: str) -> dict[str, Tensor]:
    """Puts a model of another type into a place; its tensors as its folder holds them."""
    vocabulary = {"vocab_size": 320} | ({"vocab_size_per_layer_input": 320} if kind == "gemma4_text" else {})
    model, tokenizer = model_of(kind, **vocabulary), make_tokenizer()
    shutil.rmtree(place / "model")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return load_file(place / "model" / "model.safetensors")


@slow
@parametrize("kind", few(HYBRIDS, ["nemotron_h"]))
@pytest.mark.filterwarnings("ignore")
def test_a_hybrid_goes_from_its_folder_to_a_sparse_one(kind: str, place: Path, command: CommandLine) -> None:
    dense = exchange(place, kind)
    options = settings(*HYBRIDS[kind], "search.trials=2")
    command.ok("plan", "--study", place / "tiny.toml", *options)
    command.ok("--study", place / "tiny.toml", *options)
    best = sorted(place.glob("*.best.json"))
    source = ("apply", "--config", best[0]) if best else ("prune", "--study", place / "tiny.toml", *options)  # a front
    applied = command.ok(*source, "--out", place / "sparse")
    assert "warning" not in applied.err + applied.out
    sparse = load_file(place / "sparse" / "model.safetensors")
    assert sparse.keys() == dense.keys()
    changed = {name for name in dense if not same_bits(dense[name], sparse[name])}
    assert changed and all(sparse[name].count_nonzero() < 0.7 * sparse[name].numel() for name in changed)
    assert [name for name in changed if re.search(KEPT, name)] == []
    assert AutoModelForCausalLM.from_pretrained(place / "sparse").config.model_type == kind


@slow
@parametrize("kind", few(HYBRIDS, ["falcon_h1"]))
@pytest.mark.filterwarnings("ignore")
def test_recurrent_states_start_anew_in_each_window(kind: str) -> None:
    context = bench_of(model_of(kind), ids=text)
    first = nlls_of(context, context.blocks(None), "validation")
    assert nlls_of(context, context.blocks(None), "validation") == first
    search = context._roles["validation"]
    search.items = search.items.flip(0)
    assert nlls_of(context, context.blocks(None), "validation") == pytest.approx(first[::-1], rel=1e-5)
    alone = [naive.nlls_of(context.checkpoint.model, ids[None])[0] for ids in text(7, 13, seed=1)]
    assert first == pytest.approx(alone, rel=1e-5)


@parametrize(
    ("kind", "said"),
    [
        ("bert", "predicts tokens from those that come later"),
        ("hrm_text", "runs its blocks several times"),
        ("hy_v4", "gives block 0 hidden states that are not"),
        ("gemma4_text", "passes its blocks values that depend on the tokens"),
        ("llama4_text", "gate_up_proj has 3 dimensions"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_is_refused_by_the_command(kind: str, said: str, place: Path, command: CommandLine) -> None:
    exchange(place, kind)
    assert said in command("--study", place / "tiny.toml").error  # one line, exit code 2
    assert not list(place.glob("*.best.json"))


def test_a_model_of_a_mixture_of_blocks_is_one_list() -> None:
    """Attention, a recurrence, experts and a plain MLP in one list of blocks, each with linears of its own."""
    checkpoint = Checkpoint(model_of("nemotron_h"), CPU)
    names = [{linear.module for linear in row} for row in checkpoint.linears]
    assert [bool(row) for row in names] == [True] * 4
    assert len({tuple(sorted(row)) for row in names}) == 4
    check(checkpoint)

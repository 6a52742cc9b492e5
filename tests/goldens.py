"""A dozen tiny studies, and all that is shown and stored of them: the files under tests/golden, which guard numbers.

`scripts/golden --write` writes them, tests/test_golden.py compares. Models are files there too: a model trained anew
would differ from one machine to the next. On the machine whose signature tests/golden/signature.json has, each file is
equal to the last digit. Elsewhere last bits differ, by the processor's instructions and torch's version: words are the
same there, and numbers close.
"""

import difflib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from tinystudy import TOPICS, stored

from atp_tune.cli import main
from atp_tune.report.publishing import study_note, trial_note
from atp_tune.results.summary import summarise

HOME = Path(__file__).parent / "golden"
LIBRARIES = ("torch", "transformers", "optuna", "numpy", "tokenizers", "safetensors")
# Attributes that name a process, a machine or a moment
PASSING = (
    "pid", "process_started", "booted", "start", "peak_bytes", "versions", "device", "host", "peak GB", "time (s)"
)  # fmt: skip
TEXTS = """\
description = "a tiny Llama"
GOAL
device = "cpu"

[model]
source = "model"
dtype = "float32"

[texts.calibration]
source = "file:calibration.txt"
nsamples = 8
seqlen = 32

[texts.validation]
source = "file:validation.txt"
nsamples = 8
seqlen = 32

[texts.test]
source = "file:test.txt"
nsamples = 8
seqlen = 32

[search]
trials = 4
seed = 2
sampler = "random"

[continuations]
tokens = 0
"""
IMAGES = """\
description = "a small ViT"
GOAL
device = "cpu"

[model]
source = "model"
dtype = "float32"

[images.calibration]
source = "idx:train-images-idx3-ubyte.gz"
part = [0.0, 0.5]
nsamples = 24

[images.validation]
source = "idx:train-images-idx3-ubyte.gz"
part = [0.5, 1.0]
nsamples = 40

[images.test]
source = "idx:t10k-images-idx3-ubyte.gz"

[search]
trials = 4
sampler = "random"
"""
WIDE = (
    "sparsity=[0.3,0.8]", "search.sampler=tpe", "search.screen.trials=8", "search.screen.stride=3",
    "search.screen.confirm=3",
)  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """One study: its model, the first line of its file, and what is set otherwise."""

    model: str = "llama"
    settings: tuple[str, ...] = ()
    goal: str = "sparsity = 0.5"


STUDIES = {
    "plain": Golden(
        settings=(
            "prune.pruners=['wanda','magnitude']", "allocation.beta=[0.0,0.1]", "continuations.tokens=6",
            "search.trials=6",
        )
    ),
    "kl": Golden(settings=("search.objective=kl",)),
    "both": Golden(settings=("search.objective=['kl','perplexity']",)),
    "front": Golden(settings=WIDE),
    "limit": Golden(settings=(*WIDE, "limit.max_increase=0.3", "search.trials=8")),
    "bits": Golden(
        settings=("quantize.quantizers=['rtn','gptq']", "quantize.group_size=16", "allocation.beta=both"),
        goal="bits = 3.5",
    ),
    "bits-front": Golden(
        settings=(
            *WIDE[1:], "quantize.quantizers=['rtn']", "quantize.group_size=16", "allocation=['gradient']",
        ),
        goal="bits = [3, 6]",
    ),
    "zeros-bits": Golden(settings=("bits=4", "quantize.quantizers=['gptq']", "quantize.group_size=16")),
    "channels": Golden(settings=("sparsity=0.25", "prune.pattern=channels", "allocation.beta=both")),
    "draws": Golden(settings=("texts.calibration.draws=3",)),
    "recover": Golden(settings=("recover.steps=8", "recover.batch=4", "recover.learning_rate=0.01")),
    "gradient-rows": Golden(settings=("allocation=['gradient-rows']",)),
    "allocations": Golden(
        settings=("allocation=['atp','curve','owl','gradient']", "prune.pruners=['sparsegpt']", "search.trials=8")
    ),
    "images": Golden("vit"),
    "accuracy": Golden("vit", ("sparsity=0.95", "search.objective=accuracy")),
    "pairs": Golden("pairs"),
}  # fmt: skip


# Making a study


def signature() -> dict[str, str]:
    """What the last bits of a number depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    machine = {
        "processor": names[0] if names else platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }
    return machine | {name: version(name) for name in LIBRARIES}


def made(name: str, place: Path) -> dict[str, str]:
    """The texts of a study's golden files by name, from a run in this empty folder."""
    golden = STUDIES[name]
    prepare(golden, place)
    files: dict[str, str] = {}
    with patch.dict(os.environ, {"ATP_TUNE_CACHE": str(place / "cache"), "COLUMNS": "160"}), inside(place):
        files["tune.txt"] = told(*words("--study", "tiny.toml", *golden.settings))
        steady(place / "tiny.db")
        files |= of_storage(place)
        study = ("--study", "tiny.toml")
        for suffix, kind in (("md", "md"), ("tex", "latex"), ("json", "json"), ("html", "html")):
            told("report", *study, "--format", kind, "--out", f"report.{suffix}")
            files[f"report.{suffix}"] = Path(f"report.{suffix}").read_text()
        files["report.html"] = body(files["report.html"])
        files["status.txt"] = told("status", *study)
        files["status.json"] = told("status", *study, "--json")
        files["plan.txt"] = without_costs(told("plan", *words(*study, *golden.settings)))
        files["plan.json"] = without_costs(told("plan", *words(*study, *golden.settings), "--json"))
        files["best.json"] = Path("tiny.best.json").read_text()
        files["apply.txt"] = told("apply", "--config", "tiny.best.json", "--out", "out")
        files["card.md"] = Path("out/README.md").read_text()
        files["applied.json"] = applied(files["best.json"])
    return {file: normal(text, place) for file, text in files.items()}


def prepare(golden: Golden, place: Path) -> None:
    """Fills a folder with a stored model, texts or images, and a study file."""
    shutil.copytree(HOME / "models" / golden.model, place / "model")
    weights, config = place / "model" / "model.safetensors", place / "model" / "config.json"
    save_file({key: value.float() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))
    if golden.model == "vit":
        from test_image_studies import make_images

        make_images(place, "train", 400, 1)
        make_images(place, "t10k", 80, 2)
    for index, role in enumerate(("calibration", "validation", "test")):
        start = 100_000 + 20_000 * index
        (place / f"{role}.txt").write_text(TOPICS[start : start + 20_000])
    toml = IMAGES if golden.model == "vit" else TEXTS
    if golden.model == "pairs":
        from test_pairs import write_pairs

        write_pairs(place / "pairs.parquet")
        pairs = 'source = "file:pairs.parquet"\nimages = "image"\ncolumn = "caption"'
        toml = toml.replace('source = "file:calibration.txt"', pairs).replace(
            "[texts.", "[texts]\nbos = false\n\n[texts.", 1
        )
    (place / "tiny.toml").write_text(toml.replace("GOAL", golden.goal))


def words(*arguments: str) -> list[str]:
    """Arguments of the command line, in which settings follow `--set`."""
    return [word for one in arguments for word in (("--set", one) if "=" in one else (one,))]


@contextmanager
def inside(place: Path) -> Iterator[None]:
    """Works in a folder, as a user does."""
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def told(*arguments: str) -> str:
    """What a command prints, in this process; it must succeed."""
    out = io.StringIO()
    with patch.object(sys, "argv", ["tune.py", *arguments]), redirect_stdout(out), redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, out.getvalue()
    return out.getvalue()


def steady(database: Path) -> None:
    """Gives all trials the same seconds, so that what is shown of them is always the same."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for table in ("trial_system_attributes", "trial_user_attributes", "study_system_attributes"):
            rows = f"SELECT rowid, key, value_json FROM {table}"
            for row, key, value in connection.execute(rows).fetchall():
                (steadied,) = timeless({key.rpartition(":")[2]: json.loads(value)}).values()
                connection.execute(f"UPDATE {table} SET value_json = ? WHERE rowid = ?", (json.dumps(steadied), row))
        started = "datetime_start = '2026-01-01 00:00:00', datetime_complete = '2026-01-01 00:00:02'"
        connection.execute(f"UPDATE trials SET {started}")


def timeless(value: Any, within: bool = False) -> Any:
    """A value with half a second in the place of all seconds, and half a byte in the place of peaks of memory."""
    if isinstance(value, dict):
        return {key: timeless(one, within or key in {"seconds", "peak_bytes"}) for key, one in value.items()}
    if isinstance(value, list):
        return [timeless(one, within) for one in value]
    return 0.5 if within and isinstance(value, int | float) else value


def of_storage(place: Path) -> dict[str, str]:
    """What the storage has of a study and its trials, and the dashboard's notes of them."""
    study = stored(place, "tiny", place / "tiny.db")
    trials = {
        str(trial.number): {
            "state": trial.state.name, "params": trial.params, "values": trial.values, **lasting(trial.user_attrs)
        }
        for trial in study.trials
    }  # fmt: skip
    summary = summarise(study)
    notes = [study_note(summary, "sqlite:///tiny.db"), *(trial_note(trial, summary) for trial in summary.trials)]
    return {
        "trials.json": compact(trials), "study.json": compact(lasting(study.user_attrs)),
        "notes.md": "\n\n-----\n\n".join(notes) + "\n",
    }  # fmt: skip


def lasting(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes in order, without those of a process or a moment."""
    return {key: value for key, value in sorted(attributes.items()) if key not in PASSING}


def compact(document: Mapping[str, Any]) -> str:
    """JSON with a line for each value of the two upper levels."""
    rows = []
    for key, value in document.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items())
            rows.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            rows.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def body(page: str) -> str:
    """A page without its styles, and with a digest in the place of each figure's data and of its scripts."""
    page = re.sub(r"<style.*?</style>", "<style/>", page, flags=re.S)
    script = r"<script(.*?)>(.*?)</script>"
    return re.sub(script, lambda found: f"<script{found[1]}>{digest(found[2].encode())}</script>", page, flags=re.S)


def digest(content: bytes) -> str:
    """SHA-256, the half of it."""
    return hashlib.sha256(content).hexdigest()[:32]


def applied(best: str) -> str:
    """What the configuration in a written folder has otherwise than best.json, and a digest of each tensor."""
    ours, found = json.loads(best), json.loads(Path("out/atp_tune.json").read_text())
    found.pop("manifest")
    other = {key: value for key, value in found.items() if key not in ours or ours[key] != value}
    tensors = load_file("out/model.safetensors")
    digests = {key: digest(tensor.contiguous().view(torch.uint8).numpy().tobytes()) for key, tensor in tensors.items()}
    return compact({"otherwise": other, "tensors": digests})


def without_costs(forecast: str) -> str:
    """A forecast without the seconds and bytes that this machine takes."""
    keys = "seconds|seconds_left|calibrate|prune|evaluate|descents|training"
    forecast = re.sub(rf'("(?:{keys})": )\d+\.[\de+-]+|("(?:host|loading|host_free)": )\d+', r"\1\2N", forecast)
    if forecast.lstrip().startswith("{"):
        return forecast
    forecast = re.sub(r"\d+\.\d+ GiB|\d+\.\d+(?=  |\n)|\b\d+ (?=s\b|min\b|h\b)", "N", forecast)
    return re.sub(r" {2,}|─+", " ", forecast)


def normal(text: str, place: Path) -> str:
    """A text without what changes with time, folder and versions."""
    text = text.replace(f"{place}/", "").replace(str(place), "PLACE")
    for name in (*LIBRARIES, "atp_tune"):
        text = text.replace(f"{name} {version(name)}", f"{name} VERSION")
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", "DATE", text)
    text = re.sub(r"\d+\.\d GiB are free", "N GiB are free", text)
    text = re.sub(r'("seconds": )\d+\.\d+', r"\1N", text)
    text = re.sub(r"in \d+ s\b", "in N s", text)
    text = re.sub(r", \d+ (s|min|h) left", ", N s left", text)
    text = re.sub(r"\(\d+ (s|min|h) left\)", "(N s left)", text)
    versions = "|".join((*LIBRARIES, "atp_tune"))
    text = re.sub(rf'("(?:version of )?(?:{versions})": )"[^"]*"', r'\1"VERSION"', text)
    return re.sub(rf"(version of (?:{versions.replace('_', '.{0,1}_')})\W.*?)\b\d[\w.+]*", r"\1VERSION", text)


# Comparing


def difference(name: str, found: Mapping[str, str], is_exact: bool) -> str:
    """A readable difference between the golden files of a study and these; nothing if there is none."""
    files, said = golden_lines(name), list[str]()
    for file in sorted({*files, *found}):
        before, after = files.get(file, []), found.get(file, "").split("\n")
        after = after if is_exact else as_before(before, after)
        lines = difflib.unified_diff(before, after, f"golden/{name}/{file}", "now", "", "", 1, "")
        said += [line if len(line) < 400 else f"{line[:400]} …" for line in lines]
    return "\n".join(said)


NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
OPAQUE = re.compile(r"(?<![\w.])[0-9a-f]{12,}\b|[\w+/=]{40,}")  # digests, rows in base64
SPACE = re.compile(r"[ ─-]{2,}")


def golden_lines(name: str) -> dict[str, list[str]]:
    return {file.name: file.read_text().split("\n") for file in (HOME / name).glob("*")}


def as_before(before: Sequence[str], after: list[str]) -> list[str]:
    """Lines with those of before in the place of those that are close to them."""
    shapes = ([NUMBER.sub("#", shape(line)) for line in lines] for lines in (before, after))
    for start, now, count in difflib.SequenceMatcher(None, *shapes, autojunk=False).get_matching_blocks():
        for k in range(count):
            if is_close(before[start + k], after[now + k]):
                after[now + k] = before[start + k]
    return after


def shape(text: str) -> str:
    return SPACE.sub(" ", OPAQUE.sub("OPAQUE", text))


def is_close(before: str, after: str) -> bool:
    """Whether words are the same and numbers close: by 3 of the last printed digit, 0.001 or a five-hundredth."""
    first, second = map(shape, (before, after))
    if NUMBER.sub("#", first) != NUMBER.sub("#", second):
        return False
    return all(near(*both) for both in zip(NUMBER.findall(first), NUMBER.findall(second), strict=True))


def near(before: str, after: str) -> bool:
    """Whether two printed numbers are close; whole ones are equal."""
    if before == after:
        return True
    digits = [len(text.partition("e")[0].partition(".")[2]) for text in (before, after)]
    if not max(digits):
        return False
    one, other = (float(text.replace("−", "-")) for text in (before, after))
    least = 3 * 10.0 ** -min(digits) if min(digits) < 4 else 0.001  # training makes the most of last bits
    return abs(one - other) <= max(least, 0.002 * abs(one))


# Writing


def write(names: Sequence[str], place: Path, anew: bool = False) -> None:
    """Writes the golden files of these studies, run in folders within `place`, and the signature.

    On another machine than the signature's, lines whose numbers are close stay, and the signature, unless `anew`.
    """
    home = HOME / "signature.json"
    anew = anew or signature() == json.loads(home.read_text())
    for name in names:
        (place / name).mkdir()
        before, after = golden_lines(name), made(name, place / name)
        shutil.rmtree(HOME / name, ignore_errors=True)
        (HOME / name).mkdir()
        for file, text in after.items():
            lines = text.split("\n")
            (HOME / name / file).write_text("\n".join(lines if anew else as_before(before.get(file, []), lines)))
    if anew:
        home.write_text(json.dumps(signature(), indent=1) + "\n")


def write_models(place: Path) -> None:
    """Trains the models anew, and stores them in bfloat16: all numbers of all golden files change."""
    from test_image_studies import make_place as make_vit
    from test_pairs import write_model
    from tinystudy import make_place

    for name in ("llama", "vit"):
        (place / name).mkdir()
    make_place(place / "llama")
    make_vit(place / "vit")
    write_model("idefics3", place / "pairs" / "model")
    for name in ("llama", "vit", "pairs"):
        target = HOME / "models" / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(place / name / "model", target)
        weights, config = target / "model.safetensors", target / "config.json"
        save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
        config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))

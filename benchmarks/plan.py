"""What `plan` foretells of a study against what it then takes: seconds of a trial and of the study, memory at the peak.

    python benchmarks/plan.py            SmolLM2-135M, the first trials of `smol-60`, its test text shortened
    python benchmarks/plan.py NAME       any other study

Both in one process each, one after the other, on an otherwise idle machine: the ratio is measured over foretold.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

TRIALS = 2
SHORT = ("texts.test.nsamples=8",) if len(sys.argv) < 2 else ()

RUN = """
import json, sys
from atp_tune.cli.runtime import quiet
from atp_tune.spec.studyfile import load
from atp_tune.search.runner import StudyRun, tune
with quiet():
    study = tune(StudyRun(load(sys.argv[1], sys.argv[2:]), "bench", None, lambda event: None))
trials = [t.user_attrs for t in study.trials]
peak = max(max(t["peak_bytes"].values()) for t in trials)
print(json.dumps({"seconds": [t["seconds"] for t in trials], "peak": peak}))
"""


def process(*arguments: str) -> tuple[str, float]:
    """What a process prints, and its seconds."""
    began = perf_counter()
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return done.stdout, perf_counter() - began


def main() -> None:
    """Foretells, measures, and prints both with their ratio."""
    name = sys.argv[1] if len(sys.argv) > 1 else "smol-60"
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"storage=sqlite:///{Path(folder) / 'bench.db'}", f"search.trials={TRIALS}", *SHORT]
        options = [word for text in sets for word in ("--set", text)]
        foretold = json.loads(process("tune.py", "plan", "--study", name, "--json", *options)[0])
        printed, wall = process("-c", RUN, name, *sets)
    measured = json.loads(printed.splitlines()[-1])
    (trial, *_), whole, memory = foretold["trial"], foretold["whole"], foretold["memory"]
    rows = {
        f"trial, {phase} (s)": (trial["seconds"][phase], statistics.median(one[phase] for one in measured["seconds"]))
        for phase in ("calibrate", "prune", "evaluate")
    }
    total = statistics.median(sum(one.values()) for one in measured["seconds"])
    rows["trial (s)"] = sum(trial["seconds"].values()), total
    rows[f"study of {TRIALS} trials (s)"] = whole["seconds"], wall
    if memory["device"] is None:
        rows["memory (GB)"] = max(memory["host"], memory["loading"]) / 1e9, measured["peak"] / 1e9
    print(f"{name}, {foretold['device']}, {foretold['dtype']}\n")
    print("| | foretold | measured | ratio |\n|---|---|---|---|")
    for what, (one, other) in rows.items():
        print(f"| {what} | {one:.2f} | {other:.2f} | {other / one:.2f} |")


if __name__ == "__main__":
    main()

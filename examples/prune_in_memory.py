"""Prunes a model that is loaded already, and compares it with the dense one on a text that it was not calibrated on.

python examples/prune_in_memory.py [FOLDER OR HUB ID]
"""

import sys
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

import atp_tune

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
documents = [topics[key] for key in sorted(topics)]  # a part of Python's manual; your own texts do better
calibration, test = documents[:40], documents[40:]

dense = atp_tune.perplexity(model, tokenizer, test, seqlen=256)
for allocation in ("uniform", ("atp", {"beta": 0.005})):
    pruned = atp_tune.prune(
        model, tokenizer, sparsity=0.5, allocation=allocation, texts=calibration, nsamples=16, seqlen=256
    )
    print(f"{allocation}: {atp_tune.perplexity(pruned, tokenizer, test, seqlen=256)}, dense {dense}")

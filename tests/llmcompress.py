"""Runs llm-compressor in an environment of its own: MODEL WINDOWS.npy JOBS.json.

A job has a recipe, the file for the weights, and arguments of `oneshot`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.core import reset_session  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch.utils.data import DataLoader

model, windows, jobs = sys.argv[1:]
rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.from_numpy(np.load(windows))]
for job in json.loads(Path(jobs).read_text()):
    reset_session()
    data = DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
    options = {"num_calibration_samples": len(rows), **job["arguments"]}
    pruned = oneshot(model=model, recipe=job["recipe"], dataset=data, **options)
    weights = {name: tensor.contiguous() for name, tensor in pruned.named_parameters()}
    for name, module in pruned.named_modules():  # what is to be rounded is a float until it is saved
        if hasattr(module, "quantization_scheme") and getattr(module, "weight", None) is not None:
            weights[f"{name}.weight"] = forward_quantize(
                module, module.weight, "weight", module.quantization_scheme.weights
            ).contiguous()
    save_file(weights, job["out"])

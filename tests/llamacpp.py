"""Runs llama.cpp's library, with the packages of a folder on PYTHONPATH.

logits MODEL.gguf IDS.npy OUT.npy    float32 logits [tokens, vocabulary] of one window
"""

import sys
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # type: ignore[import-not-found]

ffi, lib = get_ffi(), get_lib()


def logits(model: str, ids: str, out: str) -> None:
    row = np.load(ids)
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    asked: Any = lib.llama_context_default_params()
    asked.n_ctx = asked.n_batch = asked.n_ubatch = asked.n_outputs_max = len(row)
    asked.n_threads = asked.n_threads_batch = 1
    asked.type_k = asked.type_v = asked.flash_attn_type = 0  # float32, and no flash attention
    context, batch = lib.llama_init_from_model(loaded, asked), lib.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for place, token in enumerate(row.tolist()):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert lib.llama_decode(context, batch) == 0
    shape = len(row), lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    buffer = ffi.buffer(lib.llama_get_logits(context), 4 * shape[0] * shape[1])
    np.save(out, np.frombuffer(buffer, np.float32).reshape(shape))


lib.llama_backend_init()
{"logits": logits}[sys.argv[1]](*sys.argv[2:])

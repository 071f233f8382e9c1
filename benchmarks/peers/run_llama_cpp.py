"""Greedy decoding by llama.cpp in an environment of its own: `run_llama_cpp.py FILE.gguf THREADS`.

Reads one job as JSON from each line of standard input and answers with a line: `measure/decode_worker.py` says what
they hold. Imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

MOST_TEXTS, MOST_POSITIONS = 8, 512


def main() -> int:
    """Load the model and answer until standard input ends."""
    before = _peak_bytes()
    path, threads = sys.argv[1], int(sys.argv[2])
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = MOST_TEXTS * MOST_POSITIONS, MOST_TEXTS
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for line in sys.stdin:
        answer = _decode(context, vocabulary, json.loads(line))
        answer |= {"peak_bytes": _peak_bytes(), "bytes_before": before}
        print(json.dumps(answer), flush=True)
    return 0


def _decode(context: Any, vocabulary: int, job: dict[str, Any]) -> dict[str, Any]:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    prompts = job["prompts"]
    batch = llama_cpp.llama_batch_init(sum(map(len, prompts)), 0, 1)
    began = time.perf_counter()
    tokens = [[token] for token in _step(context, vocabulary, batch, prompts, 0)]
    times = [time.perf_counter() - began]
    for index in range(job["new_tokens"] - 1):
        began = time.perf_counter()
        following = _step(context, vocabulary, batch, [text[-1:] for text in tokens], len(prompts[0]) + index)
        for text, token in zip(tokens, following, strict=True):
            text.append(token)
        times.append(time.perf_counter() - began)
    llama_cpp.llama_batch_free(batch)
    return {"tokens": tokens, "step_seconds": times}


def _step(context: Any, vocabulary: int, batch: Any, texts: list[list[int]], first: int) -> list[int]:
    """Compute the next tokens of all texts, which stand at the same position, and return their followers."""
    batch.n_tokens, ends = 0, []
    for number, text in enumerate(texts):
        for place, token in enumerate(text):
            index = batch.n_tokens
            batch.token[index], batch.pos[index] = token, first + place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, number
            batch.logits[index] = place == len(text) - 1
            batch.n_tokens += 1
        ends.append(batch.n_tokens - 1)
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode failed")
    rows = (np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, end), (vocabulary,)) for end in ends)
    return [int(row.argmax()) for row in rows]


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main())

"""A process that holds one model and decodes greedily: `decode_worker.py TOOL FOLDER THREADS`.

Each line of standard input is a job, answered by one line, both JSON:

    {"prompts": [[...], ...], "new_tokens": n}   {"tokens": [[...], ...], "step_seconds": [first step, the others ...]}
    {"logits_of": [...], "path": "..."}          {}, and float32 logits `[S, V]` in the file

Prompts are equally long. Every answer has `bytes_before` the model was loaded, with all imports done, and `peak_bytes`
so far.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from optgptq.runtime.engine import Engine
from optgptq.runtime.engine_settings import EngineSettings
from optgptq.runtime.llm import load_for_engine
from optgptq.scheduling.sampling_params import SamplingParams

MOST_TEXTS, MOST_POSITIONS = 8, 512
TRANSFORMERS = "transformers"
_WEIGHTS: dict[str, Literal["quantized", "exact"]] = {"optgptq": "quantized", "optgptq, exact": "exact"}


class _Model(Protocol):
    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]: ...

    def logits(self, tokens: list[int]) -> torch.Tensor: ...


class _Ours:
    """Our engine, all defaults but a small pool of pages and no prefix cache."""

    def __init__(self, folder: Path, weights: Literal["quantized", "exact"]) -> None:
        loaded = load_for_engine(folder, dtype="bfloat16", weights=weights)
        settings = EngineSettings(
            prefix_cache=False, max_length=MOST_POSITIONS, max_running=MOST_TEXTS, kv_cache_bytes=256 << 20
        )
        self._engine = Engine(loaded.decoder, None, settings)

    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        names = [self._engine.submit(prompt, params) for prompt in prompts]
        times = []
        while self._engine.has_work:
            began = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - began)
        results = dict(self._engine.take_results())
        return {"tokens": [results[name].token_ids for name in names], "step_seconds": times}

    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self._engine.decoder.logits(torch.tensor([tokens]))[0]


class _Transformers:
    """The dense model in bfloat16; a plain loop, which costs less than `generate`."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self._cache = transformers.DynamicCache
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        cache, tokens, times, columns = self._cache(), torch.tensor(prompts), [], []
        for _ in range(new_tokens):
            began = time.perf_counter()
            output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            columns.append(tokens)
            times.append(time.perf_counter() - began)
        return {"tokens": torch.cat(columns, 1).tolist(), "step_seconds": times}

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([tokens])).logits[0].float()
        return logits


def main() -> int:
    """Load the model and answer until standard input ends."""
    tool, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    before = peak_bytes()
    model: _Model = _Transformers(Path(folder)) if tool == TRANSFORMERS else _Ours(Path(folder), _WEIGHTS[tool])
    for line in sys.stdin:
        job = json.loads(line)
        if "path" in job:
            answer: dict[str, Any] = {}
            torch.save(model.logits(job["logits_of"]), job["path"])
        else:
            answer = model.decode(job["prompts"], job["new_tokens"])
        print(json.dumps(answer | {"peak_bytes": peak_bytes(), "bytes_before": before}), flush=True)
    return 0


def peak_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # `getrusage` also counts the process that started this one.
        (line,) = (line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())

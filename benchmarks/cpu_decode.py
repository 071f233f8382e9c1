"""Greedy decoding on a processor with a 4-bit Llama of 1.1 billion random weights: ours, transformers, llama.cpp."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure.decode_worker import TRANSFORMERS
from measure.gguf import write_random_gguf
from measure.machine import num_cores
from measure.process import BenchmarkError
from measure.random_codes import RandomModel, random_pair, weight_bytes
from measure.random_llama import LlamaShape
from measure.report import Report, finish, median_and_spread, new_parser

HERE = Path(__file__).resolve().parent
# The sizes of TinyLlama.
SHAPE = LlamaShape(width=2048, feed_forward=5632, num_heads=32, num_kv_heads=4)
NUM_LAYERS, VOCABULARY = 22, 32000
PROMPT = 32
OURS, EXACT, LLAMA = "optgptq", "optgptq, exact", "llama.cpp Q4_0"
COLUMNS = ("tool", "texts", "ms a step", "fastest ms", "tokens/s", "times llama.cpp", "times transformers", "memory")
LEAST_TO_LLAMA, LEAST_TO_TRANSFORMERS, MOST_MEMORY, MOST_ERROR = 1.0, 4.0, 1.15, 0.15
MEBIBYTE = 2**20


@dataclass(slots=True, kw_only=True)
class Worker:
    """A process that holds a model; see `measure/decode_worker.py`.

    Attributes:
        process: with JSON lines on its standard streams.
        log: its standard error.
        stored_bytes: of its weights on disk.
        answer: the last one.
        steps: seconds of decode steps by number of texts, one list for each round.
    """

    process: subprocess.Popen[str]
    log: Path
    stored_bytes: int
    answer: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, list[list[float]]] = field(default_factory=dict)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer; BenchmarkError where there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise BenchmarkError(f"a worker died; the end of {self.log}:\n{self.log.read_text('utf-8')[-2000:]}")
        self.answer = json.loads(line)
        return self.answer


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="median and spread are shown")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8], help="texts that are written side by side")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--layers", type=int, help=f"decoder layers; default: {NUM_LAYERS}")
    parser.add_argument("--keep", type=Path, help="folder that keeps the models, 3 GB; default: a temporary one")
    parser.add_argument("--head-bits", type=int, default=8, choices=(4, 8, 16), help="of our output head")
    parser.add_argument("--tools", nargs="+", default=[OURS, EXACT, TRANSFORMERS], choices=(OURS, EXACT, TRANSFORMERS))
    parser.add_argument(
        "--llama-python", type=Path, help="Python of an environment with llama-cpp-python; default: without llama.cpp"
    )
    arguments = parser.parse_args()
    layers = arguments.layers or (2 if arguments.quick else NUM_LAYERS)
    model = RandomModel(shape=SHAPE, num_layers=layers, vocabulary=VOCABULARY, head_bits=arguments.head_bits)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        workers = _started(arguments.keep or Path(name), Path(name), model, arguments, stack)
        return finish(_measured(workers, model, Path(name), arguments), arguments)


def _started(
    models: Path, folder: Path, model: RandomModel, arguments: argparse.Namespace, stack: ExitStack
) -> dict[str, Worker]:
    """Write the models and start a worker for each tool."""
    quantized, dense = random_pair(models, model)
    commands: dict[str, tuple[list[str], int]] = {}
    script = str(HERE / "measure" / "decode_worker.py")
    for tool in arguments.tools:
        path = dense if tool == TRANSFORMERS else quantized
        command = [sys.executable, script, tool, str(path), str(arguments.threads)]
        commands[tool] = command, weight_bytes(path)
    if arguments.llama_python is not None:
        sizes = {"num_layers": model.num_layers, "vocabulary": model.vocabulary}
        path = write_random_gguf(models / f"{model.name}.gguf", model.shape, eps=model.eps, **sizes)
        script = str(HERE / "peers" / "run_llama_cpp.py")
        command = [str(arguments.llama_python), script, str(path), str(arguments.threads)]
        commands[LLAMA] = command, path.stat().st_size
    workers = {}
    for number, (tool, (command, stored)) in enumerate(commands.items()):
        log = folder / f"{number}.log"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = stack.enter_context(subprocess.Popen(command, stderr=stack.enter_context(log.open("w")), **pipes))
        workers[tool] = Worker(process=process, log=log, stored_bytes=stored)
        workers[tool].ask({"prompts": [[1, 2]], "new_tokens": 4})
        print(f"{tool}: loaded", file=sys.stderr, flush=True)
    return workers


def _measured(workers: dict[str, Worker], model: RandomModel, folder: Path, arguments: argparse.Namespace) -> Report:
    generator = random.Random(model.seed)
    prompts = [[generator.randrange(3, VOCABULARY) for _ in range(PROMPT)] for _ in range(max(arguments.texts))]
    for number in range(2 if arguments.quick else arguments.rounds):
        for count in arguments.texts:
            for tool, worker in workers.items():
                answer = worker.ask({"prompts": prompts[:count], "new_tokens": arguments.new_tokens})
                steps = answer["step_seconds"][1:]
                worker.steps.setdefault(count, []).append(steps)
                line = f"round {number + 1}, {count} texts, {tool}: {1e3 * statistics.median(steps):.2f} ms a step"
                print(line, file=sys.stderr, flush=True)
    report = Report(name="cpu-decode", title="Decoding with 4 bits on a processor", columns=COLUMNS)
    for count in arguments.texts:
        for tool, worker in workers.items():
            _add_row(report, tool, worker, workers, count, model, arguments.new_tokens)
    _check_agreement(report, workers, prompts[0], folder)
    _check(report, workers, arguments.texts, model, arguments.new_tokens)
    report.notes.append(
        f"A Llama with random weights: {model.num_layers} layers of width {model.shape.width}, {model.vocabulary} "
        f"tokens, 4 bits in groups of {model.group_size}, the head {model.head_bits} (llama.cpp: Q4_0, the head Q6_K), "
        f"the embedding bfloat16. {PROMPT} tokens of prompt, {arguments.new_tokens} written, {arguments.threads} "
        "threads, a process for each tool, rounds in turns. Steps: the median of a round's decode steps; median and "
        "spread over rounds. Fastest: of all steps, what other load on the machine disturbs least. Memory: peak above "
        "that before loading, as a share of the weights on disk and the keys and values. Exact: activations are not "
        "rounded to 8 bits."
    )
    return report


def _medians(worker: Worker, count: int) -> list[float]:
    return [statistics.median(steps) for steps in worker.steps[count]]


def _ratios(worker: Worker, other: Worker, count: int) -> list[float]:
    """Return how many times faster a worker is than another, round by round."""
    return [slow / fast for slow, fast in zip(_medians(other, count), _medians(worker, count), strict=True)]


def _memory_share(worker: Worker, model: RandomModel, texts: int, positions: int) -> float:
    cache = 2 * 2 * model.num_layers * model.shape.num_kv_heads * model.shape.head_size * texts * positions
    return (worker.answer["peak_bytes"] - worker.answer["bytes_before"]) / (worker.stored_bytes + cache)


def _add_row(
    report: Report,
    tool: str,
    worker: Worker,
    workers: dict[str, Worker],
    count: int,
    model: RandomModel,
    new_tokens: int,
) -> None:
    times = _medians(worker, count)
    peers = [workers.get(LLAMA), workers.get(TRANSFORMERS)]
    memory = _memory_share(worker, model, max(worker.steps), PROMPT + new_tokens)
    fastest = min(map(min, worker.steps[count]))
    report.rows.append(
        [
            tool,
            str(count),
            median_and_spread([1e3 * seconds for seconds in times]),
            f"{1e3 * fastest:.2f}",
            median_and_spread([count / seconds for seconds in times], digits=1),
            *("-" if peer is None else median_and_spread(_ratios(worker, peer, count)) for peer in peers),
            f"{memory:.2f}",
        ]
    )
    figures = {key: worker.answer[key] for key in ("peak_bytes", "bytes_before")}
    report.details.append(
        {"tool": tool, "texts": count, "steps": worker.steps[count], "stored_bytes": worker.stored_bytes, **figures}
    )


def _check_agreement(report: Report, workers: dict[str, Worker], prompt: list[int], folder: Path) -> None:
    """Compare logits with those of the dense model of the same numbers."""
    if TRANSFORMERS not in workers:
        return
    found = {}
    for number, tool in enumerate(tool for tool in workers if tool != LLAMA):
        path = folder / f"{number}.pt"
        workers[tool].ask({"logits_of": prompt, "path": str(path)})
        found[tool] = torch.load(path).double()
    expected = found.pop(TRANSFORMERS)
    for tool, logits in found.items():
        error = float((logits - expected).norm() / expected.norm())
        equal = float((logits.argmax(-1) == expected.argmax(-1)).double().mean())
        report.notes.append(
            f"{tool}: logits differ from those of transformers by {error:.3f} of their size; the likeliest token is "
            f"the same at {equal:.2f} of the positions."
        )
        if not error <= MOST_ERROR:
            raise BenchmarkError(f"logits of {tool} are off by {error:.3f} of their size")


def _check(
    report: Report, workers: dict[str, Worker], texts: Sequence[int], model: RandomModel, new_tokens: int
) -> None:
    if OURS not in workers:
        return
    ours = workers[OURS]
    for peer, least in ((LLAMA, LEAST_TO_LLAMA), (TRANSFORMERS, LEAST_TO_TRANSFORMERS)):
        for count in texts if peer in workers else ():
            ratio = statistics.median(_ratios(ours, workers[peer], count))
            if ratio < least:
                report.missed.append(f"{count} texts: {ratio:.2f} times {peer}, aim {least:g}")
    memory = _memory_share(ours, model, max(texts), PROMPT + new_tokens)
    if memory > MOST_MEMORY:
        report.missed.append(f"memory: {memory:.2f} of weights, keys and values, aim {MOST_MEMORY:g}")


if __name__ == "__main__":
    sys.exit(main())

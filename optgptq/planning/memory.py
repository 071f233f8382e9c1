"""Memory of a job by phase: what the process holds anyway, and what each phase adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optgptq.bundled import bundled_path
from optgptq.calibration.disk_states import Activations
from optgptq.calibration.head import ROWS_PER_SOLVE
from optgptq.calibration.stream import TOKENS_PER_BATCH
from optgptq.models.inventory import model_linears
from optgptq.models.spec import StageName
from optgptq.planning.layer_memory import StageMemory, layer_memory
from optgptq.planning.solver_memory import solver_bytes
from optgptq.planning.workload import Workload
from optgptq.planning.writing_time import TEXTS_AT_A_TIME
from optgptq.recipe.sources import source_kind

# Tokenizer, matrix libraries and threads, once they have run.
_LIBRARIES_BYTES = 42 * 2**20
# transformers, where it reads the tokenizer.
_TRANSFORMERS_BYTES = 165 * 2**20
# What CUDA keeps in the process and on the device.
_CUDA_HOST_BYTES, _CUDA_DEVICE_BYTES = 900 * 2**20, 500 * 2**20
# Blocks that are freed do not fit the next ones exactly: of everything that is alive, and of what a decoder layer's
# earlier stages held for a moment, up to some; blocks larger than a gigabyte go back to the system at once.
_HEAP_SHARE, _HOLE_SHARE = 1.06, 0.7
_LARGEST_HOLE_BYTES = 1 << 30
_MOST_HOLES_BYTES = 240 * 2**20
# Bytes per character of what a tokenizer holds of a text: of one that is a single document, and of the documents of a
# batch of a million characters.
_DOCUMENT_SHARE, _BATCH_SHARE, _BATCH_CHARACTERS = 170, 65, 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """The most that a phase holds.

    Attributes:
        cpu_bytes: resident memory of the process.
        device_bytes: memory of the device where that is not the processor.
        parts: what it is made of, by name.
    """

    cpu_bytes: int
    device_bytes: int
    parts: Mapping[str, int]


class MemoryModel:
    """Memory of the phases of one job.

    Args:
        work: the job.
        base_bytes: resident memory of a process that has loaded everything and read nothing.
        activations: where the streams are kept.
    """

    def __init__(self, work: Workload, *, base_bytes: int, activations: Activations) -> None:
        self.work = work
        self.activations = activations
        self.on_device = work.device.type != "cpu"
        self.base = base_bytes + _LIBRARIES_BYTES + (_CUDA_HOST_BYTES if self.on_device else 0)
        if work.reads_text and work.converts_tokenizer:
            self.base += _TRANSFORMERS_BYTES

    def nothing(self) -> PhaseMemory:
        """Return a phase that reads files in pieces."""
        return self._phase({"pieces of files": 32 * 2**20}, {})

    def text(self) -> PhaseMemory:
        """Return the phase in which the calibration text is read, or written by the model."""
        calibration = self.work.recipe.calibration
        if calibration.source != "self":
            return self._phase({"text and tokens": _text_bytes(self.work)}, {})
        spec, itemsize = self.work.source.original_spec, self.work.dtype.itemsize
        weights = sum(info.out_features * info.in_features for info in model_linears(spec))
        weights += spec.vocab_size * spec.embedding_size * (1 if spec.tied_head else 2)
        texts = min(TEXTS_AT_A_TIME, self.work.num_windows)
        cache = 2 * spec.num_kv_heads * spec.head_dim * spec.num_layers * (self.work.window_size + 1) * texts
        largest = max(info.num_bytes for info in self.work.source.folder.tensors.values())
        logits = texts * spec.vocab_size * 8 * 2
        return self._phase(
            {"one tensor": largest},
            {"the whole dense model": weights * itemsize, "keys and values": cache * itemsize, "logits": logits},
        )

    def heads(self) -> PhaseMemory:
        """Return the phase in which heads are merged, or scales are found to fold: a layer and the streams."""
        work = self.work
        layer = self._layer_parts(layer_memory(work, 0, activations=self.activations), "o")
        second = min(work.num_tokens, work.batch_tokens) if self.activations == "disk" else work.num_tokens
        return self._phase({}, layer | {"second stream": second * work.spec.hidden_size * 4})

    def solving(self) -> PhaseMemory:
        """Return the walk over the decoder layers, the widest of them."""
        phases = [self._solving(index) for index, _ in self.work.layer_kinds()]
        return max(phases, key=lambda phase: (phase.device_bytes, phase.cpu_bytes))

    def head(self) -> PhaseMemory:
        """Return the phase in which the output head is solved: its weight and codes, and some of its rows."""
        work, plan = self.work, self.work.head
        assert plan is not None
        rows, columns = plan.info.out_features, plan.info.in_features
        number = work.solver_dtype.itemsize
        part = min(rows, ROWS_PER_SOLVE)
        parts = {
            "activations": layer_memory(work, work.spec.num_layers - 1, activations=self.activations)["qkv"].streams,
            # What was stored, while it becomes what the model is computed in.
            "output head": rows * columns * (work.dtype.itemsize + work.weight_dtype(plan.info.name).itemsize + 2),
            "moments": columns**2 * work.moment_dtype.itemsize,
            "work of the head": solver_bytes(plan, part, itemsize=number) + part * columns * number,
        }
        return self._phase({"one tensor": self._largest_tensor()} if self.on_device else {}, parts)

    def assembly(self) -> PhaseMemory:
        """Return the phase in which shards are written: an encoded linear at a time, dense tensors in pieces."""
        return self._phase({"one linear": 3 * self._largest_linear()}, {})

    def verifying(self) -> PhaseMemory:
        """Return the phase in which everything is read back: codes of a linear as words, numbers and bytes."""
        return self._phase({"one linear": 14 * self._largest_linear()}, {})

    def cache(self) -> PhaseMemory:
        """Return the phase in which parameters of a KV cache are found: a layer, its keys and values in float32."""
        work, spec = self.work, self.work.spec
        tokens = min(work.recipe.kv_cache.num_windows, work.num_windows) * work.window_size
        stage = layer_memory(work, 0, activations=self.activations)["qkv"]
        # On disk but for a batch: before the layer, behind it and behind the last one that is judged.
        held = 3 * min(tokens, max(TOKENS_PER_BATCH, work.window_size)) if self.activations == "disk" else 2 * tokens
        heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        parts = {
            "decoder layer": stage.weights,
            "activations": min(held, 2 * tokens) * spec.hidden_size * work.dtype.itemsize,
            "queries, keys and values": 3 * tokens * heads * 4,
        }
        return self._phase({}, parts)

    def _solving(self, layer_index: int) -> PhaseMemory:
        stages = layer_memory(self.work, layer_index, activations=self.activations)
        worst: dict[str, int] = {}
        earlier = 0
        for stage, memory in stages.items():
            parts = self._layer_parts(stages, stage)
            block = max(self._stage_columns(layer_index, stage) ** 2 * 4, 1)
            if not self.on_device and block < _LARGEST_HOLE_BYTES:
                parts["freed by earlier stages"] = min(int(_HOLE_SHARE * earlier), _MOST_HOLES_BYTES)
            if sum(parts.values()) > sum(worst.values()):
                worst = parts
            earlier = max(earlier, memory.work)
        embedding = {
            "embedding": self.work.spec.vocab_size * self.work.spec.embedding_size * self.work.dtype.itemsize,
            "activations": stages["qkv"].streams,
        }
        if sum(embedding.values()) > sum(worst.values()):
            worst = embedding
        return self._phase({"one tensor": self._largest_tensor()} if self.on_device else {}, worst)

    def _stage_columns(self, layer_index: int, stage: StageName) -> int:
        return self.work.stage_plans(layer_index)[stage][0].info.in_features

    def _layer_parts(self, stages: Mapping[StageName, StageMemory], stage: StageName) -> dict[str, int]:
        memory = stages[stage]
        return {
            "activations": memory.streams,
            "decoder layer": memory.weights,
            "moments": memory.moments,
            f"work of stage {stage}": memory.work,
        }

    def _phase(self, cpu: Mapping[str, int], computed: Mapping[str, int]) -> PhaseMemory:
        """Return a phase of what the processor always holds and of what is where the model is computed."""
        in_memory = {**cpu, **({} if self.on_device else computed)}
        cpu_bytes = self.base + int(_HEAP_SHARE * sum(in_memory.values()))
        device = _CUDA_DEVICE_BYTES + int(_HEAP_SHARE * sum(computed.values())) if self.on_device else 0
        return PhaseMemory(cpu_bytes=cpu_bytes, device_bytes=device, parts={"program": self.base, **cpu, **computed})

    def _largest_linear(self) -> int:
        return max(plan.info.out_features * plan.info.in_features for plan in self.work.all_plans)

    def _largest_tensor(self) -> int:
        return max(info.num_bytes for info in self.work.source.tensors.tensors.values())


def memory_phases(work: Workload, base: int, activations: Activations) -> dict[str, PhaseMemory]:
    """Return the phases of a job by name, in the order in which they run; `base` as in `MemoryModel`."""
    memory = MemoryModel(work, base_bytes=base, activations=activations)
    phases = {"source": memory.nothing()}
    if work.reads_text:
        phases["calibration text"] = memory.text()
    if work.source.grouping is not None:
        phases["grouping heads"] = memory.heads()
    if work.cache_plan is not None and work.recipe.kv_cache.fold:
        phases["scales to fold"] = memory.heads()
    if not work.keeps_weights:
        phases["decoder layers"] = memory.solving()
    if work.head is not None:
        phases["output head"] = memory.head()
    phases["writing"] = memory.assembly()
    phases["verifying"] = memory.verifying()
    if work.cache_plan is not None:
        phases["kv cache"] = memory.cache()
    return phases


def _text_bytes(work: Workload) -> int:
    """Return what reading the text holds at most; the size of its file is all that is looked at."""
    calibration = work.recipe.calibration
    kind = source_kind(calibration.source)
    if kind in ("bundled", "text"):
        path = bundled_path(calibration.source) if kind == "bundled" else Path(calibration.source)
        return path.stat().st_size * _DOCUMENT_SHARE
    wanted = 4 * work.num_tokens * 5
    return min(wanted + _BATCH_CHARACTERS, 8 * _BATCH_CHARACTERS) * _BATCH_SHARE

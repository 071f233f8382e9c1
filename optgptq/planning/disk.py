"""Bytes on disk: what the output will hold, and what lies beside it while it is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optgptq.cache_request import most_parameter_bytes
from optgptq.checkpoint.safetensors_header import SAFETENSORS_DTYPES, TensorInfo
from optgptq.formats.checkpoint import plan_entries
from optgptq.layout import LinearLayout
from optgptq.planning.workload import Workload

# A safetensors header takes about this for a tensor, its name included; the manifest about this for a linear.
_HEADER_BYTES = 160
_MANIFEST_BYTES = 700


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """Bytes on disk.

    Attributes:
        quantized_bytes: codes, scales and zero points.
        dense_bytes: tensors that are copied.
        other_bytes: headers, config, manifest, tokenizer, and the parameters of a KV cache.
        journal_bytes: finished stages that are kept until the output is there.
        spilled_bytes: activations that are kept for a job that goes on later, or that memory does not hold.
        num_weight_files: files with tensors.
    """

    quantized_bytes: int
    dense_bytes: int
    other_bytes: int
    journal_bytes: int
    spilled_bytes: int
    num_weight_files: int

    @property
    def output_bytes(self) -> int:
        """The finished folder."""
        return self.quantized_bytes + self.dense_bytes + self.other_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that lies in the output's folder at a time; an older output that is replaced comes on top."""
        return self.output_bytes + self.journal_bytes + self.spilled_bytes


def disk_need(work: Workload, *, spilled_bytes: int) -> DiskNeed:
    """Return what a job writes; `spilled_bytes`: activations on disk.

    Raises:
        ModelError: the source stores a weight in another shape than its config says.
    """
    tensors = work.source.tensors
    side = sum(_size(tensors.path / name) for name in tensors.side_files)
    layouts = () if work.keeps_weights else work.layouts
    entries = plan_entries(tensors, layouts, work.form)
    dense_names = set(tensors.tensors) - {f"{layout.name}.weight" for layout in layouts if layout.bits is not None}
    dense = sum(entry.num_bytes for entry in entries if entry.name in dense_names)
    quantized = sum(entry.num_bytes for entry in entries) - dense
    parameters = 0 if work.cache_plan is None else most_parameter_bytes(work.spec)
    config = _size(tensors.path / "config.json")
    records = _HEADER_BYTES * len(entries) + _MANIFEST_BYTES * len(layouts)
    return DiskNeed(
        quantized_bytes=quantized,
        dense_bytes=dense,
        other_bytes=side + parameters + config + records,
        journal_bytes=quantized,
        spilled_bytes=spilled_bytes,
        num_weight_files=max(-(-(dense + quantized) // work.recipe.export.max_shard_bytes), 1),
    )


def bits_per_weight(work: Workload) -> float:
    """Return codes, scales and stored zero points over the weights of the quantized linears, as a job counts them."""
    quantized = [layout for layout in work.layouts if layout.bits is not None]
    if work.keeps_weights or not quantized:
        return 0.0
    weights = sum(layout.out_features * layout.in_features for layout in quantized)
    return sum(_stored_bits(work, layout) for layout in quantized) / weights


def _stored_bits(work: Workload, layout: LinearLayout) -> int:
    entries = work.form.entries(layout, dense_dtype=work.weight_dtype(layout.name))
    infos = [
        TensorInfo(entry.name, SAFETENSORS_DTYPES[entry.dtype], entry.shape, "", 0, entry.num_bytes)
        for entry in entries
    ]
    return work.form.stored_bits(layout, infos)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

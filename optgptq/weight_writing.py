"""A checkpoint assembled from solved decoder layers, or copied from its source, and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import ReplacedTensors, TensorSource
from optgptq.checkpoint.writer import ShardWriter
from optgptq.errors import ModelError
from optgptq.formats.checkpoint import copy_dense, plan_entries, write_side_files
from optgptq.formats.dense import verify_dense
from optgptq.formats.fp8_scales import add_fp8_scheme, fp8_scheme
from optgptq.formats.verify import verify_folder, verify_written
from optgptq.fp8_measure import Fp8Measure
from optgptq.job_record import JobRecord
from optgptq.journal.entry import Entry
from optgptq.layer_steps import LayerSteps, tensors_of
from optgptq.layout import LinearLayout
from optgptq.models.checks import check_inventory
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES


def write_solved(
    tensors: TensorSource,
    layouts: Sequence[LinearLayout],
    steps: LayerSteps,
    folder: Path,
    record: JobRecord,
    *,
    fp8: Fp8Measure | None,
    num_layers: int,
    max_shard_bytes: int,
) -> TensorSource:
    """Assemble the checkpoint in `folder`, all but its manifest, and note in `record` what was solved.

    Returns:
        What was written as it is: `tensors` with the trained norms.

    Raises:
        CapacityError, OutputError: it cannot be written, or a step of the journal is gone.
    """
    added = () if fp8 is None else fp8.entries()
    writer = ShardWriter(folder, [*plan_entries(tensors, layouts, steps.form), *added], max_shard_bytes=max_shard_bytes)
    norms: dict[str, torch.Tensor] = {}
    for index in range(num_layers):
        norms |= _write_layer(index, steps, writer, record)
    if steps.head is not None:
        head = steps.require_head()
        _write_linears(head, writer, record)
        record.warnings += head.facts["warnings"]
    written = ReplacedTensors(source=tensors, replacements=norms) if norms else tensors
    copy_dense(written, writer, layouts)
    writer.finish()
    write_side_files(written, folder, steps.form, layouts)
    if fp8 is not None:
        add_fp8_scheme(folder, fp8_scheme(fp8.strategy))
    return written


def verify_solved(
    folder: Path, written: TensorSource, layouts: Sequence[LinearLayout], record: JobRecord, *, fp8: Fp8Measure | None
) -> None:
    """Read back what `write_solved` wrote and compare it with what was meant.

    Raises:
        FormatError: something differs.
    """
    added = () if fp8 is None else fp8.entries()
    verify_written(CheckpointFolder.open(folder), written, layouts, record.digests, added=added)


def verify_copy(folder: Path, source: TensorSource) -> None:
    """Read back a model whose weights stay as `source` has them, and compare.

    Raises:
        FormatError: something differs.
        ModelError: a weight is not finite, or no tensor of the model.
    """
    written = CheckpointFolder.open(folder)
    check_inventory(written, model_spec(written))
    verify_dense(written, source)
    problems = verify_folder(written).problems
    if problems:
        raise ModelError(
            f"{source.path}, {problems[0].where}",
            expected=problems[0].expected,
            found=problems[0].found,
            action="Download or convert the model again; `optgptq verify` lists all problems.",
        )


def _write_layer(index: int, steps: LayerSteps, writer: ShardWriter, record: JobRecord) -> dict[str, torch.Tensor]:
    """Write a decoder layer and return its trained norms."""
    for stage in STAGE_NAMES:
        _write_linears(steps.require_stage(index, stage), writer, record)
    end = steps.require_layer(index)
    record.add_decoder_layer(end.facts)
    for name, tensor in tensors_of(end, "scales").items():
        writer.write(name, tensor)
    return tensors_of(end, "norms")


def _write_linears(entry: Entry, writer: ShardWriter, record: JobRecord) -> None:
    for facts in entry.facts["linears"]:
        record.add_linear(facts)
    for name, tensor in entry.tensors.items():
        writer.write(name, tensor)

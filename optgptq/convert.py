"""Lossless change of layout: the words are packed again, no weight is quantized again, and every result is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optgptq import __version__
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import describe_files, read_manifest, write_manifest
from optgptq.checkpoint.publish import require_disk_space, staging_folder
from optgptq.checkpoint.safetensors_header import TORCH_DTYPES
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.convert_weight import weight_for
from optgptq.errors import FormatError
from optgptq.formats import CheckpointFormat, detect, format_named
from optgptq.formats.cache_copy import keep_caches
from optgptq.formats.checkpoint import write_side_files
from optgptq.formats.tensors import SCALE_DTYPES
from optgptq.formats.verify import same_bytes, weight_digest
from optgptq.layout import LinearLayout

MIN_SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        output: the new folder.
        source_format: format that was read.
        format: format that was written.
        num_quantized: linears that were converted.
        warnings: oddities of the source, and who cannot load the result.
    """

    output: Path
    source_format: str
    format: str
    num_quantized: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One linear: its layouts in source and result, and tensors, dtypes of scales and digest of the result."""

    source: LinearLayout
    layout: LinearLayout
    entries: tuple[TensorEntry, ...]
    scale_dtype: torch.dtype
    wanted_dtype: torch.dtype
    digest: str


def convert(source: Path, output: Path, *, to: str, overwrite: bool = False) -> ConvertResult:
    """Write the checkpoint `source` to `output` in format `to`; decoded weights stay bit-equal.

    Args:
        source: folder in one of `optgptq.formats.FORMATS` or `READ_ONLY_FORMATS`.
        output: folder that appears when everything was written and checked.
        to: name of the wanted format.
        overwrite: replace an existing output.

    Raises:
        UsageError: no such format.
        FormatError: the source is dense or damaged.
        TargetError: act-order, or scales, coefficients or zero points that the format cannot hold exactly.
        OutputError, CapacityError: the output cannot be written.
    """
    target = format_named(to)
    folder = CheckpointFolder.open(source)
    with staging_folder(output, overwrite=overwrite, source=source) as staging:
        form = _require_quantized(folder)
        layouts = form.read_layouts(folder)
        plans, notes = _plan(folder, form, target, layouts)
        final = [plans[layout.name].layout if layout.name in plans else layout for layout in layouts]
        scale_dtypes = sorted({plan.scale_dtype for plan in plans.values()}, key=str)
        warnings = [warning for dtype in scale_dtypes for warning in target.check(final, scale_dtype=dtype)]
        entries = _entries(folder, form, plans)
        require_disk_space(staging.path, sum(entry.num_bytes for entry in entries))
        writer = ShardWriter(staging.path, entries, max_shard_bytes=_shard_bytes(folder))
        _write(folder, writer, form, target, plans=plans)
        writer.finish()
        write_side_files(folder, staging.path, target, final)
        notes += keep_caches(folder, staging.path, format_name=target.name)
        _verify(CheckpointFolder.open(staging.path), folder, target, plans)
        write_manifest(staging.path, _manifest(folder, form.name))
        staging.publish()
    return ConvertResult(
        output=output,
        source_format=form.name,
        format=target.name,
        num_quantized=len(plans),
        warnings=tuple(dict.fromkeys([*notes, *warnings])),
    )


def _require_quantized(folder: CheckpointFolder) -> CheckpointFormat:
    form = detect(folder)
    if form is None:
        raise FormatError(
            str(folder.path),
            expected="a quantized checkpoint",
            found="dense weights",
            action="Quantize it first: optgptq quantize MODEL -r RECIPE -o OUT.",
        )
    return form


def _plan(
    folder: CheckpointFolder, form: CheckpointFormat, target: CheckpointFormat, layouts: Sequence[LinearLayout]
) -> tuple[dict[str, _Plan], list[str]]:
    """Decode every linear, before anything is written: only the words tell what the target can hold, and how."""
    plans: dict[str, _Plan] = {}
    notes: list[str] = []
    model_dtype = _model_dtype(folder)
    for layout in layouts:
        if layout.bits is not None:
            plans[layout.name] = _plan_linear(folder, form, target, layout, model_dtype=model_dtype)
            notes += [f"{layout.name}: {note}" for note in form.notes(folder, layout)]
    for name, plan in list(plans.items()):
        fused = [plans[other].layout.symmetric for other in plan.layout.fused_names if other in plans]
        # Binary codes only: uniform grids are what their file says.
        if plan.layout.symmetric and not all(fused) and plan.source.coefficients is not None:
            plans[name] = _plan_linear(folder, form, target, plan.source, model_dtype=model_dtype, symmetric=False)
    kept = Counter((plan.scale_dtype, plan.wanted_dtype) for plan in plans.values())
    notes += [
        f"scales of {count} linears are stored in {stored}: {wanted} would round them"
        for (stored, wanted), count in kept.items()
        if stored != wanted
    ]
    return plans, notes


def _plan_linear(
    folder: CheckpointFolder,
    form: CheckpointFormat,
    target: CheckpointFormat,
    layout: LinearLayout,
    *,
    model_dtype: torch.dtype | None,
    symmetric: bool = True,
) -> _Plan:
    weight = weight_for(target, form.decode(folder, layout), layout, symmetric=symmetric)
    wanted = target.scale_dtype(model_dtype or weight.scale_dtype)
    if weight.scales_fit(wanted):
        weight = weight.with_scale_dtype(wanted)
    final = weight.laid_out(layout)
    tensors = target.encode(final, weight)
    return _Plan(
        source=layout,
        layout=final,
        entries=tuple(TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()),
        scale_dtype=weight.scale_dtype,
        wanted_dtype=wanted,
        digest=weight_digest(weight),
    )


def _model_dtype(folder: CheckpointFolder) -> torch.dtype | None:
    """Return the dtype that most dense tensors have; None when none is of a floating dtype."""
    names = [name for name in folder.tensors if name.endswith(".weight")]
    counts = Counter(folder.info(name).dtype for name in names if folder.info(name).dtype in SCALE_DTYPES)
    return TORCH_DTYPES[max(sorted(counts), key=counts.__getitem__)] if counts else None


def _entries(folder: CheckpointFolder, form: CheckpointFormat, plans: Mapping[str, _Plan]) -> list[TensorEntry]:
    """All tensors of the result: those of a linear take the place of the first tensor it had."""
    entries: list[TensorEntry] = []
    done: set[str] = set()
    for name, info in folder.tensors.items():
        linear = _linear_of(name, form, plans)
        if linear is None:
            entries.append(TensorEntry(name, info.torch_dtype, info.shape))
        elif linear not in done:
            done.add(linear)
            entries += plans[linear].entries
    return entries


def _linear_of(name: str, form: CheckpointFormat, plans: Mapping[str, _Plan]) -> str | None:
    linear, _, suffix = name.rpartition(".")
    return linear if linear in plans and suffix in form.suffixes else None


def _write(
    folder: CheckpointFolder,
    writer: ShardWriter,
    form: CheckpointFormat,
    target: CheckpointFormat,
    *,
    plans: Mapping[str, _Plan],
) -> None:
    for name in folder.tensors:
        if _linear_of(name, form, plans) is None:
            writer.write_chunks(name, folder.read_chunks(name))
    for plan in plans.values():
        weight = weight_for(target, form.decode(folder, plan.source), plan.source, symmetric=plan.layout.symmetric)
        tensors = target.encode(plan.layout, weight.with_scale_dtype(plan.scale_dtype))
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _verify(
    written: CheckpointFolder, folder: CheckpointFolder, target: CheckpointFormat, plans: Mapping[str, _Plan]
) -> None:
    """Read the result back: every linear decodes to the weight of the source, every other tensor has its bytes."""
    layouts = {layout.name: layout for layout in target.read_layouts(written) if layout.bits is not None}
    if detect(written) != target or layouts.keys() != plans.keys():
        raise _differs(written, f"{len(plans)} linears in {target.name}", f"{len(layouts)}")
    for linear, plan in plans.items():
        if weight_digest(target.decode(written, layouts[linear])) != plan.digest:
            raise _differs(written, f"the weight of {linear} in the source", "another")
    packed = {f"{linear}.{suffix}" for linear in plans for suffix in target.suffixes}
    for name in written.tensors:
        if name not in packed and not same_bytes(written, folder, name):
            raise _differs(written, f"the bytes of {name} in the source", "others")


def _manifest(folder: CheckpointFolder, source_format: str) -> dict[str, Any]:
    """The manifest of the source, if it has one, and what was done to it."""
    manifest = dict(read_manifest(folder.path) or {})
    source_files = manifest.pop("files", None) or describe_files(
        folder.path, (*folder.weight_files, *folder.side_files)
    )
    return {**manifest, "converted": {"optgptq": __version__, "from": source_format, "files": source_files}}


def _shard_bytes(folder: CheckpointFolder) -> int:
    """Shards as large as those of the source, so that a sharded checkpoint stays sharded alike."""
    sizes = Counter[str]()
    for info in folder.tensors.values():
        sizes[info.file] += info.num_bytes
    return max(MIN_SHARD_BYTES, *sizes.values()) if sizes else MIN_SHARD_BYTES


def _differs(folder: CheckpointFolder, expected: str, found: str) -> FormatError:
    return FormatError(
        str(folder.path),
        expected=expected,
        found=found,
        action="Nothing was published. Check the disk, run again, and report it if it happens twice.",
    )

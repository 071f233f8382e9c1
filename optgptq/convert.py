"""Lossless change of layout: the words are packed again, no weight is quantized again, and every result is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optgptq import __version__
from optgptq.affine_weight import AffineWeight
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import describe_files, read_manifest, write_manifest
from optgptq.checkpoint.publish import require_disk_space, staging_folder
from optgptq.checkpoint.safetensors_header import TORCH_DTYPES
from optgptq.checkpoint.writer import ShardWriter, TensorEntry
from optgptq.errors import FormatError
from optgptq.formats import CheckpointFormat, detect, format_named
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """One linear of the source: its layout as the words say, the dtype of its scales, its digest."""

    layout: LinearLayout
    scale_dtype: torch.dtype
    digest: str


def convert(source: Path, output: Path, *, to: str, overwrite: bool = False) -> ConvertResult:
    """Write the checkpoint `source` to `output` in format `to`; decoded weights stay bit-equal.

    Args:
        source: folder in one of `optgptq.formats.FORMATS`.
        output: folder that appears when everything was written and checked.
        to: name of the wanted format.
        overwrite: replace an existing output.

    Raises:
        UsageError: no such format.
        FormatError: the source is dense or damaged.
        TargetError: act-order, or scales or zero points that the format cannot hold exactly.
        OutputError, CapacityError: the output cannot be written.
    """
    target = format_named(to)
    folder = CheckpointFolder.open(source)
    with staging_folder(output, overwrite=overwrite, source=source) as staging:
        form = _require_quantized(folder)
        layouts = form.read_layouts(folder)
        plans, notes = _plan(folder, form, target, layouts)
        final = [plans[layout.name].layout if layout.name in plans else layout for layout in layouts]
        scale_dtypes = {plan.scale_dtype for plan in plans.values()}
        warnings = [
            warning for dtype in sorted(scale_dtypes, key=str) for warning in target.check(final, scale_dtype=dtype)
        ]
        entries = _entries(folder, form, target, plans)
        require_disk_space(staging.path, sum(entry.num_bytes for entry in entries))
        writer = ShardWriter(staging.path, entries, max_shard_bytes=_shard_bytes(folder))
        _write(folder, writer, form, target, plans=plans)
        writer.finish()
        write_side_files(folder, staging.path, target, final)
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
    """Decode every linear once: only the words tell whether it is symmetric and which dtype holds its scales.

    Raises TargetError now, before anything is written, for what the target cannot hold.
    """
    plans: dict[str, _Plan] = {}
    notes: list[str] = []
    model_dtype = _model_dtype(folder)
    for layout in layouts:
        if layout.bits is None:
            continue
        decoded = form.decode(folder, layout)
        true_layout = replace(layout, symmetric=decoded.symmetric)
        weight = _with_scale_dtype(decoded, target.scale_dtype(model_dtype or decoded.scale_OG.dtype))
        target.encode(true_layout, weight)
        plans[layout.name] = _Plan(true_layout, weight.scale_OG.dtype, weight_digest(weight))
        notes += [f"{layout.name}: {note}" for note in form.notes(folder, layout)]
    kept = [
        name for name, plan in plans.items() if plan.scale_dtype != target.scale_dtype(model_dtype or plan.scale_dtype)
    ]
    if kept:
        notes.append(f"scales of {len(kept)} linears stay as the source has them: {model_dtype} would round them")
    return plans, notes


def _with_scale_dtype(weight: AffineWeight, dtype: torch.dtype) -> AffineWeight:
    """Return `weight` with scales in `dtype`, or as they are where that would round one of them."""
    scale_OG = weight.scale_OG.to(dtype)
    if not torch.equal(scale_OG.to(torch.float32), weight.scale_OG.to(torch.float32)):
        return weight
    return replace(weight, scale_OG=scale_OG)


def _model_dtype(folder: CheckpointFolder) -> torch.dtype | None:
    """Return the dtype that most dense tensors have; None when none is of a floating dtype."""
    names = [name for name in folder.tensors if name.endswith(".weight")]
    counts = Counter(folder.info(name).dtype for name in names if folder.info(name).dtype in SCALE_DTYPES)
    return TORCH_DTYPES[max(sorted(counts), key=counts.__getitem__)] if counts else None


def _entries(
    folder: CheckpointFolder, form: CheckpointFormat, target: CheckpointFormat, plans: Mapping[str, _Plan]
) -> list[TensorEntry]:
    """All tensors of the result: those of a linear take the place of the first tensor it had."""
    entries: list[TensorEntry] = []
    done: set[str] = set()
    for name, info in folder.tensors.items():
        linear = _linear_of(name, form, plans)
        if linear is None:
            entries.append(TensorEntry(name, info.torch_dtype, info.shape))
        elif linear not in done:
            done.add(linear)
            plan = plans[linear]
            entries += target.entries(plan.layout, dense_dtype=plan.scale_dtype)
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
        decoded = form.decode(folder, plan.layout)
        weight = replace(decoded, scale_OG=decoded.scale_OG.to(plan.scale_dtype))
        for name, tensor in target.encode(plan.layout, weight).items():
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

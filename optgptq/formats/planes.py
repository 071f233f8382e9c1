"""Checkpoints of binary codes: sign planes, and coefficients in one of three ways. Written and read by optgptq alone.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `W` 32-bit words, `P` planes.
Byte-level page: docs/formats/planes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.folder import CheckpointFolder, TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import TensorEntry
from optgptq.coefficients import ByteCoefficients, Coefficients, FloatCoefficients, StepCoefficients
from optgptq.errors import FormatError
from optgptq.formats.consumers import check_planes, require_planes
from optgptq.formats.naming import with_engine_names
from optgptq.formats.plane_tensors import planes_stored_bits, read_codes, require_sound
from optgptq.formats.planes_config import PlaneSettings, planes_config, read_planes_config
from optgptq.formats.tensors import (
    SCALE_DTYPES,
    columns_per_group,
    groups_per_row,
    require_binary,
    require_bits,
    require_tensor,
)
from optgptq.layout import CoefficientStorage, LinearLayout
from optgptq.packing.planes import COLUMNS_PER_WORD, pack_planes, words_per_plane
from optgptq.quantized_weight import QuantizedWeight

PLANES = "bcq_planes"
ORDER = "bcq_perm"


@dataclass(frozen=True, slots=True)
class _Part:
    """One stored tensor of coefficients.

    Attributes:
        name: what `BinaryWeight.problems` calls it.
        suffix: its name in the file.
        letters: its shape in the file; in memory `O` comes first.
        dtype: None for the floating dtype of the file.
        spellings: dtypes in which it is read.
    """

    name: str
    suffix: str
    letters: str
    dtype: torch.dtype | None = None
    spellings: tuple[str, ...] = SCALE_DTYPES


# In the order of `Coefficients.tensors()`.
_PARTS: Mapping[CoefficientStorage, tuple[_Part, ...]] = MappingProxyType(
    {
        "float": (_Part("coefficients", "bcq_alpha", "GPO"), _Part("offsets", "bcq_offset", "GO")),
        "int8": (
            _Part("coefficients", "bcq_alpha", "GPO", torch.int8, ("I8",)),
            _Part("offsets", "bcq_offset", "GO", torch.int8, ("I8",)),
            _Part("row scales", "bcq_row_scale", "O"),
        ),
        "steps": (
            _Part("steps", "bcq_steps", "PO", torch.uint8, ("U8",)),
            _Part("scales", "bcq_scale", "GO"),
            _Part("offsets", "bcq_offset", "GO"),
        ),
    }
)
_RECORDS: Mapping[CoefficientStorage, Callable[..., Coefficients]] = MappingProxyType(
    {"float": FloatCoefficients, "int8": ByteCoefficients, "steps": StepCoefficients}
)


@dataclass(frozen=True, slots=True)
class PlanesFormat:
    """The layout of binary codes, version 1."""

    name: str = "optgptq"
    smallest_zero_point: int = 0
    stores_symmetric_zero_points: bool = False
    holds_binary_codes: bool = True
    suffixes: tuple[str, ...] = (
        PLANES,
        ORDER,
        *sorted({part.suffix for parts in _PARTS.values() for part in parts}),
    )

    def scale_dtype(self, dense_dtype: torch.dtype) -> torch.dtype:
        # Whatever the model is stored in: float16 loses 0.002 % of layer loss, bfloat16 0.1 %.
        return torch.float16

    def check(self, layouts: Sequence[LinearLayout], *, scale_dtype: torch.dtype) -> tuple[str, ...]:
        return check_planes(layouts)

    def entries(self, layout: LinearLayout, *, dense_dtype: torch.dtype) -> tuple[TensorEntry, ...]:
        require_planes(layout)
        shape = (words_per_plane(layout.in_features), require_bits(layout), layout.out_features)
        dtype = self.scale_dtype(dense_dtype)
        return (
            TensorEntry(f"{layout.name}.{PLANES}", torch.int32, shape),
            *(
                TensorEntry(f"{layout.name}.{part.suffix}", part.dtype or dtype, _shape(part, layout))
                for part in _parts(layout)
            ),
        )

    def encode(self, layout: LinearLayout, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        binary, name = require_binary(layout, weight), layout.name
        require_planes(layout)
        _require_fits(layout, binary)
        require_sound(binary, lambda part: f"{name}, {part}")
        tensors = {f"{name}.{PLANES}": pack_planes(binary.codes_OI, binary.bits)}
        for part, tensor in zip(_parts(layout), binary.coefficients.tensors(), strict=True):
            stored = tensor.movedim(0, -1).clone(memory_format=torch.contiguous_format)
            tensors[f"{name}.{part.suffix}"] = stored
        if binary.column_order_I is not None:
            tensors[f"{name}.{ORDER}"] = binary.column_order_I.to(torch.int32)
        return tensors

    def quantization_config(self, layouts: Sequence[LinearLayout]) -> dict[str, Any]:
        return planes_config(layouts)

    def extra_files(self, layouts: Sequence[LinearLayout]) -> dict[str, dict[str, Any]]:
        return {}

    def read_layouts(self, folder: CheckpointFolder) -> tuple[LinearLayout, ...]:
        config = read_planes_config(folder)
        names = [name.removesuffix(f".{PLANES}") for name in folder.tensors if name.endswith(f".{PLANES}")]
        contradictions = sorted((config.linears.keys() - set(names)) | (set(config.dense) & set(names)))
        if not names or contradictions:
            subject = contradictions[0] if contradictions else "*"
            raise FormatError(
                f"{folder.path}, tensor {subject}.{PLANES}",
                expected="sign planes of exactly the linears that quantization_config says are quantized",
                found="none" if subject not in names else "planes of a linear that it says is dense",
                action="Get the checkpoint again: its weights are not those of its configuration.",
            )
        return with_engine_names(folder, [_read_layout(folder, config.settings_for(name), name) for name in names])

    def decode(self, folder: TensorSource, layout: LinearLayout) -> BinaryWeight:
        name, parts = layout.name, _parts(layout)
        assert layout.coefficients is not None
        stored = [folder.read(f"{name}.{part.suffix}").movedim(-1, 0).contiguous() for part in parts]
        weight = BinaryWeight(
            codes_OI=read_codes(folder, f"{name}.{PLANES}", layout),
            coefficients=_RECORDS[layout.coefficients](*stored),
            bits=require_bits(layout),
            group_size=columns_per_group(layout),
            column_order_I=folder.read(f"{name}.{ORDER}") if f"{name}.{ORDER}" in folder.tensors else None,
        )
        suffixes = {"column order": ORDER, **{part.name: part.suffix for part in parts}}
        return require_sound(weight, lambda part: f"{folder.path}, tensor {name}.{suffixes[part]}")

    def stored_bits(self, layout: LinearLayout, tensors: Sequence[TensorInfo]) -> int:
        return planes_stored_bits(layout, tensors, planes=f"{layout.name}.{PLANES}")

    def notes(self, folder: CheckpointFolder, layout: LinearLayout) -> tuple[str, ...]:
        return ()


def _parts(layout: LinearLayout) -> tuple[_Part, ...]:
    require_planes(layout)
    assert layout.coefficients is not None
    return _PARTS[layout.coefficients]


def _shape(part: _Part, layout: LinearLayout) -> tuple[int, ...]:
    sizes = {"G": groups_per_row(layout), "P": require_bits(layout), "O": layout.out_features}
    return tuple(sizes[letter] for letter in part.letters)


def _read_layout(folder: CheckpointFolder, settings: PlaneSettings, name: str) -> LinearLayout:
    """Return the layout of one linear, with the shapes of all its tensors checked."""
    info = require_tensor(folder, f"{name}.{PLANES}", dtypes=("I32",))
    words, planes, rows = info.shape if len(info.shape) == 3 else (0, 0, 0)
    columns = words * COLUMNS_PER_WORD if settings.in_features is None else settings.in_features
    layout = LinearLayout(
        name=name,
        out_features=rows,
        in_features=columns,
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=False,
        coefficients=settings.coefficients,
    )
    expected_words = words_per_plane(columns)
    if (words, planes) != (expected_words, settings.bits) or rows < 1 or columns < 1:
        raise FormatError(
            f"{folder.path}, tensor {name}.{PLANES}",
            expected=f"[{expected_words or 'words'}, {settings.bits}, rows]",
            found=str(list(info.shape)),
            action="Check quantization_config: it contradicts the stored tensors.",
        )
    whole_rows = settings.group_size in (-1, columns)
    if not whole_rows and (settings.group_size % COLUMNS_PER_WORD or columns % settings.group_size):
        raise FormatError(
            f"{folder.path}, linear {name}",
            expected=f"a group size that is a multiple of {COLUMNS_PER_WORD} and divides its {columns} columns",
            found=str(settings.group_size),
            action="Check quantization_config: it contradicts the stored tensors.",
        )
    for part in _parts(layout):
        require_tensor(folder, f"{name}.{part.suffix}", dtypes=part.spellings, shape=_shape(part, layout))
    if f"{name}.{ORDER}" in folder.tensors:
        require_tensor(folder, f"{name}.{ORDER}", dtypes=("I32",), shape=(columns,))
    return layout


def _require_fits(layout: LinearLayout, weight: BinaryWeight) -> None:
    """Raise FormatError unless `weight` is what `layout` says."""
    alpha_OGP, offset_OG = weight.coefficients.values()
    rows, groups, bits = layout.out_features, groups_per_row(layout), require_bits(layout)
    found = (weight.codes_OI.shape, alpha_OGP.shape, offset_OG.shape, weight.group_size, weight.coefficients.storage)
    wanted = (
        (rows, layout.in_features),
        (rows, groups, bits),
        (rows, groups),
        columns_per_group(layout),
        layout.coefficients,
    )
    if found != wanted or weight.bits != bits:
        raise FormatError(
            layout.name,
            expected=f"codes, coefficients, offsets, group size, storage {wanted}",
            found=str(tuple(tuple(item) if isinstance(item, torch.Size) else item for item in found)),
            action="Please report this: it is a bug in optgptq.",
        )


PLANES_FORMAT = PlanesFormat()

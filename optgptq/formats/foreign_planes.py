"""Sign planes of other projects, read only: LUT-GEMM, AnyBCQ, BPDQ. `optgptq convert --to optgptq` imports them.

All store planes as we do; names and coefficients differ. None of them has a written specification of its files:
docs/formats/planes.md says what is taken for granted here.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.checkpoint.folder import CheckpointFolder, TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.checkpoint.writer import TensorEntry
from optgptq.coefficients import FloatCoefficients
from optgptq.errors import FormatError, TargetError
from optgptq.formats.naming import with_engine_names
from optgptq.formats.plane_tensors import planes_stored_bits, read_codes, require_sound
from optgptq.formats.tensors import SCALE_DTYPES, columns_per_group, require_bits, require_tensor
from optgptq.layout import LinearLayout
from optgptq.normal_form import normal_form
from optgptq.packing.planes import COLUMNS_PER_WORD
from optgptq.quantized_weight import QuantizedWeight

MAX_PLANES = 8
# Stands for the number of planes in a suffix.
PRECISION = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignPlanes:
    """One foreign layout.

    Attributes:
        name: name in messages.
        planes: suffix of the planes, int32 `[I / 32, P, O]`; more than `P` where precisions share them.
        coefficients: suffix of the coefficients `[G, P, O]`, with `PRECISION` where each precision has its own.
        offsets: suffix of the offsets `[G, O]`; None where coefficients count bits of 0 and 1, and have one entry more,
            the last, for the constant.
    """

    name: str
    planes: str
    coefficients: str
    offsets: str | None
    smallest_zero_point: int = 0
    stores_symmetric_zero_points: bool = False
    holds_binary_codes: bool = True

    @property
    def suffixes(self) -> tuple[str, ...]:
        beside = [suffix for suffix in (self.coefficients, self.offsets) if suffix is not None]
        every = [suffix.format(number) for suffix in beside for number in range(1, MAX_PLANES + 1)]
        return tuple(dict.fromkeys([self.planes, *every]))

    def recognizes(self, folder: CheckpointFolder) -> bool:
        """True if some linear of `folder` has planes and coefficients under the names of this layout."""
        return bool(self._linears(folder))

    def scale_dtype(self, dense_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def check(self, layouts: Sequence[LinearLayout], *, scale_dtype: torch.dtype) -> tuple[str, ...]:
        raise self._read_only()

    def entries(self, layout: LinearLayout, *, dense_dtype: torch.dtype) -> tuple[TensorEntry, ...]:
        raise self._read_only()

    def encode(self, layout: LinearLayout, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        raise self._read_only()

    def quantization_config(self, layouts: Sequence[LinearLayout]) -> dict[str, Any]:
        raise self._read_only()

    def extra_files(self, layouts: Sequence[LinearLayout]) -> dict[str, dict[str, Any]]:
        raise self._read_only()

    def read_layouts(self, folder: CheckpointFolder) -> tuple[LinearLayout, ...]:
        self._require_whole(folder)
        return with_engine_names(folder, [self._read_layout(folder, name) for name in self._linears(folder)])

    def decode(self, folder: TensorSource, layout: LinearLayout) -> BinaryWeight:
        name, bits = layout.name, require_bits(layout)
        stored_OGP = folder.read(f"{name}.{self.coefficients.format(bits)}").movedim(-1, 0).contiguous()
        if self.offsets is None:
            alpha_OGP, offset_OG = _from_bits(stored_OGP)
        else:
            alpha_OGP = stored_OGP
            offset_OG = folder.read(f"{name}.{self.offsets.format(bits)}").movedim(-1, 0).contiguous()
        group_size = columns_per_group(layout)
        codes_OI = read_codes(folder, f"{name}.{self.planes}", layout)
        codes_OI, alpha_OGP = normal_form(codes_OI, alpha_OGP, group_size=group_size)
        weight = BinaryWeight(
            codes_OI=codes_OI,
            coefficients=FloatCoefficients(alpha_OGP, offset_OG),
            bits=bits,
            group_size=group_size,
        )
        suffixes = {"coefficients": self.coefficients, "offsets": self.offsets or self.coefficients}
        return require_sound(weight, lambda part: f"{folder.path}, tensor {name}.{suffixes[part].format(bits)}")

    def stored_bits(self, layout: LinearLayout, tensors: Sequence[TensorInfo]) -> int:
        beside = {self.coefficients, self.offsets} - {None}
        used = {f"{layout.name}.{suffix}".format(require_bits(layout)) for suffix in beside}
        planes = f"{layout.name}.{self.planes}"
        return planes_stored_bits(layout, [tensor for tensor in tensors if tensor.name in used], planes=planes)

    def notes(self, folder: CheckpointFolder, layout: LinearLayout) -> tuple[str, ...]:
        precisions = self._precisions(folder, layout.name)
        if len(precisions) < 2:
            return ()
        return (f"it holds precisions of {', '.join(map(str, precisions))} bits; the highest is read",)

    def _require_whole(self, folder: CheckpointFolder) -> None:
        """Raise FormatError where only a part of a linear is there: it would pass for dense tensors, and be copied."""
        present: dict[str, str] = {}
        suffixes = frozenset(self.suffixes)
        for tensor in sorted(folder.tensors):
            name, _, suffix = tensor.rpartition(".")
            if suffix in suffixes:
                present.setdefault(name, tensor)
        for name, tensor in present.items():
            missing = self._missing(folder, name)
            if missing is not None:
                raise FormatError(
                    f"{folder.path}, tensor {missing}",
                    expected=f"planes, coefficients and offsets beside each other in a checkpoint of {self.name}",
                    found=f"no such tensor beside {tensor}",
                    action="Get the checkpoint again: a part of this linear is missing.",
                )

    def _missing(self, folder: CheckpointFolder, name: str) -> str | None:
        """Return a tensor that linear `name` lacks; the shape of its planes must be that of planes."""
        planes = f"{name}.{self.planes}"
        if planes not in folder.tensors:
            return planes
        info = require_tensor(folder, planes, dtypes=("I32",))
        if len(info.shape) != 3:
            raise FormatError(
                f"{folder.path}, tensor {planes}",
                expected=f"[words, planes, rows] in a checkpoint of {self.name}",
                found=str(list(info.shape)),
                action="Convert the checkpoint with the tool that made it: its linears are in several layouts.",
            )
        beside = [suffix for suffix in (self.coefficients, self.offsets) if suffix is not None]
        for number in range(1, MAX_PLANES + 1):
            wanted = [f"{name}.{suffix.format(number)}" for suffix in beside]
            lacking = [tensor for tensor in wanted if tensor not in folder.tensors]
            if lacking and len(lacking) < len(wanted):
                return lacking[0]
        if self._precisions(folder, name):
            return None
        return f"{name}.{self.coefficients.format(min(max(info.shape[1], 1), MAX_PLANES))}"

    def _linears(self, folder: CheckpointFolder) -> list[str]:
        names = [name.removesuffix(f".{self.planes}") for name in folder.tensors if name.endswith(f".{self.planes}")]
        return [
            name
            for name in names
            if len(folder.info(f"{name}.{self.planes}").shape) == 3 and self._precisions(folder, name)
        ]

    def _precisions(self, folder: CheckpointFolder, name: str) -> list[int]:
        """Return the numbers of planes for which there are coefficients, ascending."""
        if PRECISION not in self.coefficients:
            stored = folder.info(f"{name}.{self.planes}").shape[1]
            return [stored] if f"{name}.{self.coefficients}" in folder.tensors else []
        numbers = range(1, MAX_PLANES + 1)
        return [number for number in numbers if f"{name}.{self.coefficients.format(number)}" in folder.tensors]

    def _read_layout(self, folder: CheckpointFolder, name: str) -> LinearLayout:
        """Return the layout of one linear, all of it told by shapes, which are checked."""
        words, planes, rows = require_tensor(folder, f"{name}.{self.planes}", dtypes=("I32",)).shape
        bits, columns = self._precisions(folder, name)[-1], words * COLUMNS_PER_WORD
        coefficients = f"{name}.{self.coefficients.format(bits)}"
        stored = require_tensor(folder, coefficients, dtypes=SCALE_DTYPES).shape
        groups = stored[0] if stored else 0
        if bits > min(planes, MAX_PLANES) or not groups or not rows or columns % groups or not columns:
            raise FormatError(
                f"{folder.path}, tensors of {name}",
                expected=f"1 to {MAX_PLANES} planes, and groups that divide its {columns} columns",
                found=f"planes {[words, planes, rows]} and coefficients {list(stored)}",
                action=f"Check that the checkpoint is one of {self.name}: optgptq told it by the names of its tensors.",
            )
        extra = 1 if self.offsets is None else 0
        require_tensor(folder, coefficients, dtypes=SCALE_DTYPES, shape=(groups, bits + extra, rows))
        if self.offsets is not None:
            offsets = f"{name}.{self.offsets.format(bits)}"
            require_tensor(folder, offsets, dtypes=SCALE_DTYPES, shape=(groups, rows))
        return LinearLayout(
            name=name,
            out_features=rows,
            in_features=columns,
            bits=bits,
            group_size=-1 if groups == 1 else columns // groups,
            symmetric=False,
            coefficients="float",
        )

    def _read_only(self) -> TargetError:
        return TargetError(
            self.name,
            expected="a layout that optgptq writes",
            found="one that it only reads",
            action="Use the layout optgptq for binary codes.",
        )


def _from_bits(stored_OGP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coefficients and offsets, float32, of `sum_p c_p * bit_p + constant`, the constant last.

    A bit is `(1 + sign) / 2`. Halves are exact; sums are taken in float64 and rounded once.
    """
    half_OGP = stored_OGP[:, :, :-1].to(torch.float32) / 2
    offset_OG = stored_OGP[:, :, -1].to(torch.float64) + half_OGP.to(torch.float64).sum(dim=2)
    return half_OGP, offset_OG.to(torch.float32)


LUT_GEMM = ForeignPlanes(name="lut-gemm", planes="binary", coefficients="alpha", offsets="q_bias")
ANYBCQ = ForeignPlanes(name="anybcq", planes="qweight", coefficients="alpha_{}", offsets="beta_{}")
BPDQ = ForeignPlanes(name="bpdq", planes="B", coefficients="c", offsets=None)

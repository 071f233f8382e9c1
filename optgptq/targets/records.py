"""What a record about an engine can say. Adding an engine or a version is adding records, and nothing else.

A target is one engine, version and platform. It has one record per path: a way in which it loads some formats. A path
has kernels: a linear loads if one of them takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ActOrder = Literal["no", "whole rows", "yes"]
Splits = Literal["rows", "columns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What one kernel takes. Empty tuples and ones set no limit.

    Attributes:
        name: its name in the engine.
        bits: widths of codes.
        symmetric, asymmetric: grids without and with zero points of their own.
        group_sizes: columns per group, -1 for one group per row.
        group_multiple: group sizes other than -1 are multiples of it.
        whole_rows: takes a group size of -1.
        row_multiple, column_multiple: rows and columns of what one device holds are multiples of these.
        tiles: pairs (columns, rows), of which one must divide what one device holds.
        model_dtypes: dtypes of activations.
        head: takes an output head as well.
        package: what must be installed beside the engine.
        note: what to know where only this kernel takes a linear.
    """

    name: str
    bits: tuple[int, ...]
    symmetric: bool = True
    asymmetric: bool = False
    group_sizes: tuple[int, ...] = ()
    group_multiple: int = 1
    whole_rows: bool = True
    row_multiple: int = 1
    column_multiple: int = 1
    tiles: tuple[tuple[int, int], ...] = ()
    model_dtypes: tuple[str, ...] = ()
    head: bool = True
    package: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """A warning for files with some linear of these widths; `symmetric` None is both kinds of grids."""

    text: str
    bits: tuple[int, ...] = ()
    symmetric: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a rule was read.

    Attributes:
        what: the release, and the file or function in it.
        date: day on which it was read, ISO.
        sure: read in the source; False for what follows from it without having been tried.
    """

    what: str
    date: str
    sure: bool = True

    def __str__(self) -> str:
        return f"{self.what}, read {self.date}" + ("" if self.sure else ", inferred")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPath:
    """How one engine on one platform loads some formats.

    Attributes:
        engine, version, platform: the target.
        name: the path in the engine.
        formats: names of formats, `dense` among them.
        kernels: what linears it takes; a path of dense files has none.
        source: where the rules were read.
        option: what the user passes to the engine.
        act_order: columns may be assigned to groups by a stored index.
        asymmetric_versions: versions of GPTQ zero points that are read right where grids are asymmetric.
        reads_zero_points: of symmetric GPTQ files as well, so that their words must be those of the label.
        labels: versions that the label of a GPTQ file may have.
        mixed: linears may differ from each other.
        dense_linears: linears in decoder layers may stay dense.
        quantized_head: the output head may be quantized.
        head_row_multiple: rows of a quantized head are a multiple of it.
        tied_families: model types whose head is the embedding whatever the config says.
        transposed: linears that the model stores `[I, O]` (GPT-2) may be quantized.
        loose_words: widths that do not divide 32 may be packed with unused bits, as before compressed-tensors 0.18.
        binary: sums of signs.
        fused_apart: members of a linear that others fuse may differ.
        whole_words: rows and columns of a device fill whole 32-bit words.
        scale_dtypes: dtypes of stored scales.
        max_tensor_parallel: most devices that share a linear; 0 sets no limit.
        own_cache: uses the quantized KV cache of optgptq.
        fp8_scales: kinds of fp8 KV cache scales that it uses.
        families: model types that it knows; empty where all are.
        refused_families: model types that it cannot load, and why.
        refused_traits: what a family's config may say, and why it is refused.
        requires: what must be installed; told with every answer.
        cautions: further warnings.
    """

    engine: str
    version: str
    platform: str
    name: str
    formats: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    source: Source
    option: str = ""
    act_order: ActOrder = "no"
    asymmetric_versions: tuple[int, ...] = (1, 2)
    reads_zero_points: bool = False
    labels: tuple[int, ...] = (1, 2)
    mixed: bool = True
    dense_linears: bool = True
    quantized_head: bool = False
    head_row_multiple: int = 1
    tied_families: tuple[str, ...] = ()
    transposed: bool = True
    loose_words: bool = False
    binary: bool = False
    fused_apart: bool = False
    whole_words: bool = True
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    max_tensor_parallel: int = 0
    own_cache: bool = False
    fp8_scales: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    refused_families: tuple[tuple[str, str], ...] = ()
    refused_traits: tuple[tuple[str, str], ...] = ()
    requires: tuple[str, ...] = ()
    cautions: tuple[Caution, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatLimits:
    """What a format itself can hold, whoever reads it.

    Attributes:
        name: the format.
        bits: widths.
        binary: it holds sums of signs, and nothing else; otherwise uniform grids alone.
        transposed: linears that the model stores `[I, O]`.
        group_multiple: group sizes other than -1 are multiples of it.
    """

    name: str
    bits: tuple[int, ...]
    binary: bool = False
    transposed: bool = True
    group_multiple: int = 1


FORMAT_LIMITS = (
    FormatLimits(name="gptq", bits=(2, 3, 4, 8)),
    FormatLimits(name="gptq_v2", bits=(2, 3, 4, 8)),
    FormatLimits(name="compressed-tensors", bits=(1, 2, 3, 4, 5, 6, 7, 8), transposed=False),
    FormatLimits(name="optgptq", bits=(1, 2, 3, 4), binary=True, group_multiple=32),
)
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}

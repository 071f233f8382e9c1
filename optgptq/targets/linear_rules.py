"""Which linears a path takes: each kind of linear once, as one device holds it, against each kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optgptq.layout import LinearLayout
from optgptq.targets.records import Kernel, LoadPath, Splits
from optgptq.targets.refusal import Refusal
from optgptq.targets.subject import TargetSubject

WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearKind:
    """Linears that are alike for every rule.

    Attributes:
        layout: the first of them.
        names: all of them.
        rows: rows of the fused linear on one device; None where they cannot be split.
        own_rows: rows of the linear itself on one device.
        columns: columns on one device; None where they cannot be split.
    """

    layout: LinearLayout
    names: tuple[str, ...]
    rows: int | None
    own_rows: int | None
    columns: int | None


@dataclass(frozen=True, slots=True)
class _Miss:
    """One thing that a kernel does not take."""

    rule: str
    expected: str
    found: str


def linear_kinds(subject: TargetSubject, tensor_parallel: int) -> tuple[LinearKind, ...]:
    """Return the kinds of linears of `subject`; the output head is split along padded rows and always fits."""
    by_name = {layout.name: layout for layout in subject.layouts}
    kinds: dict[tuple[object, ...], LinearKind] = {}
    names: dict[tuple[object, ...], list[str]] = {}
    for layout in subject.layouts:
        splits: Splits = subject.splits.get(layout.name, "rows")
        members = [by_name.get(name, layout) for name in layout.fused_names] or [layout]
        parallel = tensor_parallel if subject.is_inner(layout) else 1
        own_rows = _device_rows(layout, members, subject, parallel if splits == "rows" else 1)
        shares = [_device_rows(one, members, subject, parallel if splits == "rows" else 1) for one in members]
        rows = None if None in shares else sum(share or 0 for share in shares)
        columns = _share(layout.in_features, parallel if splits == "columns" else 1)
        is_head = layout.name == subject.head_name
        key = (
            is_head,
            _settings(layout),
            layout.out_features,
            layout.in_features,
            layout.stored_transposed,
            rows,
            columns,
        )
        names.setdefault(key, []).append(layout.name)
        kinds.setdefault(key, LinearKind(layout=layout, names=(), rows=rows, own_rows=own_rows, columns=columns))
    return tuple(
        LinearKind(
            layout=kind.layout,
            names=tuple(names[key]),
            rows=kind.rows,
            own_rows=kind.own_rows,
            columns=kind.columns,
        )
        for key, kind in kinds.items()
    )


def linear_refusals(path: LoadPath, subject: TargetSubject, tensor_parallel: int) -> Iterator[Refusal]:
    """Yield what no kernel of `path` takes, and what cannot be shared by `tensor_parallel` devices."""
    for kind in linear_kinds(subject, tensor_parallel):
        misses = [*_split_misses(kind, subject.splits.get(kind.layout.name, "rows"), tensor_parallel)]
        if kind.layout.bits is not None and not misses:
            misses += _word_misses(path, subject, kind)
            misses += nearest_misses(path.kernels, kind, subject)
        for miss in misses:
            yield Refusal.of(path, miss.rule, names=kind.names, expected=miss.expected, found=miss.found)


def nearest_misses(kernels: Sequence[Kernel], kind: LinearKind, subject: TargetSubject) -> list[_Miss]:
    """Return what keeps the kernel that comes nearest from taking `kind`; empty where one takes it."""
    every = [list(_kernel_misses(kernel, kind, subject)) for kernel in kernels]
    return min(every, key=len, default=[_Miss("bits", "no packed linears", f"{kind.layout.bits} bits")])


def kernel_for(path: LoadPath, kind: LinearKind, subject: TargetSubject) -> Kernel | None:
    """Return the first kernel of `path` that takes `kind`; None where none does."""
    return next((kernel for kernel in path.kernels if not list(_kernel_misses(kernel, kind, subject))), None)


def _kernel_misses(kernel: Kernel, kind: LinearKind, subject: TargetSubject) -> Iterator[_Miss]:
    layout, size = kind.layout, kind.layout.group_size
    if layout.bits not in kernel.bits:
        yield _Miss("bits", f"{_list(kernel.bits)} bits", f"{layout.bits}")
    if not (kernel.symmetric if layout.symmetric else kernel.asymmetric):
        kinds = ("symmetric grids", "asymmetric ones")
        expected, found = kinds if kernel.symmetric else kinds[::-1]
        yield _Miss("symmetric", expected, found)
    whole = size == -1 or size == layout.in_features
    if kernel.group_sizes and size not in kernel.group_sizes and not (whole and -1 in kernel.group_sizes):
        yield _Miss("group_size", f"groups of {_list(kernel.group_sizes)} columns", str(size))
    elif size == -1 and not kernel.whole_rows:
        yield _Miss("group_size", "groups of columns", "-1, one group per row")
    elif size != -1 and size % kernel.group_multiple:
        yield _Miss("group_size", f"a group size that is a multiple of {kernel.group_multiple}", str(size))
    if kernel.model_dtypes and subject.model_dtype not in kernel.model_dtypes:
        yield _Miss("dtype", f"activations in {_list(kernel.model_dtypes)}", subject.model_dtype)
    if not kernel.head and layout.name == subject.head_name:
        yield _Miss("head", "a linear of a decoder layer", "the output head")
    yield from _shape_misses(kernel, kind.rows or 0, kind.columns or 0)


def _shape_misses(kernel: Kernel, rows: int, columns: int) -> Iterator[_Miss]:
    if rows % kernel.row_multiple:
        yield _Miss("shape", f"rows in multiples of {kernel.row_multiple}", f"{rows} rows on a device")
    if columns % kernel.column_multiple:
        yield _Miss("shape", f"columns in multiples of {kernel.column_multiple}", f"{columns} columns on a device")
    if kernel.tiles and not any(columns % tile[0] == 0 and rows % tile[1] == 0 for tile in kernel.tiles):
        tiles = " or ".join(f"{tile[0]} columns and {tile[1]} rows" for tile in kernel.tiles)
        yield _Miss("shape", f"multiples of {tiles}", f"{columns} columns and {rows} rows on a device")


def _word_misses(path: LoadPath, subject: TargetSubject, kind: LinearKind) -> Iterator[_Miss]:
    """Yield sizes that leave a word half empty: engines allocate whole words, and files round up."""
    layout = kind.layout
    if not path.whole_words or layout.bits is None:
        return
    if (kind.columns or 0) * layout.bits % WORD_BITS:
        yield _Miss("shape", "columns whose codes fill whole 32-bit words", f"{kind.columns} of {layout.bits} bits")
    stores_zero_points = subject.format.startswith("gptq") or not layout.symmetric
    if stores_zero_points and (kind.own_rows or 0) * layout.bits % WORD_BITS:
        yield _Miss("shape", "rows whose zero points fill whole 32-bit words", f"{kind.own_rows} of {layout.bits} bits")


def _split_misses(kind: LinearKind, splits: Splits, tensor_parallel: int) -> Iterator[_Miss]:
    layout = kind.layout
    if kind.rows is None:
        yield _Miss("tensor_parallel", f"rows that {tensor_parallel} devices share", f"{layout.out_features}")
    elif kind.columns is None:
        yield _Miss("tensor_parallel", f"columns that {tensor_parallel} devices share", f"{layout.in_features}")
    elif splits == "columns" and layout.bits is not None and _straddles(layout, kind.columns):
        expected = f"whole groups of {layout.group_size} columns on each of {tensor_parallel} devices"
        yield _Miss("tensor_parallel", expected, f"{kind.columns} columns on each")


def _straddles(layout: LinearLayout, columns: int) -> bool:
    """Return whether a group lies on two devices."""
    return 0 < layout.group_size < layout.in_features and columns % layout.group_size != 0


def _device_rows(
    layout: LinearLayout, members: Sequence[LinearLayout], subject: TargetSubject, parallel: int
) -> int | None:
    """Return the rows of `layout` on one device; heads of keys and values are repeated where there are too few."""
    key_value, head_dim = subject.num_kv_heads, subject.head_dim
    repeats = 0 < key_value < parallel and parallel % key_value == 0
    if repeats and len(members) == 3 and layout is not members[0] and layout.out_features == key_value * head_dim:
        return head_dim
    if repeats and layout.out_features == (subject.num_heads + 2 * key_value) * head_dim:
        return None if subject.num_heads % parallel else (subject.num_heads // parallel + 2) * head_dim
    return _share(layout.out_features, parallel)


def _share(size: int, parallel: int) -> int | None:
    return None if size % parallel else size // parallel


def _settings(layout: LinearLayout) -> tuple[object, ...]:
    return () if layout.bits is None else (layout.bits, layout.group_size, layout.symmetric, layout.coefficients)


def _list(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

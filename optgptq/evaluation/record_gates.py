"""Figures of gates that need no model to run: what a job recorded of itself, and which linears are stored in codes.

A record is the content of a checkpoint's manifest, which anybody can edit: what is not there, or not a number, is an
error and never a figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import InputError, OptGPTQError
from optgptq.evaluation.gates import Figure, Gate
from optgptq.formats import detect
from optgptq.models.inventory import head_linear, model_linears
from optgptq.models.registry import model_spec
from optgptq.plain_numbers import is_number

_ROUNDING = "rtn"
_OLD_RECORD = (
    "Quantize the model again with this version, or leave the gate out: an older version, another program, or a recipe "
    "without this step made the checkpoint."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLinear:
    """A linear of a decoder layer, or the head, as a checkpoint stores it.

    Attributes:
        name: full module name.
        out_features, in_features: rows and columns.
        is_dense: it is not stored in codes.
        is_head: it is the output head.
    """

    name: str
    out_features: int
    in_features: int
    is_dense: bool
    is_head: bool = False

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features


def stored_linears(folder: CheckpointFolder) -> tuple[StoredLinear, ...]:
    """Return every linear of every decoder layer, and the head where it is in codes.

    Headers and JSON are read, weights are not.

    Raises:
        ModelError: the architecture is not known.
        FormatError: the configuration of its codes cannot be understood.
    """
    form = detect(folder)
    layouts = () if form is None else form.read_layouts(folder)
    in_codes = {layout.name for layout in layouts if layout.bits is not None}
    spec = model_spec(folder)
    heads = [head for head in (head_linear(spec),) if head.name in in_codes]
    return tuple(
        StoredLinear(
            name=linear.name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            is_dense=linear.name not in in_codes,
            is_head=linear.stage == "head",
        )
        for linear in (*model_linears(spec), *heads)
    )


def recorded_figures(
    gates: Iterable[Gate], record: Mapping[str, Any], linears: Iterable[StoredLinear]
) -> dict[str, Figure | OptGPTQError]:
    """Return the figure of each gate that needs no model to run, by gate name; an InputError where it is missing.

    Args:
        gates: gates that are measured are passed over.
        record: content of the manifest; empty for a checkpoint without one.
        linears: as `stored_linears` returns them.
    """
    known = tuple(linears)
    figures: dict[str, Figure | OptGPTQError] = {}
    for gate in gates:
        if gate.kind.is_measured:
            continue
        try:
            figures[gate.kind.name] = _READERS[gate.kind.name](record, known)
        except InputError as error:
            figures[gate.kind.name] = error
    return figures


def require_figures(figures: Mapping[str, Figure | OptGPTQError]) -> None:
    """Raise the first error among figures.

    Raises:
        InputError: a figure is missing in the record.
    """
    for figure in figures.values():
        if isinstance(figure, OptGPTQError):
            raise figure


Linears = tuple[StoredLinear, ...]
_Reader = Callable[[Mapping[str, Any], Linears], Figure]


def _layer_error(record: Mapping[str, Any], linears: Linears) -> Figure:
    entries = _entries(record, "decoder_layers")
    errors = [(f"decoder layer {entry.get('index')}", _number(entry, "output_error")) for entry in entries]
    return _worst(errors)


def _highest(key: str) -> _Reader:
    """Return the reader of the highest value of a key over all quantized linears."""

    def read(record: Mapping[str, Any], linears: Linears) -> Figure:
        return _worst([(_name(entry), _number(entry, key)) for entry in _entries(record, "layers")])

    return read


def _damping(record: Mapping[str, Any], linears: Linears) -> Figure:
    entries = {_name(entry): entry for entry in _entries(record, "layers")}
    worst = _worst([(name, _number(entry, "damp_ratio_used")) for name, entry in entries.items()])
    asked = None if worst.where is None else entries[worst.where].get("damp_ratio")
    return worst if asked is None else Figure(value=worst.value, where=f"{worst.where}, asked {asked:g}")


def _fewest_tokens(record: Mapping[str, Any], linears: Linears) -> Figure:
    counts = [(_name(entry), -_number(entry, "num_tokens")) for entry in _entries(record, "layers")]
    worst = _worst(counts)
    return Figure(value=-worst.value, where=worst.where)


def _dense_share(record: Mapping[str, Any], linears: Linears) -> Figure:
    inner = tuple(linear for linear in linears if not linear.is_head)
    dense = {linear.name: linear.num_weights for linear in inner if linear.is_dense}
    return Figure(value=_share(dense, inner), where=_largest(dense))


def _rtn_share(record: Mapping[str, Any], linears: Linears) -> Figure:
    """Weights rounded to nearest against the recipe's method: whole linears, and columns that no token reached."""
    method = _asked_method(record, "weights")
    by_name = {linear.name: linear for linear in linears}
    rounded: dict[str, float] = {}
    for entry in _entries(record, "layers"):
        name = _name(entry)
        if name not in by_name:
            raise _missing("layers", found=f"{name}, which the checkpoint does not have")
        if (_asked_method(record, "head") if by_name[name].is_head else method) == _ROUNDING:
            continue
        if not isinstance(entry.get("method"), str):
            raise _missing(f"layers, {name}: method", found=repr(entry.get("method")))
        is_rounded = entry["method"] == _ROUNDING
        columns = by_name[name].in_features if is_rounded else _number(entry, "num_dead_inputs")
        rounded[name] = columns * by_name[name].out_features
    return Figure(value=_share(rounded, linears), where=_largest(rounded))


def _asked_method(record: Mapping[str, Any], section: str) -> str:
    recipe = record.get("recipe")
    values = recipe.get(section) if isinstance(recipe, Mapping) else None
    method = values.get("method") if isinstance(values, Mapping) else None
    if not isinstance(method, str):
        raise _missing(f"recipe.{section}.method", found=repr(method))
    return method


_READERS: Mapping[str, _Reader] = MappingProxyType(
    {
        "max_layer_error": _layer_error,
        "max_linear_loss": _highest("loss"),
        "max_dense_share": _dense_share,
        "max_rtn_share": _rtn_share,
        "max_damp_ratio": _damping,
        "max_clip_fraction": _highest("clip_fraction"),
        "min_tokens_per_linear": _fewest_tokens,
    }
)


def _entries(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = record.get(key)
    if not isinstance(entries, list) or not entries:
        raise _missing(key, found="none" if entries in (None, []) else repr(entries)[:40])
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise _missing(key, found=repr(entry)[:40])
    return entries


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name"))


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    if not isinstance(value, float) and not is_number(value):  # a gate fails on an infinite value, and takes it
        place = _name(entry) if "name" in entry else f"decoder layer {entry.get('index')}"
        raise _missing(f"{place}: {key}", found="none" if value is None else repr(value)[:40])
    return float(value)


def _missing(where: str, *, found: str) -> InputError:
    return InputError(
        f"record of the checkpoint, {where}", expected="a figure that a gate asks for", found=found, action=_OLD_RECORD
    )


def _worst(values: list[tuple[str, float]]) -> Figure:
    """Return the highest of the values and its place; the first one that is not a number where there is any."""
    where, value = max(values, key=lambda item: (math.isnan(item[1]), 0.0 if math.isnan(item[1]) else item[1]))
    return Figure(value=value, where=where)


def _share(weights: Mapping[str, float], linears: Linears) -> float:
    return sum(weights.values()) / sum(linear.num_weights for linear in linears)


def _largest(weights: Mapping[str, float]) -> str | None:
    """Return the linear with the most such weights, and how many others there are; None where there is none."""
    names = [name for name, count in weights.items() if count > 0]
    if not names:
        return None
    largest = max(names, key=lambda name: weights[name])
    others = len(names) - 1
    return largest if not others else f"{largest} and {others} other{'s' if others > 1 else ''}"

"""The nearest recipe that a target loads: changes are tried from the mildest on, and each is checked again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import log2
from typing import Any

from optgptq.targets.known import Target
from optgptq.targets.records import FORMAT_LIMITS
from optgptq.targets.refusal import Refusal
from optgptq.targets.rules import judge
from optgptq.targets.subject import Change, TargetSubject, Varied
from optgptq.targets.vary import vary_layouts

_MOST_DEVICES = 1024
# What a change costs its user: first in quality and size, at last in memory. Fewer changes come before cheaper ones.
COSTS = {
    "format": 1,
    "group_size": 2,
    "symmetric": 3,
    "tensor_parallel": 4,
    "bits": 5,
    "dense_head": 5,
    "keep_dense": 6,
    "uniform": 7,
    "drop_rules": 8,
}
WRITTEN_BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32, -1)
# Linears that meet these rules only by staying dense; what is kept dense must stay the smaller part.
_MISFITS = ("shape", "group_size", "tensor_parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """Changes after which the target loads the result; checked by the rules that refused.

    Attributes:
        settings: texts for `--set`.
        convert_to: format of a lossless `optgptq convert`; empty where the model is quantized again.
        tensor_parallel: devices that share a linear, where they must be another number.
    """

    settings: tuple[str, ...] = ()
    convert_to: str = ""
    tensor_parallel: int | None = None

    @property
    def text(self) -> str:
        """What a user types."""
        words = [f"optgptq convert --to {self.convert_to}"] if self.convert_to else []
        words += [f"--set {shlex.quote(setting)}" for setting in self.settings]
        if self.tensor_parallel is not None:
            words.append(f"--tensor-parallel {self.tensor_parallel}")
        return " ".join(words)

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "settings": list(self.settings),
            "convert_to": self.convert_to or None,
            "tensor_parallel": self.tensor_parallel,
            "text": self.text,
        }


def suggest(target: Target, subject: TargetSubject, tensor_parallel: int = 1) -> Suggestion | None:
    """Return the mildest changes after which `target` loads `subject`; None where no combination does."""
    small = subject.without_repeats()
    if any(refusal.rule == "family" for refusal in judge(target, small, tensor_parallel).refusals):
        return None
    tried: dict[Change, tuple[Refusal, ...] | None] = {}
    for change, is_dense in _candidates(target, small, tensor_parallel):
        if change not in tried:
            tried[change] = _refusals(target, small, change, tensor_parallel)
        refusals = tried[change]
        wanted = _with_dense(small, change, refusals) if is_dense and refusals else change
        if refusals is None or wanted is None or (refusals and not is_dense):
            continue
        suggestion = _confirmed(target, subject, wanted, tensor_parallel)
        if suggestion is not None:
            return suggestion
    return None


def _refusals(target: Target, small: TargetSubject, change: Change, tensor_parallel: int) -> tuple[Refusal, ...] | None:
    """Return what refuses `small` after `change`, by its layouts alone; None where they cannot be changed so."""
    changed = small if _keeps_file(change) else None
    if changed is None:
        varied = vary_layouts(small, change)
        changed = None if varied is None else varied.subject
    return None if changed is None else judge(target, changed, change.tensor_parallel or tensor_parallel).refusals


def _confirmed(target: Target, subject: TargetSubject, change: Change, tensor_parallel: int) -> Suggestion | None:
    """Return the suggestion if the whole subject, made anew with `change`, passes."""
    if change.keep_dense:
        # The names come from the layers that were looked at; those that are like them have the same last parts.
        change = replace(change, keep_dense=_whole_groups(subject, change.keep_dense))
    if _keeps_file(change):
        varied: Varied | None = Varied(subject=subject)
    else:
        varied = (subject.vary or vary_layouts)(subject, change)
    if varied is None or judge(target, varied.subject, change.tensor_parallel or tensor_parallel).refusals:
        return None
    return Suggestion(settings=varied.settings, convert_to=varied.convert_to, tensor_parallel=change.tensor_parallel)


def _keeps_file(change: Change) -> bool:
    return replace(change, tensor_parallel=None) == Change()


def _with_dense(small: TargetSubject, change: Change, refusals: Sequence[Refusal] | None) -> Change | None:
    """Return `change` with the linears dense that are refused for their sizes, where that is the smaller part."""
    refusals = refusals or ()
    names = tuple(dict.fromkeys(name for refusal in refusals for name in refusal.names))
    if not names or any(refusal.rule not in _MISFITS for refusal in refusals):
        return None
    kept = _whole_groups(small, names)
    sizes = {layout.name: layout.out_features * layout.in_features for layout in small.quantized}
    share = sum(sizes.get(name, 0) for name in kept)
    return replace(change, keep_dense=kept) if kept and 2 * share < sum(sizes.values()) else None


def _whole_groups(subject: TargetSubject, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return `names`, all linears with the same last part, and what engines load together with them."""
    leaves = {name.rpartition(".")[2] for name in names}
    fused = {
        member.rpartition(".")[2]
        for layout in subject.layouts
        if layout.name.rpartition(".")[2] in leaves
        for member in layout.fused_names
    }
    return tuple(
        layout.name
        for layout in subject.layouts
        if subject.is_inner(layout) and layout.name.rpartition(".")[2] in leaves | fused
    )


def _candidates(target: Target, subject: TargetSubject, tensor_parallel: int) -> list[tuple[Change, bool]]:
    """Return changes, and whether misfits stay dense: fewest first, then cheapest."""
    changes = [*_changes(target, subject, tensor_parallel)]
    pairs = [(change, is_dense) for change in changes for is_dense in (False, True) if is_dense or change != Change()]
    return sorted(pairs, key=lambda pair: _cost(*pair))


def _changes(target: Target, subject: TargetSubject, tensor_parallel: int) -> Iterator[Change]:
    """Yield the combinations of changes that the records of `target` can take, no change at all among them."""
    binary = any(layout.coefficients is not None for layout in subject.quantized)
    mixed = len({(layout.bits, layout.group_size, layout.symmetric) for layout in subject.quantized}) > 1
    dense = any(layout.bits is None and subject.is_inner(layout) for layout in subject.layouts)
    asymmetric = any(not layout.symmetric and layout.coefficients is None for layout in subject.quantized)
    choices = product(
        _formats(target, subject),
        (False, True) if asymmetric else (False,),
        _bits(target, subject),
        _group_sizes(target, subject),
        (False, True) if mixed or dense else (False,),
        (True,) if binary and not any(path.binary for path in target.paths) else (False,),
        (None, *_fewer_devices(tensor_parallel)),
        (False, True) if any(layout.name == subject.head_name for layout in subject.quantized) else (False,),
    )
    for form, symmetric, bits, group_size, drop_rules, uniform, devices, dense_head in choices:
        yield Change(
            format=form,
            symmetric=symmetric,
            bits=bits,
            group_size=group_size,
            drop_rules=drop_rules,
            uniform=uniform,
            tensor_parallel=devices,
            dense_head=dense_head,
        )


def _fewer_devices(tensor_parallel: int) -> list[int]:
    """Return the divisors that an engine could use in its place; no machine has more devices than are looked at."""
    most = min(tensor_parallel - 1, _MOST_DEVICES)
    return [devices for devices in range(most, 0, -1) if tensor_parallel % devices == 0]


def _cost(change: Change, is_dense: bool) -> tuple[int, int, int]:
    """Return how many changes there are, what they cost, and how far widths and devices move."""
    unchanged = asdict(Change())
    made = [name for name, value in asdict(change).items() if value != unchanged[name]]
    made += ["keep_dense"] if is_dense else []
    # Rules are several wishes of a user: to drop them all counts twice.
    return (
        len(made) + ("drop_rules" in made),
        sum(COSTS[name] for name in made),
        (change.bits or 0) - (change.tensor_parallel or 0),
    )


def _formats(target: Target, subject: TargetSubject) -> list[str | None]:
    """Return None for the format as it is, and the formats that the target knows and this package writes."""
    written = [limits.name for limits in FORMAT_LIMITS if not limits.binary]
    known = {name for path in target.paths for name in path.formats}
    # A file that is written anew has the right label, no gaps, and groups of neighbouring columns.
    is_odd = subject.words_version != 0 or subject.loose_words or subject.act_order
    others = [name for name in written if name in known and (is_odd or name != subject.format)]
    return [None, *others] if subject.format != "dense" else [None]


def _bits(target: Target, subject: TargetSubject) -> list[int | None]:
    fewest = min((layout.bits for layout in subject.quantized if layout.bits is not None), default=8)
    known = {bits for path in target.paths for kernel in path.kernels for bits in kernel.bits}
    return [None, *(bits for bits in WRITTEN_BITS if bits > fewest and bits in known)]


def _group_sizes(target: Target, subject: TargetSubject) -> list[int | None]:
    """Return sizes nearest to the first of `subject` first, the finer of two before the coarser, whole rows last."""
    if not any(path.kernels for path in target.paths):
        return [None]
    first = next((layout.group_size for layout in subject.quantized if layout.group_size > 0), GROUP_SIZES[0])
    near = sorted(GROUP_SIZES, key=lambda size: (size < 0, abs(log2(abs(size) / first)), size))
    return [None, *near]

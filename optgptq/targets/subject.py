"""What is asked about: a checkpoint that exists, or one that a recipe will make, as far as engines care."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from optgptq.layout import LinearLayout
from optgptq.targets.records import Splits

Vary: TypeAlias = "Callable[[TargetSubject, Change], Varied | None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Differences from what is; None, False and empty leave a thing as it is.

    Attributes:
        format: another format.
        symmetric: grids without zero points of their own for all linears.
        bits: linears with fewer get this width.
        group_size: all linears get it.
        keep_dense: names of linears that stay dense.
        dense_head: the output head stays dense.
        uniform: a method that makes uniform grids in place of sums of signs.
        drop_rules: no linear differs from the others any more.
        tensor_parallel: devices that share a linear.
    """

    format: str | None = None
    symmetric: bool = False
    bits: int | None = None
    group_size: int | None = None
    keep_dense: tuple[str, ...] = ()
    dense_head: bool = False
    uniform: bool = False
    drop_rules: bool = False
    tensor_parallel: int | None = None

    @property
    def only_format(self) -> bool:
        """Nothing but the format changes, so codes and scales stay what they are."""
        return self.format is not None and replace(self, format=None, tensor_parallel=None) == Change()


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSubject:
    """A checkpoint as engines see it.

    Attributes:
        format: name of its format; `dense` where nothing is quantized.
        layouts: every linear, dense ones included.
        scale_dtype, model_dtype: of stored scales, and of the dense weights: `float16`, `bfloat16` or `float32`.
        model_type: `model_type` of its config.json; empty where unknown.
        traits: what its config says beyond the family, for records to refuse: `grouped-mpt`, `grouped-sequential`.
        num_heads, num_kv_heads, head_dim: attention; 0 where unknown.
        act_order: linears whose columns are assigned to groups by a stored index, and a configuration that says so.
        words_version: version of the zero points of a symmetric GPTQ file by its words; 0 where the label is right.
        loose_words: codes are packed with unused bits in every word, as compressed-tensors did before 0.18.
        head_name: name of the output head.
        splits: what tensor parallelism divides, by name of the linear; rows where nothing is said.
        own_cache: it has a quantized KV cache of optgptq.
        fp8_scales: kind of its fp8 KV cache scales, `tensor` or `head`; empty where there are none.
        vary: makes the subject after a change, for suggestions; None: from its layouts alone.
    """

    format: str
    layouts: tuple[LinearLayout, ...]
    scale_dtype: str = "float16"
    model_dtype: str = "float16"
    model_type: str = ""
    traits: tuple[str, ...] = ()
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    act_order: bool = False
    words_version: int = 0
    loose_words: bool = False
    head_name: str = "lm_head"
    splits: Mapping[str, Splits] = field(default_factory=dict)
    own_cache: bool = False
    fp8_scales: str = ""
    vary: Vary | None = field(default=None, compare=False, repr=False)

    @property
    def quantized(self) -> tuple[LinearLayout, ...]:
        """The linears that have codes."""
        return tuple(layout for layout in self.layouts if layout.bits is not None)

    def without_repeats(self) -> TargetSubject:
        """Return it with one of the decoder layers that are alike: no rule tells them apart."""
        layers: dict[str, list[LinearLayout]] = {}
        for layout in self.layouts:
            layers.setdefault(_number_of(layout.name), []).append(layout)
        first: dict[tuple[object, ...], list[LinearLayout]] = {}
        for number, members in layers.items():
            first.setdefault(tuple(_unnumbered(layout, number, self.splits) for layout in members), members)
        return replace(self, layouts=tuple(layout for members in first.values() for layout in members))

    def is_inner(self, layout: LinearLayout) -> bool:
        """Return whether a linear is in a decoder layer: its name has the number of one."""
        return bool(_number_of(layout.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Varied:
    """A subject after a change, and what a user does to get there.

    Attributes:
        subject: what the check is asked about again.
        settings: texts for `--set`.
        convert_to: format for `optgptq convert --to`; empty where the model is quantized again.
    """

    subject: TargetSubject
    settings: tuple[str, ...] = ()
    convert_to: str = ""


def _number_of(name: str) -> str:
    """Return the number of the decoder layer that `name` is in; empty where it is in none."""
    return next((part for part in name.split(".") if part.isdecimal()), "")


def _unnumbered(layout: LinearLayout, number: str, splits: Mapping[str, Splits]) -> tuple[object, ...]:
    """Return everything of `layout` that rules look at, without the number of its decoder layer."""
    name = layout.name.replace(f".{number}.", ".*.", 1) if number else layout.name
    return name, splits.get(layout.name), replace(layout, name="", fused_names=(), fused_name="", dense_reason=None)

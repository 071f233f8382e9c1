"""Channel scales of keys and values moved into the weights: what a cache stores becomes easier to round, scores and
outputs stay what they were.

A key channel is divided by `s` and the query channel multiplied: rows of the projections, or gains of the norms behind
them where there are such norms, as those take away any factor of a projection. A value channel is divided, and the
columns of the output projection that read it multiplied.

The rotary embedding mixes the two channels of a pair, so both must have the same scale: only then is
`(R k) / s = R (k / s)`.

Shapes: `N` query heads, `K` key/value heads, `D` head dimension, `O` output rows, `I` input columns. All is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.errors import ModelError
from optgptq.kv_cache.rotary_pairs import RotaryPairs, untied_pair
from optgptq.models.inventory import LinearInfo
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.head_rows import HeadRows, head_rows

_FIELD = "kv_cache.fold"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class KVScales:
    """What the keys and values of one decoder layer are divided by, `[K, D]`, positive; None for nothing."""

    key_KD: torch.Tensor | None = None
    value_KD: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is, by the name of its field."""
        parts = {"key_KD": self.key_KD, "value_KD": self.value_KD}
        return {name: part for name, part in parts.items() if part is not None}


def rotary_pairs(spec: DecoderSpec) -> tuple[RotaryPairs | None, ...]:
    """Return the rotary pairs of each decoder layer, None where it has no rotary embedding.

    All families here turn the halves of the leading channels, as `optgptq.models.rope` does.
    """
    return tuple(None if layer.rope is None else RotaryPairs(rotary_dim=layer.rope.rotary_dim) for layer in spec.layers)


def shares_key_scale(spec: DecoderSpec) -> bool:
    """True if all heads of a layer must have the same key scales: they share the gains of one norm."""
    return spec.names.key_norm is not None


def check_kv_scales(spec: DecoderSpec, scales: Sequence[KVScales], *, family: str) -> None:
    """Raise ModelError, naming `family` and the reason, unless the model computes the same with `scales` moved."""
    if len(scales) != spec.num_layers:
        raise ValueError(f"scales of {len(scales)} layers for a model of {spec.num_layers}")
    for index, (layer, pairs) in enumerate(zip(scales, rotary_pairs(spec), strict=True)):
        for scale_KD in (layer.key_KD, layer.value_KD):
            _check_numbers(spec, scale_KD, index)
        reason = _refusal(spec, layer, pairs)
        if reason is not None:
            raise ModelError(
                f"{_FIELD}, decoder layer {index}",
                expected="scales that can be moved into the weights of the model",
                found=f"{family}: {reason}",
                action=f"Set {_FIELD}=false for this model: its scales are then applied at run time.",
            )


def row_scale(spec: DecoderSpec, linear: LinearInfo, scales: KVScales) -> torch.Tensor | None:
    """Return the factor `[O]` on the rows of a linear of the stage `qkv`, None where there is none."""
    key_KD = None if shares_key_scale(spec) else scales.key_KD
    if key_KD is None and scales.value_KD is None:
        return None
    group = spec.num_heads // spec.num_kv_heads
    factor_O = torch.ones(linear.out_features, dtype=torch.float64)
    rows: HeadRows = head_rows(spec, spec.linear_names(linear.layer_index, "qkv").index(linear.name))
    if key_KD is not None and rows.query_ND is not None:
        factor_O[rows.query_ND] = key_KD.double().repeat_interleave(group, dim=0)
    if key_KD is not None and rows.key_KD is not None:
        factor_O[rows.key_KD] = 1 / key_KD.double()
    if scales.value_KD is not None and rows.value_KD is not None:
        factor_O[rows.value_KD] = 1 / scales.value_KD.double()
    return None if bool((factor_O == 1).all()) else factor_O


def column_scale(spec: DecoderSpec, scales: KVScales) -> torch.Tensor | None:
    """Return the factor `[I]` on the columns of the output projection, None where there is none."""
    if scales.value_KD is None:
        return None
    return scales.value_KD.double().repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0).flatten()


def norm_gains(spec: DecoderSpec, scales: Sequence[KVScales]) -> dict[str, torch.Tensor]:
    """Return the factor `[D]` on the gain of each norm of queries and of keys, by full name."""
    names = spec.names
    gains: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(scales):
        if layer.key_KD is None or names.query_norm is None or names.key_norm is None:
            continue
        prefix, scale_D = names.layer_prefix(index), layer.key_KD[0].double()
        gains[f"{prefix}.{names.query_norm}"] = scale_D
        gains[f"{prefix}.{names.key_norm}"] = 1 / scale_D
    return gains


def _check_numbers(spec: DecoderSpec, scale_KD: torch.Tensor | None, index: int) -> None:
    if scale_KD is None:
        return
    shape = (spec.num_kv_heads, spec.head_dim)
    if tuple(scale_KD.shape) != shape or not bool((torch.isfinite(scale_KD) & (scale_KD > 0)).all()):
        raise ValueError(f"layer {index}: scales must be positive, {list(shape)}; found {list(scale_KD.shape)}")


def _refusal(spec: DecoderSpec, scales: KVScales, pairs: RotaryPairs | None) -> str | None:
    key_KD = scales.key_KD
    if spec.clip_qkv is not None and (key_KD is not None or scales.value_KD is not None):
        return f"its queries, keys and values are clipped at {spec.clip_qkv}, which a scale moves"
    if key_KD is None:
        return None
    untied = None if pairs is None else untied_pair(key_KD, pairs)
    if untied is not None:
        head, channel, partner = untied
        return (
            f"the rotary embedding turns channels {channel} and {partner} of a head together, and head {head} has "
            f"the scales {float(key_KD[head, channel]):g} and {float(key_KD[head, partner]):g} for them"
        )
    if shares_key_scale(spec):
        if not spec.norm.has_weight:
            return "its queries and keys pass norms without gains, which take away any factor"
        if not torch.equal(key_KD, key_KD[:1].expand_as(key_KD)):
            return "the heads of a layer share the gain of one norm, and their scales differ"
    return None

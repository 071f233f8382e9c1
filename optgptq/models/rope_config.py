"""Rotary parameters from config.json, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`).

Source: transformers `modeling_rope_utils.py` for the meaning of every field and default.
"""

from __future__ import annotations

import math

from optgptq.models.config_reader import ConfigReader
from optgptq.models.spec import RopeSpec
from optgptq.plain_numbers import is_number

_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


def read_rope(
    config: ConfigReader,
    *,
    head_dim: int,
    max_position: int,
    partial_keys: tuple[str, ...] = (),
    default_partial: float = 1.0,
    theta_keys: tuple[str, ...] = ("rope_theta",),
    default_original: int | None = None,
) -> RopeSpec:
    """Return the one rotary table of a model whose layers share it.

    Args:
        config: the whole config.
        head_dim: features of a head.
        max_position: positions the config promises.
        partial_keys: top-level names of the share of a head that is rotated; empty where the family always rotates all.
        default_partial: that share where the config is silent.
        theta_keys: top-level names of the base period.
        default_original: positions of pre-training where the config does not state them at its top level.

    Raises:
        ModelError: an unknown kind of scaling, or a field it needs is missing.
    """
    theta = config.number(*theta_keys, default=10_000.0)
    partial = config.number(*partial_keys, default=default_partial) if partial_keys else default_partial
    outer_original = config.optional_integer("original_max_position_embeddings", absent=default_original)
    scaling = config.section("rope_scaling")
    section = config.section("rope_parameters") or scaling
    if section is None:
        return RopeSpec(kind="default", theta=theta, rotary_dim=int(head_dim * partial))
    if partial_keys:
        partial = section.number("partial_rotary_factor", default=partial)
    rope = read_rope_section(
        section,
        theta=theta,
        rotary_dim=int(head_dim * partial),
        max_position=max_position,
        original_max_position=outer_original,
    )
    section.require("partial_rotary_factor", partial)
    return rope


def read_rope_section(
    section: ConfigReader,
    *,
    theta: float,
    rotary_dim: int,
    max_position: int,
    original_max_position: int | None = None,
) -> RopeSpec:
    """Return the table that one `rope_parameters` or `rope_scaling` object describes.

    `theta` holds where the object has none; `original_max_position`, where given, wins over the object's.
    """
    kind = section.choice("rope_type", "type", allowed=(*_KINDS, "su"), default="default")
    theta = section.number("rope_theta", default=theta)
    if kind == "default":
        section.finish_strictly("partial_rotary_factor", "original_max_position_embeddings", "factor")
        return RopeSpec(kind="default", theta=theta, rotary_dim=rotary_dim)
    inner_original = section.integer("original_max_position_embeddings", default=max_position)
    original = original_max_position or inner_original
    if kind in ("linear", "dynamic"):
        rope = RopeSpec(
            kind="linear" if kind == "linear" else "dynamic",
            theta=theta,
            rotary_dim=rotary_dim,
            factor=section.number("factor"),
            max_position=max_position if kind == "dynamic" else 0,
        )
    elif kind == "llama3":
        rope = RopeSpec(
            kind="llama3",
            theta=theta,
            rotary_dim=rotary_dim,
            factor=section.number("factor"),
            original_max_position=original,
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
        )
    elif kind == "yarn":
        rope = _yarn(section, theta=theta, rotary_dim=rotary_dim, original=original, max_position=max_position)
    else:
        rope = _longrope(section, theta=theta, rotary_dim=rotary_dim, original=original, max_position=max_position)
    section.finish_strictly("partial_rotary_factor", "finetuned")
    return rope


def _yarn(section: ConfigReader, *, theta: float, rotary_dim: int, original: int, max_position: int) -> RopeSpec:
    factor = section.number("factor", default=max_position / original)
    attention_factor = section.optional_number("attention_factor")
    scale, scale_all = section.number("mscale", default=0.0), section.number("mscale_all_dim", default=0.0)
    if attention_factor is None:
        both = bool(scale and scale_all)
        attention_factor = _yarn_scale(factor, scale if both else 1.0) / _yarn_scale(factor, scale_all if both else 0.0)
    return RopeSpec(
        kind="yarn",
        theta=theta,
        rotary_dim=rotary_dim,
        factor=factor,
        original_max_position=original,
        attention_factor=attention_factor,
        beta_fast=section.number("beta_fast", default=32.0),
        beta_slow=section.number("beta_slow", default=1.0),
        truncate=section.flag("truncate", default=True),
    )


def _yarn_scale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(section: ConfigReader, *, theta: float, rotary_dim: int, original: int, max_position: int) -> RopeSpec:
    factor = section.number("factor", default=max_position / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeSpec(
        kind="longrope",
        theta=theta,
        rotary_dim=rotary_dim,
        factor=factor,
        original_max_position=original,
        attention_factor=section.number("attention_factor", default=default),
        short_factor=_factors(section, "short_factor", rotary_dim // 2),
        long_factor=_factors(section, "long_factor", rotary_dim // 2),
    )


def _factors(section: ConfigReader, key: str, count: int) -> tuple[float, ...]:
    values = section.raw(key)
    if not isinstance(values, list) or len(values) != count or not all(map(is_number, values)):
        raise section.refusal(key, values, expected=f"a list of {count} numbers")
    return tuple(float(value) for value in values)

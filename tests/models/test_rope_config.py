"""Rotary parameters that cannot be obeyed are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from optgptq.errors import ModelError
from optgptq.models.config_reader import ConfigReader
from optgptq.models.rope_config import read_rope
from optgptq.models.spec import RopeSpec


def rope(**config: Any) -> RopeSpec:
    return read_rope(ConfigReader(config), head_dim=8, max_position=64)


def test_silence_means_plain_rotation_of_the_whole_head() -> None:
    assert rope() == RopeSpec(kind="default", theta=10_000.0, rotary_dim=8)
    assert rope(rope_theta=5, rope_scaling=None) == RopeSpec(kind="default", theta=5.0, rotary_dim=8)


def test_yarn_derives_its_attention_factor() -> None:
    yarn = rope(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    assert yarn.attention_factor == pytest.approx(0.1 * 1.3862944 + 1)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (32.0, 1.0, True)


@pytest.mark.parametrize(
    ("scaling", "where"),
    [
        ({"rope_type": "mrope", "mrope_section": [2, 1, 1]}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 1, 1]}, "mrope_section"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 1, 1, 1]}, "short_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_implemented_or_missing_is_named(scaling: dict[str, Any], where: str) -> None:
    with pytest.raises(ModelError) as caught:
        rope(rope_parameters=scaling)
    assert caught.value.where == f"config.json: rope_parameters: {where}"

"""The configuration of GPTQ files: what consumers demand, rules that they match, and foreign ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import mixed_story_layouts, random_weight, story_layouts, write_linears, write_tensors

from optgptq import __version__
from optgptq.errors import FormatError, TargetError
from optgptq.formats import detect
from optgptq.formats.gptq import GPTQ_V1, GPTQ_V2
from optgptq.layout import LinearLayout


def engine_override(dynamic: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | bool | None:
    """What vLLM and SGLang do: the first pattern that matches from the start; False means not quantized."""
    for pattern, override in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return override
    return None


def linear(name: str, *, bits: int | None = 4, group_size: int = 32) -> LinearLayout:
    return LinearLayout(name=name, out_features=32, in_features=64, bits=bits, group_size=group_size)


def test_uniform_configuration() -> None:
    assert GPTQ_V1.quantization_config(story_layouts(group_size=128)) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"optgptq:{__version__}"]},
    }
    second = GPTQ_V2.quantization_config(story_layouts())
    assert (second["format"], second["checkpoint_format"]) == ("gptq_v2", "gptq_v2")


def test_both_files_hold_the_same_object() -> None:
    layouts = mixed_story_layouts()
    assert GPTQ_V1.extra_files(layouts) == {"quantize_config.json": GPTQ_V1.quantization_config(layouts)}


def test_rules_match_plain_and_fused_names_and_nothing_else() -> None:
    dynamic = GPTQ_V1.quantization_config(mixed_story_layouts())["dynamic"]
    wide = {"bits": 8, "group_size": 32, "sym": True}
    for leaf in ("gate_proj", "up_proj", "gate_up_proj"):
        assert engine_override(dynamic, f"model.layers.1.mlp.{leaf}") == wide
        assert engine_override(dynamic, f"model.layers.4.mlp.{leaf}") == wide
        for other in (f"model.layers.11.mlp.{leaf}", f"model.layers.2.mlp.{leaf}", f"xmodel.layers.1.mlp.{leaf}"):
            assert engine_override(dynamic, other) is None
    assert engine_override(dynamic, "model.layers.2.mlp.down_proj") is False
    assert engine_override(dynamic, "model.layers.2.mlp.down_proj_extra") is None
    assert engine_override(dynamic, "modelXlayersX2XmlpXdown_proj") is None


def test_dense_head_needs_no_rule() -> None:
    config = GPTQ_V1.quantization_config([linear("model.layers.0.a"), linear("lm_head", bits=None)])
    assert "dynamic" not in config
    assert config["lm_head"] is False


@pytest.mark.parametrize("name", ["lm_head", "embed_out"])
def test_a_head_in_codes_is_said_and_has_a_rule_where_it_differs(name: str) -> None:
    inner = [linear(f"model.layers.{index}.a") for index in range(2)]
    config = GPTQ_V1.quantization_config([*inner, linear(name)])
    assert config["lm_head"] is True
    assert "dynamic" not in config
    config = GPTQ_V1.quantization_config([*inner, linear(name, bits=8, group_size=-1)])
    assert config["lm_head"] is True
    assert config["dynamic"] == {f"+:^{name}$": {"bits": 8, "group_size": -1, "sym": True}}


def test_nothing_quantized_is_refused() -> None:
    with pytest.raises(TargetError, match="at least one quantized linear"):
        GPTQ_V1.quantization_config([linear("a", bits=None)])


def test_written_rules_are_read_back(tmp_path: Path) -> None:
    layouts = [
        linear("model.layers.0.a"),
        linear("model.layers.1.a", bits=8, group_size=64),
        linear("model.layers.1.b"),
    ]
    weights = {layout.name: random_weight(layout) for layout in layouts}
    checkpoint = write_linears(tmp_path, layouts, weights, format_name="gptq")
    found = {layout.name: (layout.bits, layout.group_size) for layout in GPTQ_V1.read_layouts(checkpoint)}
    assert found == {layout.name: (layout.bits, layout.group_size) for layout in layouts}


def test_first_matching_rule_counts_and_missing_keys_come_from_the_base(tmp_path: Path) -> None:
    layouts = [linear("model.layers.0.a"), linear("model.layers.1.a", bits=8)]
    weights = {layout.name: random_weight(layout) for layout in layouts}
    rules = {"-:.*nothing": {}, r".*\.1\.": {"bits": 8}, "+:.*": {"group_size": 32}, ".*a": {"bits": 2}}
    checkpoint = write_linears(
        tmp_path, layouts, weights, format_name="gptq", config={"bits": 4, "group_size": 32, "dynamic": rules}
    )
    assert [layout.bits for layout in GPTQ_V1.read_layouts(checkpoint)] == [4, 8]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("+:^(a|aa)+$", "backtracks without end"), ("+:(", "missing"), ("+:" + "a" * 100_001, "100001 characters")],
)
def test_bad_patterns_of_foreign_files(tmp_path: Path, pattern: str, message: str) -> None:
    layout = linear("a" * 60 + "!")
    checkpoint = write_linears(
        tmp_path, [layout], {layout.name: random_weight(layout)}, format_name="gptq", config={"dynamic": {pattern: {}}}
    )
    with pytest.raises(FormatError, match=message) as caught:
        GPTQ_V1.read_layouts(checkpoint)
    assert caught.value.where.startswith("quantization_config.dynamic")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"group_size": None}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"sym": "yes"}, "sym"),
        ({"dynamic": [1]}, "dynamic"),
        ({"dynamic": {"a": 3}}, "dynamic"),
    ],
)
def test_bad_values_name_their_key(tmp_path: Path, config: dict[str, object], key: str) -> None:
    layout = linear("a")
    checkpoint = write_linears(tmp_path, [layout], {"a": random_weight(layout)}, format_name="gptq", config=config)
    with pytest.raises(FormatError) as caught:
        GPTQ_V1.read_layouts(checkpoint)
    assert caught.value.where.endswith(f"quantization_config.{key}")


def test_files_that_only_have_quantize_config(tmp_path: Path) -> None:
    layout = linear("model.layers.0.a")
    tensors = GPTQ_V1.encode(layout, random_weight(layout))
    write_tensors(tmp_path, tensors, {})
    config = {key: value for key, value in GPTQ_V1.quantization_config([layout]).items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    checkpoint = type(write_tensors(tmp_path / "other", tensors, {})).open(tmp_path)
    assert detect(checkpoint) is GPTQ_V1
    assert [found.bits for found in GPTQ_V1.read_layouts(checkpoint)] == [4]


def test_configuration_without_packed_tensors(tmp_path: Path) -> None:
    config = {"quantization_config": GPTQ_V1.quantization_config([linear("a")])}
    checkpoint = write_tensors(tmp_path, random_tensors(), config)
    with pytest.raises(FormatError, match=r"tensors named \*.qweight"):
        GPTQ_V1.read_layouts(checkpoint)


def random_tensors() -> dict[str, Any]:
    layout = linear("b")
    return {"b.weight": random_weight(layout).dequantize()}

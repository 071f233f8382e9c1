from __future__ import annotations

import pytest
from pydantic import ValidationError

from optgptq.recipe import (
    AttentionRecipe,
    CalibrationRecipe,
    ExportRecipe,
    KVCacheRecipe,
    Recipe,
    TransformRecipe,
    WeightRecipe,
    WeightRule,
)


def problem_types(section: type, **values: object) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        section(**values)
    return {detail["type"] for detail in caught.value.errors()}


def test_defaults_are_the_documented_ones() -> None:
    recipe = Recipe()
    assert recipe.weights.model_dump() == {
        "method": "gptq",
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "order": "group_aware",
        "grid_search": "walk",
        "group_grids": "dynamic",
        "damp_ratio": 0.01,
        "column_block": 16,
        "solver_dtype": "float32",
        "target_shift": "off",
        "shift_strength": "held_out",
        "scale_refit": False,
        "code_sweeps": 0,
        "true_sequential": True,
        "keep_dense": (),
        "rules": (),
    }
    assert recipe.calibration.model_dump() == {
        "source": "self",
        "config": None,
        "split": "train",
        "column": "text",
        "revision": None,
        "num_windows": 128,
        "window_size": None,
        "seed": 0,
        "bos": "none",
        "layout": "packed",
        "chat_template": False,
        "windows_per_batch": None,
        "full_precision_windows": None,
        "held_out_windows": 8,
        "compute_dtype": "auto",
        "moment_dtype": "float32",
        "moment_stream": "quantized",
        "self_temperature": 1.0,
    }
    assert recipe.attention.model_dump() == {
        "rows": "softmax",
        "row_windows": 32,
        "row_order": "activation",
        "row_block": 1,
        "values": True,
        "value_rows": True,
        "value_share": 0.25,
    }
    assert recipe.transform.model_dump() == {
        "fold_norms": False,
        "residual_rotation": "none",
        "value_rotation": "none",
        "seed": 0,
    }
    assert recipe.kv_cache == KVCacheRecipe(bits=16)
    assert recipe.export.model_dump() == {"format": "gptq", "max_shard_bytes": 5_000_000_000}


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe().weights.bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("group_size", [-1, 16, 17, 128, 1024])
def test_group_sizes_that_are_taken(group_size: int) -> None:
    assert WeightRecipe(group_size=group_size).group_size == group_size


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (WeightRecipe, "group_size", 15),
        (WeightRecipe, "group_size", 1025),
        (WeightRecipe, "group_size", 0),
        (WeightRecipe, "group_size", True),
        (WeightRecipe, "group_size", "128"),
        (WeightRecipe, "bits", 5),
        (WeightRecipe, "bits", "4"),
        (WeightRecipe, "bits", True),
        (WeightRecipe, "symmetric", 1),
        (WeightRecipe, "symmetric", "true"),
        (WeightRecipe, "damp_ratio", 0),
        (WeightRecipe, "damp_ratio", 1),
        (WeightRecipe, "damp_ratio", "0.1"),
        (WeightRecipe, "damp_ratio", float("nan")),
        (WeightRecipe, "column_block", 0),
        (WeightRecipe, "column_block", 4097),
        (WeightRecipe, "column_block", 1.5),
        (WeightRecipe, "keep_dense", "lm_head"),
        (WeightRecipe, "keep_dense", ["("]),
        (WeightRecipe, "keep_dense", ["a" * 1001]),
        (WeightRecipe, "target_shift", "full"),
        (WeightRecipe, "target_shift", True),
        (WeightRecipe, "shift_strength", -0.1),
        (WeightRecipe, "shift_strength", 1.1),
        (WeightRecipe, "shift_strength", float("nan")),
        (WeightRecipe, "shift_strength", "best"),
        (WeightRecipe, "scale_refit", 1),
        (WeightRecipe, "code_sweeps", -1),
        (WeightRecipe, "code_sweeps", 101),
        (WeightRecipe, "code_sweeps", True),
        (AttentionRecipe, "rows", "all"),
        (AttentionRecipe, "row_windows", 0),
        (AttentionRecipe, "row_order", "group_aware"),
        (AttentionRecipe, "row_block", 0),
        (AttentionRecipe, "values", "yes"),
        (AttentionRecipe, "value_share", 0),
        (AttentionRecipe, "value_share", 1.5),
        (TransformRecipe, "residual_rotation", "dct"),
        (TransformRecipe, "value_rotation", True),
        (TransformRecipe, "fold_norms", "hadamard"),
        (TransformRecipe, "seed", -1),
        (CalibrationRecipe, "held_out_windows", 0),
        (CalibrationRecipe, "source", ""),
        (CalibrationRecipe, "num_windows", 0),
        (CalibrationRecipe, "window_size", 0),
        (CalibrationRecipe, "seed", -1),
        (CalibrationRecipe, "seed", 2**63),
        (CalibrationRecipe, "self_temperature", 0.0),
        (CalibrationRecipe, "self_temperature", float("inf")),
        (CalibrationRecipe, "revision", 123),
        (KVCacheRecipe, "bits", 5),
        (ExportRecipe, "max_shard_bytes", 0),
        (ExportRecipe, "max_shard_bytes", "5 apples"),
        (ExportRecipe, "max_shard_bytes", "0GB"),
        (ExportRecipe, "format", "awq"),
        (WeightRule, "bits", 4),  # without `match`
    ],
)
def test_values_that_are_refused(section: type, field: str, value: object) -> None:
    assert problem_types(section, **{field: value})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5_000_000_000), ("1.5 GiB", 1_610_612_736), ("100KB", 100_000), ("2MiB", 2_097_152), (7, 7)],
)
def test_shard_sizes_can_be_written_with_a_unit(text: object, num_bytes: int) -> None:
    assert ExportRecipe(max_shard_bytes=text).max_shard_bytes == num_bytes


@pytest.mark.parametrize("order", ["activation", "min_pivot"])
def test_orders_that_scatter_groups_need_static_grids_or_one_group(order: str) -> None:
    assert problem_types(WeightRecipe, order=order) == {"impossible_combination"}
    assert WeightRecipe(order=order, group_grids="static").order == order
    assert WeightRecipe(order=order, group_size=-1).order == order
    grouped_rule = WeightRule(match="o_proj", group_size=64)
    assert problem_types(WeightRecipe, order=order, group_size=-1, rules=(grouped_rule,)) == {"impossible_combination"}
    other_rule = WeightRule(match="o_proj", bits=8)
    assert WeightRecipe(order=order, group_size=-1, rules=(other_rule,)).rules == (other_rule,)


@pytest.mark.parametrize("values", [{"chat_template": True}, {"layout": "documents"}])
def test_self_text_has_neither_messages_nor_documents(values: dict[str, object]) -> None:
    assert problem_types(CalibrationRecipe, **values) == {"impossible_combination"}
    assert CalibrationRecipe(source="chat.jsonl", **values).source == "chat.jsonl"


@pytest.mark.parametrize(
    "values",
    [
        {"weights": {"target_shift": "exact", "true_sequential": False}},
        {"weights": {"target_shift": "exact"}, "calibration": {"moment_stream": "full_precision"}},
    ],
)
def test_a_shift_is_measured_stage_by_stage_in_the_quantized_stream(values: dict[str, dict[str, object]]) -> None:
    assert problem_types(Recipe, **values) == {"impossible_combination"}
    off = {**values, "weights": {**values["weights"], "target_shift": "off"}}
    assert Recipe.model_validate(off).weights.target_shift == "off"


@pytest.mark.parametrize("strength", [0, 0.5, 1, "held_out"])
def test_strengths_that_are_taken(strength: object) -> None:
    assert WeightRecipe(shift_strength=strength).shift_strength == strength


@pytest.mark.parametrize("method", ["gptqt", "binary", "attention_aware_binary"])
@pytest.mark.parametrize(
    ("field", "value"), [("symmetric", False), ("symmetric", True), ("grid_search", "mse"), ("grid_search", "walk")]
)
@pytest.mark.parametrize("is_own", [True, False])
def test_a_rule_of_signs_names_nothing_of_uniform_grids(method: str, field: str, value: object, is_own: bool) -> None:
    rule = {"match": "down_proj", field: value, **({"method": method} if is_own else {})}
    weights = {"method": "gptq" if is_own else method, "bits": 3, "rules": [{"match": "o_proj", "bits": 2}, rule]}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"weights": weights})
    (detail,) = caught.value.errors()
    assert detail["ctx"] == {
        "field": f"weights.rules.1.{field}",
        "expected": f"no {field} in a rule of method {method}, whose codes are sums of signs (section binary)",
        "found": f"{value} in the rule for 'down_proj'",
        "action": f"Leave weights.rules.1.{field} out, or set weights.rules.1.method to one of uniform grids.",
    }


@pytest.mark.parametrize("method", ["rtn", "gptq", "attention_aware"])
def test_a_rule_can_take_linears_from_signs_to_grids_of_their_own(method: str) -> None:
    rule = {"match": "down_proj", "method": method, "bits": 8, "symmetric": False, "grid_search": "mse"}
    weights = {"method": "binary", "bits": 2, "rules": [rule]}
    assert Recipe.model_validate({"weights": weights}).weights.rules == (WeightRule.model_validate(rule),)


def test_rules_of_grids_and_rules_of_signs_stand_beside_each_other() -> None:
    rules = [{"match": "o_proj", "symmetric": False}, {"match": "down_proj", "method": "binary", "group_size": 64}]
    recipe = Recipe.model_validate({"weights": {"method": "gptq", "bits": 3, "rules": rules}})
    assert recipe.weights.rules[0].symmetric is False

"""What a recipe asks of the cache of one model: bits and groups by layer, exact keys, and what no model can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.quantizable import tiny_model
from support.tiny_models import reference_model

from optgptq.cache_job import calibration_settings
from optgptq.cache_request import CacheRequest, check_num_windows, check_windows, most_parameter_bytes, request_cache
from optgptq.errors import ModelError, OptGPTQError, RecipeError
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.models.registry import config_spec
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.kv_cache import KVCacheRecipe
from optgptq.recipe.records import Recipe


@pytest.fixture(scope="module")
def spec() -> DecoderSpec:
    """Three decoder layers, two key/value heads of 16."""
    model = reference_model(tiny_model("llama-rope_llama3"))
    spec = config_spec(model.config.to_dict())
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (3, 2, 16)
    return spec


def planned(spec: DecoderSpec, **values: Any) -> CacheRequest:
    plan = request_cache(spec, KVCacheRecipe.model_validate({"bits": 4, **values}))
    assert plan is not None
    return plan


def side(bits: int, group_size: int = 16) -> SideScheme:
    return SideScheme(bits=bits, group_size=group_size)


def test_no_plan_where_nothing_is_quantized(spec: DecoderSpec) -> None:
    assert request_cache(spec, KVCacheRecipe()) is None


def test_bits_by_side_and_layer(spec: DecoderSpec) -> None:
    plan = planned(
        spec,
        value_bits=2,
        layers=[{"layers": "0-1", "key_bits": 8}, {"layers": "1", "value_bits": 16}],
        skip_layers="2",
    )
    assert plan.scheme.layers == (
        LayerScheme(keys=side(8), values=side(2)),
        LayerScheme(keys=side(8), values=SideScheme()),
        LayerScheme(keys=SideScheme(), values=SideScheme()),
    )
    assert plan.fixed_layers == {0, 1, 2}


def test_skipped_layers_stay_whatever_else_is_said(spec: DecoderSpec) -> None:
    plan = planned(spec, skip_layers=1, layers=[{"layers": "0-2", "key_bits": 2}])
    assert [layer.keys.bits for layer in plan.scheme.layers] == [2, 16, 2]


def test_groups_along_tokens_are_of_keys_and_move_the_granule(spec: DecoderSpec) -> None:
    plan = planned(spec, key_axis="token", key_group_tokens=64)
    assert plan.scheme.layers[0].keys == SideScheme(bits=4, group_size=64, axis="token")
    assert plan.scheme.layers[0].values == side(4)
    assert plan.scheme.past.granule == 64
    assert planned(spec, key_axis="token", key_bits=16).scheme.past.granule == 1


@pytest.mark.parametrize(
    ("values", "sinks", "recent"),
    [
        ({"bits": 8}, 0, 0),
        ({"bits": 4}, 4, 16),
        ({"bits": 3}, 4, 32),
        ({"bits": 2}, 64, 128),
        ({"bits": 8, "value_bits": 2}, 64, 128),
        ({"bits": 2, "sink_tokens": 1, "recent_tokens": 0}, 1, 0),
        ({"bits": 4, "budget_bits": 2.5}, 64, 128),
        ({"bits": 4, "budget_bits": 3.0}, 4, 32),
    ],
)
def test_exact_tokens_follow_the_fewest_bits(
    spec: DecoderSpec, values: dict[str, object], sinks: int, recent: int
) -> None:
    past = planned(spec, **values).scheme.past
    assert (past.sink_tokens, past.recent_tokens) == (sinks, recent)


def test_modes(spec: DecoderSpec) -> None:
    assert planned(spec).scheme.past.name == "chunk"
    assert planned(spec, past_only="window:48").scheme.past.name == "window:48"


def test_a_shift_of_keys_is_left_where_scores_are_capped(spec: DecoderSpec) -> None:
    capped = replace(spec, attention_softcap=30.0)
    assert planned(capped, key_transform="shift_scale").notes == (
        "kv_cache.key_transform: keys are scaled and not shifted, since this model caps its attention scores, and a "
        "shift of keys then does not drop out of the softmax",
    )
    assert planned(capped, value_transform="shift_scale").notes == ()
    assert planned(spec, key_transform="shift_scale").notes == ()


@pytest.mark.parametrize(
    ("values", "kind", "where", "expected", "found"),
    [
        (
            {"group_size": 32},
            RecipeError,
            "kv_cache.group_size",
            "a divisor of the 16 channels of a head, or -1 for all of them",
            "32",
        ),
        ({"skip_layers": "3"}, RecipeError, "kv_cache.skip_layers", "decoder layers of this model, 0 to 2", "3"),
        (
            {"layers": [{"layers": "0-999999", "key_bits": 2}]},
            RecipeError,
            "kv_cache.layers.0.layers",
            "decoder layers of this model, 0 to 2",
            "999999",
        ),
        (
            {"skip_layers": "0-2"},
            RecipeError,
            "kv_cache.skip_layers and kv_cache.layers",
            "at least one decoder layer to quantize",
            "16 bits for all 3",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    spec: DecoderSpec, values: dict[str, object], kind: type[OptGPTQError], where: str, expected: str, found: str
) -> None:
    with pytest.raises(kind) as caught:
        planned(spec, **values)
    assert (caught.value.where, caught.value.expected, caught.value.found) == (where, expected, found)


@pytest.mark.parametrize("head_dim", [4, 12, 20])
def test_heads_that_do_not_split_are_refused(spec: DecoderSpec, head_dim: int) -> None:
    with pytest.raises(ModelError) as caught:
        planned(replace(spec, head_dim=head_dim))
    assert caught.value.found == f"{head_dim} channels"
    assert caught.value.action == "Set kv_cache.bits=16 for this model."


def test_room_for_the_file_of_parameters(spec: DecoderSpec) -> None:
    """Both sides of 3 layers of 2 heads: metric and rotation `[16, 16]`, shift and scale `[16]`."""
    assert most_parameter_bytes(spec) == 2 * 3 * 2 * (2 * 16 * 16 + 2 * 16) * 4


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ({"bits": 2}, 192),
        ({"sink_tokens": 3, "recent_tokens": 0}, 4),
        ({"sink_tokens": 0, "recent_tokens": 5, "past_only": "off"}, 5),
        ({"sink_tokens": 2, "recent_tokens": 0, "past_only": "window:8"}, 8),
        ({"sink_tokens": 0, "recent_tokens": 0, "key_axis": "token", "key_group_tokens": 16}, 16),
    ],
)
def test_windows_must_be_longer_than_what_is_exact(spec: DecoderSpec, values: dict[str, object], exact: int) -> None:
    plan = planned(spec, **values)
    with pytest.raises(RecipeError) as caught:
        check_windows(plan, exact)
    assert caught.value.where == "calibration.window_size"
    assert caught.value.found.startswith(f"{exact} tokens, with the first {plan.scheme.past.sink_tokens} ")
    check_windows(plan, exact + 1)


@pytest.mark.parametrize(
    ("values", "fewest"),
    [
        ({"budget_bits": 3.5}, 3),
        ({"budget_bits": 3.5, "sink_tokens": 0}, 3),
        ({"budget_bits": 3.5, "recent_tokens": 0}, 3),
        ({"budget_bits": 3.5, "sink_tokens": 0, "recent_tokens": 0}, 2),
        ({"budget_bits": 2.5}, 2),
        ({"budget_bits": 3.5, "layers": [{"layers": "0", "key_bits": 2}]}, 2),
    ],
)
def test_a_budget_gives_two_bits_only_beside_the_exact_tokens_of_two_bits(
    spec: DecoderSpec, values: dict[str, Any], fewest: int
) -> None:
    assert min(planned(spec, **values).allowed_bits) == fewest


@pytest.mark.parametrize(
    ("of_text", "of_cache", "field"),
    [(1, 16, "calibration.num_windows"), (1, 1, "calibration.num_windows"), (128, 1, "kv_cache.num_windows")],
)
def test_too_few_windows_name_the_setting_that_is_smaller(of_text: int, of_cache: int, field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_num_windows(of_text, of_cache)
    assert caught.value.where == field
    assert caught.value.action.startswith(f"Set {field} to 2")
    check_num_windows(2, 2)


def test_rows_that_are_filled_up_are_said(spec: DecoderSpec) -> None:
    (note,) = planned(spec, bits=3).notes
    assert "heads of 16 channels, codes of 3 bits take no fewer bytes than those of 4" in note
    assert planned(spec, bits=4, value_bits=2).notes == ()
    assert planned(replace(spec, head_dim=32), bits=3).notes == ()


@pytest.mark.parametrize("head_dim", [16, 10])
def test_advice_does_not_lead_in_a_circle(spec: DecoderSpec, head_dim: int) -> None:
    recipe = KVCacheRecipe(bits=4, skip_layers="0-2")
    for weights_stay in (False, True):
        with pytest.raises(OptGPTQError) as caught:
            request_cache(replace(spec, head_dim=head_dim), recipe, weights_stay=weights_stay)
        # Without a cache such a job would have nothing to do, which is refused too.
        assert ("weights.method" in caught.value.action) == weights_stay


def test_the_calibration_hears_of_the_bits_that_a_budget_may_give(spec: DecoderSpec) -> None:
    recipe = Recipe(kv_cache=KVCacheRecipe(bits=4, budget_bits=3.5))
    plan = request_cache(spec, recipe.kv_cache)
    assert plan is not None
    assert calibration_settings(plan, recipe).allowed_bits == (3, 4, 8)

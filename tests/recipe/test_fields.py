from __future__ import annotations

import pytest

from optgptq.recipe.fields import keys_at, nearest_path, recipe_schema, schema_at, takes_only_text, valid_values


def test_every_field_says_in_words_what_it_takes() -> None:
    sections = [(name,) for name in recipe_schema()["properties"] if keys_at((name,))] + [("weights", "rules", 0)]
    assert len(sections) == 12
    for section in sections:
        for key in keys_at(section):
            schema = schema_at((*section, key))
            assert schema is not None
            assert valid_values(schema) not in ("", "None")


def test_paths_that_lead_nowhere_have_no_schema() -> None:
    assert schema_at(("weights", "bits", "low")) is None
    assert schema_at(("weights", 0)) is None
    assert schema_at(("nothing",)) is None
    assert keys_at(("weights", "bits")) == ()


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        (("weight",), "weights"),
        (("weights", "groupsize"), "weights.group_size"),
        (("weights", "window_size"), "calibration.window_size"),
        (("num_window",), "calibration.num_windows"),
        (("weights", "rules", 2, "grid"), "weights.rules.2.grid_search"),
        (("export", "fromat"), "export.format"),
        (("weights", "value_rows"), "attention.value_rows"),
        (("transform", "residual"), "transform.residual_rotation"),
    ],
)
def test_the_nearest_key(path: tuple[str | int, ...], nearest: str) -> None:
    assert nearest_path(path) == nearest


def test_fields_that_hold_text_and_nothing_else() -> None:
    assert takes_only_text(("calibration", "revision"))
    assert takes_only_text(("name",))
    assert not takes_only_text(("calibration", "layout"))
    assert not takes_only_text(("export", "max_shard_bytes"))
    assert not takes_only_text(("nothing",))

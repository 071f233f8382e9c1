"""The texts of these errors are part of the product, so the tests hold them word for word."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shipped import SHIPPED

from optgptq.errors import RecipeError
from optgptq.recipe import (
    AttentionRecipe,
    CalibrationRecipe,
    ExportRecipe,
    Recipe,
    TransformRecipe,
    WeightRecipe,
    WeightRule,
    load_recipe,
    recipe_for_record,
    recipe_schema,
    recipe_to_yaml,
)

WEIGHT_KEYS = (
    "method, bits, group_size, symmetric, order, grid_search, group_grids, damp_ratio, column_block, solver_dtype, "
    "target_shift, shift_strength, scale_refit, code_sweeps, true_sequential, keep_dense, rules"
)
SECTIONS = (
    "weights",
    "attention",
    "binary",
    "head",
    "gqa",
    "transform",
    "norm_tweaking",
    "calibration",
    "kv_cache",
    "export",
    "gates",
)


def failure(name: str | Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(name), overrides)
    return caught.value


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("job.yaml")


def parts(error: RecipeError) -> tuple[str, str, str, str]:
    return error.where, error.expected, error.found, error.action


def test_an_unknown_key_names_file_line_path_nearest_key_and_valid_keys(job: Path) -> None:
    job.write_text("# mine\nweights:\n  bits: 3\n  group_sise: 64\n")
    assert parts(failure(job)) == (
        "job.yaml line 4, weights.group_sise",
        "a known key; the nearest is weights.group_size",
        "the unknown key 'group_sise'",
        f"Rename or remove it. Valid keys of weights: {WEIGHT_KEYS}.",
    )


def test_a_key_in_the_wrong_section_is_pointed_to_its_own(job: Path) -> None:
    job.write_text("bits: 4\n")
    assert parts(failure(job)) == (
        "job.yaml line 1, bits",
        "a known key; the nearest is weights.bits",
        "the unknown key 'bits'",
        f"Rename or remove it. Valid keys at the top level: name, description, {', '.join(SECTIONS)}.",
    )


def test_an_unknown_key_of_a_rule_is_told_by_its_number(job: Path) -> None:
    job.write_text("weights:\n  rules:\n  - match: o_proj\n    wbits: 8\n")
    assert parts(failure(job)) == (
        "job.yaml line 4, weights.rules.0.wbits",
        "a known key; the nearest is weights.rules.0.bits",
        "the unknown key 'wbits'",
        "Rename or remove it. Valid keys of weights.rules.0: match, description, method, bits, group_size, symmetric, "
        "grid_search, keep_dense.",
    )


def test_a_key_like_no_other_still_gets_the_nearest(job: Path) -> None:
    job.write_text("weights:\n  zzz: 1\n")
    assert failure(job).expected.startswith("a known key; the nearest is weights.")


@pytest.mark.parametrize(
    ("text", "where", "expected", "found", "action"),
    [
        (
            "weights:\n  bits: 5",
            "line 2, weights.bits",
            "one of 2, 3, 4, 8",
            "5",
            "Write a valid value, or remove the key to get the default, 4.",
        ),
        (
            "weights:\n  method: gptk",
            "line 2, weights.method",
            "one of none, rtn, gptq, attention_aware, gptqt, binary, attention_aware_binary",
            "the text 'gptk'",
            "Did you mean gptq?",
        ),
        (
            "weights: {group_size: 5}",
            "line 1, weights.group_size",
            "-1 or a whole number from 16 to 1024",
            "5",
            "Write a valid value, or remove the key to get the default, 128.",
        ),
        (
            "weights: {symmetric: yes}",
            "line 1, weights.symmetric",
            "true or false",
            "the text 'yes'",
            "Write a valid value, or remove the key to get the default, true.",
        ),
        (
            "weights: {damp_ratio: 3}",
            "line 1, weights.damp_ratio",
            "a number above 0 and below 1",
            "3",
            "Write a valid value, or remove the key to get the default, 0.01.",
        ),
        (
            "weights: {keep_dense: lm_head}",
            "line 1, weights.keep_dense",
            "a list whose items are each a regular expression",
            "the text 'lm_head'",
            "Write a valid value, or remove the key to get the default, an empty list.",
        ),
        (
            "weights: {keep_dense: [ok, '(']}",
            "line 1, weights.keep_dense.1",
            "a regular expression",
            "'(' (missing ) at position 1)",
            "Write a valid value for weights.keep_dense.1.",
        ),
        (
            "weights:\n  rules:\n  - bits: 3",
            "line 3, weights.rules.0.match",
            "a regular expression",
            "no such key",
            "Add the key match to weights.rules.0.",
        ),
        (
            "calibration: {num_windows: many}",
            "line 1, calibration.num_windows",
            "a whole number of at least 1",
            "the text 'many'",
            "Write a valid value, or remove the key to get the default, 128.",
        ),
        (
            "calibration: {window_size: 0}",
            "line 1, calibration.window_size",
            "a whole number of at least 1 or null",
            "0",
            "Write a valid value, or remove the key to get the default, null.",
        ),
        (
            "calibration: {source: }",
            "line 1, calibration.source",
            "text that is not empty",
            "null",
            "Write a valid value, or remove the key to get the default, the text 'self'.",
        ),
        (
            "kv_cache:\n  bits: 5",
            "line 2, kv_cache.bits",
            "one of 16, 8, 4, 3, 2",
            "5",
            "Write a valid value, or remove the key to get the default, 16.",
        ),
        (
            "export: {max_shard_bytes: 5 apples}",
            "line 1, export.max_shard_bytes",
            "a whole number of at least 1 or a size such as 5GB",
            "the text '5 apples'",
            "Write a valid value, or remove the key to get the default, 5000000000.",
        ),
        (
            "weights:\n- bits: 4",
            "line 1, weights",
            f"a section with the keys {WEIGHT_KEYS}",
            "a list of 1 item",
            "Write a valid value for weights.",
        ),
    ],
)
def test_a_wrong_value_names_the_valid_ones(
    job: Path, text: str, where: str, expected: str, found: str, action: str
) -> None:
    job.write_text(text)
    assert parts(failure(job)) == (f"job.yaml {where}", expected, found, action)


def test_an_impossible_combination_says_which_ways_out_there_are(job: Path) -> None:
    job.write_text("weights:\n  group_size: 64\n  order: activation\n")
    assert parts(failure(job)) == (
        "job.yaml line 3, weights.order",
        "group_aware or natural while groups are contiguous and group_grids is dynamic",
        "order activation with group_size 64 and group_grids dynamic",
        "Set weights.group_grids=static, weights.order=group_aware or weights.group_size=-1.",
    )


def test_the_first_problem_in_the_file_is_told_and_the_others_are_counted(job: Path) -> None:
    job.write_text("export:\n  formt: gptq\nweights:\n  bits: 5\n  group_size: 5\n")
    error = failure(job)
    assert error.where == "job.yaml line 2, export.formt"
    assert error.action.endswith(" The recipe has 2 more problems.")


def test_a_wrong_override_is_named_and_not_the_file() -> None:
    assert parts(failure("gptq-w4", "weights.seed=1", "weights.bits=5")) == (
        "--set weights.seed=1, weights.seed",
        "a known key; the nearest is transform.seed",
        "the unknown key 'seed'",
        f"Rename or remove it. Valid keys of weights: {WEIGHT_KEYS}. The recipe has 1 more problem.",
    )


def test_an_override_that_clashes_with_the_file_is_named() -> None:
    assert failure("gptq-w4", "weights.order=min_pivot").where == "--set weights.order=min_pivot, weights.order"


def test_an_unknown_name_lists_the_shipped_recipes() -> None:
    assert parts(failure("gptqw4")) == (
        "recipe gptqw4",
        f"a shipped recipe ({', '.join(SHIPPED)}) or a file ending in .yaml, .yml or .json",
        "'gptqw4'",
        "Did you mean gptq-w4?",
    )
    assert failure("quite-different").action == "`optgptq recipes` describes them."


def test_a_missing_file_says_so(job: Path) -> None:
    assert parts(failure(job)) == (
        "recipe job.yaml",
        "a file that can be read",
        "no such file or directory",
        f"Check the path, or name a shipped recipe: {', '.join(SHIPPED)}.",
    )


def test_a_file_that_is_not_utf8_gives_the_offset(job: Path) -> None:
    job.write_bytes(b"name: caf\xe9\n")
    assert parts(failure(job))[1:] == ("UTF-8 text", "byte 0xe9 at offset 9", "Save the recipe as UTF-8.")


def test_a_file_that_holds_no_sections_is_refused(job: Path) -> None:
    job.write_text("gptq-w4\n")
    error = failure(job)
    assert (error.where, error.found) == ("job.yaml", "the text 'gptq-w4'")


def test_an_empty_file_is_all_defaults(job: Path) -> None:
    job.write_text("")
    assert load_recipe(str(job)) == Recipe()


# Surrogates cannot be written as UTF-8; everything else must survive.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
patterns = st.sampled_from([r"o_proj$", r"layers\.[01]\.", "yes", "1e3", "a: b", "# x", "null", " "])
rules = st.builds(
    WeightRule,
    match=patterns,
    description=words,
    bits=st.none() | st.sampled_from([2, 3, 4, 8]),
    keep_dense=st.none() | st.booleans(),
)
recipes = st.builds(
    Recipe,
    name=words,
    description=words,
    weights=st.builds(
        WeightRecipe,
        bits=st.sampled_from([2, 3, 4, 8]),
        group_size=st.just(-1) | st.integers(16, 1024),
        damp_ratio=st.floats(0, 1, exclude_min=True, exclude_max=True),
        target_shift=st.sampled_from(["off", "exact"]),
        shift_strength=st.just("held_out") | st.floats(0, 1),
        scale_refit=st.booleans(),
        code_sweeps=st.integers(0, 100),
        keep_dense=st.lists(patterns, max_size=3).map(tuple),
        rules=st.lists(rules, max_size=2).map(tuple),
    ),
    attention=st.builds(
        AttentionRecipe,
        rows=st.sampled_from(["off", "pooled", "softmax"]),
        row_windows=st.integers(1, 10**6),
        row_order=st.sampled_from(["natural", "activation"]),
        row_block=st.just(-1) | st.integers(1, 1024),
        values=st.booleans(),
        value_rows=st.booleans(),
        value_share=st.floats(0, 1, exclude_min=True),
    ),
    transform=st.builds(
        TransformRecipe,
        fold_norms=st.booleans(),
        residual_rotation=st.sampled_from(["none", "hadamard", "random"]),
        value_rotation=st.sampled_from(["none", "hadamard", "random"]),
        seed=st.integers(0, 2**63 - 1),
    ),
    calibration=st.builds(
        CalibrationRecipe,
        source=words.filter(bool),
        config=st.none() | words,
        seed=st.integers(0, 2**63 - 1),
        window_size=st.none() | st.integers(1, 10**6),
    ),
    export=st.builds(ExportRecipe, max_shard_bytes=st.integers(1, 10**15)),
)


@settings(max_examples=40, deadline=None)
@given(recipe=recipes)
def test_yaml_reads_back_to_an_equal_recipe(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "again.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(folder / "again.yaml")) == recipe


def test_the_recipe_of_a_record_can_be_used_again(job: Path) -> None:
    recipe = load_recipe("gptq-w3", ["weights.rules=[{match: o_proj, bits: 8}]", "calibration.seed=7"])
    job.with_suffix(".json").write_text(json.dumps(recipe_for_record(recipe)))
    assert load_recipe("job.json") == recipe


def test_a_record_holds_every_field_but_no_local_folder(tmp_path: Path) -> None:
    text = tmp_path / "my text.txt"
    text.write_text("hello")
    recipe = load_recipe("gptq-w4", [f"calibration.source={text}"])
    record = recipe_for_record(recipe)
    assert record["calibration"]["source"] == "my text.txt"
    assert str(tmp_path) not in json.dumps(record)
    assert Recipe.model_validate(record).weights == recipe.weights


def test_the_schema_names_every_field_and_describes_it() -> None:
    schema = recipe_schema()
    assert list(schema["properties"]) == ["name", "description", *SECTIONS]
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), name


def test_recipes_load_without_heavy_libraries() -> None:
    program = (
        "import sys; from optgptq.recipe import load_recipe; load_recipe('gptq-w4', ['weights.bits=3']); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Figures that a job recorded of itself, and the linears of a checkpoint."""

from __future__ import annotations

import math

import pytest
from support.checkpoints import mixed_story_layouts, quantize_all, write_checkpoint

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import InputError
from optgptq.evaluation.gates import Figure, Gate
from optgptq.evaluation.record_gates import StoredLinear, recorded_figures, require_figures, stored_linears
from optgptq.recipe.gates import GATES

STORY = bundled_path("bundled:story-llama")
RECORDED = [name for name, kind in GATES.items() if not kind.is_measured]


def linear(name: str, rows: int, columns: int, *, is_dense: bool = False) -> StoredLinear:
    return StoredLinear(name=name, out_features=rows, in_features=columns, is_dense=is_dense)


LINEARS = (linear("a", 10, 20), linear("b", 30, 10), linear("c", 5, 20, is_dense=True), linear("d", 20, 20))
NUM_WEIGHTS = 200 + 300 + 100 + 400


def entry(name: str, **values) -> dict:
    facts = {"loss": 0.1, "clip_fraction": 0.01, "damp_ratio_used": 0.01, "num_dead_inputs": 0, "num_tokens": 640}
    return {"name": name, "method": "gptq", **facts, **values}


def record(*entries: dict, method: str = "gptq", errors: tuple = (0.1, 0.3, 0.2)) -> dict:
    return {
        "recipe": {"weights": {"method": method}},
        "layers": list(entries or (entry("a"), entry("b"), entry("d"))),
        "decoder_layers": [{"index": index, "output_error": error} for index, error in enumerate(errors)],
    }


def found(name: str, content: dict) -> Figure:
    gate = Gate(kind=GATES[name], limit=0.5, asked_as=name)
    figures = recorded_figures([gate], content, LINEARS)
    require_figures(figures)
    figure = figures[name]
    assert isinstance(figure, Figure)
    return figure


def test_every_recorded_gate_has_a_figure():
    gates = [Gate(kind=kind, limit=1.0, asked_as=name) for name, kind in GATES.items()]
    figures = recorded_figures(gates, record(), LINEARS)
    assert list(figures) == RECORDED
    require_figures(figures)


def test_the_worst_decoder_layer_is_named():
    assert found("max_layer_error", record()) == Figure(value=0.3, where="decoder layer 1")


@pytest.mark.parametrize(("name", "key"), [("max_linear_loss", "loss"), ("max_clip_fraction", "clip_fraction")])
def test_the_worst_linear_is_named(name, key):
    content = record(entry("a", **{key: 0.2}), entry("b", **{key: 0.9}), entry("d", **{key: 0.4}))
    assert found(name, content) == Figure(value=0.9, where="b")


def test_the_damping_that_was_asked_is_told_beside_the_one_that_was_needed():
    content = record(entry("a"), entry("b", damp_ratio_used=0.3, damp_ratio=0.01))
    assert found("max_damp_ratio", content) == Figure(value=0.3, where="b, asked 0.01")
    assert found("max_damp_ratio", record(entry("a", damp_ratio_used=0.1))) == Figure(value=0.1, where="a")


def test_the_linear_with_the_fewest_tokens_is_named():
    content = record(entry("a"), entry("b", num_tokens=7), entry("d", num_tokens=8))
    assert found("min_tokens_per_linear", content) == Figure(value=7, where="b")
    assert found("min_tokens_per_linear", record(entry("a", num_tokens=0))).value == 0


def test_the_dense_share_counts_weights():
    assert found("max_dense_share", record()) == Figure(value=100 / NUM_WEIGHTS, where="c")


def test_linears_and_columns_that_were_rounded_to_nearest_count():
    content = record(entry("a", method="rtn"), entry("b", num_dead_inputs=2), entry("d"))
    assert found("max_rtn_share", content) == Figure(value=(200 + 2 * 30) / NUM_WEIGHTS, where="a and 1 other")
    assert found("max_rtn_share", record()) == Figure(value=0, where=None)


@pytest.mark.parametrize(("method", "share"), [("rtn", 0), ("gptq", 50)])
def test_a_head_is_judged_by_the_method_that_was_asked_of_it(method, share):
    head = StoredLinear(name="lm_head", out_features=5, in_features=10, is_dense=False, is_head=True)
    content = record(entry("a"), entry("lm_head", method="rtn"))
    content["recipe"]["head"] = {"method": method}
    gates = [Gate(kind=GATES[name], limit=0.5, asked_as=name) for name in ("max_rtn_share", "max_dense_share")]
    figures = recorded_figures(gates, content, (*LINEARS, head))
    require_figures(figures)
    assert figures["max_rtn_share"].value == share / (NUM_WEIGHTS + 50)
    # Of decoder layers alone.
    assert figures["max_dense_share"].value == 100 / NUM_WEIGHTS


def test_rounding_that_was_asked_for_is_no_fallback():
    content = record(entry("a", method="rtn", num_dead_inputs=3), method="rtn")
    assert found("max_rtn_share", content) == Figure(value=0, where=None)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("max_linear_loss", "loss"),
        ("max_damp_ratio", "damp_ratio_used"),
        ("max_clip_fraction", "clip_fraction"),
        ("min_tokens_per_linear", "num_tokens"),
        ("max_rtn_share", "num_dead_inputs"),
    ],
)
@pytest.mark.parametrize("value", [None, "0.1", True, []])
def test_a_figure_that_is_missing_in_one_linear_is_an_error(name, key, value):
    with pytest.raises(InputError) as caught:
        found(name, record(entry("a"), entry("b", **{key: value})))
    assert caught.value.exit_code == 3
    assert caught.value.where == f"record of the checkpoint, b: {key}"


def test_an_output_error_that_was_not_measured_is_an_error():
    with pytest.raises(InputError) as caught:
        found("max_layer_error", record(errors=(0.1, None)))
    assert caught.value.where == "record of the checkpoint, decoder layer 1: output_error"


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "max_dense_share"])
@pytest.mark.parametrize("content", [{}, {"layers": [], "decoder_layers": []}, {"layers": 3, "decoder_layers": "x"}])
def test_a_checkpoint_without_a_record_has_no_figures(name, content):
    with pytest.raises(InputError, match="record of the checkpoint"):
        found(name, content)


@pytest.mark.parametrize(
    "content",
    [
        {**record(), "recipe": "gptq"},
        {**record(), "recipe": {"weights": {}}},
        record(entry("z")),
        record(entry("a", method=None)),
        {**record(), "layers": [3]},
    ],
)
def test_a_record_that_makes_no_sense_has_no_rounded_share(content):
    with pytest.raises(InputError, match="record of the checkpoint"):
        found("max_rtn_share", content)


@pytest.mark.parametrize("values", [(0.1, math.nan, 0.9), (math.nan, 0.1), (0.9, math.inf, math.nan)])
def test_what_is_not_a_number_is_worst_of_all(values):
    figure = found("max_layer_error", record(errors=values))
    assert math.isnan(figure.value)
    assert figure.where == f"decoder layer {[math.isnan(value) for value in values].index(True)}"


def test_the_linears_of_a_checkpoint_are_told_apart(tmp_path):
    source = CheckpointFolder.open(STORY)
    layouts = mixed_story_layouts()
    weights = quantize_all(source, layouts, format_name="compressed-tensors")
    folder = write_checkpoint(source, tmp_path / "out", layouts, weights, format_name="compressed-tensors")
    found_linears = stored_linears(folder)
    assert {linear.name for linear in found_linears if not linear.is_dense} == set(weights)
    assert [linear.name for linear in found_linears] == [linear.name for linear in stored_linears(source)]
    assert all(linear.is_dense for linear in stored_linears(source))
    shapes = {layout.name: (layout.out_features, layout.in_features) for layout in layouts}
    assert all(shapes[each.name] == (each.out_features, each.in_features) for each in found_linears)

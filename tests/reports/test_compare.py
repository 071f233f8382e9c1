"""Two runs beside each other."""

from __future__ import annotations

from support.pages import Page
from support.runs import EVALUATION, run_data

from optgptq.reports.compare import compare_page, recipe_differences

QUIET = {"error_maps": []}


def other_run(**fields):
    base = run_data(record=QUIET)
    layers = [{**layer, "loss": layer["loss"] * 3} for layer in base.manifest["layers"][1:]]
    recipe = {**base.manifest["recipe"], "weights": {"method": "rtn", "bits": 4, "extra": None}}
    manifest = {"recipe": recipe, "layers": layers, "warnings": ["both", "only <b>here</b>"]}
    return run_data(manifest=manifest, record=QUIET, **{"name": "other", **fields})


def test_recipe_fields_that_differ() -> None:
    assert recipe_differences(run_data(), other_run()) == [
        ("weights.method", "gptq", "rtn"),
        ("weights.damp_ratio", "0.01", "-"),
        ("weights.rules", "none", "-"),
        ("weights.extra", "-", "-"),
    ]


def test_everything_stands_beside_each_other() -> None:
    first = run_data(manifest={"warnings": ["both", "mine"]}, record=QUIET)
    page = compare_page(first, other_run(evaluation={**EVALUATION, "perplexity": 6.5, "tokens_sha256": "x"}))
    read = Page(page)
    assert read.problems == []
    for words in (
        "Two quantizations: out and other",
        "weights.method gptq rtn",
        "perplexity 5.0875 6.5",
        "measured on different texts or windows",
        "Warnings of out only warning times mine 1",
        "Warnings of other only warning times only <b>here</b> 1",
        "model.layers.0.self_attn.q_proj 4 dense",
    ):
        assert words in read.text, words
    assert "<b>" not in page
    labels = [attributes["aria-label"] for _, attributes in read.elements if attributes.get("role") == "img"]
    assert len(labels) == 1
    assert "out: 0.001 in layer 0" in str(labels[0])


def test_ratios_of_losses_come_largest_change_first() -> None:
    read = Page(compare_page(run_data(record=QUIET), other_run()))
    assert read.text.index("model.layers.0.self_attn.k_proj") < read.text.index("model.layers.0.self_attn.q_proj")
    assert " 3 model.layers." in read.text


def test_a_run_beside_itself_has_no_differences() -> None:
    text = Page(compare_page(run_data(record=QUIET), run_data(record=QUIET))).text
    assert "The recipes are the same." in text
    assert "Both have the same warnings." in text
    assert "out (first)" in text


def test_large_models_make_small_pages() -> None:
    page = compare_page(run_data(80, record=QUIET), run_data(80, record=QUIET, name="other"))
    assert len(page.encode()) < 2_000_000
    assert Page(page).problems == []


def test_a_damaged_evaluation_still_makes_a_page() -> None:
    page = compare_page(run_data(record=QUIET), other_run(evaluation={"perplexity": [], "tokens_sha256": {"a": 1}}))
    assert Page(page).problems == []

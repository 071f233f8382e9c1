"""The report page: everything is on it, nothing is loaded, nothing foreign becomes markup, and it stays small."""

from __future__ import annotations

import re

import pytest
from support.pages import Page
from support.runs import HASH, linear_names, run_data

from optgptq.reports.cost_sections import cost_section
from optgptq.reports.loss_sections import loss_section, worst_section
from optgptq.reports.page import render_page, report_page
from optgptq.reports.summary_sections import heads_section, quality_section

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{ {{ 7*7 }} %}\x00\x1b\u202e\ud800 & '</pre>"
SECTIONS = [
    "summary",
    "findings",
    "quality",
    "losses",
    "worst",
    "costs",
    "plan",
    "dense",
    "environment",
    "recipe",
    "files",
]


@pytest.fixture(scope="module")
def page() -> str:
    return report_page(run_data())


def test_all_sections_are_there_and_linked(page: str) -> None:
    read = Page(page)
    sections = [attributes["id"] for attributes in read.tags("section")]
    assert sections == SECTIONS
    assert [link["href"] for link in read.tags("a")][1:] == [f"#{name}" for name in SECTIONS]
    assert read.problems == []


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    assert re.findall(r"https?:|//[a-z]|@import|javascript:", page, flags=re.IGNORECASE) == []
    read = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "form", "img", "base"} & {
        tag for tag, _ in read.elements
    }
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    sources = [found for _, attributes in read.elements for key in ("src", "href") if (found := attributes.get(key))]
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    (policy,) = [meta["content"] for meta in read.tags("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_identifiers_are_not_used_twice(page: str) -> None:
    identifiers = Page(page).identifiers
    repeated = {name for name in identifiers if identifiers.count(name) > 1}
    assert repeated == set()


def test_pictures_have_words_and_follow_the_colors_of_the_page(page: str) -> None:
    read = Page(page)
    labels = [attributes["aria-label"] for tag, attributes in read.elements if attributes.get("role") == "img"]
    assert len(labels) == len(read.tags("svg")) == 2 + 6 + 2
    assert all(label is not None and len(label) > 60 for label in labels)
    assert "the highest is that of model.layers." in str(labels[0])
    assert "currentColor" in page
    assert "var(--series-1)" in page
    assert "prefers-color-scheme: dark" in page
    assert "#0a0b" not in page


def test_the_figures_of_the_run_are_on_the_page(page: str) -> None:
    text = Page(page).text
    for words in (
        "Quality gates missed: 1 of 2 (max_kl).",
        "missed by 0.0073",
        "5.0875",
        "95.66 %",
        "4.1562",
        "2:00:00 h",
        "20.0 GiB",
        "1.9 GiB; now 30.00 % of it",
        "Sessions: 2, 1 of them interrupted or failed",
        "Windows per batch began at 16 and shrank when memory ran out: 8 from layer 1.",
        "a time there was",
        "outside the decoder layers",
        HASH,
        "0.833",
    ):
        assert words in text, words


def test_warnings_and_fallbacks_are_told() -> None:
    names = linear_names(2)
    data = run_data(manifest={"warnings": [f"{name}: dead inputs" for name in names] + ["text changed"]})
    layers = list(data.manifest["layers"])
    layers[0] = {**layers[0], "damp_ratio_used": 0.1}
    layers[1] = {**layers[1], "method": "rtn"}
    layers[2] = {**layers[2], "notes": ["3 dead inputs"]}
    layers[3] = {**layers[3], "rtn_loss": layers[3]["loss"] / 2}
    text = Page(report_page(run_data(manifest={"warnings": data.manifest["warnings"], "layers": layers}))).text
    assert "damping raised from 0.01 to 0.1" in text
    assert "rounded to nearest where the recipe asks for gptq" in text
    assert "3 dead inputs" in text
    assert "of rounding to nearest" in text
    assert "text changed" in text
    assert "model.layers.0.self_attn.q_proj: dead inputs 2" in text


def test_a_clean_run_says_so(page: str) -> None:
    assert "No warning, and no linear fell back" in Page(page).text


@pytest.mark.parametrize(("num_layers", "num_experts"), [(80, 0), (48, 64)])
def test_large_models_make_small_pages(num_layers: int, num_experts: int) -> None:
    data = run_data(num_layers, num_experts=num_experts)
    assert len(data.linears) >= 560
    page = report_page(data)
    assert len(page.encode()) < 2_000_000
    read = Page(page)
    assert read.problems == []
    if num_experts:
        assert f"{len(data.linears) - 1000:,} more rows are left out here." in read.text
        assert "mlp.experts.*.up_proj" in page


def test_many_warnings_stay_a_short_table() -> None:
    same = [f"model.layers.{layer}.mlp.up_proj: damping raised to 0.{layer}" for layer in range(5000)]
    others = ["x" * 100_000, *(f"warning {'ab'[i % 2] * (i % 700)}" for i in range(3000))]
    page = report_page(run_data(manifest={"warnings": same + others}))
    assert len(page.encode()) < 2_000_000
    assert "5000</td>" in page


def test_foreign_text_is_never_markup() -> None:
    name = f"model.layers.0.{HOSTILE}"
    data = run_data(
        names=[name, "model.layers.1.x_proj"],
        manifest={
            "warnings": [HOSTILE],
            "recipe": {"name": HOSTILE, "description": HOSTILE, "weights": {HOSTILE: HOSTILE, "method": HOSTILE}},
            "files": {HOSTILE: {"sha256": HOSTILE, "bytes": HOSTILE}},
            "versions": {HOSTILE: HOSTILE},
            "calibration": {HOSTILE: [HOSTILE]},
        },
        record={
            "environment": {HOSTILE: HOSTILE},
            "sample": {"prompt": HOSTILE, "text": HOSTILE},
            "plan": {HOSTILE: {HOSTILE: HOSTILE}},
            "phases": [{"name": HOSTILE, "detail": HOSTILE, "seconds": 1}, {"name": "b", "seconds": 2}],
            "sessions": [{"started": HOSTILE, "ended": HOSTILE}],
            "gates": [{"gate": HOSTILE, "figure": HOSTILE, "where": HOSTILE, "passed": HOSTILE}],
            "error_maps": [{"name": HOSTILE, "rows": HOSTILE, "weight": [[1.0]], "error": [[2.0]]}],
        },
        inspected={"dense": ({"name": HOSTILE, "reason": HOSTILE},), "architecture": HOSTILE},
        evaluation={"perplexity": 3.0, "num_tokens": 5, "tokens_sha256": HOSTILE},
        name=HOSTILE,
    )
    page = report_page(data)
    read = Page(page)
    assert read.problems == []
    assert not read.tags("script")
    assert not read.tags("img")
    assert "alert(1)" in read.text
    assert "{{ 7*7 }}" in read.text
    assert not set("\x00\x1b\u202e\ud800") & set(page)
    page.encode()


WRONG = [None, True, -1, 1e400, "text", [], {}, [[]], [None], {"a": None}, 10**400, 1e308, 5e-324]
SECTIONS_OF = {
    "sessions": cost_section,
    "phases": cost_section,
    "decoder_layer_costs": cost_section,
    "error_maps": worst_section,
    "gates": quality_section,
    "decoder_layers": loss_section,
    "gqa": heads_section,
}
NOTHING = {"decoder_layer_costs": [], "phases": [], "error_maps": [], "sessions": []}


@pytest.mark.parametrize("wrong", [None, "text", 10**400], ids=["none", "text", "huge"])
def test_damaged_records_still_make_a_page(wrong: object) -> None:
    base = run_data()
    keys = [key for key in (*base.manifest, *base.record) if key != "layers"]
    manifest = dict.fromkeys((key for key in keys if key in base.manifest), wrong)
    record = dict.fromkeys(keys, wrong)
    page = report_page(run_data(manifest=manifest, record=record, evaluation={"perplexity": wrong}))
    assert Page(page).problems == []


@pytest.mark.parametrize("key", SECTIONS_OF)
def test_damaged_entries_still_make_a_section(key: str) -> None:
    fields = ("index", "seconds", "name", "weight", "error", "output_error", "value", "ended", "layers", "peak_bytes")
    names = [] if key == "decoder_layers" else None
    for wrong in WRONG:
        for entry in (dict.fromkeys(fields, wrong), {**dict.fromkeys(fields, wrong), "index": 1, "seconds": 2}):
            told = entry if key == "gqa" else [entry, entry, wrong]
            part = {key: told}
            section = SECTIONS_OF[key](run_data(names=names, manifest=part, record={**NOTHING, **part}))
            if section is not None:
                assert Page(render_page("title", [section])).problems == []


def test_what_is_not_known_is_said() -> None:
    data = run_data(
        manifest={"decoder_layers": []},
        record={"decoder_layer_costs": [], "sessions": [], "phases": [], "error_maps": [], "plan": None, "gates": []},
        evaluation={},
    )
    read = Page(report_page(data))
    assert "No quality gate was set." in read.text
    assert "Quality was not measured" in read.text
    assert {"worst", "plan"}.isdisjoint({attributes["id"] for attributes in read.tags("section")})


def test_the_same_run_makes_the_same_page(page: str) -> None:
    assert report_page(run_data()) == page

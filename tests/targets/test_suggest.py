"""Suggestions: the mildest change, checked again, for any layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.target_subjects import Sizes, llama_layouts, subject

from optgptq.targets import Change, TargetSubject, Varied, check_target, known_targets, parse_target
from optgptq.targets.suggest import suggest
from optgptq.targets.vary import vary_layouts

CT = "compressed-tensors"


def told(name: str, asked: TargetSubject, devices: int = 1) -> str:
    suggestion = check_target(parse_target(name), asked, devices).suggestion
    return "" if suggestion is None else suggestion.text


@pytest.mark.parametrize(
    ("name", "asked", "devices", "text"),
    [
        ("vllm", subject(bits=3), 1, "--set export.format=compressed-tensors"),
        ("vllm", subject(symmetric=False), 1, "--set export.format=compressed-tensors"),
        ("vllm", subject(), 4, "--set weights.group_size=64"),
        ("vllm", subject(), 3, "--tensor-parallel 1"),
        ("vllm:cpu", subject(bits=3), 1, "--set weights.bits=4"),
        ("sglang", subject(bits=3), 1, "--set weights.bits=4"),
        ("sglang", subject(CT, bits=2, group_size=32), 1, "--set weights.bits=4"),
        ("vllm:humming", subject(bits=2, symmetric=False), 1, "--set export.format=gptq_v2"),
        ("transformers", subject(), 2, "--tensor-parallel 1"),
        ("gptqmodel", subject(CT, bits=3), 1, "--set export.format=gptq"),
        (
            "vllm",
            subject("optgptq", bits=2, symmetric=False, coefficients="int8", group_size=64),
            1,
            "--set export.format=compressed-tensors --set weights.method=gptq",
        ),
        ("vllm", subject(facts={"model_type": "mpt"}), 1, ""),
        # 11000 columns fill no 32 columns on the processor, whatever is done; these linears are most of the model.
        ("vllm:cpu", subject(sizes=Sizes(intermediate=11000), group_size=-1), 1, ""),
    ],
)
def test_the_mildest_change(name: str, asked: TargetSubject, devices: int, text: str) -> None:
    assert told(name, asked, devices) == text


def test_a_head_that_is_not_taken_stays_dense() -> None:
    layouts = tuple(
        replace(layout, bits=8, group_size=128, symmetric=True) if layout.name == "lm_head" else layout
        for layout in llama_layouts(Sizes())
    )
    assert told("vllm:humming", subject(layouts=layouts)) == "--set head.bits=null"


def test_misfits_stay_dense_where_they_are_the_smaller_part() -> None:
    layouts = tuple(
        replace(layout, in_features=11003) if layout.name.endswith("down_proj") else layout
        for layout in llama_layouts(Sizes(), group_size=-1)
    )
    text = told("vllm", subject(layouts=layouts))
    assert text == """--set 'weights.keep_dense=["\\\\.down_proj$"]'"""


def test_rules_are_dropped_where_an_engine_ignores_them() -> None:
    layouts = tuple(
        replace(layout, bits=8) if layout.name.endswith("down_proj") else layout for layout in llama_layouts(Sizes())
    )
    assert told("transformers", subject(layouts=layouts)) == "--set export.format=compressed-tensors"
    assert "weights.rules=[]" in told("sglang:cpu", subject(layouts=layouts))


def test_a_suggestion_is_given_only_where_the_whole_subject_passes() -> None:
    asked = subject(bits=3)
    assert suggest(parse_target("sglang"), replace(asked, vary=lambda *_: None)) is None

    def unchanged(asked: TargetSubject, change: Change) -> Varied:
        return Varied(subject=asked, settings=("weights.bits=4",))

    assert suggest(parse_target("sglang"), replace(asked, vary=unchanged)) is None


SIZES = st.builds(
    Sizes,
    hidden=st.sampled_from([256, 288, 512, 1000]),
    intermediate=st.sampled_from([352, 768, 1001, 1376]),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    layers=st.integers(1, 2),
)


@st.composite
def subjects(draw: st.DrawFn) -> TargetSubject:
    form = draw(st.sampled_from(["gptq", "gptq_v2", CT, "optgptq", "dense"]))
    sizes = draw(SIZES)
    values: dict[str, Any] = {"bits": None, "group_size": -1}
    if form != "dense":
        values = {
            "bits": draw(st.sampled_from([2, 3, 4, 5, 8])),
            "group_size": draw(st.sampled_from([-1, 16, 32, 64, 128])),
            "symmetric": form != "optgptq" and draw(st.booleans()),
            "coefficients": "int8" if form == "optgptq" else None,
        }
    layouts = list(llama_layouts(sizes, **values))
    if form != "dense" and draw(st.booleans()):
        place = draw(st.integers(0, len(layouts) - 2))
        other = draw(st.sampled_from([{"bits": 8}, {"bits": None}, {"group_size": -1}]))
        layouts[place] = replace(layouts[place], **other)
    facts = {
        "act_order": draw(st.booleans()),
        "words_version": draw(st.sampled_from([0, 0, 1, 2])) if form.startswith("gptq") else 0,
        "model_type": draw(st.sampled_from(["llama", "mpt", "gpt2", "bloom"])),
        "own_cache": draw(st.booleans()),
    }
    return subject(form, sizes=sizes, layouts=tuple(layouts), facts=facts)


@settings(max_examples=100, deadline=None)
@given(subjects(), st.sampled_from(known_targets()), st.sampled_from([1, 2, 4]))
def test_a_suggestion_passes_or_there_is_none(asked: TargetSubject, target: Any, devices: int) -> None:
    made: list[tuple[Varied, int]] = []

    def vary(subject: TargetSubject, change: Change) -> Varied | None:
        varied = vary_layouts(subject, change)
        if varied is not None:
            made.append((varied, change.tensor_parallel or devices))
        return varied

    answer = check_target(target, replace(asked, vary=vary), devices)
    assert answer.loads == (not answer.refusals)
    if answer.loads:
        assert answer.suggestion is None
    elif answer.suggestion is not None:
        assert answer.suggestion.text
        if answer.suggestion.settings:
            varied, used = made[-1]
            assert check_target(target, varied.subject, used).loads
        else:
            assert check_target(target, asked, answer.suggestion.tensor_parallel or devices).loads


@settings(max_examples=30, deadline=None)
@given(subjects(), st.sampled_from(known_targets()), st.sampled_from([1, 2, 4]))
def test_layers_that_are_alike_count_once(asked: TargetSubject, target: Any, devices: int) -> None:
    whole = check_target(target, asked, devices)
    small = check_target(target, asked.without_repeats(), devices)
    assert whole.loads == small.loads
    assert {refusal.rule for refusal in whole.refusals} == {refusal.rule for refusal in small.refusals}
    assert whole.suggestion == small.suggestion

"""Who loads what: one row per question, as the sources of the engines answer it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.target_subjects import Sizes, llama_layouts, subject

from optgptq.targets import TargetSubject, check_target, parse_target

CT = "compressed-tensors"


def some(form: str = "gptq", **settings: Any) -> TargetSubject:
    return subject(form, **settings)


def with_facts(form: str = "gptq", **facts: Any) -> TargetSubject:
    return subject(form, facts=facts)


def changed(leaf: str, form: str = "gptq", **values: Any) -> TargetSubject:
    """Return a subject whose linears that end with `leaf` differ."""
    layouts = tuple(
        replace(layout, **values) if layout.name.endswith(leaf) else layout for layout in llama_layouts(Sizes())
    )
    return subject(form, layouts=layouts)


def transposed(form: str = "gptq") -> TargetSubject:
    layouts = tuple(replace(layout, stored_transposed=layout.bits is not None) for layout in llama_layouts(Sizes()))
    return subject(form, layouts=layouts, facts={"model_type": "gpt2"})


def packed_head(
    form: str = "gptq", *, bits: int = 4, vocabulary: int | None = None, family: str = "llama"
) -> TargetSubject:
    layouts = tuple(
        replace(layout, bits=bits, group_size=128, out_features=vocabulary or layout.out_features)
        if layout.name == "lm_head"
        else layout
        for layout in llama_layouts(Sizes())
    )
    return subject(form, layouts=layouts, facts={"model_type": family})


def planes() -> TargetSubject:
    return some("optgptq", bits=2, symmetric=False, coefficients="int8")


ODD = Sizes(hidden=4096, intermediate=11000)
SHARED = Sizes(hidden=8192, intermediate=28672, heads=64, kv_heads=8)

# target, subject, loads
ROWS: list[tuple[str, TargetSubject, bool]] = [
    # vLLM, GPTQ
    *(("vllm-0.33:cuda", some(bits=bits), bits in (4, 8)) for bits in (2, 3, 4, 8)),
    *(("vllm:cuda", some(group_size=size), True) for size in (-1, 32, 64)),
    *(("vllm:cuda", some(group_size=size), False) for size in (16, 256)),
    ("vllm:cuda", some(symmetric=False), False),
    ("vllm:cuda", some("gptq_v2"), True),
    ("vllm:cuda", with_facts(act_order=True), False),
    ("vllm:cuda", subject(group_size=-1, facts={"act_order": True}), True),
    ("vllm:cuda", with_facts(words_version=2), True),
    ("vllm:cuda", changed("down_proj", bits=8), True),
    ("vllm:cuda", changed("down_proj", bits=None), True),
    ("vllm:cuda", changed("v_proj", bits=None), False),
    ("vllm:cuda", changed("up_proj", bits=8), False),
    ("vllm:cuda", transposed(), True),
    *(("vllm:cuda", packed_head(form, bits=bits), True) for form in ("gptq", CT) for bits in (4, 8)),
    *((name, packed_head(vocabulary=32_001), False) for name in ("vllm", "sglang")),
    *((name, packed_head(CT, vocabulary=32_001), True) for name in ("transformers", "optgptq")),
    ("vllm", packed_head(CT, vocabulary=32_001), True),
    *((name, packed_head(CT, family="gemma2"), False) for name in ("vllm", "sglang")),
    ("transformers", packed_head(CT, family="gemma2"), True),
    *((name, packed_head(bits=8), True) for name in ("gptqmodel", "optgptq")),
    ("vllm:cpu", packed_head(bits=8), False),
    ("vllm:cuda", some(sizes=ODD, group_size=-1), True),
    ("vllm:rocm", some(), True),
    ("vllm:rocm", some(bits=3), False),
    ("vllm:rocm", subject(bits=8, group_size=64), False),
    ("vllm:rocm", subject(bits=8, group_size=64, facts={"model_dtype": "float16"}), True),
    ("vllm:rocm", some(bits=8), True),
    ("vllm:cpu", some(), True),
    ("vllm:cpu", some(bits=8), False),
    ("vllm:cpu", some(sizes=ODD, group_size=-1), False),
    ("vllm:xpu", some(), True),
    ("vllm:xpu", some(bits=8), False),
    # vLLM, compressed-tensors
    *(("vllm:cuda", some(CT, bits=bits), True) for bits in range(2, 9)),
    ("vllm:cuda", some(CT, bits=1), False),
    *(("vllm:cuda", some(CT, bits=bits, symmetric=False), True) for bits in (2, 3, 4, 8)),
    ("vllm:cuda", with_facts(CT, act_order=True), False),
    ("vllm:cuda", with_facts(CT, loose_words=True), False),
    ("vllm:rocm", some(CT, symmetric=False), True),
    ("vllm:rocm", some(CT, bits=3), False),
    ("vllm:rocm", some(CT, bits=2), False),
    ("vllm:cpu", some(CT, symmetric=False), True),
    ("vllm:cpu", some(CT, bits=3), False),
    ("vllm:xpu", some(CT, group_size=32), True),
    ("vllm:xpu", some(CT, group_size=16), False),
    # vLLM, other files
    ("vllm:humming", some(bits=3), True),
    ("vllm:humming", some(bits=2, symmetric=False), False),
    ("vllm:humming", some("gptq_v2", bits=2, symmetric=False), True),
    ("vllm:humming", some(group_size=-1), False),
    ("vllm:humming", some(CT, bits=3, group_size=-1), True),
    ("vllm:humming", changed("down_proj", CT, bits=8), False),
    ("vllm:humming", changed("down_proj", bits=8), True),
    ("vllm:humming", packed_head(), False),
    ("vllm:humming", with_facts(act_order=True), False),
    ("vllm", planes(), False),
    ("vllm", some("dense", bits=None), True),
    ("vllm", with_facts(model_type="mpt"), False),
    ("vllm", with_facts(own_cache=True), True),
    # SGLang
    *(("sglang-0.5.23:cuda", some(bits=bits), bits in (4, 8)) for bits in (2, 3, 4, 8)),
    ("sglang", some(symmetric=False), False),
    ("sglang", some(group_size=16), False),
    ("sglang", with_facts(act_order=True), True),
    ("sglang", some(sizes=ODD, group_size=-1), False),
    ("sglang", some(CT, symmetric=False), True),
    ("sglang", some(CT, bits=8, symmetric=False), True),
    ("sglang", some(CT, bits=3), False),
    ("sglang", with_facts(model_type="bloom"), False),
    ("sglang", planes(), False),
    ("sglang:cpu", some(), True),
    ("sglang:cpu", some("gptq_v2"), False),
    ("sglang:cpu", with_facts(words_version=2), False),
    ("sglang:cpu", some(bits=8), False),
    ("sglang:cpu", changed("down_proj", bits=None), False),
    ("sglang:cpu", some(CT), False),
    ("sglang:npu", some(bits=8, symmetric=False), True),
    ("sglang:npu", some("gptq_v2", symmetric=False), True),
    ("sglang:npu", with_facts(act_order=True), False),
    ("sglang:npu", some(group_size=-1), False),
    ("sglang:xpu", some(symmetric=False), True),
    ("sglang:xpu", some(bits=8), False),
    ("sglang:xpu", some(CT, symmetric=False), False),
    ("sglang:humming", some(bits=3), True),
    ("sglang:humming", some(CT, bits=6, symmetric=False), True),
    # transformers
    *(("transformers", some(bits=bits, symmetric=False), True) for bits in (2, 3, 4, 8)),
    ("transformers", with_facts(act_order=True), True),
    ("transformers", changed("down_proj", bits=8), False),
    ("transformers", changed("down_proj", bits=None), False),
    ("transformers", changed("down_proj", CT, bits=8), True),
    ("transformers", some(CT, bits=3), True),
    ("transformers", some(CT, symmetric=False), True),
    ("transformers", packed_head(), False),
    ("transformers", transposed(), True),
    ("transformers", transposed(CT), False),
    ("transformers", planes(), False),
    ("transformers", with_facts(traits=("grouped-mpt",), model_type="mpt"), False),
    # GPTQModel and optgptq
    ("gptqmodel", some(bits=3), True),
    ("gptqmodel", some(symmetric=False), False),
    ("gptqmodel", some("gptq_v2", symmetric=False), True),
    ("gptqmodel", some(CT), False),
    ("gptqmodel", changed("down_proj", bits=8), True),
    ("gptqmodel", with_facts(words_version=2), False),
    ("optgptq", planes(), True),
    ("optgptq", some(bits=3, symmetric=False), True),
    ("optgptq", with_facts(CT, loose_words=True), True),
    ("optgptq", with_facts(own_cache=True), True),
    ("optgptq", with_facts(model_type="mamba"), False),
]


@pytest.mark.parametrize(("name", "asked", "loads"), ROWS, ids=[f"{index}-{row[0]}" for index, row in enumerate(ROWS)])
def test_who_loads_what(name: str, asked: TargetSubject, loads: bool) -> None:
    answer = check_target(parse_target(name), asked)
    assert answer.loads is loads, answer.lines()
    assert answer.refusals or loads


def test_there_are_enough_rows() -> None:
    assert len(ROWS) >= 60


# target, subject, devices, loads
SPLIT_ROWS: list[tuple[str, TargetSubject, int, bool]] = [
    ("vllm", some(), 2, True),
    # 11008 columns in groups of 128 on four devices: 21 and a half groups each.
    ("vllm", some(), 4, False),
    ("vllm", some(group_size=64), 4, True),
    ("vllm", some(CT), 4, False),
    ("vllm", some(group_size=-1), 4, True),
    ("sglang", some(), 4, False),
    ("vllm", some(), 3, False),
    ("vllm", some(), 64, False),
    ("vllm", some(sizes=SHARED), 8, True),
    # Eight key/value heads on sixteen devices: each head is there twice.
    ("vllm", some(sizes=SHARED), 16, True),
    ("vllm", some("dense", bits=None), 4, True),
    ("transformers", some(), 2, False),
    ("gptqmodel", some(), 2, False),
    ("optgptq", some(), 2, False),
]


@pytest.mark.parametrize(("name", "asked", "devices", "loads"), SPLIT_ROWS)
def test_who_loads_what_on_several_devices(name: str, asked: TargetSubject, devices: int, loads: bool) -> None:
    answer = check_target(parse_target(name), asked, devices)
    assert answer.loads is loads, answer.lines()

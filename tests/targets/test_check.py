"""Reasons, sources, warnings, and the error of a command."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.target_subjects import Sizes, llama_layouts, subject

from optgptq.errors import ExitCode, TargetError, UsageError
from optgptq.targets import check_target, parse_target, require_loads


def test_a_refusal_says_what_where_and_by_which_rule() -> None:
    answer = check_target(parse_target("vllm"), subject(bits=3, symmetric=False))
    by_rule = {refusal.rule: refusal for refusal in answer.refusals}
    assert set(by_rule) == {"bits", "symmetric"}
    bits = by_rule["bits"]
    assert (bits.expected, bits.found) == ("4 or 8 bits", "3")
    assert len(bits.names) == 14
    assert bits.where.endswith("and 11 more")
    assert "vllm 0.33.0" in bits.source
    assert "2026-11-22" in bits.source
    record = answer.record()
    assert record["target"] == "vllm-0.33:cuda"
    assert record["loads"] is False
    assert record["refusals"][0]["num_linears"] == 14
    assert record["suggestion"]["settings"] == ["export.format=compressed-tensors"]


def test_a_group_on_two_devices_is_told_in_numbers() -> None:
    answer = check_target(parse_target("vllm"), subject(), 4)
    (refusal,) = answer.refusals
    assert refusal.rule == "tensor_parallel"
    assert refusal.expected == "whole groups of 128 columns on each of 4 devices"
    assert refusal.found == "2752 columns on each"
    assert all(name.endswith("down_proj") for name in refusal.names)
    assert answer.lines()[-1] == "vLLM 0.33 (cuda), 4 devices: It loads with --set weights.group_size=64."


@pytest.mark.parametrize(
    ("name", "asked", "text"),
    [
        ("transformers", subject(), "needs optimum >= 1.24 and gptqmodel >= 1.4.3"),
        ("transformers", subject("compressed-tensors", bits=3), "compressed-tensors 0.18 or newer"),
        ("transformers", subject("compressed-tensors", symmetric=False), "dequantize=True"),
        ("vllm:humming", subject(bits=3), "--quantization humming"),
        ("vllm:humming", subject(bits=3), "inferred"),
        ("vllm", subject("compressed-tensors", bits=3), "Humming"),
        ("vllm", subject("compressed-tensors", bits=8, symmetric=False), "Humming"),
        ("vllm:rocm", subject(bits=8), "conch-triton-kernels"),
        ("vllm", subject(facts={"own_cache": True}), "only optgptq uses the quantized KV cache"),
        ("sglang", subject("compressed-tensors", facts={"fp8_scales": "head"}), "scales of an fp8 KV cache"),
    ],
)
def test_warnings(name: str, asked: object, text: str) -> None:
    answer = check_target(parse_target(name), asked)  # type: ignore[arg-type]
    assert answer.loads
    assert text in "\n".join(answer.warnings)


def test_what_loads_plainly_has_no_warning() -> None:
    for name in ("vllm", "vllm:cpu", "vllm:xpu", "sglang", "gptqmodel", "optgptq"):
        assert check_target(parse_target(name), subject()).warnings == ()


def test_scales_in_float64_are_refused() -> None:
    answer = check_target(parse_target("vllm"), subject("compressed-tensors", facts={"scale_dtype": "float64"}))
    assert [refusal.rule for refusal in answer.refusals] == ["scales"]


def test_a_command_ends_with_the_first_reason() -> None:
    loads = check_target(parse_target("vllm"), subject())
    refuses = check_target(parse_target("sglang"), subject(bits=3, symmetric=False))
    require_loads([])
    require_loads([loads])
    with pytest.raises(TargetError) as caught:
        require_loads([loads, refuses])
    error = caught.value
    assert error.exit_code == ExitCode.TARGET
    assert error.where.startswith("SGLang 0.5.23 (cuda), model.layers.0.self_attn.q_proj")
    assert error.where.endswith("(and 1 more reasons)")
    assert error.expected == "4 or 8 bits"
    assert error.action.startswith("It loads with --set")
    nothing = check_target(parse_target("vllm"), subject(facts={"model_type": "mpt"}))
    with pytest.raises(TargetError, match=r"0\.28\.0\. No change of the recipe helps"):
        require_loads([nothing])


def test_devices_are_counted_from_one() -> None:
    with pytest.raises(UsageError, match="1 or more"):
        check_target(parse_target("vllm"), subject(), 0)


def test_a_fused_linear_of_two_kinds_is_told_once_per_layer() -> None:
    layouts = tuple(
        replace(layout, bits=None) if layout.name.endswith("k_proj") else layout for layout in llama_layouts(Sizes())
    )
    answer = check_target(parse_target("vllm"), subject(layouts=layouts))
    (refusal,) = answer.refusals
    assert refusal.rule == "fused"
    assert refusal.found == "4 bits, groups of 128, symmetric and dense"
    assert len(refusal.names) == 6


def test_many_layers_are_answered_in_little_time() -> None:
    sizes = Sizes(hidden=8192, intermediate=28672, heads=64, kv_heads=8, layers=80)
    answer = check_target(parse_target("vllm:cpu"), subject(sizes=sizes, bits=3), 8)
    assert answer.suggestion is not None
    assert answer.suggestion.settings == ("weights.bits=4",)

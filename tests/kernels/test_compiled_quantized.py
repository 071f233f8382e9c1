"""The triton kernels for a quantized cache, compiled for devices that are not there."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

from measure.compiled import CompiledCase, can_compile, compile_case, problems
from measure.compiled_quantized import attention_case, cases


def in_the_table(name: str) -> CompiledCase:
    return next(case for case in cases() if case.name == name)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "name",
    ["cache attention split bf16 D=128 rows=16 bits=4", "store codes bf16 D=128 bits=4 fitted"],
)
def test_it_fits_the_device(name, target, tmp_path, monkeypatch):
    """All the others are in the table of compiled kernels, which is written only where they fit."""
    if not can_compile(target):
        pytest.skip(f"this build of triton has no compiler for {target}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = in_the_table(name)
    assert problems(case, target, compile_case(case, target)) == []


@pytest.mark.skipif(not can_compile("sm_90"), reason="this build of triton has no compiler for sm_90")
def test_codes_are_read_many_at_once_and_sums_follow_no_number_of_rows(tmp_path, monkeypatch):
    """Rows of codes come 16 bytes at a time; both products of both loops keep their layouts."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = set()
    for mode, most_rows in (("split", 16), ("all", 1000)):
        kernel = compile_case(attention_case("fp16", 64, "4", mode, most_rows=most_rows), "sm_90")
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
        known = dict(re.findall(r"^(#\w+) = (#ttg\.\w*mma\w*<.*>)", kernel.asm["ttgir"], flags=re.MULTILINE))
        found.add(tuple(sorted(re.sub(r"warpsPerCTA = \[[^\]]*\], ", "", layout) for layout in known.values())))
    assert len(found) == 1, found


@pytest.mark.skipif(not can_compile("sm_90"), reason="this build of triton has no compiler for sm_90")
def test_numbers_that_are_one_compile_too(tmp_path, monkeypatch):
    """At a launch triton makes a constant of every whole number that is 1; the interpreter does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    attention = attention_case("fp16", 64, "4", "all", rule={"window": "i32"}, most_rows=16, exact=True)
    for case, names in (
        (attention, ("window", "query_stride", "key_stride", "value_stride")),
        (in_the_table("store codes bf16 D=128 bits=4"), ("token_stride",)),
    ):
        compile_case(replace(case, constants={**case.constants, **dict.fromkeys(names, 1)}, multiples=()), "sm_90")

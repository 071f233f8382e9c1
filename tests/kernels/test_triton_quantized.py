"""The triton kernels for a quantized cache: run by the interpreter or a GPU, and compiled for absent devices."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.kv_cache import layer_schemes
from support.triton_runs import run_cases

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

from measure.compiled import CompiledCase, can_compile, compile_case, problems
from measure.compiled_quantized import attention_case, cases

from optgptq.kernels.device_kind import DeviceKind
from optgptq.kernels.triton_attention import SEGMENT
from optgptq.kernels.triton_quantized_attention import choose_tiles, code_side
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import SIDES, Side
from optgptq.kv_cache.scheme import LayerScheme

CASES = Path(__file__).with_name("triton_quantized_cases.py")
CUDA, WAVES_OF_64 = DeviceKind(is_hip=False, wave_size=32), DeviceKind(is_hip=True, wave_size=64)
WAVES_OF_32 = DeviceKind(is_hip=True, wave_size=32)


def test_every_case_passes_in_the_interpreter(tmp_path):
    run_cases(CASES, tmp_path, {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_case_passes_on_the_gpu(tmp_path):
    run_cases(CASES, tmp_path, {})


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


def page_of(scheme: LayerScheme, head_dim: int) -> PageLayout:
    return PageLayout(num_kv_heads=2, head_dim=head_dim, page_size=16, scheme=scheme, exact_bytes=2)


@pytest.mark.parametrize("kind", [CUDA, WAVES_OF_64, WAVES_OF_32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_rows_change_no_number_that_is_part_of_the_arithmetic(kind, head_dim):
    layout = page_of(layer_schemes(head_dim)["4 bits"], head_dim)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        few, many = (choose_tiles(kind, dtype, layout, most_rows=rows) for rows in (1, 4096))
        assert few.keys == many.keys
        assert SEGMENT % few.keys == 0
        for name in ("num_warps", "enable_fp_fusion", "matrix_instr_nonkdim"):
            assert few.options.get(name) == many.options.get(name)
        assert few.options["enable_fp_fusion"] is False


@pytest.mark.parametrize("side", SIDES)
def test_kernels_are_told_the_layout(side: Side):
    schemes = layer_schemes(32)
    halves, exact = page_of(schemes["8 and 2 bits"], 32), page_of(schemes["keys only"], 32)
    tokens = page_of(schemes["keys along tokens, 3 bits"], 32)
    is_key = side == "keys"
    found = code_side(halves, side)
    assert (found.bits, found.low_bits, found.group_size) == ((8, 8, 32) if is_key else (2, 2, 16))
    assert (found.is_single, found.by_token) == (is_key, False)
    assert found.codes == (0 if is_key else halves.value_codes)
    assert found.parameters == (halves.key_parameters if is_key else halves.value_parameters)
    assert found.row_bytes == (32 if is_key else 8)
    assert (code_side(exact, side).bits, code_side(exact, side).is_single) == ((4, True) if is_key else (0, False))
    found = code_side(tokens, side)
    assert (found.bits, found.low_bits, found.by_token) == ((3, 2, True) if is_key else (4, 4, False))

"""The triton kernel that attends to a quantized cache, run by the interpreter or a GPU, and how it is launched."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.kv_cache import layer_schemes
from support.triton_runs import run_cases

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

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

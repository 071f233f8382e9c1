"""The triton kernels for attention over pages: run by the interpreter or a GPU, and compiled for absent devices."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paged import paged_texts
from support.triton_runs import run_cases

if find_spec("triton") is None:
    pytest.skip("triton is not installed: there are no wheels but for Linux", allow_module_level=True)

from measure.compiled import TARGETS, CompiledCase, can_compile, compile_case, problems
from measure.compiled_attention import attention_case, cases

from optgptq.kernels.device_kind import DeviceKind
from optgptq.kernels.triton_attention import SEGMENT, choose_tiles, launch_plan

CASES = Path(__file__).with_name("triton_attention_cases.py")
CUDA, WAVES_OF_64 = DeviceKind(is_hip=False, wave_size=32), DeviceKind(is_hip=True, wave_size=64)
WAVES_OF_32 = DeviceKind(is_hip=True, wave_size=32)


def test_every_case_passes_in_the_interpreter(tmp_path):
    run_cases(CASES, tmp_path, {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_case_passes_on_the_gpu(tmp_path):
    run_cases(CASES, tmp_path, {})


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device to compile for; what is compiled goes to a cache of the test's own."""
    if not can_compile(request.param):
        pytest.skip(f"this build of triton has no compiler for {request.param}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return str(request.param)


def in_the_table(name: str) -> CompiledCase:
    return next(case for case in cases() if case.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "attention split bf16 D=128 rows=16 ALiBi",
        "attention all bf16 D=128 rows=many window, cap",
        "join segments bf16 D=128",
        "store keys and values bf16 D=128",
    ],
)
def test_it_fits_the_device_and_uses_the_matrix_unit(target, name):
    """All the others are in the table of compiled kernels, which is written only where they fit."""
    case = in_the_table(name)
    assert problems(case, target, compile_case(case, target)) == []


def test_keys_and_values_are_read_many_at_once(target):
    """Slots of a page and features of a value are neighbours: 16 bytes for each load, and no load of one number."""
    kernel = compile_case(in_the_table("attention split bf16 D=128 rows=16"), target)
    if TARGETS[target].device.backend == "cuda":
        text = kernel.asm["ptx"]
        assert "cp.async.cg.shared.global" in text
        assert "ld.global.b16" not in text
    else:
        text = kernel.asm["amdgcn"]
        assert re.search(r"global_load_(dwordx4|b128)", text)
        assert not re.search(r"global_load_(ushort|short|u16|d16)", text)


def test_the_order_of_sums_is_the_same_for_every_number_of_rows_and_mode(target):
    """Sums over keys of a tile follow the layout of scores; within a product they follow the instruction."""
    found = set()
    for mode, most_rows in (("split", 16), ("all", 16), ("all", 1000), ("one", 1000)):
        kernel = compile_case(attention_case("fp16", 64, mode, most_rows=most_rows), target)
        found.add(layouts(kernel.asm["ttgir"]))
    assert len(found) == 1, found


def layouts(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the layout of scores whole, and of the product with values the instruction, from a kernel's inner form."""
    known = dict(re.findall(r"^(#\w+) = (#ttg\.\w*mma\w*<.*>|#ttg\.amd_\w+<.*>)", text, flags=re.MULTILINE))
    dots = re.findall(r"tt\.dot .*?kWidth = (\d+).*-> tensor<\d+x\d+xf32, (#\w+)>", text)
    # A loop that is begun outside has its products more than once.
    scores, values = (known[name] for name in (dots[0][1], dots[1][1]))
    instruction = re.sub(r"warpsPerCTA = \[[^\]]*\], |, ctaLayout = \{.*\}", "", values)
    return scores, instruction, tuple(sorted({width for width, _ in dots}))


@pytest.mark.parametrize("wanted", ["sm_90", "gfx942"])
def test_numbers_that_are_one_compile_too(wanted, tmp_path, monkeypatch):
    """At a launch triton makes a constant of every whole number that is 1; the interpreter does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    attention = attention_case("fp16", 64, "all", rule={"window": "i32"}, most_rows=16)
    for case, names in (
        (attention, ("window", "query_token_stride")),
        (in_the_table("store keys and values bf16 D=128"), ("key_token_stride", "value_token_stride")),
    ):
        compile_case(replace(case, constants={**case.constants, **dict.fromkeys(names, 1)}, multiples=()), wanted)


def sizes(kind: DeviceKind, head_dim: int, *, most_rows: int, dtype: torch.dtype = torch.float16) -> tuple[int, int]:
    tiles = choose_tiles(kind, dtype, head_dim, most_rows=most_rows)
    return tiles.keys, tiles.rows


@pytest.mark.parametrize("kind", [CUDA, WAVES_OF_64, WAVES_OF_32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_change_no_number_that_is_part_of_the_arithmetic(kind, head_dim, dtype):
    few, many = (choose_tiles(kind, dtype, head_dim, most_rows=rows) for rows in (1, 4096))
    assert few.keys == many.keys
    assert SEGMENT % few.keys == 0
    for name in ("num_warps", "enable_fp_fusion", "matrix_instr_nonkdim"):
        assert few.options.get(name) == many.options.get(name)
    assert few.options["enable_fp_fusion"] is False


def test_sizes_follow_the_device_and_the_work():
    assert sizes(CUDA, 128, most_rows=4) == (64, 16)
    assert sizes(CUDA, 128, most_rows=17) == (64, 32)
    assert sizes(CUDA, 80, most_rows=17) == (32, 32)
    assert sizes(CUDA, 256, most_rows=17) == (32, 16)
    assert sizes(WAVES_OF_64, 128, most_rows=17) == (64, 32)
    assert sizes(WAVES_OF_32, 128, most_rows=17) == (32, 16)


def plan(contexts: list[int], **numbers: Any) -> tuple[int, int, str]:
    texts = paged_texts(contexts, num_heads=8, num_kv_heads=2, head_dim=64, page_size=256)
    step = texts.step([(text, end - 1, end) for text, end in enumerate(contexts)])
    tiles = choose_tiles(CUDA, torch.float16, 64, most_rows=4)
    found = launch_plan(step.query_TND, 2, replace(step.batch, **numbers), tiles)
    return found.blocks, found.segments, found.mode


def test_a_step_is_split_where_there_are_few_programs_and_little_memory():
    assert plan([10, 256]) == (2, 1, "one")
    assert plan([10, 257]) == (2, 2, "split")
    assert plan([10, 257], max_context=1 << 20) == (2, 4096, "split")
    assert plan([10, 257], max_context=1 << 24) == (2, 1, "all")
    assert plan([1] * 511, max_context=300) == (638, 1, "all")

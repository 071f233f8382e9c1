"""Warnings and refusals about who loads a result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.checkpoints import mixed_story_layouts, story_layouts

from optgptq.errors import ExitCode, TargetError
from optgptq.formats.compressed_tensors import COMPRESSED_TENSORS
from optgptq.formats.gptq import GPTQ_V1, GPTQ_V2, GptqFormat
from optgptq.layout import LinearLayout


def gptq(layouts: list[LinearLayout], form: GptqFormat = GPTQ_V1) -> str:
    return "\n".join(form.check(layouts, scale_dtype=torch.float16))


def packed(layouts: list[LinearLayout]) -> str:
    return "\n".join(COMPRESSED_TENSORS.check(layouts, scale_dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_what_every_engine_loads_gives_no_warning(bits: int, group_size: int) -> None:
    layouts = story_layouts(bits=bits, group_size=group_size)
    assert gptq(layouts) == ""
    assert packed(layouts) == ""


def test_gptq_warnings() -> None:
    both = "vLLM 0.33 (cuda) and SGLang 0.5.23 (cuda)"
    asymmetric = gptq(story_layouts(symmetric=False))
    assert f"{both} do not load the result: expected symmetric grids, found asymmetric ones" in asymmetric
    assert f"{both}: It loads with --set export.format=compressed-tensors." in asymmetric
    assert "GPTQModel 7.7 does not load the result: expected version 2" in asymmetric
    assert "GPTQModel 7.7: It loads with --set export.format=gptq_v2." in asymmetric
    assert "GPTQModel" not in gptq(story_layouts(symmetric=False), GPTQ_V2)
    assert "vLLM 0.33 (humming) loads it when started with --quantization humming." in gptq(
        story_layouts(symmetric=False), GPTQ_V2
    )
    assert gptq(story_layouts(), GPTQ_V2).startswith("SGLang 0.5.23 (cpu) reads version 1 alone")
    three = gptq(story_layouts(bits=3))
    assert f"{both} do not load the result: expected 4 or 8 bits, found 3" in three
    assert "39 more" in three
    assert "vLLM 0.33 (cuda): It loads with --set export.format=compressed-tensors." in three
    assert "SGLang 0.5.23 (cuda): It loads with --set weights.bits=4." in three
    assert "SGLang 0.5.23 (humming) loads it when started with --quantization humming." in three
    groups = gptq(story_layouts(group_size=16))
    assert "expected groups of -1, 32, 64 or 128 columns, found 16" in groups
    assert "SGLang 0.5.23 (cuda): It loads with --set weights.group_size=32." in groups
    mixed = gptq(mixed_story_layouts())
    assert "transformers 5.23 does not load the result: expected linears that are alike" in mixed
    assert "it does not look at the rules of the file, found dense linears (model.layers.2.mlp.down_proj)" in mixed
    assert "vLLM" not in mixed


def test_compressed_tensors_warnings() -> None:
    three = packed(story_layouts(bits=3))
    assert "transformers 5.23: compressed-tensors 0.18 or newer decodes 3" in three
    assert "vLLM 0.33 (cuda): 3 bits, groups of 64, symmetric: runs on the Humming kernels" in three
    assert "SGLang 0.5.23 (cuda) does not load the result: expected 4 or 8 bits, found 3" in three
    assert "dequantize=True" in packed(story_layouts(symmetric=False))
    assert "NVIDIA GPU" in packed(story_layouts(bits=8, symmetric=False))
    assert packed(mixed_story_layouts()) == ""


def test_odd_sizes_are_named() -> None:
    layout = LinearLayout(name="odd", out_features=33, in_features=64, bits=4, group_size=32)
    assert "expected rows whose zero points fill whole 32-bit words, found 33 of 4 bits (odd)" in gptq([layout])
    assert "found 64 columns and 33 rows on a device (odd)" in packed([layout])


def refused(layouts: list[LinearLayout], *, form: str = "gptq") -> TargetError:
    with pytest.raises(TargetError) as caught:
        _ = gptq(layouts) if form == "gptq" else packed(layouts)
    assert caught.value.exit_code == ExitCode.TARGET
    return caught.value


def test_what_cannot_be_held_is_refused() -> None:
    layout = story_layouts()[0]
    assert refused([replace(layout, bits=5)]).found == "5"
    assert refused([replace(layout, group_size=100)]).expected == "a group size that divides its 384 columns"
    assert refused([replace(layout, stored_transposed=True)], form="packed").action.startswith("Use export.format=gptq")
    assert gptq([replace(layout, stored_transposed=True)]) == ""
    with pytest.raises(TargetError, match="float16, the dtype of scales"):
        GPTQ_V1.check([layout], scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("change", [{"bits": 8}, {"bits": None}, {"symmetric": False}, {"group_size": 32}])
def test_members_of_a_fused_linear_must_agree(change: dict[str, object]) -> None:
    layouts = story_layouts()
    place = next(place for place, layout in enumerate(layouts) if layout.name.endswith("0.self_attn.v_proj"))
    layouts[place] = replace(layouts[place], **change)  # type: ignore[arg-type]
    for form in ("gptq", "packed"):
        error = refused(layouts, form=form)
        assert "model.layers.0.self_attn.v_proj" in error.where
        assert "qkv_proj" in error.expected

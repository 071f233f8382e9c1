"""Facts that engines care about and layouts do not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats.engine_facts import engine_facts


def test_a_dense_folder_has_no_facts() -> None:
    facts = engine_facts(CheckpointFolder.open(STORY_LLAMA))
    assert (facts.format, facts.layouts, facts.scale_dtype) == ("dense", (), "")
    assert [facts.says_act_order, facts.stores_act_order, facts.loose_words, facts.own_cache] == [False] * 4
    assert (facts.words_version, facts.fp8_scales) == (0, "")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("form", "scales"), [("gptq", "float16"), ("gptq_v2", "float16"), ("compressed-tensors", "")])
def test_files_of_this_package_are_what_they_say(tmp_path: Path, form: str, scales: str, bits: int) -> None:
    source = CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts(bits=bits)
    weights = quantize_all(source, layouts, format_name=form)
    facts = engine_facts(write_checkpoint(source, tmp_path / "out", layouts, weights, format_name=form))
    assert facts.format == form
    assert len([layout for layout in facts.layouts if layout.bits == bits]) == 42
    assert [facts.says_act_order, facts.stores_act_order, facts.loose_words] == [False] * 3
    assert facts.words_version == 0
    assert facts.scale_dtype == (scales or facts.scale_dtype) != ""

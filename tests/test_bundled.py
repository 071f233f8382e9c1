from __future__ import annotations

import pytest

from optgptq.bundled import bundled_path
from optgptq.errors import UsageError


def test_bundled_files_are_there() -> None:
    assert (bundled_path("bundled:story-llama") / "model.safetensors").is_file()
    assert (bundled_path("story-llama") / "tokenizer.json").is_file()
    for name in ("story-calibration", "story-evaluation"):
        assert bundled_path(f"bundled:{name}").read_text(encoding="utf-8")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        bundled_path("bundled:llama")
    assert caught.value.where == "name bundled:llama"
    assert caught.value.expected == "one of bundled:story-llama, bundled:story-calibration, bundled:story-evaluation"
    assert caught.value.found == "'llama'"

"""Every family, and every part of a job beside its weights: stopped once on the way, the bytes are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.quantizable import tiny_model, tiny_recipe, wide_llama, write_model
from support.stops import StoppedError, folder_bytes, run_with_stops, stopped_at_linear
from support.tiny_models import TINY_MODELS

from optgptq.group_heads import group_model
from optgptq.journal.store import Journal
from optgptq.quantize import JobOptions, quantize
from optgptq.recipe.records import Recipe

TEXT = {"num_windows": 4, "window_size": 12}


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_every_family_goes_on_to_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    model = write_model(tiny_model(tiny.name), tmp_path / "model")
    recipe = tiny_recipe(method="rtn", calibration={"num_windows": 2, "window_size": 12})
    whole = quantize(model, recipe, tmp_path / "whole")
    first_of_next_layer = len(whole.record["layers"]) // len(whole.record["decoder_layers"]) + 1
    for linear, share in ((first_of_next_layer, float("inf")), (2, 0.0)):
        options = JobOptions(spill_share=share)
        with pytest.raises(StoppedError):
            quantize(model, recipe, tmp_path / "out", progress=stopped_at_linear(linear), options=options)
    quantize(model, recipe, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


CACHE: dict[str, Any] = {"bits": 4, "num_windows": 4, "past_only": "token", "recent_tokens": 2}
PARTS: dict[str, dict[str, Any]] = {
    "kv cache": {"kv_cache": CACHE},
    "kv cache alone": {"weights": {"method": "none"}, "kv_cache": CACHE},
    "kv cache folded": {"kv_cache": {**CACHE, "fold": True}},
    "heads": {"gqa": {"group": 2}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return write_model(wide_llama(**values), tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_a_job_goes_on(name: str, model: Path, tmp_path: Path) -> None:
    text = {**TEXT, "window_size": 24}
    values: dict[str, Any] = {"weights": {"group_size": -1}, "calibration": text}
    recipe = Recipe.model_validate({**values, **PARTS[name]})
    quantize(model, recipe, tmp_path / "whole")
    result, steps = run_with_stops(model, recipe, tmp_path / "out", puts_per_run=2)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert len(steps) > 4
    assert len(result.record["sessions"]) > 2


def test_merging_heads_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate({"gqa": {"group": 2}, "calibration": TEXT})
    whole = group_model(model, recipe, tmp_path / "whole")
    put = Journal.put
    seen: list[str] = []

    def stopping(self: Journal, name: str, *rest: Any) -> None:
        put(self, name, *rest)
        if name not in seen:
            seen.append(name)
            raise StoppedError

    monkeypatch.setattr(Journal, "put", stopping)
    result = None
    while result is None:
        try:
            result = group_model(model, recipe, tmp_path / "out")
        except StoppedError:
            assert [path.name for path in sorted(tmp_path.iterdir())] == [".out.work", "whole"]
    first_heads = seen.index("windows") + 1
    kinds = [name.partition(".")[0] for name in seen]
    assert kinds[:first_heads] == ["windows"] * first_heads
    assert set(kinds[first_heads:]) <= {"heads", "published"}
    assert kinds.count("heads") >= 2
    assert result.record == whole.record
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")

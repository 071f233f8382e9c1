"""What a conversion leaves when its process dies after the output appeared, and how many layers are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.quantizable import wide_llama, write_model
from support.stops import StoppedError, folder_bytes

from optgptq.checkpoint.lock import work_folder
from optgptq.errors import OutputError
from optgptq.group_heads import group_model
from optgptq.journal.store import open_journal
from optgptq.kept_work import kept_work
from optgptq.layer_steps import num_layer_steps
from optgptq.recipe import load_recipe

TEXT = "bundled:story-calibration"
OVERRIDES = ("calibration.source=" + TEXT, "calibration.num_windows=8", "calibration.window_size=24")


def die(*arguments: object, **named: object) -> None:
    raise StoppedError


def test_an_output_that_appeared_is_known_and_of_its_own_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = write_model(wide_llama(**sizes), tmp_path / "model")
    recipe, output = load_recipe("opt-gqa-w4", [*OVERRIDES, "gqa.group=2"]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("optgptq.journal.store.Journal.remove", die)
        with pytest.raises(StoppedError):
            group_model(model, recipe, output)
    before = folder_bytes(output)
    assert kept_work(output) == "out is complete. Run the same command again: it ends at once."
    other = load_recipe("opt-gqa-w4", [*OVERRIDES, "gqa.group=4"])
    with pytest.raises(OutputError, match="one that exists"):
        group_model(model, other, output)
    with monkeypatch.context() as patch:
        patch.setattr("optgptq.group_heads.group_into", die)
        result = group_model(model, recipe, output)
    assert result.record["num_kv_heads_after"] == 2
    assert folder_bytes(output) == before
    assert not work_folder(output).exists()


@pytest.mark.parametrize("prefix", ["", "heads."])
def test_a_torn_step_ends_no_layer(prefix: str, tmp_path: Path) -> None:
    with open_journal(tmp_path / "work") as journal:
        journal.begin({})
        for name in ("layer-00000.qkv", "layer-00000", "layer-00001.qkv", "layer-00001", "layer-00002.qkv"):
            journal.put(f"{prefix}{name}", {"x": torch.ones(8)}, {})
        assert num_layer_steps(journal, prefix=prefix) == 2
        torn = journal.path / f"{prefix}layer-00001.qkv.safetensors"
        torn.write_bytes(torn.read_bytes()[:-1])
        assert num_layer_steps(journal, prefix=prefix) == 1

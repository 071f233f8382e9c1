"""The journal keeps whole steps, knows torn ones, and belongs to one process."""

from __future__ import annotations

import os

import pytest
import torch

from optgptq.errors import OutputError
from optgptq.journal.store import KEY_FILE, NothingKept, open_journal

KEY = {"recipe": {"bits": 4}}


def test_a_step_comes_back_as_it_was_put(tmp_path):
    tensors = {
        "codes": torch.arange(7, dtype=torch.uint8),
        "scale": torch.tensor([[1.5, -2.0]], dtype=torch.float16),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(6.0).reshape(2, 3).T,
    }
    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.scope("layer-0").put("qkv", tensors, {"loss": 0.25, "names": ["ü"]})
        journal.sync()
    with open_journal(tmp_path / "work") as journal:
        assert journal.key == KEY
        entry = journal.get("layer-0.qkv")
    assert entry is not None
    assert entry.facts == {"loss": 0.25, "names": ["ü"]}
    assert entry.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entry.tensors[name].dtype == tensor.dtype
        assert torch.equal(entry.tensors[name], tensor)


def test_every_truncation_and_flipped_bit_makes_a_step_unknown(tmp_path):
    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.put("step", {"x": torch.arange(5, dtype=torch.int32)}, {"seconds": 1})
        path = tmp_path / "work" / "step.safetensors"
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert journal.get("step") is None
        for place in range(len(whole)):
            for bit in (0, 6):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
                entry = journal.get("step")
                # Padding and the order of JSON may change without a change of what is said.
                assert entry is None or (
                    entry.facts == {"seconds": 1} and entry.tensors["x"].tolist() == [0, 1, 2, 3, 4]
                )
        path.write_bytes(whole)
        assert journal.get("step") is not None


def test_steps_without_their_job_are_dropped(tmp_path):
    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.put("step", {}, {})
    os.unlink(tmp_path / "work" / KEY_FILE)
    with open_journal(tmp_path / "work") as journal:
        assert journal.key is None
        assert journal.get("step") is None
        assert journal.is_empty


def test_two_processes_cannot_work_on_one_output(tmp_path):
    with (
        open_journal(tmp_path / "work"),
        pytest.raises(OutputError, match="another one"),
        open_journal(tmp_path / "work"),
    ):
        pass


def test_removing_and_forgetting(tmp_path):
    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.put("a", {}, {})
        journal.forget("a")
        journal.forget("a")
        assert journal.get("a") is None
        journal.sync()
        journal.remove()
    assert not (tmp_path / "work").exists()


def test_a_job_without_a_journal_knows_nothing():
    steps = NothingKept()
    steps.scope("a").put("b", {}, {})
    steps.sync()
    assert steps.get("b") is None


def test_a_journal_with_no_step_goes_and_one_with_a_step_stays(tmp_path):
    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.put("session-00001", {}, {"seconds": 1.0})
    assert not (tmp_path / "work").exists()
    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.put("step", {}, {})
        journal.put("session-00001", {}, {})
        assert journal.names("session-") == ["session-00001"]
        assert journal.num_bytes > 0
    with open_journal(tmp_path / "work") as journal:
        assert journal.get("step") is not None
        assert journal.key == KEY


def test_what_cannot_be_removed_is_told_and_hurts_nobody(tmp_path, monkeypatch, caplog):
    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    with open_journal(tmp_path / "work") as journal:
        journal.begin(KEY)
        journal.put("step", {}, {})
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.unlink", refuse)
            journal.remove()
    assert "could not be removed" in caplog.text

"""From a model's name to its folder, without a network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from optgptq.bundled import bundled_path
from optgptq.checkpoint.hub import resolve_model
from optgptq.errors import ModelError, UsageError


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Record calls of the download function, and answer with a folder or an exception."""
    calls: list[dict] = []
    answer: list[object] = [str(tmp_path)]

    def snapshot_download(name, **options):
        calls.append({"name": name, **options})
        if isinstance(answer[0], BaseException):
            raise answer[0]
        return answer[0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return calls, answer


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch, downloads):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == Path("owner/model")
    assert not downloads[0]


def test_bundled_models_are_found():
    assert resolve_model("bundled:story-llama") == bundled_path("story-llama")
    with pytest.raises(UsageError, match="bundled:nope"):
        resolve_model("bundled:nope")


def test_a_hub_id_is_downloaded_at_its_revision_without_pickles(tmp_path, downloads):
    calls, _ = downloads
    assert resolve_model("owner/model", "abc123") == tmp_path
    (call,) = calls
    assert (call["name"], call["revision"], call["local_files_only"]) == ("owner/model", "abc123", False)
    assert "*.safetensors" in call["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in call["allow_patterns"])
    assert "*.bin" in call["ignore_patterns"]


def test_offline_uses_the_cache_only(monkeypatch, downloads):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolve_model("gpt2")
    assert downloads[0][0]["local_files_only"]


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c", "../x", "", "has space", "a..b/c"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(name, downloads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert caught.value.where == name
    assert not downloads[0]


@pytest.mark.parametrize("name", ["bundled:story-llama", "."])
def test_a_revision_needs_a_hub_model(name):
    with pytest.raises(UsageError, match="--revision"):
        resolve_model(name, "main")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LocalEntryNotFoundError("not cached"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("no route\nmore"), "ConnectionError: no route"),
    ],
)
def test_what_goes_wrong_with_the_hub_is_bad_input(error, expected, downloads):
    downloads[1][0] = error
    with pytest.raises(ModelError) as caught:
        resolve_model("owner/model")
    assert expected in caught.value.found
    assert caught.value.__cause__ is error

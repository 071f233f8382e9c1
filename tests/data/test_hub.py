"""The hub is not reached from tests: `load_dataset` is replaced at its border, or switched off by the offline flag."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from optgptq.data.corpora import TextSource, load_documents
from optgptq.errors import TextError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def load_dataset(path: str, **settings: Any) -> list[dict[str, str]]:
        seen.append({"path": path} | settings)
        return [{"text": "first"}, {"text": "second"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return seen


def test_every_setting_reaches_the_library(calls: list[dict[str, Any]]) -> None:
    source = TextSource(source="owner/name", config="en", split="validation", revision="abc")
    assert list(load_documents(source)) == ["first", "second"]
    assert calls == [{"path": "owner/name", "name": "en", "split": "validation", "revision": "abc", "streaming": True}]


def test_offline_the_cache_is_read_instead_of_a_stream(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(load_documents(TextSource(source="owner/name"))) == ["first", "second"]
    assert calls[0]["streaming"] is False


@pytest.mark.parametrize(
    ("offline", "advice"),
    [
        ("0", "Check the id, config, split, revision and the network, or name a local file or folder."),
        ("1", "Nothing is fetched while HF_HUB_OFFLINE is set; unset it, or name a local file."),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore"),
        ValueError("Unknown split"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
    ],
)
def test_what_cannot_be_read(offline: str, advice: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(TextError) as caught:
        list(load_documents(TextSource(source="owner/name")))
    assert caught.value.where == "text owner/name"
    assert caught.value.found == str(error).splitlines()[0]
    assert caught.value.action == advice

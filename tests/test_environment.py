from __future__ import annotations

import gc
import sys

import pytest

from optgptq.environment import Environment, loading_modules, read_environment
from optgptq.errors import UsageError


def test_nothing_set() -> None:
    assert read_environment({}) == Environment(offline=False, no_color=False, continuous_integration=False)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize(
    ("value", "offline"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" on ", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("", False),
    ],
)
def test_either_offline_flag(name: str, value: str, offline: bool) -> None:
    assert read_environment({name: value}).offline is offline


def test_one_true_offline_flag_is_enough() -> None:
    assert read_environment({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}).offline


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_word_that_is_neither_yes_nor_no_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_environment({name: "maybe"})
    error = caught.value
    assert error.where == f"environment variable {name}"
    assert error.expected == "1, true, yes or on; 0, false, no, off or nothing"
    assert error.found == "'maybe'"
    assert error.action == f"Set {name} to 1 or 0, or unset it."


@pytest.mark.parametrize(("value", "no_color"), [("", False), ("1", True), ("0", True), ("anything", True)])
def test_no_color_is_set_by_any_text(value: str, no_color: bool) -> None:
    assert read_environment({"NO_COLOR": value}).no_color is no_color


@pytest.mark.parametrize(
    ("value", "found"), [("true", True), ("woodpecker", True), ("false", False), ("0", False), ("", False)]
)
def test_ci_may_hold_the_name_of_a_service(value: str, found: bool) -> None:
    assert read_environment({"CI": value}).continuous_integration is found


def test_the_real_environment_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_environment().offline
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert not read_environment().offline


@pytest.mark.parametrize(("present", "frozen"), [(False, True), (True, False)])
def test_what_the_first_import_of_torch_makes_is_not_searched_for_cycles(
    monkeypatch: pytest.MonkeyPatch, *, present: bool, frozen: bool
) -> None:
    monkeypatch.setattr(sys, "modules", {**sys.modules, "torch": sys} if present else {})
    before = gc.get_freeze_count()
    try:
        with loading_modules():
            assert gc.isenabled() is present
        assert gc.isenabled()
        assert (gc.get_freeze_count() > before) is frozen
    finally:
        gc.unfreeze()

"""Names of targets, and records that add one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.source_tree import ROOT

from optgptq.errors import UsageError
from optgptq.models.registry import FAMILIES
from optgptq.targets import known_targets, parse_target
from optgptq.targets.known import RECORDS
from optgptq.targets.others import OWN_FAMILIES


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vllm", "vllm-0.33:cuda"),
        ("vllm-0.33", "vllm-0.33:cuda"),
        ("vllm:rocm", "vllm-0.33:rocm"),
        (" vLLM-0.33:Humming ", "vllm-0.33:humming"),
        ("sglang", "sglang-0.5.23:cuda"),
        ("sglang-0.5.23:npu", "sglang-0.5.23:npu"),
        ("transformers", "transformers-5.23"),
        ("transformers-5.23", "transformers-5.23"),
        ("gptqmodel", "gptqmodel-7.7"),
        ("gptqmodel-7.7", "gptqmodel-7.7"),
        ("optgptq", "optgptq"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert parse_target(text).name == name


@pytest.mark.parametrize(
    ("text", "closest"),
    [("vlm", "vllm"), ("vllm-0.32", "vllm-0.33"), ("vllm:tpu", "vllm:"), ("sglang:rocm", "sglang:"), ("", "")],
)
def test_an_unknown_name_lists_the_known_ones_closest_first(text: str, closest: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert caught.value.exit_code == 2
    assert caught.value.expected.startswith(f"one of {closest}")
    for target in known_targets():
        assert target.name in caught.value.expected
    if closest:
        assert caught.value.action.startswith("Did you mean")


def test_a_new_version_is_new_records() -> None:
    newer = tuple(replace(path, version="0.100") for path in RECORDS if path.engine == "vllm")
    records = (*RECORDS, *newer)
    assert parse_target("vllm", records).name == "vllm-0.100:cuda"
    assert parse_target("vllm:cpu", records).name == "vllm-0.100:cpu"
    assert parse_target("vllm-0.33", records).name == "vllm-0.33:cuda"


def test_every_record_says_where_it_was_read() -> None:
    for path in RECORDS:
        assert path.source.what
        assert len(path.source.date) == len("2026-11-22")
        assert path.kernels or path.formats == ("dense",)


def test_the_families_of_this_package_are_all_named() -> None:
    assert set(OWN_FAMILIES) == {family.name for family in FAMILIES}


def test_the_page_lists_every_target() -> None:
    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE) == [target.name for target in known_targets()]

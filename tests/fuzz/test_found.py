"""What fuzzing found, each with the smallest input that shows it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from support.checkpoints import STORY_LLAMA, quantize_all, story_layouts, write_checkpoint
from support.texts import write_tokenizer

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.hub import resolve_model
from optgptq.checkpoint.paths import require_inside
from optgptq.checkpoint.safetensors_header import parse_header
from optgptq.data.chat import render_chat
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.tokenizer import load_tokenizer
from optgptq.errors import ModelError, RecipeError, TextError
from optgptq.models.config_reader import ConfigReader
from optgptq.models.registry import family_of
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.sources import source_kind
from optgptq.runtime.field_values import sampling_params
from optgptq.targets.suggest import _fewer_devices
from optgptq_cli.main import main
from optgptq_cli.output import write_json, write_result

LONG = "9" * 5000  # Python reads and writes no whole number of more than 4300 digits


def header(**entry: object) -> list[object]:
    whole = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], **entry}
    return list(parse_header(json.dumps({"a": whole}).encode(), file="model.safetensors", file_bytes=200))


def test_a_dtype_that_is_a_list():
    with pytest.raises(ModelError, match="a dtype among"):
        header(dtype=["U8"])


def test_a_shape_whose_product_has_thousands_of_digits():
    with pytest.raises(ModelError, match="at most 64 dimensions, found 300"):
        header(shape=[2**63 - 1] * 300)


def test_a_file_name_that_no_file_system_has(tmp_path):
    for name in ("\ud800", "a\0b"):
        with pytest.raises(ModelError, match="expected a file"):
            require_inside(tmp_path, name)


def test_architectures_that_are_no_list():
    with pytest.raises(ModelError, match="found 7"):
        family_of({"architectures": 7})


@pytest.mark.parametrize("value", [10**400, float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_no_finite_float(value):
    with pytest.raises(ModelError, match="expected a number"):
        ConfigReader({"eps": value}).number("eps")


def test_counts_that_would_fill_the_memory():
    config = ConfigReader({"num_hidden_layers": 10**9, "hidden_size": 10**14})
    with pytest.raises(ModelError, match="at most 100000, found 1000000000"):
        config.integer("num_hidden_layers")
    with pytest.raises(ModelError, match="at most 1099511627776"):
        config.integer("n_embd", "hidden_size")


def test_numbers_of_thousands_of_digits_on_the_command_line_and_in_prompts():
    with pytest.raises(RecipeError, match="--set weights"):
        load_recipe("gptq-w4", [f"weights.rules.{LONG}=1"])
    with pytest.raises(RecipeError):
        load_recipe("gptq-w4", [f"weights.bits={LONG}"])
    with pytest.raises(Exception, match="logit_bias"):
        sampling_params({"logit_bias": {LONG: 1.0}})


def test_what_is_blank_gets_words():
    error = ModelError("a", expected="b", found=" ", action="C.")
    assert (error.found, str(error)) == ("the empty text ' '", "a: expected b, found the empty text ' '. C.")


def test_parquet_whose_names_of_columns_are_no_text(tmp_path):
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["once"]}), stream)
    path = tmp_path / "rows.parquet"
    path.write_bytes(stream.getvalue().replace(b"text", b"\xd5ext"))
    with pytest.raises(TextError):
        list(load_documents(TextSource(source=str(path))))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": ["TokenizersBackend"]}),
        ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": 7}),
        ("config.json", {"model_type": {"a": 1}}),
    ],
)
def test_tokenizer_files_with_other_kinds_of_values(tmp_path, file, content):
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with contextlib.suppress(TextError):
        assert load_tokenizer(tmp_path).encode("a")


def test_json_that_is_nested_too_deeply_for_its_reader(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(TextError, match="JSON object"):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_calls_itself():
    template = "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"
    with pytest.raises(TextError, match="a template that accepts the messages"):
        render_chat([{"role": "user"}], template, special_tokens={}, folder=Path("model"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_stdout_cannot_spell(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    write_result("linear \ud800é")
    write_json({"name": "\ud800é"})
    text = stdout.buffer.getvalue().decode(encoding)
    assert text.startswith("linear \\ud800\\xe9\n")
    assert json.loads(text.partition("\n")[2]) == {"name": "\ud800é"}


def test_names_that_are_too_long_for_a_file():
    long = "a" * 5000
    assert source_kind(long) == "unknown"
    with pytest.raises(RecipeError, match="a shipped recipe"):
        load_recipe(long)
    with pytest.raises(ModelError, match="nothing at this path"):
        resolve_model(long)


def test_a_number_of_devices_that_no_machine_has():
    assert _fewer_devices(2**40)[:2] == [1024, 512]
    assert _fewer_devices(6) == [3, 2, 1]
    assert _fewer_devices(1) == []


def test_notes_and_warnings_of_a_manifest_that_are_numbers(tmp_path, capsys):
    folder, source = tmp_path / "out", CheckpointFolder.open(STORY_LLAMA)
    layouts = story_layouts()
    weights = quantize_all(source, layouts, format_name="gptq")
    write_checkpoint(source, folder, layouts, weights, format_name="gptq")
    manifest = {"files": {}, "warnings": 5, "layers": [{"name": layouts[0].name, "notes": 7}], "dense": 3}
    (folder / "optgptq_manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["warnings"] == []
    assert [layer["notes"] for layer in told["layers"]] == [[]] * len(layouts)

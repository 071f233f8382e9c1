from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.texts import shared_path, write_tokenizer

from optgptq.bundled import bundled_path
from optgptq.data.tokenizer import load_tokenizer
from optgptq.errors import TextError

SAMPLES = (
    "",
    "a",
    "Once upon a time, there was a girl.\n\n  Two  spaces and a tab\t.",
    "Special <s> tokens </s> in text",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600 \r\n end ",
    " leading space",
)


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def set_config(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_the_bundled_tokenizer() -> None:
    tokenizer = load_tokenizer(bundled_path("story-llama"))
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1024, 0, (1,))
    assert not tokenizer.adds_bos
    assert tokenizer.chat_template is None
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["story-llama", "babyllama-105", "tinystories-656k"])
def test_ids_are_those_of_transformers(name: str) -> None:
    folder = bundled_path(name) if name == "story-llama" else shared_path(f"models/{name}")
    tokenizer, reference = load_tokenizer(folder), transformers_tokenizer(folder)
    texts = [*SAMPLES, bundled_path("story-evaluation").read_text(encoding="utf-8")[:5000]]
    expected = [reference.encode(text, add_special_tokens=False) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    for ids in expected:
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.adds_bos == (reference.encode("a")[0] == reference.bos_token_id)
    assert tokenizer.vocab_size == len(reference)


def test_nothing_is_added_where_the_model_adds_a_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, adds_bos=True))
    assert tokenizer.adds_bos
    assert 0 not in tokenizer.encode("hello")
    assert tokenizer.encode("<s>") == [0]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_the_habit_is_what_transformers_does_whatever_flags_say(
    tmp_path: Path, adds_bos: bool, config: dict[str, Any]
) -> None:
    folder = write_tokenizer(tmp_path, adds_bos=adds_bos, config=config)
    assert load_tokenizer(folder).adds_bos is adds_bos
    assert (transformers_tokenizer(folder)("a")["input_ids"][0] == 0) is adds_bos


def test_special_ids_come_from_the_first_file_that_has_them(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    assert load_tokenizer(folder).eos_token_ids == (1,)
    set_config(folder, "config.json", bos_token_id=7, eos_token_id=8)
    assert (load_tokenizer(folder).bos_token_id, load_tokenizer(folder).eos_token_ids) == (0, (8,))
    set_config(folder, "generation_config.json", eos_token_id=[9, 10])
    assert load_tokenizer(folder).eos_token_ids == (9, 10)
    set_config(folder, "tokenizer_config.json", tokenizer_class="TokenizersBackend", bos_token=None)
    assert load_tokenizer(folder).bos_token_id == 7
    assert not load_tokenizer(folder).adds_bos


def test_special_tokens_may_stand_in_the_older_file(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    set_config(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    set_config(folder, "special_tokens_map.json", bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1,))


def test_truncation_stored_with_a_tokenizer_is_not_obeyed(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    assert len(load_tokenizer(folder).encode("longer than four")) == 16


def test_a_token_that_only_the_configuration_declares_is_known(tmp_path: Path) -> None:
    """transformers adds it on loading, so `tokenizer.json` alone would give other ids."""
    folder = write_tokenizer(tmp_path, config={"extra_special_tokens": ["<tool>"]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<tool>") == transformers_tokenizer(folder).encode("a<tool>", add_special_tokens=False)
    assert len(tokenizer.encode("<tool>")) == 1


def test_the_fast_path_imports_no_transformers() -> None:
    program = (
        "import sys; from optgptq.bundled import bundled_path; from optgptq.data.tokenizer import load_tokenizer; "
        "load_tokenizer(bundled_path('story-llama')).encode('a'); "
        "print([name for name in ('transformers', 'datasets', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TextError) as caught:
        load_tokenizer(tmp_path)
    error = caught.value
    assert error.where == f"tokenizer of {tmp_path}"
    assert error.expected == "one of the files tokenizer.json, tokenizer.model, vocab.json, vocab.txt, tekken.json"
    assert error.found == "none of them"
    assert error.action == "Copy the tokenizer files of the model into the folder."


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"cut', b"[1]", b"\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(TextError) as caught:
        load_tokenizer(folder)
    assert caught.value.where == f"file {folder / name}"
    assert caught.value.expected == "a JSON object"
    assert caught.value.action == f"Copy {name} into {folder} again from where the model came from."


def test_json_that_is_no_tokenizer(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(TextError) as caught:
        load_tokenizer(folder)
    assert caught.value.expected == "a tokenizer that the tokenizers library can build"


def test_code_in_the_folder_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_tokenizer(tmp_path, config={"auto_map": {"AutoTokenizer": ["custom.Custom", None]}})
    (folder / "custom.py").write_text("print('ran')\nraise SystemExit(3)")
    set_config(folder, "config.json", model_type="llama")
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("abc")) == 3
    assert "ran" not in capfd.readouterr().out


def test_a_class_that_only_the_folder_defines_is_refused(tmp_path: Path) -> None:
    set_config(tmp_path, "config.json", model_type="unheard-of", auto_map={"AutoConfig": "custom.Config"})
    set_config(tmp_path, "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Custom", None]})
    (tmp_path / "custom.py").write_text("raise SystemExit(3)")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TextError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.expected == "a tokenizer that transformers can load without running code from the folder"


def test_a_sentencepiece_file_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    set_config(tmp_path, "config.json", model_type="llama")
    set_config(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(TextError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == f"tokenizer of {tmp_path}"


def test_a_copy_of_the_bundled_tokenizer_without_config_still_loads(tmp_path: Path) -> None:
    shutil.copy(bundled_path("story-llama") / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Once") == load_tokenizer(bundled_path("story-llama")).encode("Once")
    assert tokenizer.bos_token_id is None or tokenizer.bos_token_id == 0

"""Small tokenizers and texts, and the files beside the repository that some tests use where they exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared_path(relative: str) -> Path:
    """Return a file or folder beside the repository; the test is skipped where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"../shared/{relative} is not there")
    return path


def write_tokenizer(folder: Path, *, adds_bos: bool = False, config: dict[str, Any] | None = None) -> Path:
    """Write a byte-level tokenizer without merges: one id per byte from 2 on, `<s>` is 0 and `</s>` is 1."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    native = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    native.add_special_tokens(["<s>", "</s>"])
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    if adds_bos:
        native.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    native.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder

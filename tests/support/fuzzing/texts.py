"""Boundaries of text: calibration files, prompts, tokenizers, chat templates, and the journal's own files."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import torch
from pyarrow import parquet
from support.fuzzing.case import Boundary, CaseFolder
from support.fuzzing.checkpoints import damaged_safetensors
from support.fuzzing.mutate import CANARY, damaged_bytes, damaged_json, damaged_value, interesting

from optgptq.data.chat import render_chat
from optgptq.data.corpora import TextSource, load_documents
from optgptq.data.tokenizer import load_tokenizer
from optgptq.journal.entry import Entry, read_entry, write_entry
from optgptq.journal.store import KEY_FILE, open_journal
from optgptq.runtime.prompt_file import read_prompts

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Once upon a time"}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[{{ message['content'] }}]"
    "{% elif loop.index > 9 %}{{ raise_exception('too long') }}{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def text_boundaries(home: Path, model: Path) -> list[Boundary]:
    """Return the boundaries of text files and of the files around text; `model` has a tokenizer."""
    return [
        *_corpora(_folder(home / "corpora", {"text.txt": b"Once upon a time.\r\n" * 20, **_rows()})),
        _prompts(_folder(home / "prompts", {"prompts.jsonl": _prompt_lines()})),
        _tokenizer(CaseFolder.of(home / "tokenizer" / "model", model)),
        _template(_folder(home / "template", {})),
        *_journal(_folder(home / "journal", {})),
    ]


def _folder(path: Path, files: dict[str, bytes]) -> CaseFolder:
    folder = CaseFolder(path / "given", files)
    (path / CANARY).write_text("outside")
    return folder


def _rows() -> dict[str, bytes]:
    rows = [{"text": f"Story number {index}.", "messages": MESSAGES} for index in range(20)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return {"rows.jsonl": lines, "rows.parquet": stream.getvalue()}


def _corpora(folder: CaseFolder) -> list[Boundary]:
    def damage_of(name: str) -> Callable[[random.Random], Callable[[], object]]:
        def damage(rng: random.Random) -> Callable[[], object]:
            data = folder.files[name]
            if name.endswith(".jsonl") and rng.random() < 0.5:
                row = json.loads(data.splitlines()[0])
                data = b"\n".join(json.dumps(damaged_value(rng, row)).encode() for _ in range(3))
            else:
                data = damaged_bytes(rng, data)
            chat = rng.random() < 0.4
            path = folder.put(name, data)
            source = TextSource(source=str(path), column="messages" if chat else "text", chat_template=chat)
            return lambda: list(load_documents(source, render_chat=_render))

        return damage

    return [Boundary(name=f"text {name}", folder=folder, damage=damage_of(name)) for name in folder.files]


def _render(messages: object) -> str:
    return render_chat(messages, TEMPLATE, special_tokens={"bos_token": "<s>"}, folder=Path("model"))  # type: ignore[arg-type]


def _prompt_lines() -> bytes:
    rows = [
        {"prompt": "Once", "id": "a", "temperature": 0.5, "top_p": 0.9, "stop": ["."], "max_tokens": 5, "seed": 3},
        {"prompt_token_ids": [1, 2, 3], "logit_bias": {"3": 1.0}, "stop_token_ids": [4], "n": 2, "min_p": 0.1},
        {"messages": MESSAGES, "id": 7, "repetition_penalty": 1.1, "logprobs": 2, "top_k": 4, "allowed_token_ids": [1]},
    ]
    return b"\n".join(json.dumps(row).encode() for row in rows)


def _prompts(folder: CaseFolder) -> Boundary:
    rows = [json.loads(line) for line in folder.files["prompts.jsonl"].splitlines()]

    def damage(rng: random.Random) -> Callable[[], object]:
        data = damaged_json(rng, rng.choice(rows)).replace(b"\n", b" ")
        path = folder.put("prompts.jsonl", data if rng.random() < 0.9 else damaged_bytes(rng, data))
        return lambda: read_prompts(path, {"max_tokens": 10})

    return Boundary(name="prompts", folder=folder, damage=damage)


def _tokenizer(folder: CaseFolder) -> Boundary:
    (folder.path.parent / CANARY).write_text("outside")
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "generation_config.json")
    names = tuple(name for name in names if name in folder.files)

    def damage(rng: random.Random) -> Callable[[], object]:
        name = rng.choice(names)
        folder.put(name, damaged_json(rng, json.loads(folder.files[name])))
        if rng.random() < 0.1:
            folder.put("special_tokens_map.json", json.dumps(interesting(rng)).encode())
        return lambda: _tokenize(folder.path)

    return Boundary(name="tokenizer", folder=folder, damage=damage)


def _tokenize(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Once upon a time, é\n")
    tokenizer.decode(ids)
    tokenizer.decode(ids, skip_special_tokens=True)


def _template(folder: CaseFolder) -> Boundary:
    def damage(rng: random.Random) -> Callable[[], object]:
        template = damaged_bytes(rng, TEMPLATE.encode()).decode(errors="replace")
        messages = damaged_value(rng, MESSAGES) if rng.random() < 0.5 else MESSAGES
        return lambda: render_chat(
            messages, template, special_tokens={"bos_token": "<s>"}, folder=folder.path, add_generation_prompt=True
        )

    return Boundary(name="chat template", folder=folder, damage=damage)


def _journal(folder: CaseFolder) -> list[Boundary]:
    path = folder.path / "step.safetensors"
    tensors = {"codes": torch.arange(40, dtype=torch.uint8), "scale": torch.ones(3, 2, dtype=torch.float16)}
    write_entry(path, Entry(tensors, {"loss": 0.1, "notes": ["a"]}))
    whole = path.read_bytes()

    def entry_damage(rng: random.Random) -> Callable[[], object]:
        folder.put(path.name, damaged_safetensors(rng, whole, [whole]))
        return lambda: read_entry(path)

    def key_damage(rng: random.Random) -> Callable[[], object]:
        key = {"version": "1", "recipe": {"weights": {"bits": 4}}, "tokens": "ab"}
        folder.put(f"work/{KEY_FILE}", damaged_json(rng, key))
        return lambda: _open(folder.path / "work")

    def _open(home: Path) -> None:
        with open_journal(home):
            pass

    return [
        Boundary(name="journal step", folder=folder, damage=entry_damage),
        Boundary(name="journal key", folder=folder, damage=key_damage),
    ]

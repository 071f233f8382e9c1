"""Boundaries of checkpoint folders: headers, index, configurations, tensors, manifest, parameters of a KV cache."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from support.fuzzing.case import Boundary, CaseFolder
from support.fuzzing.mutate import CANARY, damaged_bytes, damaged_json, damaged_value, interesting

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.safetensors_header import TORCH_DTYPES
from optgptq.convert import convert
from optgptq.formats import FORMATS
from optgptq.formats.verify import verify_folder
from optgptq.reports.inspect import inspect_checkpoint
from optgptq.runtime.load import load_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "optgptq_manifest.json"
Damage = Callable[[random.Random], Callable[[], object]]


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the parsed header of a safetensors file, and its data."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_header(header: bytes, data: bytes) -> bytes:
    """Return a file with this header."""
    return len(header).to_bytes(8, "little") + header + data


def damaged_safetensors(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Return a safetensors file whose length, header or data are damaged."""
    kind = rng.randrange(6)
    if kind == 0:
        return damaged_bytes(rng, data, corpus=corpus)
    if kind == 1:
        length = rng.choice((0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, len(data) - 8, len(data), rng.randrange(4096)))
        return length.to_bytes(8, "little") + data[8 : rng.choice((50, 50, len(data)))]
    header, tensors = split_header(data)
    if kind in (2, 3):
        return joined_header(damaged_json(rng, header), tensors)
    if kind == 4:
        return joined_header(json.dumps(_claims(rng, header)).encode(), tensors[: rng.choice((0, len(tensors)))])
    return joined_header(json.dumps(header).encode(), damaged_bytes(rng, tensors))


def _claims(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """Return the header with a tensor that says it is of another size, its offsets said to fit."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    shape = rng.choice(([2**40], [2**20, 2**20], [0, 2**62], [2**63 - 1, 0], [1] * 70, [0] * 70, [], [2**63 - 1] * 300))
    entry["shape"] = shape
    entry["dtype"] = rng.choice(list(TORCH_DTYPES))
    product = 1
    for size in shape:
        product *= size
    begin = entry["data_offsets"][0]
    item_bytes = TORCH_DTYPES[entry["dtype"]].itemsize
    ends = [begin, 2**63 - 1]
    if product < 2**200:  # what JSON can write
        ends += [begin + product * item_bytes] * 2
    entry["data_offsets"] = [begin, rng.choice(ends)]
    return {name: entry} if rng.random() < 0.5 else header


def open_and_read(folder: Path) -> None:
    """Open a checkpoint and read all of it, as a whole and in pieces."""
    checkpoint = CheckpointFolder.open(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)
        for _ in checkpoint.read_chunks(name):
            pass


def look_at(folder: Path) -> None:
    """Do with a checkpoint what `inspect --json` and `verify --json` do, up to the bytes that they print."""
    from dataclasses import asdict

    from optgptq.reports.wording import finite

    checkpoint = CheckpointFolder.open(folder)
    for report in (inspect_checkpoint(checkpoint), verify_folder(checkpoint)):
        json.dumps(finite(asdict(report)), allow_nan=False)


def use(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Return something that a command does with a checkpoint."""
    kind = rng.randrange(4)
    if kind == 0:
        return lambda: load_model(folder)
    if kind == 1:
        target = rng.choice(list(FORMATS))
        return lambda: convert(folder, folder / "out", to=target)
    return lambda: look_at(folder)


def header_damage(folder: CaseFolder) -> Damage:
    corpus = [data for name, data in folder.files.items() if name.endswith(".safetensors")]
    names = [name for name in folder.files if name.endswith(".safetensors")]

    def damage(rng: random.Random) -> Callable[[], object]:
        name = rng.choice(names)
        folder.put(name, damaged_safetensors(rng, folder.files[name], corpus))
        return lambda: open_and_read(folder.path)

    return damage


def index_damage(folder: CaseFolder) -> Damage:
    index = json.loads(folder.files[INDEX])

    def damage(rng: random.Random) -> Callable[[], object]:
        kind = rng.randrange(5)
        if kind == 0:
            folder.link(
                rng.choice([*folder.files]), rng.choice((f"../{CANARY}", "/etc/hostname", "loop", ".", WEIGHTS))
            )
        elif kind == 1:
            files = list(index["weight_map"].values())
            changed = {name: rng.choice((*files, interesting(rng))) for name in index["weight_map"]}
            folder.put(INDEX, json.dumps({"weight_map": changed}).encode())
        else:
            folder.put(INDEX, damaged_json(rng, index))
        return lambda: open_and_read(folder.path)

    return damage


def json_damage(folder: CaseFolder, name: str, key: str | None = None) -> Damage:
    """Damage file `name`, or one key of it, and use the checkpoint."""
    whole = json.loads(folder.files[name])

    def damage(rng: random.Random) -> Callable[[], object]:
        if key is None:
            folder.put(name, damaged_json(rng, whole))
        else:
            value = damaged_value(rng, whole[key])
            folder.put(name, json.dumps({**whole, key: value}).encode())
        return use(rng, folder.path)

    return damage


def tensors_damage(folder: CaseFolder) -> Damage:
    """Change dtype, shape, name, values or number of tensors, the file itself being whole."""
    names = [name for name in folder.files if name.endswith(".safetensors")]
    tensors = {name: load(folder.files[name]) for name in names}

    def damage(rng: random.Random) -> Callable[[], object]:
        file = rng.choice(names)
        changed = dict(tensors[file])
        for _ in range(rng.choice((1, 1, 2, 5))):
            _change_tensor(rng, changed)
        folder.put(file, save({name: tensor.contiguous().clone() for name, tensor in changed.items()}))
        if file != WEIGHTS:
            folder.drop(MANIFEST)
        return use(rng, folder.path)

    return damage


def _change_tensor(rng: random.Random, tensors: dict[str, Any]) -> None:
    import torch

    if not tensors:
        return
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)
    raw = bytearray(rng.randbytes(tensor.numel() * tensor.element_size()))
    kind = rng.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = tensor.to(rng.choice(dtypes))
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)
    elif kind == 3:
        tensors[name] = tensor[: rng.randrange(len(tensor) + 1)] if tensor.dim() else tensor.reshape(1)
    elif kind == 4:
        tensors[name] = tensor.transpose(0, -1) if tensor.dim() else tensor
    elif kind == 5:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == 6 and raw:
        tensors[name] = torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)
    elif kind == 7:
        tensors[rng.choice((f"{name}.", f"{name}.weight", "x", "lm_head.weight", "\u2028"))] = tensor
    else:
        tensors[name] = torch.full_like(tensor, rng.choice((0, 1, 127)))


def checkpoint_boundaries(home: Path, sources: dict[str, Path]) -> list[Boundary]:
    """Return the boundaries of these checkpoint folders; `dense` and `sharded` are dense ones."""
    found = []

    def add(name: str, source: str, make: Callable[[CaseFolder], Damage]) -> None:
        folder = CaseFolder.of(home / name.replace(" ", "-").replace(":", "") / "model", sources[source])
        (folder.path.parent / CANARY).write_text("outside")
        found.append(Boundary(name=name, folder=folder, damage=make(folder)))

    add("safetensors header", "dense", header_damage)
    add("index", "sharded", index_damage)
    for source in sorted(set(sources) - {"dense", "sharded"}):
        if "quantization_config" in json.loads((sources[source] / "config.json").read_bytes()):
            add(f"{source}: configuration", source, lambda f: json_damage(f, "config.json", "quantization_config"))
        else:
            add(f"{source}: configuration", source, lambda f: json_damage(f, "config.json"))
        add(f"{source}: tensors", source, tensors_damage)
        if (sources[source] / MANIFEST).exists():
            add(f"{source}: manifest", source, lambda f: json_damage(f, MANIFEST))
    return found

"""The file of parameters: its bytes, and every way in which it can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cache_setups import (
    FOUR,
    HEAD_DIM,
    NUM_KV_HEADS,
    mixed_layers,
    random_orthogonal,
    tied_scale,
    with_cache_key,
    written_cache,
)

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.safetensors_header import SAFETENSORS_DTYPES
from optgptq.errors import FormatError
from optgptq.formats.cache_copy import copy_cache_setup
from optgptq.formats.kv_cache_config import read_cache_setup
from optgptq.formats.kv_cache_sidecar import CacheSizes, sidecar_bytes, stored_sizes
from optgptq.kv_cache.rotary_pairs import RotaryPairs
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme
from optgptq.kv_cache.setup import CacheSetup, LayerParameters, SideParameters

KEY = "kv_cache_quantization"
SIDECAR = "kv_cache/kv_params.safetensors"
K, D = NUM_KV_HEADS, HEAD_DIM


def holding(folder: Path, tensors: dict[str, torch.Tensor], *, transform: str = "matrix") -> CheckpointFolder:
    """Write a cache of two layers whose file of parameters holds `tensors`, whatever they are, with the right hash."""
    scheme = CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),) * 2)
    plain = LayerParameters(keys=SideParameters(), values=SideParameters())
    checkpoint = written_cache(folder, scheme, [plain, plain])
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    return with_sidecar(checkpoint, len(text).to_bytes(8, "little") + text + data, transform=transform)


def with_sidecar(checkpoint: CheckpointFolder, data: bytes, *, transform: str = "none") -> CheckpointFolder:
    (checkpoint.path / SIDECAR).write_bytes(data)
    content = checkpoint.config[KEY]
    content["params_sha256"] = hashlib.sha256(data).hexdigest()
    content["default"] |= {"k_transform": transform, "v_transform": transform if transform != "matrix" else "none"}
    return with_cache_key(checkpoint, content)


def read(folder: CheckpointFolder, *, pairs: tuple[RotaryPairs | None, ...] = ()) -> CacheSetup:
    setup = read_cache_setup(folder, num_layers=2, num_kv_heads=K, head_dim=D, pairs=pairs)
    assert setup is not None
    return setup


def test_safetensors_reads_it_and_names_are_those_of_the_format(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    tensors = load_file(folder.path / SIDECAR)
    both = [f"{side}_{part}" for side in "kv" for part in ("metric", "ranges", "rotation", "shift", "smooth")]
    names = [f"layers.0.{part}" for part in both]
    names += [f"layers.{index}.k_{part}" for index in (2, 3) for part in ("metric", "ranges", "shift", "smooth")]
    names += [f"layers.4.v_{part}" for part in ("metric", "ranges", "shift", "smooth")]
    assert sorted(tensors) == names
    scale_KD = mixed_layers()[0].keys.scale_KD
    assert scale_KD is not None
    assert torch.equal(tensors["layers.0.k_smooth"], scale_KD)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_golden_bytes() -> None:
    side = SideParameters(shift_KD=torch.tensor([[1.0, -2.0]]), ranges_C2=torch.tensor([[1.0, 0.5]]))
    data = sidecar_bytes([LayerParameters(keys=side, values=SideParameters())])
    header = (
        b'{"layers.0.k_ranges":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"layers.0.k_shift":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]}}'
    )
    padding = b" " * (-len(header) % 8)
    numbers = "0000803f0000003f" + "0000803f000000c0"
    assert data == (len(header) + len(padding)).to_bytes(8, "little") + header + padding + bytes.fromhex(numbers)


def test_numbers_are_stored_in_float32_whatever_they_come_in() -> None:
    shift_KD = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = [
        [LayerParameters(keys=SideParameters(shift_KD=tensor), values=SideParameters())]
        for tensor in (shift_KD, shift_KD.float(), shift_KD.float().T.contiguous().T)
    ]
    assert len({sidecar_bytes(layer) for layer in layers}) == 1


def test_a_rotation_for_all_heads_is_one_of_each(tmp_path: Path) -> None:
    rotation_DD = random_orthogonal(torch.Generator().manual_seed(1), D, D)
    setup = read(holding(tmp_path / "model", {"layers.0.k_rotation": rotation_DD, "layers.1.k_rotation": rotation_DD}))
    found = setup.layers[1].keys.rotation_KDD
    assert found is not None
    assert torch.equal(found, torch.stack([rotation_DD] * K))


def test_a_missing_file_names_the_way_out(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    (folder.path / SIDECAR).unlink()
    for attempt in (lambda: read(holding_same(folder)), lambda: copy_cache_setup(folder, tmp_path / "copy")):
        with pytest.raises(FormatError) as caught:
            attempt()
        assert caught.value.where == f"{folder.path}, {SIDECAR}"
        assert caught.value.found == "no such file"
        assert "--kv-cache 4" in caught.value.action


def holding_same(folder: CheckpointFolder) -> CheckpointFolder:
    content = {**folder.config[KEY], "layers": {}, "skip_layers": []}
    return with_cache_key(folder, content)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = holding(tmp_path / "model", {"layers.0.k_ranges": torch.ones(1, 2)}, transform="none")
    read(folder)
    path = folder.path / SIDECAR
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"expected SHA-256 {folder.config[KEY]['params_sha256']}, found") as caught:
        read(folder)
    assert hashlib.sha256(data).hexdigest() in caught.value.found
    with pytest.raises(FormatError, match="SHA-256"):
        copy_cache_setup(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    folder = holding(tmp_path / "model", {"layers.0.k_ranges": torch.ones(1, 2)}, transform="none")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder.path / SIDECAR).read_bytes())
    for name in ("../outside.safetensors", str(outside)):
        with pytest.raises(FormatError, match="a file inside the checkpoint folder"):
            read(with_cache_key(folder, {**folder.config[KEY], "params_file": name}))
    (folder.path / SIDECAR).unlink()
    (folder.path / SIDECAR).symlink_to(outside)
    with pytest.raises(FormatError, match=r"a file inside the checkpoint folder, found a symlink"):
        read(folder)
    with pytest.raises(FormatError, match="expected a regular file"):
        read(with_cache_key(folder, {**folder.config[KEY], "params_file": "kv_cache"}))


GENERATOR = torch.Generator().manual_seed(2)
ROTATION_KDD = random_orthogonal(GENERATOR, K, D, D)
METRIC_KDD = torch.eye(D).repeat(K, 1, 1)


def changed(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BAD_TENSORS: list[tuple[str, torch.Tensor, str]] = [
    ("layers.0.k_shift", torch.zeros(K, D + 1), rf"expected F32 \[{K}, {D}\], found F32 \[{K}, {D + 1}\]"),
    ("layers.0.k_shift", torch.zeros(1, D), r"found F32 \[1, 24\]"),
    ("layers.0.k_shift", torch.zeros(K, D, dtype=torch.float16), r"expected F32 \[3, 24\], found F16"),
    ("layers.1.v_shift", changed(torch.zeros(K, D), (1, 3), torch.nan), "expected finite values, found 1 NaN"),
    ("layers.1.v_smooth", changed(torch.ones(K, D), (1, 3), torch.inf), "expected finite values"),
    ("layers.1.v_smooth", changed(torch.ones(K, D), (1, 3), 0.0), "expected scales above 0, found 0"),
    ("layers.0.k_smooth", changed(torch.ones(K, D), (0, 0), -2.0), "expected scales above 0, found -2"),
    ("layers.0.k_rotation", ROTATION_KDD[:2], r"expected F32 \[3, 24, 24\] or \[24, 24\], found F32 \[2, 24, 24\]"),
    ("layers.0.k_rotation", changed(ROTATION_KDD, (1, 2, 3), 0.9), "expected an orthogonal matrix"),
    ("layers.0.k_rotation", ROTATION_KDD * 1.0001, "within 0.0001 of the identity, found 0.0002"),
    ("layers.0.k_metric", METRIC_KDD[0], r"expected F32 \[3, 24, 24\], found F32 \[24, 24\]"),
    ("layers.0.v_metric", changed(METRIC_KDD, (1, 2, 3), 0.01), "symmetric matrix, found entries that differ by 0.01"),
    ("layers.0.v_metric", changed(METRIC_KDD, (1, 2, 2), -0.1), "positive semidefinite matrix, found one of head 1"),
    ("layers.0.k_ranges", torch.ones(2), r"expected F32 \[C, 2\] with C from 1 to 64, found F32 \[2\]"),
    ("layers.0.k_ranges", torch.ones(0, 2), r"found F32 \[0, 2\]"),
    ("layers.0.k_ranges", torch.ones(65, 2), r"found F32 \[65, 2\]"),
    ("layers.0.k_ranges", torch.tensor([[1.0, 0.0]]), "shares above 0 and at most 1, found 0 to 1"),
    ("layers.0.k_ranges", torch.tensor([[1.5, 0.9]]), "found 0.9 to 1.5"),
    ("layers.0.k_clip", torch.ones(K), r"ending in one of shift, smooth, rotation, metric, ranges, found another name"),
    ("layers.0.q_shift", torch.zeros(K, D), "found another name: a method that is not supported"),
    ("layers.2.k_shift", torch.zeros(K, D), "N up to 1"),
    ("layers.00.k_shift", torch.zeros(K, D), "another name"),
    ("layers.x.k_shift", torch.zeros(K, D), "another name"),
    ("model.layers.0.k_shift", torch.zeros(K, D), "another name"),
    ("k_shift", torch.zeros(K, D), "another name"),
]


@pytest.mark.parametrize(("name", "tensor", "said"), BAD_TENSORS)
def test_parameters_that_no_cache_can_use_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, said: str
) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        read(holding(tmp_path / "model", {name: tensor}))
    assert f"tensor {name}" in caught.value.where
    assert caught.value.action.endswith(".")


def test_metrics_of_unread_heads_and_of_few_queries_pass(tmp_path: Path) -> None:
    """A sum of few outer products has most eigenvalues at zero, in float32 some just below."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(K, D, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e3]).view(K, 1, 1)
    metric_KDD = factor @ factor.mT
    metric_KDD[2] = 0
    setup = read(holding(tmp_path / "model", {"layers.0.k_metric": metric_KDD}, transform="none"))
    found = setup.layers[0].keys.metric_KDD
    assert found is not None
    assert torch.equal(found, metric_KDD)


def test_scales_of_rotary_keys_are_tied(tmp_path: Path) -> None:
    scale_KD = tied_scale(torch.Generator().manual_seed(4), rotary_dim=16)
    tensors = {"layers.1.k_smooth": scale_KD, "layers.1.v_smooth": scale_KD}
    folder = holding(tmp_path / "model", tensors, transform="shift_scale")
    half, whole = RotaryPairs(rotary_dim=16), RotaryPairs(rotary_dim=24)
    read(folder)
    read(folder, pairs=(whole, half))
    read(folder, pairs=(whole, None))
    for pairs, partner in ((whole, 12), (RotaryPairs(rotary_dim=16, interleaved=True), 1)):
        with pytest.raises(FormatError) as caught:
            read(folder, pairs=(None, pairs))
        assert caught.value.where.endswith("tensor layers.1.k_smooth")
        assert caught.value.expected == "one scale for both channels of a rotary pair"
        assert caught.value.found.endswith(f"for channels 0 and {partner} of head 0")


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", b"\0" * 8])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = holding(tmp_path / "model", {"layers.0.k_ranges": torch.ones(1, 2)}, transform="none")
    with pytest.raises(FormatError):
        read(with_sidecar(folder, data))


def test_sizes_are_read_off_the_tensors(tmp_path: Path) -> None:
    sizes = CacheSizes(num_layers=5, num_kv_heads=K, head_dim=D)
    assert stored_sizes(written_cache(tmp_path / "model").path / SIDECAR) == sizes
    tensors = {"layers.1.k_ranges": torch.ones(1, 2), "layers.0.v_rotation": torch.eye(D)}
    assert stored_sizes(holding(tmp_path / "none", tensors).path / SIDECAR) is None

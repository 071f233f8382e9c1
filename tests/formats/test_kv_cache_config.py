"""The key of config.json and its file of parameters: what is written is read back, what is not understood refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cache_setups import (
    ALONG_TOKENS,
    CALIBRATION,
    FOLDED,
    FOUR,
    HEAD_DIM,
    NUM_KV_HEADS,
    empty_checkpoint,
    mixed_layers,
    mixed_scheme,
    same_parameters,
    same_setup,
    with_cache_key,
    written_cache,
)

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ExitCode, FormatError, UsageError
from optgptq.formats.cache_copy import copy_cache_setup
from optgptq.formats.kv_cache_config import (
    data_free_setup,
    read_cache_keys,
    read_cache_setup,
    write_cache_setup,
)
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastRule, SideScheme
from optgptq.kv_cache.setup import CacheSetup, LayerParameters, SideParameters

KEY = "kv_cache_quantization"
SIDECAR = "kv_cache/kv_params.safetensors"
PLAIN = LayerParameters(keys=SideParameters(), values=SideParameters())


def read(folder: CheckpointFolder, *, num_layers: int = 5) -> CacheSetup:
    setup = read_cache_setup(folder, num_layers=num_layers, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    assert setup is not None
    return setup


def plain_content(**values: Any) -> dict[str, Any]:
    """The smallest object that is complete, for the sidecar of `plain`."""
    return {"version": 1, "params_file": SIDECAR, "default": {"k": {"bits": 4}, "v": {"bits": 4}}, **values}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolder:
    """Two layers without parameters: the file of parameters holds no tensor."""
    scheme = CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),) * 2)
    return written_cache(tmp_path_factory.mktemp("plain") / "model", scheme, [PLAIN, PLAIN])


def reread(plain: CheckpointFolder, folder: Path, content: object) -> CacheSetup:
    """Read `content` beside the sidecar of `plain`, its hash filled in where a hash is missing."""
    shutil.copytree(plain.path, folder)
    if isinstance(content, dict):
        content = {"params_sha256": plain.config[KEY]["params_sha256"], **content}
    return read(with_cache_key(CheckpointFolder.open(folder), content), num_layers=2)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    setup = read(folder)
    assert same_setup(setup, mixed_scheme(), mixed_layers())
    assert setup.source == str(folder.path)
    assert len(setup.fingerprint) == 32
    keys = read_cache_keys(folder, num_layers=5, head_dim=HEAD_DIM)
    assert keys is not None
    assert (keys.folded, keys.calibration) == (FOLDED, CALIBRATION)
    assert [layer.transforms for layer in keys.layers] == [
        ("matrix", "matrix"),
        ("none", "none"),
        ("hadamard", "none"),
        ("shift_scale", "none"),
        ("none", "hadamard"),
    ]


def test_the_key_says_it_in_the_words_of_the_format(tmp_path: Path) -> None:
    content = written_cache(tmp_path / "model").config[KEY]
    side = {"bits": 4, "axis": "channel", "group_size": 24, "symmetric": False, "grid": "uniform", "zero": "float_min"}
    digest = content.pop("params_sha256")
    assert digest == json.loads((tmp_path / "model" / "config.json").read_text())[KEY]["params_sha256"]
    assert content == {
        "version": 1,
        "params_file": SIDECAR,
        "default": {
            "k": side,
            "v": side,
            "k_transform": "matrix",
            "v_transform": "matrix",
            "param_dtype": "float16",
            "rope_stage": "post",
        },
        "layers": {
            "2": {"k_transform": "hadamard", "v_transform": "none"},
            "3": {"v": {"bits": 16}, "k_transform": "shift_scale", "v_transform": "none"},
            "4": {
                "k": {"bits": 3, "axis": "token", "group_size": 48},
                "v": {"bits": 2, "group_size": 8},
                "k_transform": "none",
                "v_transform": "hadamard",
            },
        },
        "skip_layers": [1],
        "sink_tokens": 4,
        "recent_tokens": 0,
        "past_only": "window:48",
        "packing": "split",
        "page_tokens_multiple": 48,
        "folded": FOLDED,
        "calibration": CALIBRATION,
    }


def test_the_same_cache_gives_the_same_bytes_and_another_another_fingerprint(tmp_path: Path) -> None:
    first, second = (written_cache(tmp_path / name) for name in ("first", "second"))
    for name in ("config.json", SIDECAR):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
    assert read(first).fingerprint == read(second).fingerprint
    changed = list(mixed_layers())
    shift_KD = changed[0].keys.shift_KD
    assert shift_KD is not None
    keys = replace(changed[0].keys, shift_KD=shift_KD + 1)
    third = written_cache(tmp_path / "third", layers=[replace(changed[0], keys=keys), *changed[1:]])
    other = replace(mixed_scheme(), past=replace(mixed_scheme().past, sink_tokens=5))
    fourth = written_cache(tmp_path / "fourth", other)
    assert len({read(folder).fingerprint for folder in (first, third, fourth)}) == 3


def test_a_hadamard_rotation_is_named_and_not_stored(tmp_path: Path) -> None:
    scheme = CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),))
    rotation_KDD = block_hadamard(HEAD_DIM).expand(NUM_KV_HEADS, -1, -1)
    layers = [LayerParameters(keys=SideParameters(rotation_KDD=rotation_KDD), values=SideParameters())]
    folder = written_cache(tmp_path / "model", scheme, layers)
    assert b"rotation" not in (folder.path / SIDECAR).read_bytes()
    assert same_setup(read(folder, num_layers=1), scheme, layers)


def test_config_keeps_its_other_bytes_and_an_old_key_is_replaced(tmp_path: Path) -> None:
    folder = empty_checkpoint(tmp_path / "model")
    before = '{\n  "model_type": "tiny",\n  "rope_theta": 1e4\n}\n'
    (folder.path / "config.json").write_text(before)
    scheme = CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),))
    write_cache_setup(folder.path, scheme, [PLAIN], folded={}, calibration={})
    text = (folder.path / "config.json").read_text()
    assert text.startswith(before.removesuffix("\n}\n"))
    write_cache_setup(folder.path, scheme, [PLAIN], folded={}, calibration={"seed": 1})
    assert json.loads((folder.path / "config.json").read_text())[KEY]["calibration"] == {"seed": 1}


def test_a_model_without_the_key_has_no_cache(tmp_path: Path) -> None:
    folder = empty_checkpoint(tmp_path / "model")
    assert read_cache_setup(folder, num_layers=1, num_kv_heads=1, head_dim=8) is None
    assert read_cache_keys(folder, num_layers=1, head_dim=8) is None
    copy_cache_setup(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_absent_fields_have_their_defaults(plain: CheckpointFolder, tmp_path: Path) -> None:
    setup = reread(plain, tmp_path / "model", plain_content())
    assert setup.scheme == CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),) * 2, past=PastRule())
    assert same_setup(setup, setup.scheme, [PLAIN, PLAIN])


def test_skipped_layers_beat_the_others(plain: CheckpointFolder, tmp_path: Path) -> None:
    content = plain_content(layers={"0": {"k": {"bits": 8}}, "1": {"v": {"bits": 8}}}, skip_layers=[0])
    setup = reread(plain, tmp_path / "model", content)
    eight = SideScheme(bits=8, group_size=HEAD_DIM)
    assert [layer.is_exact for layer in setup.scheme.layers] == [True, False]
    assert setup.scheme.layers[1] == LayerScheme(keys=FOUR, values=eight)


def test_a_clip_ratio_is_one_range(plain: CheckpointFolder, tmp_path: Path) -> None:
    content = plain_content(default={"k": {"bits": 4, "clip": 0.5}, "v": {"bits": 4, "clip": 1.0}})
    layer = reread(plain, tmp_path / "model", content).layers[1]
    assert layer.keys.ranges_C2 is not None
    assert torch.equal(layer.keys.ranges_C2, torch.tensor([[0.5, 0.5]]))
    assert layer.values.ranges_C2 is None


def test_groups_along_tokens_set_the_granule(plain: CheckpointFolder, tmp_path: Path) -> None:
    along = {"bits": 4, "axis": "token", "group_size": 32}
    content = plain_content(
        default={"k": along, "v": {"bits": 4}}, layers={"1": {"k": {"group_size": 48}}}, past_only="token"
    )
    setup = reread(plain, tmp_path / "model", content)
    assert setup.scheme.past == PastRule(mode="token", granule=96)
    assert setup.scheme.layers[1].keys == replace(ALONG_TOKENS, bits=4)


BAD_VALUES: list[tuple[Callable[[dict[str, Any]], object], str, str]] = [
    (lambda content: content | {"version": 2}, f"{KEY}.version: expected 1, the only", "found 2, a newer version"),
    (lambda content: content | {"version": "1"}, f"{KEY}.version", "found '1'"),
    (lambda content: content | {"version": True}, f"{KEY}.version", "found True"),
    (lambda content: {}, f"{KEY}.version", "found None"),
    (lambda content: [content], KEY, "expected an object"),
    (lambda content: content | {"codebook": 1}, f"{KEY}.codebook", "only fields of this version, found 1"),
    (lambda content: content | {"params_sha256": "12"}, "params_sha256", "a SHA-256 of 64 hexadecimal digits"),
    (lambda content: content | {"params_file": 3}, "params_file", "expected a text, found 3"),
    (lambda content: content | {"default": None}, "default", "expected an object, found None"),
    (lambda content: content | {"packing": "even_odd"}, "packing", "expected 'split', found 'even_odd'"),
    (lambda content: content | {"past_only": "window:0"}, "past_only", "window:N with N of 1 or more"),
    (lambda content: content | {"past_only": 1}, "past_only", "expected a text, found 1"),
    (lambda content: content | {"sink_tokens": -1}, "sink_tokens", "a whole number of at least 0, found -1"),
    (lambda content: content | {"recent_tokens": 1.5}, "recent_tokens", "found 1.5"),
    (lambda content: content | {"sink_tokens": True}, "sink_tokens", "found True"),
    (lambda content: content | {"folded": 1}, "folded", "expected an object"),
    (lambda content: content | {"layers": []}, "layers", "expected an object"),
    (lambda content: content | {"layers": {"2": {}}}, "layers.2", "the number of a decoder layer, 0 to 1"),
    (lambda content: content | {"layers": {"01": {}}}, "layers.01", "the number of a decoder layer"),
    (lambda content: content | {"layers": {"1": 4}}, "layers.1", "expected an object, found 4"),
    (lambda content: content | {"layers": {"1": {"bits": 4}}}, "layers.1.bits", "only fields of this version"),
    (lambda content: content | {"skip_layers": [2]}, "skip_layers", "a list of decoder layers, 0 to 1, found [2]"),
    (lambda content: content | {"skip_layers": "0"}, "skip_layers", "found '0'"),
    (lambda content: content | {"page_tokens_multiple": 0}, "page_tokens_multiple", "at least 1, found 0"),
]
BAD_SIDES: list[tuple[dict[str, Any], str, str]] = [
    ({"bits": 5}, "bits", "one of 2, 3, 4, 8, 16, found 5"),
    ({"bits": True}, "bits", "found True"),
    ({}, "bits", "found no value"),
    ({"bits": 4, "axis": "head"}, "axis", "one of channel, token, found 'head'"),
    ({"bits": 4, "group_size": 16}, "group_size", "a divisor of the 24 channels of a head, or -1 for all of them"),
    ({"bits": 4, "group_size": 0}, "group_size", "found 0"),
    ({"bits": 4, "group_size": 48}, "group_size", "found 48"),
    ({"bits": 4, "axis": "token"}, "group_size", "a number of tokens for groups along tokens, found -1"),
    ({"bits": 4, "symmetric": True}, "symmetric", "expected False, found True"),
    ({"bits": 4, "symmetric": 0}, "symmetric", "expected False, found 0"),
    ({"bits": 4, "grid": "lloyd_max"}, "grid", "expected 'uniform', found 'lloyd_max'"),
    ({"bits": 4, "zero": "integer"}, "zero", "expected 'float_min'"),
    ({"bits": 4, "clip": 0}, "clip", "above 0 and at most 1"),
    ({"bits": 4, "clip": float("nan")}, "clip", "expected a number"),
    ({"bits": 4, "seed": 3}, "seed", "only fields of this version"),
]
BAD_LAYERS: list[tuple[dict[str, Any], str, str]] = [
    ({"k_transform": "polar"}, "k_transform", "one of none, shift_scale, hadamard, matrix, found 'polar'"),
    ({"param_dtype": "bfloat16"}, "param_dtype", "expected one of float16, found 'bfloat16'"),
    ({"rope_stage": "pre"}, "rope_stage", "expected one of post, found 'pre'"),
    ({"k": 4}, "k", "expected an object, found 4"),
]


def refused(plain: CheckpointFolder, folder: Path, content: object, place: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        reread(plain, folder, content)
    assert caught.value.exit_code == ExitCode.INPUT
    assert place in str(caught.value)
    assert said in str(caught.value)
    assert "--kv-cache 16" in caught.value.action


@pytest.mark.parametrize(("change", "place", "said"), BAD_VALUES)
def test_values_that_are_not_understood_are_refused(
    plain: CheckpointFolder, tmp_path: Path, change: Callable[[dict[str, Any]], object], place: str, said: str
) -> None:
    refused(plain, tmp_path / "model", change(plain_content()), place, said)


@pytest.mark.parametrize(("side", "place", "said"), BAD_SIDES)
def test_sides_that_are_not_understood_are_refused(
    plain: CheckpointFolder, tmp_path: Path, side: dict[str, Any], place: str, said: str
) -> None:
    content = plain_content(default={"k": side, "v": {"bits": 4}})
    refused(plain, tmp_path / "default", content, f"default.k.{place}", said)
    # The same in a layer of its own; fields that it lacks come from the default.
    if "bits" in side:
        refused(plain, tmp_path / "layer", plain_content(layers={"1": {"k": side}}), f"layers.1.k.{place}", said)


@pytest.mark.parametrize(("fields", "place", "said"), BAD_LAYERS)
def test_layers_that_are_not_understood_are_refused(
    plain: CheckpointFolder, tmp_path: Path, fields: dict[str, Any], place: str, said: str
) -> None:
    default = {**plain_content()["default"], **fields}
    refused(plain, tmp_path / "default", plain_content(default=default), f"default.{place}", said)


def test_values_take_no_groups_along_tokens(plain: CheckpointFolder, tmp_path: Path) -> None:
    along = {"bits": 4, "axis": "token", "group_size": 16}
    content = plain_content(default={"k": {"bits": 4}, "v": along})
    refused(plain, tmp_path / "model", content, "default.v.axis", "groups along tokens are for keys")


def test_pages_must_hold_whole_groups_of_tokens(plain: CheckpointFolder, tmp_path: Path) -> None:
    along = {"bits": 4, "axis": "token", "group_size": 24}
    content = plain_content(default={"k": along, "v": {"bits": 4}}, page_tokens_multiple=32)
    refused(plain, tmp_path / "model", content, "page_tokens_multiple", "a multiple of the 24 tokens")


def test_heads_that_do_not_split_stay_exact(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model", CacheScheme(layers=(LayerScheme(keys=FOUR, values=FOUR),)), [PLAIN])
    with pytest.raises(FormatError, match=r"k\.bits: expected heads whose channels are a mul.*found 12 channels"):
        read_cache_setup(folder, num_layers=1, num_kv_heads=2, head_dim=12)


def test_transforms_and_parameters_must_agree(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    content = copy.deepcopy(folder.config[KEY])
    content["layers"]["3"]["k_transform"] = "none"
    with pytest.raises(FormatError, match=r"layers\.3\.k: expected parameters of the transform 'none'.*another one"):
        read(with_cache_key(folder, content))
    content["layers"]["3"]["k_transform"] = "matrix"
    with pytest.raises(FormatError, match=r"layers\.3\.k: expected parameters of the transform 'matrix'.*no rotation"):
        read(with_cache_key(folder, content))
    content["layers"]["3"]["k_transform"] = "shift_scale"
    del content["layers"]["2"]["v_transform"]
    with pytest.raises(FormatError, match=r"layers\.2\.v: .*'matrix'.*no rotation"):
        read(with_cache_key(folder, content))


def test_a_stored_rotation_of_the_hadamard_transform_is_used(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    content = copy.deepcopy(folder.config[KEY])
    content["default"]["k_transform"] = "hadamard"
    found = read(with_cache_key(folder, content)).layers[0].keys.rotation_KDD
    expected = mixed_layers()[0].keys.rotation_KDD
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_copies_hold_the_same_cache(tmp_path: Path) -> None:
    folder = written_cache(tmp_path / "model")
    copy = empty_checkpoint(tmp_path / "copy", other=1)
    copy_cache_setup(folder, copy.path)
    copy = CheckpointFolder.open(copy.path)
    assert (copy.path / SIDECAR).read_bytes() == (folder.path / SIDECAR).read_bytes()
    assert copy.config == {"model_type": "tiny", "other": 1, KEY: folder.config[KEY]}
    assert read(copy).fingerprint == read(folder).fingerprint


def test_a_cache_without_calibration() -> None:
    past = PastRule(mode="token", sink_tokens=4)
    setup = data_free_setup(3, num_layers=2, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, past=past)
    side = SideScheme(bits=3, group_size=HEAD_DIM)
    assert setup.scheme == CacheScheme(layers=(LayerScheme(keys=side, values=side),) * 2, past=past)
    for layer in setup.layers:
        for parameters in (layer.keys, layer.values):
            assert parameters.rotation_KDD is not None
            assert torch.equal(parameters.rotation_KDD[2], block_hadamard(HEAD_DIM))
            assert parameters.metric_KDD is parameters.shift_KD is parameters.scale_KD is parameters.ranges_C2 is None
    others = [
        data_free_setup(4, num_layers=2, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, past=past),
        data_free_setup(3, num_layers=2, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, past=PastRule(mode="token")),
        data_free_setup(3, num_layers=3, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, past=past),
    ]
    assert len({setup.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_cache_without_calibration_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UsageError, match="expected one of 2, 3, 4, 8, found 5"):
        data_free_setup(5, num_layers=1, num_kv_heads=1, head_dim=8, past=PastRule())
    with pytest.raises(UsageError, match=r"a multiple of 8.*found 12 channels.*kv_cache 16"):
        data_free_setup(4, num_layers=1, num_kv_heads=1, head_dim=12, past=PastRule())


def test_exact_layers_need_no_parameters(tmp_path: Path) -> None:
    """Those that are stored for a skipped layer are not used."""
    folder = written_cache(tmp_path / "model")
    content = copy.deepcopy(folder.config[KEY])
    content["skip_layers"] = [0, 1]
    setup = read(with_cache_key(folder, content))
    assert same_parameters(setup.layers[0].keys, SideParameters())
    assert setup.scheme.layers[0].is_exact

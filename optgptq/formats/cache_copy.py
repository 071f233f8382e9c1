"""What a checkpoint says of KV caches, taken over into another layout of the same weights."""

from __future__ import annotations

from pathlib import Path

from optgptq.checkpoint.disk import disk_error
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats.fp8_scales import COMPRESSED_TENSORS, add_fp8_scheme, stored_scheme
from optgptq.formats.kv_cache_config import write_cache_key
from optgptq.formats.kv_cache_keys import CACHE_KEY, params_place
from optgptq.formats.kv_cache_sidecar import require_sidecar


def keep_caches(source: CheckpointFolder, folder: Path, *, format_name: str) -> list[str]:
    """Take over what `source` says of KV caches into checkpoint `folder`; return, in sentences, what cannot be kept.

    Raises:
        FormatError: the parameters of the cache are missing, or changed since they were written.
        CapacityError, OutputError: a file cannot be written.
    """
    copy_cache_setup(source, folder)
    scheme = stored_scheme(source)
    if scheme is None:
        return []
    if format_name != COMPRESSED_TENSORS:
        return [f"kv_cache_scheme is left out: engines look for scales of an fp8 KV cache in {COMPRESSED_TENSORS} only"]
    add_fp8_scheme(folder, scheme)
    return []


def copy_cache_setup(source: CheckpointFolder, folder: Path) -> None:
    """Take the cache that `source` asks for over into checkpoint `folder`: the key and the file; nothing if none.

    Raises:
        FormatError: the file is missing, or changed since it was written.
        CapacityError, OutputError: it cannot be written.
    """
    if CACHE_KEY not in source.config:
        return
    content = source.config[CACHE_KEY]
    name, digest = params_place(content, where=f"{source.path}, {CACHE_KEY}")
    path, target = require_sidecar(source.path, name, digest), folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    except OSError as error:
        raise disk_error(target, error) from error
    write_cache_key(folder, content)

"""Checks of a checkpoint against the spec of its model, before and while it is read."""

from __future__ import annotations

from collections.abc import Collection

import torch

from optgptq.checkpoint.source import TensorSource
from optgptq.errors import ModelError
from optgptq.models.inventory import embedding_shape, expected_tensors, head_shape
from optgptq.models.spec import DecoderSpec

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def check_inventory(folder: TensorSource, spec: DecoderSpec, *, supplied: Collection[str] = ()) -> None:
    """Compare names, shapes and dtypes of all tensors with the spec; reads no weights.

    Args:
        folder: the checkpoint.
        spec: its model.
        supplied: full names of linears whose tensors another reader understands; all theirs are skipped.

    Raises:
        ModelError: a tensor is missing, unknown, of another shape, or holds no floating point numbers.
    """
    expected = expected_tensors(spec)
    known = expected | head_shape(spec)
    skipped = frozenset(supplied)
    unused = _cache_scales(spec)
    for name, info in folder.tensors.items():
        if name in unused or name.rpartition(".")[0] in skipped or name.endswith(spec.names.ignored or ("\0",)):
            continue
        if name not in known:
            raise _unknown_tensor(folder, name, info.shape)
        if tuple(info.shape) != known[name]:
            raise _wrong_shape(folder, name, known[name], tuple(info.shape))
        if info.dtype not in _FLOAT_DTYPES:
            raise ModelError(
                f"{folder.path}: {name}",
                expected="floating point weights (" + ", ".join(_FLOAT_DTYPES) + ")",
                found=info.dtype,
                action="Give the unquantized model.",
            )
    twin = {embedding: head for embedding in embedding_shape(spec) for head in head_shape(spec) if spec.tied_head}
    for name, shape in expected.items():
        present = name in folder.tensors or twin.get(name) in folder.tensors
        if not present and name.rpartition(".")[0] not in skipped:
            raise ModelError(
                f"{folder.path}: {name}",
                expected=f"a tensor of shape {list(shape)}",
                found="no such tensor in the checkpoint",
                action="The checkpoint is incomplete or of another architecture; download it again or fix config.json.",
            )


def read_weight(
    folder: TensorSource,
    name: str,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """Return tensor `name` in `dtype` on `device`.

    Raises:
        ModelError: the shape is not `shape`, or a value is not finite in `dtype`.
    """
    tensor = folder.read(name)
    if tuple(tensor.shape) != shape:
        raise _wrong_shape(folder, name, shape, tuple(tensor.shape))
    tensor = tensor.to(device=device, dtype=dtype)
    require_finite(tensor, where=f"{folder.path}: {name}")
    return tensor


def require_finite(tensor: torch.Tensor, *, where: str) -> None:
    """Raise ModelError naming `where` when a value is NaN or infinite."""
    if not tensor.numel():
        return
    # aminmax propagates NaN and, unlike isfinite, makes no second tensor.
    smallest, largest = torch.aminmax(tensor)
    if torch.isfinite(smallest) and torch.isfinite(largest):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise ModelError(
        where,
        expected=f"finite weights in {str(tensor.dtype).removeprefix('torch.')}",
        found=f"{bad} of {tensor.numel()} values NaN or infinite",
        action="The weights are damaged; download or export the model again.",
    )


def _cache_scales(spec: DecoderSpec) -> frozenset[str]:
    """Return names of scales for an fp8 KV cache, of other engines: what the model computes does not need them."""
    modules = [name.rpartition(".")[0] for index in range(spec.num_layers) for name in spec.linear_names(index, "o")]
    return frozenset(f"{module}.{leaf}" for module in modules for leaf in ("k_scale", "v_scale"))


def _unknown_tensor(folder: TensorSource, name: str, shape: tuple[int, ...]) -> ModelError:
    hint = " Fused experts are not implemented." if len(shape) > 2 else ""
    return ModelError(
        f"{folder.path}: {name}",
        expected="only tensors that the architecture in config.json has",
        found=f"an unknown tensor of shape {list(shape)}",
        action=f"This tool would leave it out and compute something else, so it refuses the model.{hint}",
    )


def _wrong_shape(folder: TensorSource, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{folder.path}: {name}",
        expected=f"shape {list(expected)}",
        found=f"shape {list(found)}",
        action="config.json and weights do not belong together; download or export the model again.",
    )

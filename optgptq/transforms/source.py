"""A checkpoint seen through its transforms: every tensor is computed when it is read, and nothing else changes.

What reads a checkpoint does not know of the transforms. In memory are the residual rotation and the norms' vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from optgptq.checkpoint.safetensors_header import TensorInfo
from optgptq.checkpoint.source import TensorSource
from optgptq.errors import ModelError
from optgptq.models.inventory import embedding_shape, head_shape
from optgptq.models.registry import family_of
from optgptq.models.spec import DecoderSpec
from optgptq.transforms.changes import LinearChange, ModelChange
from optgptq.transforms.checks import check_transform
from optgptq.transforms.fold import FoldedNorm, fold_norms, identity_weight
from optgptq.transforms.kv_scales import KVScales, check_kv_scales, norm_gains
from optgptq.transforms.rotation import Rotation, residual_rotation
from optgptq.transforms.settings import TransformSettings

# Elements of a large table that are held in float64 at a time: 128 MiB.
_ELEMENTS_PER_BLOCK = 1 << 24
_TIED_KEY = "tie_word_embeddings"


def transformed_source(
    source: TensorSource,
    spec: DecoderSpec,
    settings: TransformSettings,
    *,
    kv_scales: Sequence[KVScales] = (),
    own_head: bool = False,
) -> tuple[TensorSource, DecoderSpec]:
    """Return `source` with transformed tensors, and the spec of the model in it; both as given where nothing changes.

    Embedding and head become two tensors where they were tied and no longer are equal; config and spec then say so.
    `own_head` asks for that whether or not they differ. `kv_scales`, one record per decoder layer, are scales of the
    keys and values that the model has after `settings`.
    All changes of a tensor are computed together and rounded once.
    Reads the norms.

    Raises:
        ModelError: the model would compute something else (`check_transform`, `check_kv_scales`), or a norm cannot be
            folded.
    """
    separates = own_head and spec.tied_head
    if settings.changes_nothing and not kv_scales and not separates:
        return source, spec
    family = family_of(source.config).name
    check_transform(spec, settings, family=family)
    if kv_scales:
        check_kv_scales(spec, kv_scales, family=family)
    norms = fold_norms(source, spec, final=settings.rotates_residual) if settings.folds else {}
    residual = residual_rotation(spec, settings)
    change = ModelChange(spec=spec, settings=settings, norms=norms, residual=residual, kv_scales=kv_scales)
    linears = change.linear_changes()
    unties = separates or (spec.tied_head and (spec.names.embedding in linears or spec.names.head in linears))
    origins = _origins(source, spec) if unties else {}
    tensors = {**source.tensors, **{name: replace(source.info(old), name=name) for name, old in origins.items()}}
    view = TransformedSource(
        source=source,
        config={**source.config, _TIED_KEY: False} if unties else source.config,
        tensors=MappingProxyType(dict(sorted(tensors.items()))),
        origins=origins,
        linears=linears,
        norms=norms,
        gains=norm_gains(spec, kv_scales),
        residual=residual,
        identity_weight=identity_weight(spec),
    )
    return view, replace(spec, tied_head=False) if unties else spec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransformedSource:
    """A `TensorSource`; make it with `transformed_source`.

    Attributes:
        source: what is transformed.
        config: its config, untied where need be.
        tensors: dtype and shape of every tensor, those of the source and perhaps an untied head.
        origins: names of tensors that are computed from one of another name.
        linears: changes by module name.
        norms: folded norms by module name.
        gains: factors on the gains and biases of norms of queries and keys, by module name.
        residual: rotation of the biases that stay in norms.
        identity_weight: what folded norms store.
    """

    source: TensorSource
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    origins: Mapping[str, str]
    linears: Mapping[str, LinearChange]
    norms: Mapping[str, FoldedNorm]
    gains: Mapping[str, torch.Tensor]
    residual: Rotation | None
    identity_weight: float

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def side_files(self) -> tuple[str, ...]:
        return self.source.side_files

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of tensor `name`; ModelError if there is none."""
        return self.tensors[name] if name in self.tensors else self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor `name`, computed in float64, in its stored dtype.

        Raises:
            ModelError: no such tensor, it cannot be read, or a changed value is too large for the dtype.
        """
        module, _, leaf = name.rpartition(".")
        if module in self.norms:
            return self._norm_tensor(name, self.norms[module], leaf)
        if module in self.gains:
            return self._scaled_norm(name, self.gains[module], leaf)
        if module in self.linears:
            return self._bias(name, module) if leaf == "bias" else self._weight(name, self.linears[module])
        return self.source.read(self.origins.get(name, name))

    def read_chunks(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[torch.Tensor]:
        """Yield the bytes of tensor `name` as uint8 tensors of `chunk_bytes`, the last one shorter."""
        module = name.rpartition(".")[0]
        if not any(module in changed for changed in (self.norms, self.gains, self.linears)):
            yield from self.source.read_chunks(self.origins.get(name, name), chunk_bytes)
            return
        yield from torch.split(self.read(name).reshape(-1).view(torch.uint8), chunk_bytes)

    def _weight(self, name: str, change: LinearChange) -> torch.Tensor:
        stored = self.source.read(self.origins.get(name, name))
        rows = stored.shape[0]
        if change.stored_rows_are_independent:
            rows = max(1, _ELEMENTS_PER_BLOCK // stored.shape[1])
        for block in torch.split(stored, rows):
            oriented = block.T if change.stored_transposed else block
            changed = change.change_weight(oriented.to(torch.float64).contiguous())
            block.copy_(self._stored(name, changed.T if change.stored_transposed else changed, stored.dtype))
        return stored

    def _bias(self, name: str, module: str) -> torch.Tensor:
        change, stored = self.linears[module], self.source.read(name)
        weight_OI = None
        if change.norm is not None and change.norm.moved_bias_M is not None:
            weight = self.source.read(f"{module}.weight").to(torch.float64)
            weight_OI = weight.T if change.stored_transposed else weight
        return self._stored(name, change.change_bias(stored.to(torch.float64), weight_OI), stored.dtype)

    def _norm_tensor(self, name: str, norm: FoldedNorm, leaf: str) -> torch.Tensor:
        info = self.info(name)
        if leaf == "weight":
            return torch.full(info.shape, self.identity_weight, dtype=info.torch_dtype)
        if norm.kept_bias_M is None:
            return torch.zeros(info.shape, dtype=info.torch_dtype)
        bias_M = norm.kept_bias_M if self.residual is None else self.residual.apply(norm.kept_bias_M)
        return self._stored(name, bias_M, info.torch_dtype)

    def _scaled_norm(self, name: str, gain_D: torch.Tensor, leaf: str) -> torch.Tensor:
        stored_D = self.source.read(name)
        # What is added to a stored weight before it is used.
        offset = 1.0 - self.identity_weight if leaf == "weight" else 0.0
        return self._stored(name, (stored_D.double() + offset) * gain_D - offset, stored_D.dtype)

    def _stored(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = values.to(dtype)
        if bool(torch.isfinite(values).all()) and not bool(torch.isfinite(rounded).all()):
            raise ModelError(
                f"{self.path}: {name}",
                expected=f"transformed values up to {torch.finfo(dtype).max:g}, the largest of its dtype",
                found=f"{float(values.abs().max()):g}",
                action="Convert the model to bfloat16 or float32 first, or switch the transform off.",
            )
        return rounded


def _origins(source: TensorSource, spec: DecoderSpec) -> dict[str, str]:
    """Return for embedding and head of a tied pair the stored tensor each is made of; either may be missing."""
    (embedding,), (head,) = embedding_shape(spec), head_shape(spec)
    return {
        embedding: embedding if embedding in source.tensors else head,
        head: head if head in source.tensors else embedding,
    }

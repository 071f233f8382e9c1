"""The last step of a job: parameters of the KV cache, found with the weights that were written and put beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optgptq.cache_fold import scales_to_fold
from optgptq.cache_request import CacheRequest
from optgptq.calibration.states import ActivationPlace
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import FormatError
from optgptq.formats.kv_cache_config import write_cache_setup
from optgptq.journal.store import Steps
from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE, PageLayout, bits_per_value
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_calibration.calibrate import CalibratedCache, StreamedModel, calibrate_cache
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.kv_cache import CacheTransform, KVCacheRecipe
from optgptq.recipe.records import Recipe
from optgptq.recipe.sources import source_for_record
from optgptq.reports import events
from optgptq.reports.events import ProgressListener
from optgptq.runtime.cache_plan import cache_of_folder
from optgptq.runtime.decoded import decoded_layers, decoded_linears
from optgptq.transforms.kv_scales import KVScales, shares_key_scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheJob:
    """What is made of the cache of one model.

    Attributes:
        plan, recipe: what was decided.
        spec: the model as it was written.
        place: where activations are computed and kept.
        progress: hears of every decoder layer, and of what was found.
        steps: keeps what was found, layer by layer.
        folded: channel scales that were moved into the weights, by decoder layer; empty for none.
    """

    plan: CacheRequest
    recipe: Recipe
    spec: DecoderSpec
    place: ActivationPlace
    progress: ProgressListener
    steps: Steps
    folded: tuple[KVScales, ...] = ()

    def scales_to_fold(self, source: TensorSource, windows: Windows) -> tuple[KVScales, ...]:
        """Return channel scales for the weights of `source`, which are not quantized yet; see `scales_to_fold`."""
        return scales_to_fold(
            source,
            self.spec,
            calibration_settings(self.plan, self.recipe),
            self._read(windows),
            steps=self.steps.scope("fold"),
            place=self.place,
            progress=self.progress,
        )

    def run(self, folder: Path, windows: Windows | None) -> dict[str, Any]:
        """Find the parameters, write them into checkpoint `folder`, read them back; return what the manifest says.

        Args:
            folder: complete but for its manifest.
            windows: the calibration text; may be None where nothing is calibrated.

        Raises:
            OptGPTQError: one of its kinds.
        """
        if windows is None or not self.recipe.kv_cache.calibrated:
            found, told = self._data_free(), {}
        else:
            found, told = self._calibrated(folder, windows), self._calibration_facts(windows)
        folded = self._folded()
        write_cache_setup(folder, found.scheme, found.layers, folded=folded, calibration=told)
        self._verify(folder, found)
        facts = cache_facts(self.spec, found.scheme)
        self.progress(
            events.CacheFound(
                key_bits=facts["bits_per_key"],
                value_bits=facts["bits_per_value"],
                bytes_per_token=facts["bytes_per_token"],
                exact_bytes_per_token=facts["exact_bytes_per_token"],
            )
        )
        return {**facts, "folded": folded, "notes": list(self.plan.notes), "calibration": found.record}

    def _calibrated(self, folder: Path, windows: Windows) -> CalibratedCache:
        written = CheckpointFolder.open(folder)

        def tell(index: int) -> None:
            detail = f"decoder layer {index + 1}/{self.spec.num_layers}"
            self.progress(events.PhaseStarted(name="kv cache", detail=detail))

        model = StreamedModel(
            source=written,
            spec=self.spec,
            layer_of=decoded_layers(written, dtype=self.place.dtype, device=self.place.device),
            dtype=self.place.dtype,
            device=self.place.device,
            store=self.place.store,
            supply_head=decoded_linears(written, dtype=self.place.dtype, device=self.place.device),
        )
        return calibrate_cache(
            model,
            calibration_settings(self.plan, self.recipe),
            self._read(windows),
            steps=self.steps.scope("kv_cache"),
            layer_started=tell,
        )

    def _data_free(self) -> CalibratedCache:
        kv_cache = self.recipe.kv_cache
        self.progress(events.PhaseStarted(name="kv cache", detail="no calibration"))
        keys = self._rotated(kv_cache.key_transform)
        values = self._rotated(kv_cache.value_transform)
        layers = tuple(
            LayerParameters(
                keys=SideParameters() if layer.keys.is_exact else keys,
                values=SideParameters() if layer.values.is_exact else values,
            )
            for layer in self.plan.scheme.layers
        )
        return CalibratedCache(scheme=self.plan.scheme, layers=layers, record={"calibrated": False})

    def _rotated(self, transform: CacheTransform) -> SideParameters:
        if transform == "none":
            return SideParameters()
        rotation_DD = block_hadamard(self.spec.head_dim)
        return SideParameters(rotation_KDD=rotation_DD.expand(self.spec.num_kv_heads, -1, -1))

    def _read(self, windows: Windows) -> Windows:
        return windows.first(self.recipe.kv_cache.num_windows)

    def _calibration_facts(self, windows: Windows) -> dict[str, Any]:
        read = self._read(windows)
        return {
            "dataset": source_for_record(self.recipe.calibration.source),
            "tokens": read.num_tokens,
            "max_position": read.window_size,
            "seed": self.recipe.calibration.seed,
            "weights": "dense" if self.recipe.weights.method == "none" else "quantized",
        }

    def _folded(self) -> dict[str, Any]:
        """Return what was moved into the weights before."""
        told: dict[str, Any] = {}
        if self.folded:
            keys = any(scales.key_KD is not None for scales in self.folded)
            values = any(scales.value_KD is not None for scales in self.folded)
            told |= {"k_scale": keys, "v_scale": values, "k_norm_gain": keys and shares_key_scale(self.spec)}
        if self.recipe.transform.value_rotation != "none":
            told["v_rotation"] = self.recipe.transform.value_rotation
        return told

    def _verify(self, folder: Path, found: CalibratedCache) -> None:
        """Raise FormatError unless what is read is what was found."""
        setup = cache_of_folder(CheckpointFolder.open(folder), self.spec)
        if setup is None or setup.scheme != found.scheme or not _same_parameters(setup.layers, found.layers):
            raise FormatError(
                f"{folder}, kv_cache_quantization",
                expected="the parameters of the KV cache that were to be written",
                found="others or none",
                action="Nothing was published. Check the disk, run again, and report it if it happens twice.",
            )


def calibration_settings(plan: CacheRequest, recipe: Recipe) -> CacheCalibrationSettings:
    """Return what the calibration is asked for."""
    kv_cache: KVCacheRecipe = recipe.kv_cache
    return CacheCalibrationSettings(
        schemes=plan.scheme.layers,
        past=plan.scheme.past,
        key_transform=kv_cache.key_transform,
        value_transform=kv_cache.value_transform,
        rounding=kv_cache.rounding or "fitted",
        budget_bits=kv_cache.budget_bits,
        fixed_layers=plan.fixed_layers,
        allowed_bits=plan.allowed_bits,
        refine=kv_cache.refine,
        seed=recipe.calibration.seed,
    )


def cache_facts(spec: DecoderSpec, scheme: CacheScheme) -> dict[str, Any]:
    """Return what a cache takes, as plain values: bits of a number on average, bytes of a token in all layers."""
    page_size = math.lcm(PAGE_MULTIPLE, scheme.past.granule)

    def layout(layer: LayerScheme) -> PageLayout:
        return PageLayout(
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            page_size=page_size,
            scheme=layer,
            exact_bytes=2,
        )

    exact = layout(LayerScheme(keys=SideScheme(), values=SideScheme()))
    layers = scheme.layers
    return {
        "bits_per_key": sum(bits_per_value(layer.keys, spec.head_dim) for layer in layers) / len(layers),
        "bits_per_value": sum(bits_per_value(layer.values, spec.head_dim) for layer in layers) / len(layers),
        "bytes_per_token": sum(layout(layer).bytes_per_token for layer in layers),
        "exact_bytes_per_token": exact.bytes_per_token * len(layers),
        "layers": [{"key_bits": layer.keys.bits, "value_bits": layer.values.bits} for layer in layers],
        "past_only": scheme.past.name,
        "sink_tokens": scheme.past.sink_tokens,
        "recent_tokens": scheme.past.recent_tokens,
    }


def _same_parameters(found: Sequence[LayerParameters], meant: Sequence[LayerParameters]) -> bool:
    pairs = [(left.tensors, right.tensors) for left, right in zip(found, meant, strict=True)]
    return all(
        left.keys() == right.keys() and all(torch.equal(left[name].cpu(), right[name].cpu().float()) for name in left)
        for left, right in pairs
    )

"""From a checkpoint folder, dense or quantized, to a model that runs. Formats are decoded by our own readers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.formats import CheckpointFormat, detect
from optgptq.kernels import KernelChoice, Matmul
from optgptq.models.decoder import Decoder, load_decoder
from optgptq.models.inventory import model_linears
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.registry import model_spec
from optgptq.runtime.decoded import decode_linear, read_bias, require_known
from optgptq.runtime.linear import HELD_KINDS, QuantLinear

logger = logging.getLogger(__name__)

HeldWeights = Literal["dense", "quantized"]


def load_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: HeldWeights = "dense",
    kernel: Matmul[Any] | None = None,
) -> Decoder:
    """Read a checkpoint, dense or in any of the formats that can be read.

    Args:
        path: the folder.
        dtype: dtype of activations and dense weights.
        device: where everything is put.
        weights: `dense` decodes quantized linears once, which is the fastest for long inputs; `quantized` keeps codes
            or sign planes in memory and multiplies with a kernel; a linear that no kernel takes is decoded, with a
            warning. Dense checkpoints are the same in both.
        kernel: takes the place of the kernel that would be chosen; for tests.

    Raises:
        ModelError, FormatError: the checkpoint is damaged, or its model or layout is not implemented.
    """
    folder = CheckpointFolder.open(path)
    form = detect(folder)
    if form is None:
        return load_decoder(folder, dtype=dtype, device=device)
    layouts = {layout.name: layout for layout in form.read_layouts(folder) if layout.bits is not None}
    linears = {linear.name: linear for linear in model_linears(model_spec(folder))}
    require_known(folder, layouts, linears)
    kernels = _Kernels(device=torch.device(device), dtype=dtype, replacement=kernel)
    unfit: list[tuple[str, str]] = []

    def supply(name: str) -> LinearLike | None:
        if name not in layouts:
            return None
        weight = decode_linear(folder, form, layouts[name], linears[name])
        bias_O = read_bias(folder, linears[name], dtype=dtype, device=device)
        if weights == "quantized":
            kind, choice = HELD_KINDS[type(weight)], kernels.of(type(weight))
            if kind.fits(weight, choice):
                kernels.say(choice)
                held = kind.hold(weight, choice, kernels.device)
                return QuantLinear(weight=held, bias_O=bias_O, kernel=choice.call)
            unfit.append((name, kind.parts))
        return Linear(weight.dequantize(dtype).to(device), bias_O)

    if weights == "dense":
        _say_decoded(len(layouts), form, dtype)
    decoder = load_decoder(folder, dtype=dtype, device=device, supply_linear=supply, supplied=tuple(layouts))
    if unfit:
        first, parts = unfit[0]
        logger.warning(
            "linears that are held dense: %d, %s first; no kernel multiplies with %s whose groups of %d "
            "columns begin inside a word",
            len(unfit),
            first,
            parts,
            layouts[first].group_size,
        )
    return decoder


def _say_decoded(num_linears: int, form: CheckpointFormat, dtype: torch.dtype) -> None:
    number = str(dtype).removeprefix("torch.")
    logger.info("%d quantized linears (%s) are decoded once and held dense in %s", num_linears, form.name, number)


@dataclass(slots=True, kw_only=True)
class _Kernels:
    """The kernel of each kind of weight in a model, chosen once, and logged when it has a weight to multiply with."""

    device: torch.device
    dtype: torch.dtype
    replacement: Matmul[Any] | None
    chosen: dict[type, KernelChoice[Any]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def of(self, kind: type) -> KernelChoice[Any]:
        if kind not in self.chosen:
            choice = HELD_KINDS[kind].choose(self.device, self.dtype)
            self.chosen[kind] = choice if self.replacement is None else replace(choice, call=self.replacement)
        return self.chosen[kind]

    def say(self, choice: KernelChoice[Any]) -> None:
        if self.replacement is not None or choice.operation in self.said:
            return
        self.said.add(choice.operation)
        level = logging.WARNING if choice.is_makeshift else logging.INFO
        logger.log(level, "%s kernel for quantized linears: %s", choice.name, choice.reason)

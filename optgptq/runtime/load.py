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
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.registry import model_spec
from optgptq.runtime.decoded import decode_linear, known_linears, read_bias, require_known
from optgptq.runtime.linear import HELD_KINDS, QuantLinear

logger = logging.getLogger(__name__)

HeldWeights = Literal["dense", "quantized", "exact"]


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
        weights: `dense` decodes quantized linears once; `quantized` keeps codes or sign planes in memory and multiplies
            with a kernel, which on a processor rounds activations to 8 bits; `exact` does so with activations as they
            are. A linear that no kernel takes is decoded, with a warning. Dense checkpoints are the same in all three.
        kernel: takes the place of the kernel that would be chosen; for tests.

    Raises:
        ModelError, FormatError: the checkpoint is damaged, or its model or layout is not implemented.
    """
    folder = CheckpointFolder.open(path)
    form = detect(folder)
    if form is None:
        return load_decoder(folder, dtype=dtype, device=device)
    layouts = {layout.name: layout for layout in form.read_layouts(folder) if layout.bits is not None}
    linears = known_linears(model_spec(folder))
    require_known(folder, layouts, linears)
    kernels = _Kernels(device=torch.device(device), dtype=dtype, exact=weights == "exact", replacement=kernel)
    unfit: list[tuple[str, str]] = []

    def supply(name: str) -> LinearLike | None:
        if name not in layouts:
            return None
        weight = decode_linear(folder, form, layouts[name], linears[name])
        bias_O = read_bias(folder, linears[name], dtype=dtype, device=device)
        if weights != "dense":
            kind = HELD_KINDS[type(weight)]
            choice = next((choice for choice in kernels.of(type(weight)) if kind.fits(weight, choice)), None)
            if choice is not None:
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
        _say_unfit(len(unfit), first, parts, layouts[first].group_size)
    return decoder


def _say_decoded(num_linears: int, form: CheckpointFormat, dtype: torch.dtype) -> None:
    number = str(dtype).removeprefix("torch.")
    logger.info("%d quantized linears (%s) are decoded once and held dense in %s", num_linears, form.name, number)


def _say_unfit(count: int, first: str, parts: str, group_size: int) -> None:
    logger.warning(
        "linears that are held dense: %d, %s first; no kernel multiplies with %s whose groups of %d "
        "columns begin inside a word",
        count,
        first,
        parts,
        group_size,
    )


@dataclass(slots=True, kw_only=True)
class _Kernels:
    """The kernels of each kind of weight in a model, chosen once, and logged when one has a weight to multiply with."""

    device: torch.device
    dtype: torch.dtype
    exact: bool
    replacement: Matmul[Any] | None
    chosen: dict[type, list[KernelChoice[Any]]] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def of(self, kind: type) -> list[KernelChoice[Any]]:
        """Return the kernel for a kind of weight, then that for weights which do not fit it, if there is one."""
        if kind not in self.chosen:
            held = HELD_KINDS[kind]
            choices = [held.choose(self.device, self.dtype, exact=self.exact)]
            if self.replacement is not None:
                choices = [replace(choices[0], call=self.replacement)]
            elif held.choose_other is not None:
                choices.append(held.choose_other(self.device, self.dtype))
            self.chosen[kind] = choices
        return self.chosen[kind]

    def say(self, choice: KernelChoice[Any]) -> None:
        if self.replacement is not None or choice.reason in self.said:
            return
        self.said.add(choice.reason)
        level = logging.WARNING if choice.is_makeshift else logging.INFO
        logger.log(level, "%s kernel for quantized linears: %s", choice.name, choice.reason)

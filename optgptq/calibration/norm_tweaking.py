"""Norm weights trained after a decoder layer was quantized, so that its output comes back to the full-precision one.

The one step of the package that takes gradients. It trains the weights (and the biases of layer norms) of the norms
that run over the model width; norms of queries and keys stay. The loss is the squared error of the layer's output in
the quantized stream against its output in the full-precision stream. Values are judged as the checkpoint will store
them, on windows that were held out, and kept only where they lower the error there.

Source: Li et al., Norm Tweaking, arXiv 2309.02784, with the squared error in the place of its distance of channel means
and variances.

Shapes: `B` windows of a batch, `S` positions, `M` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.calibration.stream import ActivationStream, Batch
from optgptq.models.attention import AttentionContext, context_at
from optgptq.models.layer import DecoderLayer, LayerState
from optgptq.models.linear import Linear, LinearLike
from optgptq.models.norm import Norm

# Steps between two looks at the windows held out.
_STEPS_PER_CHECK = 8
# Far below the gradients of a relative error, which shrink with the model's width.
_ADAM_EPSILON = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class NormTweakSettings:
    """How norms are trained.

    Attributes:
        steps: steps of Adam per decoder layer, each on one batch of windows, in turn.
        learning_rate: first step as a share of the root mean square of each norm's weight; it falls linearly to zero.
        stored_dtype: returns the dtype of the checkpoint's tensor of that full name.
    """

    steps: int
    learning_rate: float
    stored_dtype: Callable[[str], torch.dtype]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormTweak:
    """What came of one decoder layer.

    Attributes:
        loss_before, loss_after: `|h - r|^2 / |r|^2` of the layer's output on the windows held out; equal where the old
            values stay.
        steps: steps after which the values kept were reached, 0 for the old ones.
        tensors: new tensors by full name, as the checkpoint stores them; empty where the old ones stay.
    """

    loss_before: float
    loss_after: float
    steps: int
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Example:
    """One batch: before the layer, and behind the original one."""

    start: Batch
    wanted: Batch


def tweak_norms(
    layer: DecoderLayer,
    start: ActivationStream,
    quantized: ActivationStream,
    full_precision: ActivationStream,
    settings: NormTweakSettings,
) -> NormTweak:
    """Train the norms of `layer` and return what came of it; new norms are set and `quantized` moved along.

    Everything is computed in float32, whatever the dtype of the streams.

    Args:
        layer: all its linears as they were quantized; only its norms are replaced.
        start: the quantized stream before the layer, in the same batches.
        quantized: the stream behind the layer; some batches are held out.
        full_precision: the other stream behind the original layer, of the same windows in the same batches.
        settings: how.
    """
    examples: dict[bool, list[_Example]] = {False: [], True: []}
    for batch, reference in zip(start.batches, full_precision.batches, strict=True):
        examples[batch.held_out].append(_Example(batch, reference))
    training = _Training(layer, quantized.context, settings)
    tweak = training.run(examples[False], held_out=examples[True])
    if tweak.tensors:
        set_norms(layer, training.in_use(tweak.tensors))
        for before, batch in zip(start.batches, quantized.batches, strict=True):
            batch.state = LayerState(hidden_BSM=layer.forward(before.state.hidden_BSM, quantized.context))
    return tweak


class _Training:
    """The norms of one decoder layer while they are trained: `values` by full name, float32, as the layer uses them."""

    def __init__(self, layer: DecoderLayer, context: AttentionContext, settings: NormTweakSettings) -> None:
        self.settings = settings
        self.compute_dtype = next(iter(_dense_linears(layer).values())).weight_OI.dtype
        self.layer = _in_float32(layer)
        self.context = context_at(layer.spec, context.positions, dtype=torch.float32)
        self.values: dict[str, torch.Tensor] = {}
        self.rates: dict[str, float] = {}
        for module, norm in _trained(layer).values():
            assert norm.weight is not None
            size = float(norm.weight.float().square().mean().sqrt())
            for leaf, tensor in (("weight", norm.weight), ("bias", norm.bias)):
                if tensor is not None:
                    self.values[f"{module}.{leaf}"] = tensor.float().clone().requires_grad_()
                    self.rates[f"{module}.{leaf}"] = settings.learning_rate * size

    def run(self, measured: Sequence[_Example], *, held_out: Sequence[_Example]) -> NormTweak:
        """Take all steps; return the best of the values looked at, the old ones included."""
        settings = self.settings
        optimizer = torch.optim.Adam([{"params": [value]} for value in self.values.values()], eps=_ADAM_EPSILON)
        loss_before = best_loss = self.loss(held_out)
        best_steps, best = 0, dict[str, torch.Tensor]()
        for step in range(settings.steps):
            for group, rate in zip(optimizer.param_groups, self.rates.values(), strict=True):
                group["lr"] = rate * (1 - step / settings.steps)
            optimizer.zero_grad()
            self.add_gradients(measured[step % len(measured)])
            optimizer.step()
            if (step + 1) % _STEPS_PER_CHECK and step + 1 < settings.steps:
                continue
            loss = self.loss(held_out)
            if loss < best_loss:
                best_loss, best_steps, best = loss, step + 1, self.stored()
        return NormTweak(loss_before=loss_before, loss_after=best_loss, steps=best_steps, tensors=best)

    def add_gradients(self, example: _Example) -> None:
        """Add the gradient of the relative error on one batch to `grad` of the values."""
        with torch.enable_grad():
            difference, energy = self._errors(self.values, example)
            torch.autograd.backward(difference / energy.clamp_min(1e-30))

    def loss(self, examples: Sequence[_Example]) -> float:
        """Return the relative error over several batches with the values as the checkpoint will store them."""
        values = self.in_use(self.stored())
        difference = energy = 0.0
        with torch.no_grad():
            for example in examples:
                parts = self._errors(values, example)
                difference += float(parts[0])
                energy += float(parts[1])
        return difference / energy if energy > 0 else 0.0

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the values as the checkpoint stores them: without the spec's offset, in its dtypes."""
        offset, dtype = self.layer.spec.norm.weight_offset, self.settings.stored_dtype
        return {
            name: (value.detach() - (offset if name.endswith(".weight") else 0)).to(dtype(name))
            for name, value in self.values.items()
        }

    def in_use(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return stored tensors as a layer of the streams' dtype uses them once they are read again."""
        offset = self.layer.spec.norm.weight_offset
        used = {name: tensor.to(self.compute_dtype) for name, tensor in stored.items()}
        with_offset = [name for name in used if offset and name.endswith(".weight")]
        return used | {name: used[name].float() + offset for name in with_offset}

    def _errors(self, values: Mapping[str, torch.Tensor], example: _Example) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `|h - r|^2` and `|r|^2` over the positions that count."""
        layer = self.layer.copy()
        set_norms(layer, {name: value.float() for name, value in values.items()})
        found_BSM = layer.forward(example.start.state.hidden_BSM.float(), self.context)
        wanted_BSM = example.wanted.state.hidden_BSM.float()
        if example.start.valid_BS is not None:
            found_BSM, wanted_BSM = found_BSM[example.start.valid_BS], wanted_BSM[example.start.valid_BS]
        return (found_BSM - wanted_BSM).square().sum(), wanted_BSM.square().sum()


def set_norms(layer: DecoderLayer, values: Mapping[str, torch.Tensor]) -> None:
    """Give the norms over the model width new weights and biases, by full name; copies of the layer keep the old."""
    norms = {
        field: replace(norm, weight=values[f"{module}.weight"], bias=values.get(f"{module}.bias"))
        for field, (module, norm) in _trained(layer).items()
    }
    layer.norms = replace(layer.norms, **norms)


def _trained(layer: DecoderLayer) -> dict[str, tuple[str, Norm]]:
    """Return full module name and norm by field of `LayerNorms`: those over the model width that have a weight."""
    names, norms = layer.spec.names, layer.norms
    prefix = names.layer_prefix(layer.index)
    candidates = {
        "attention": (names.attention_norm, norms.attention),
        "mlp": (names.mlp_norm, norms.mlp),
        "attention_output": (names.attention_output_norm, norms.attention_output),
        "mlp_output": (names.mlp_output_norm, norms.mlp_output),
    }
    return {
        field: (f"{prefix}.{local}", norm)
        for field, (local, norm) in candidates.items()
        if norm is not None and norm.weight is not None
    }


def _in_float32(layer: DecoderLayer) -> DecoderLayer:
    """Return the layer with all weights in float32, sharing what is float32 already."""
    linears: dict[str, LinearLike] = {
        name: Linear(linear.weight_OI.float(), None if linear.bias_O is None else linear.bias_O.float())
        for name, linear in _dense_linears(layer).items()
    }
    query, key = (_norm_in_float32(norm) for norm in (layer.norms.query, layer.norms.key))
    return replace(layer, linears=linears, norms=replace(layer.norms, query=query, key=key))


def _norm_in_float32(norm: Norm | None) -> Norm | None:
    if norm is None:
        return None
    weight, bias = (None if tensor is None else tensor.float() for tensor in (norm.weight, norm.bias))
    return replace(norm, weight=weight, bias=bias)


def _dense_linears(layer: DecoderLayer) -> dict[str, Linear]:
    linears = {name: linear for name, linear in layer.linears.items() if isinstance(linear, Linear)}
    if len(linears) != len(layer.linears):
        raise TypeError(f"decoder layer {layer.index} has linears whose weight is not in memory as one tensor")
    return linears

"""What a job did: facts of solved linears and decoder layers as plain values, and the lists that the manifest holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optgptq.calibration.layer import SolvedLinear
from optgptq.calibration.norm_tweaking import NormTweak
from optgptq.formats.verify import weight_digest
from optgptq.layout import LinearLayout
from optgptq.quantized_weight import QuantizedWeight


@dataclass(slots=True)
class JobRecord:
    """Growing lists of what happened.

    Attributes:
        layers: one entry per quantized linear, in the order of the walk.
        dense: one entry per linear that stays dense.
        decoder_layers: one entry per decoder layer.
        decoder_layer_costs: time and memory of each decoder layer; not part of the manifest.
        warnings: everything that a user must hear about.
        timings: seconds by linear and phase; not part of the manifest.
        digests: `weight_digest` by linear; not part of the manifest.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    dense: list[dict[str, Any]] = field(default_factory=list)
    decoder_layers: list[dict[str, Any]] = field(default_factory=list)
    decoder_layer_costs: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    _stored_bits: int = 0
    _num_weights: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and stored zero points over the quantized weights."""
        return self._stored_bits / self._num_weights if self._num_weights else 0.0

    def add_linear(self, facts: Mapping[str, Any]) -> None:
        """Add a linear by what `linear_facts` returned; notes of its solver become warnings."""
        if "dense" in facts:
            self.dense.append(facts["dense"])
            return
        layer = facts["layer"]
        self.layers.append(layer)
        self._stored_bits += facts["stored_bits"]
        self._num_weights += facts["num_weights"]
        self.timings[layer["name"]] = facts["seconds"]
        self.digests[layer["name"]] = facts["digest"]
        self.warnings += [f"{layer['name']}: {note}" for note in layer["notes"]]

    def add_decoder_layer(self, facts: Mapping[str, Any]) -> None:
        """Add a decoder layer by what was noted at its end."""
        entry = facts["layer"]
        self.decoder_layers.append(entry)
        self.decoder_layer_costs.append(facts["cost"])
        self.timings[f"decoder layer {entry['index']}"] = facts["cost"]["seconds"]
        self.warnings += facts["warnings"]


def linear_facts(
    solved: SolvedLinear, stored: QuantizedWeight | None, *, zero_points_stored: bool, damp_ratio: float
) -> dict[str, Any]:
    """Return what is told about a linear, as plain values.

    Args:
        solved: the linear.
        stored: its weight with the scales that are stored; None where it stays dense.
        zero_points_stored: symmetric zero points take room in the file.
        damp_ratio: the damping that was asked for.
    """
    layout, solution = solved.plan.layout, solved.solution
    if solution is None or stored is None:
        return {"dense": {"name": layout.name, "reason": layout.dense_reason}}
    return {
        "layer": {
            "name": layout.name,
            "method": solved.plan.method,
            "bits": layout.bits,
            "group_size": layout.group_size,
            "symmetric": layout.symmetric,
            "loss": solution.loss,
            "rtn_loss": solution.rtn_loss,
            "clip_fraction": solution.clip_fraction,
            "damp_ratio": damp_ratio,
            "damp_ratio_used": solution.damp_ratio_used,
            "num_dead_inputs": solution.num_dead_inputs,
            "num_tokens": solved.num_tokens,
            "notes": list(solution.notes),
            **_coefficients(layout),
            **({} if solved.shift_strength is None else {"shift_strength": solved.shift_strength}),
            **({} if solved.plan.reason is None else {"reason": solved.plan.reason}),
        },
        "stored_bits": stored.stored_bits(zero_points_stored=zero_points_stored or not layout.symmetric),
        "num_weights": layout.out_features * layout.in_features,
        "digest": weight_digest(stored),
        "seconds": solution.seconds,
    }


def decoder_layer_facts(index: int, output_error: float | None, tweak: NormTweak | None) -> dict[str, Any]:
    """Return what the manifest says about a decoder layer, and what training its norms brought."""
    facts: dict[str, Any] = {"index": index, "output_error": output_error}
    if tweak is not None:
        facts["norm_tweaking"] = {
            "loss_before": tweak.loss_before,
            "loss_after": tweak.loss_after,
            "steps": tweak.steps,
        }
    return facts


def _coefficients(layout: LinearLayout) -> dict[str, Any]:
    return {} if layout.coefficients is None else {"coefficients": layout.coefficients}

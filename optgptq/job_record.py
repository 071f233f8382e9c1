"""What a job did, collected while it runs: what the manifest holds, and the timings that it must not hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optgptq.calibration.layer import SolvedLinear
from optgptq.calibration.norm_tweaking import NormTweak
from optgptq.plan import LinearPlan
from optgptq.quantized_weight import QuantizedWeight


@dataclass(slots=True)
class JobRecord:
    """Growing lists of what happened.

    Attributes:
        zero_points_stored: symmetric zero points take room in the file.
        layers: one entry per quantized linear, in the order of the walk.
        dense: one entry per linear that stays dense.
        decoder_layers: one entry per decoder layer.
        warnings: everything that a user must hear about.
        timings: seconds by linear and phase; not part of the manifest.
    """

    zero_points_stored: bool
    layers: list[dict[str, Any]] = field(default_factory=list)
    dense: list[dict[str, Any]] = field(default_factory=list)
    decoder_layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    _stored_bits: int = 0
    _num_weights: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales and stored zero points over the quantized weights."""
        return self._stored_bits / self._num_weights if self._num_weights else 0.0

    def add_linear(self, solved: SolvedLinear, stored: QuantizedWeight | None) -> None:
        """Add a linear and its weight with the scales that are stored; notes of its solver become warnings."""
        layout, solution = solved.plan.layout, solved.solution
        if solution is None or stored is None:
            self.dense.append({"name": layout.name, "reason": layout.dense_reason})
            return
        zero_points_stored = self.zero_points_stored or not layout.symmetric
        self._stored_bits += stored.stored_bits(zero_points_stored=zero_points_stored)
        self._num_weights += layout.out_features * layout.in_features
        self.timings[layout.name] = solution.seconds
        self.layers.append(
            {
                "name": layout.name,
                "method": solved.plan.method,
                "bits": layout.bits,
                "group_size": layout.group_size,
                "symmetric": layout.symmetric,
                "loss": solution.loss,
                "rtn_loss": solution.rtn_loss,
                "clip_fraction": solution.clip_fraction,
                "damp_ratio_used": solution.damp_ratio_used,
                "num_dead_inputs": solution.num_dead_inputs,
                "notes": list(solution.notes),
                **({} if layout.coefficients is None else {"coefficients": layout.coefficients}),
                **_shift(solved),
                **_reason(solved.plan),
            }
        )
        self.warnings += [f"{layout.name}: {note}" for note in solution.notes]

    def add_decoder_layer(self, index: int, output_error: float | None, tweak: NormTweak | None) -> None:
        """Add a decoder layer, and what training its norms brought."""
        entry: dict[str, Any] = {"index": index, "output_error": output_error}
        if tweak is not None:
            entry["norm_tweaking"] = {
                "loss_before": tweak.loss_before,
                "loss_after": tweak.loss_after,
                "steps": tweak.steps,
            }
        self.decoder_layers.append(entry)


def _shift(solved: SolvedLinear) -> dict[str, float]:
    return {} if solved.shift_strength is None else {"shift_strength": solved.shift_strength}


def _reason(plan: LinearPlan) -> dict[str, str]:
    return {} if plan.reason is None else {"reason": plan.reason}

"""Quality gates: limits on evaluation figures, for a job that must fail when a checkpoint is worse than agreed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optgptq.errors import GateError, UsageError
from optgptq.evaluation.perplexity import EvalResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Limits; None where there is none.

    Attributes:
        max_ppl: highest perplexity of the candidate.
        max_ppl_increase: highest relative increase over the baseline, 0.02 for 2 percent.
        max_kl: highest mean KL divergence, nats per token.
        min_top1: lowest top-1 agreement, 0 to 1.
    """

    max_ppl: float | None = None
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        for option, limit in self._named().items():
            if limit is not None and not (math.isfinite(limit) and limit >= 0):
                raise UsageError(
                    option,
                    expected="a finite number that is not negative",
                    found=str(limit),
                    action="Give a limit such as 0.02.",
                )
        if self.min_top1 is not None and self.min_top1 > 1:
            raise UsageError(
                "--min-top1",
                expected="a share between 0 and 1",
                found=str(self.min_top1),
                action="Give 0.98 for 98 percent.",
            )

    def _named(self) -> dict[str, float | None]:
        return {
            "--max-ppl": self.max_ppl,
            "--max-ppl-increase": self.max_ppl_increase,
            "--max-kl": self.max_kl,
            "--min-top1": self.min_top1,
        }

    @property
    def needing_baseline(self) -> tuple[str, ...]:
        """Options that are set and compare with a baseline model."""
        return tuple(name for name, limit in self._named().items() if limit is not None and name != "--max-ppl")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOutcome:
    """One gate after an evaluation.

    Attributes:
        gate: option name.
        figure: what was measured, in words.
        value: the measured value.
        limit: the agreed limit.
        passed: whether the value is within the limit; a value that is not a number never is.
        excess: by how much the limit is missed, in the figure's unit; 0 when it passed.
    """

    gate: str
    figure: str
    value: float
    limit: float
    passed: bool
    excess: float


def require_baseline(gates: Gates, *, has_baseline: bool) -> None:
    """Check before any work that each gate can be computed.

    Raises:
        UsageError: a gate compares with a baseline and none is given.
    """
    if gates.needing_baseline and not has_baseline:
        raise UsageError(
            ", ".join(gates.needing_baseline),
            expected="a baseline model to compare with",
            found="no --baseline",
            action="Name the dense model that the checkpoint was made from with --baseline.",
        )


def judge(result: EvalResult, gates: Gates) -> tuple[GateOutcome, ...]:
    """Return an outcome for every gate that is set, in the order of the options."""
    outcomes = []
    if gates.max_ppl is not None:
        outcomes.append(_at_most("--max-ppl", "perplexity", result.perplexity, gates.max_ppl))
    if gates.max_ppl_increase is not None and result.baseline_perplexity is not None:
        increase = result.perplexity / result.baseline_perplexity - 1
        outcomes.append(
            _at_most("--max-ppl-increase", "relative perplexity increase", increase, gates.max_ppl_increase)
        )
    if gates.max_kl is not None and result.mean_kl is not None:
        outcomes.append(_at_most("--max-kl", "mean KL in nats per token", result.mean_kl, gates.max_kl))
    if gates.min_top1 is not None and result.top1_agreement is not None:
        value, limit = result.top1_agreement, gates.min_top1
        passed = value >= limit
        outcomes.append(
            GateOutcome(
                gate="--min-top1",
                figure="top-1 agreement",
                value=value,
                limit=limit,
                passed=passed,
                excess=0.0 if passed else limit - value,
            )
        )
    return tuple(outcomes)


def _at_most(gate: str, figure: str, value: float, limit: float) -> GateOutcome:
    passed = value <= limit
    return GateOutcome(
        gate=gate, figure=figure, value=value, limit=limit, passed=passed, excess=0.0 if passed else value - limit
    )


def require_passed(outcomes: tuple[GateOutcome, ...]) -> None:
    """Raise for the gates that were missed; the message tells value, limit and by how much, for each.

    Raises:
        GateError: at least one gate was missed.
    """
    missed = [outcome for outcome in outcomes if not outcome.passed]
    if not missed:
        return
    raise GateError(
        "quality gate " + ", ".join(outcome.gate for outcome in missed),
        expected="; ".join(f"{outcome.figure} {_bound(outcome)} {outcome.limit:.6g}" for outcome in missed),
        found="; ".join(f"{outcome.value:.6g} (missed by {outcome.excess:.6g})" for outcome in missed),
        action="Use a recipe with more bits or smaller groups, more calibration text, or agree on another limit.",
    )


def _bound(outcome: GateOutcome) -> str:
    return "at least" if outcome.gate == "--min-top1" else "at most"

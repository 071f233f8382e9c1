"""Quality gates: limits on figures of a checkpoint, for a job that must fail when it is worse than agreed.

The gates themselves are data, `optgptq.recipe.gates.GATES`. Their figures come from an evaluation (here) or from what a
job recorded (`optgptq.evaluation.record_gates`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from optgptq.errors import GateError, UsageError
from optgptq.evaluation.perplexity import EvalResult
from optgptq.recipe.gates import GATES, GateKind, GatesRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A gate that is set.

    Attributes:
        kind: what it looks at.
        limit: the agreed limit.
        asked_as: how messages call it: the option or the field that set it.

    Raises:
        UsageError: a limit without a meaning.
    """

    kind: GateKind
    limit: float
    asked_as: str

    def __post_init__(self) -> None:
        highest = self.kind.highest
        if not (math.isfinite(self.limit) and self.limit >= 0):
            raise UsageError(
                self.asked_as,
                expected="a finite number that is not negative",
                found=str(self.limit),
                action="Give a limit such as 0.02.",
            )
        if highest is not None and self.limit > highest:
            raise UsageError(
                self.asked_as,
                expected=f"a share between 0 and {highest:g}",
                found=str(self.limit),
                action="Give 0.98 for 98 percent.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a gate looks at, found.

    Attributes:
        value: may be infinite or NaN.
        where: the decoder layer or linear that it is worst in; None where it is one of the whole model.
        seconds: what it took to find it.
    """

    value: float
    where: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOutcome:
    """One gate after its figure is known, or is known to be missing.

    Attributes:
        gate: how it was asked for.
        name: its name in `GATES`.
        figure: what was measured or read, in words.
        unit: of value and limit; empty for a plain number.
        value: the figure; NaN where it is missing.
        limit: the agreed limit.
        passed: whether the value is within the limit; a value that is not a number never is.
        excess: by how much the limit is missed, in the figure's unit; 0 when it passed.
        where: the decoder layer or linear that is worst; None where the figure is one of the whole model.
        problem: why there is no figure; None where there is one.
        seconds: what it took to find the figure.
    """

    gate: str
    name: str
    figure: str
    unit: str
    value: float
    limit: float
    passed: bool
    excess: float
    where: str | None
    problem: str | None
    seconds: float

    @property
    def bound(self) -> str:
        """Which side of the limit is good, in words."""
        return GATES[self.name].bound

    @property
    def verdict(self) -> str:
        """A clause for people: value, limit, place, and by how much it is missed."""
        if self.problem is not None:
            return f"not known: {self.problem}"
        place = "" if self.where is None else f" ({self.where})"
        against = f"{self.value:.6g} against {self.limit:.6g}{place}"
        return f"passed: {against}" if self.passed else f"missed by {self.excess:.6g}: {against}"

    def record(self) -> dict[str, Any]:
        """Return it as plain values; infinities and NaN are for the writer to replace."""
        return {**asdict(self), "at_least": GATES[self.name].at_least}


def gates_of_options(texts: Iterable[str], options: Mapping[str, float | None]) -> tuple[Gate, ...]:
    """Return the gates of a command line, in the order of `GATES`.

    Args:
        texts: of `--gate`, `NAME=VALUE` each.
        options: limits by gate name, of the gates that have an option of their own; None where it is not given.

    Raises:
        UsageError: an unknown name, no number, a limit without a meaning, or a gate that is set twice.
    """
    gates = {
        name: Gate(kind=GATES[name], limit=limit, asked_as=GATES[name].option or name)
        for name, limit in options.items()
        if limit is not None
    }
    for text in texts:
        gate = _parse_gate(text)
        name = gate.kind.name
        if name in gates:
            raise UsageError(
                f"--gate {text}",
                expected="each gate once",
                found=f"{name} set as {gates[name].asked_as} too",
                action="Leave one of them out.",
            )
        gates[name] = gate
    return tuple(gates[name] for name in GATES if name in gates)


def _parse_gate(text: str) -> Gate:
    name, _, value = (part.strip() for part in text.partition("="))
    if name not in GATES:
        close = get_close_matches(name, GATES, n=1)
        raise UsageError(
            f"--gate {text}",
            expected="NAME=VALUE with one of " + ", ".join(GATES),
            found=repr(name),
            action=f"Did you mean {close[0]}?" if close else "Write --gate max_kl=0.02 for example.",
        )
    try:
        limit = float(value)
    except ValueError:
        raise UsageError(
            f"--gate {text}",
            expected=f"a number behind {name}=",
            found=repr(value),
            action=f"Write --gate {name}=0.02 for example.",
        ) from None
    return Gate(kind=GATES[name], limit=limit, asked_as=f"--gate {name}")


def gates_of_recipe(recipe: GatesRecipe) -> tuple[Gate, ...]:
    """Return the gates that a recipe sets."""
    return tuple(Gate(kind=GATES[name], limit=limit, asked_as=f"gates.{name}") for name, limit in recipe.limits.items())


def require_baseline(gates: Iterable[Gate], *, has_baseline: bool) -> None:
    """Check before any work that each gate can be computed.

    Raises:
        UsageError: a gate compares with a baseline and none is given.
    """
    comparing = [gate.asked_as for gate in gates if gate.kind.source == "comparison"]
    if comparing and not has_baseline:
        raise UsageError(
            ", ".join(comparing),
            expected="a baseline model to compare with",
            found="no --baseline",
            action="Name the dense model that the checkpoint was made from with --baseline.",
        )


def measured_figures(result: EvalResult, *, seconds: float = 0.0) -> dict[str, Figure]:
    """Return the figures of an evaluation by gate name; those that compare only where there was a baseline."""
    values = {"max_perplexity": result.perplexity, "max_kl": result.mean_kl, "min_top1": result.top1_agreement}
    if result.baseline_perplexity is not None:
        # The difference first: a limit that is reached exactly is not missed by a rounding error.
        increase = (result.perplexity - result.baseline_perplexity) / result.baseline_perplexity
        values["max_perplexity_increase"] = increase
    return {name: Figure(value=value, seconds=seconds) for name, value in values.items() if value is not None}


def judge(gates: Iterable[Gate], figures: Mapping[str, Figure | Exception]) -> tuple[GateOutcome, ...]:
    """Return an outcome for every gate; one whose figure is an error, or is not there, did not pass."""
    return tuple(_outcome(gate, figures.get(gate.kind.name)) for gate in gates)


def _outcome(gate: Gate, found: Figure | Exception | None) -> GateOutcome:
    problem = None if isinstance(found, Figure) else "it was not measured" if found is None else str(found)
    figure = found if isinstance(found, Figure) else Figure(value=math.nan)
    beyond = gate.limit - figure.value if gate.kind.at_least else figure.value - gate.limit
    passed = beyond <= 0
    return GateOutcome(
        gate=gate.asked_as,
        name=gate.kind.name,
        figure=gate.kind.figure,
        unit=gate.kind.unit,
        value=figure.value,
        limit=gate.limit,
        passed=passed,
        excess=0.0 if passed else beyond,
        where=figure.where,
        problem=problem,
        seconds=figure.seconds,
    )


def require_passed(outcomes: Iterable[GateOutcome]) -> None:
    """Raise for the gates that were missed; the message tells value, limit and by how much, for each.

    Raises:
        GateError: at least one gate was missed.
    """
    missed = [outcome for outcome in outcomes if not outcome.passed]
    if not missed:
        return
    raise GateError(
        "quality gate " + ", ".join(outcome.gate for outcome in missed),
        expected="; ".join(f"{outcome.figure} {outcome.bound} {outcome.limit:.6g}" for outcome in missed),
        found="; ".join(_missed(outcome) for outcome in missed),
        action=" ".join(dict.fromkeys(GATES[outcome.name].advice for outcome in missed)),
    )


def _missed(outcome: GateOutcome) -> str:
    if outcome.problem is not None:
        return f"no figure ({outcome.problem})"
    place = "" if outcome.where is None else f" in {outcome.where}"
    return f"{outcome.value:.6g}{place} (missed by {outcome.excess:.6g})"

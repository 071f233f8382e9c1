"""Will a target load this? The answer with every reason, and the nearest recipe that passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optgptq.errors import TargetError, UsageError
from optgptq.targets.known import Target
from optgptq.targets.refusal import Refusal
from optgptq.targets.rules import judge
from optgptq.targets.subject import TargetSubject
from optgptq.targets.suggest import Suggestion, suggest


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetAnswer:
    """What a target says to a checkpoint.

    Attributes:
        target: who was asked.
        path: the path that loads it, or comes nearest; empty where none knows the format.
        refusals: why it does not load; empty where it does.
        warnings: what a user must know.
        suggestion: changes after which it loads; None where it does, or where nothing helps.
        tensor_parallel: devices that share a linear.
    """

    target: Target
    path: str
    refusals: tuple[Refusal, ...]
    warnings: tuple[str, ...]
    suggestion: Suggestion | None
    tensor_parallel: int

    @property
    def loads(self) -> bool:
        """The target loads it."""
        return not self.refusals

    def record(self) -> dict[str, Any]:
        """Return plain values for a report."""
        return {
            "target": self.target.name,
            "loads": self.loads,
            "path": self.path or None,
            "tensor_parallel": self.tensor_parallel,
            "refusals": [refusal.record() for refusal in self.refusals],
            "warnings": list(self.warnings),
            "suggestion": None if self.suggestion is None else self.suggestion.record(),
        }

    def lines(self) -> tuple[str, ...]:
        """Return the answer for people, one sentence a line."""
        devices = f", {self.tensor_parallel} devices" if self.tensor_parallel > 1 else ""
        title = f"{self.target.title}{devices}"
        if self.loads:
            return (f"{title}: loads it", *(f"{title}: {warning}" for warning in self.warnings))
        told = [
            f"{title}: refused: {refusal.where}: expected {refusal.expected}, found {refusal.found}"
            for refusal in self.refusals
        ]
        return (*told, f"{title}: {self.advice}")

    @property
    def advice(self) -> str:
        """What to do about a refusal, a sentence."""
        if self.suggestion is None:
            return "No change of the recipe helps: choose another engine or another model."
        if self.suggestion.convert_to:
            return f"It loads after {self.suggestion.text}."
        return f"It loads with {self.suggestion.text}."


def check_target(target: Target, subject: TargetSubject, tensor_parallel: int = 1) -> TargetAnswer:
    """Return whether `target` loads `subject` shared by `tensor_parallel` devices, why not, and what would load.

    Raises:
        UsageError: fewer than one device.
    """
    if tensor_parallel < 1:
        raise UsageError(
            "--tensor-parallel",
            expected="a number of devices, 1 or more",
            found=str(tensor_parallel),
            action="Give the number of GPUs that the engine will share each linear among.",
        )
    judgement = judge(target, subject, tensor_parallel)
    refused = bool(judgement.refusals)
    return TargetAnswer(
        target=target,
        path=judgement.path,
        refusals=judgement.refusals,
        warnings=judgement.warnings,
        suggestion=suggest(target, subject, tensor_parallel) if refused else None,
        tensor_parallel=tensor_parallel,
    )


def require_loads(answers: Sequence[TargetAnswer]) -> None:
    """Raise TargetError with the first reason of the first answer that refuses, and how many there are besides."""
    refused = [answer for answer in answers if not answer.loads]
    if not refused:
        return
    first, refusal = refused[0], refused[0].refusals[0]
    others = sum(len(answer.refusals) for answer in refused) - 1
    raise TargetError(
        f"{first.target.title}, {refusal.where}" + (f" (and {others} more reasons)" if others else ""),
        expected=refusal.expected,
        found=refusal.found,
        action=first.advice,
    )

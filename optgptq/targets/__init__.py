"""Who will load a checkpoint: rules of engines as records, the check, and the nearest recipe that passes."""

from __future__ import annotations

from optgptq.targets.check import TargetAnswer, check_target, require_loads
from optgptq.targets.known import Target, known_targets, parse_target
from optgptq.targets.refusal import Refusal
from optgptq.targets.subject import Change, TargetSubject, Varied
from optgptq.targets.suggest import Suggestion

__all__ = [
    "Change",
    "Refusal",
    "Suggestion",
    "Target",
    "TargetAnswer",
    "TargetSubject",
    "Varied",
    "check_target",
    "known_targets",
    "parse_target",
    "require_loads",
]

"""Which candidates are looked at again, and what a shift must gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from optgptq.kv_cache.setup import SideParameters
from optgptq.kv_calibration.candidates import Candidate, plain_candidate
from optgptq.kv_calibration.search import _margin, _shortened


class Judge:
    """Knows the errors beforehand."""

    def __init__(self, *errors: float) -> None:
        self.errors = errors

    def attention_errors(self, quantizers: Sequence[object]) -> list[float]:
        assert len(quantizers) == len(self.errors)
        return list(self.errors)


def candidate(name: str, *, shifted: bool) -> Candidate:
    return Candidate(name=name, parameters=SideParameters(shift_KD=torch.ones(1, 8) if shifted else None))


def best_first(judge: Judge, *candidates: Candidate) -> list[str]:
    found = _shortened(cast("Any", judge), candidates, cast("Any", candidates))
    return [each.name for each in found if each is not None]


def test_a_shift_is_taken_where_it_gains_much_and_not_where_it_gains_little() -> None:
    plain, shifted = candidate("plain", shifted=False), candidate("shifted", shifted=True)
    assert best_first(Judge(1.0, 0.9), plain, shifted) == ["plain", "shifted"]
    assert best_first(Judge(1.0, 0.7), plain, shifted) == ["shifted", "plain"]
    assert (_margin(None), _margin(plain_candidate())) == (1.0, 1.0)


def test_the_worst_are_not_looked_at_again() -> None:
    many = [candidate(str(number), shifted=False) for number in range(7)]
    errors = [3.0, 1.0, 7.0, 2.0, 6.0, 5.0, 4.0]
    assert best_first(Judge(*errors), *many) == ["1", "3", "0"]

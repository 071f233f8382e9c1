"""The error of a query head's scores as a quadratic form of its queries, and the change with the least error.

A change `T f` of every query, `T` one matrix for all of them, has normal equations `sum of M_t T f_t f_t^T = ...`: too
many to form, but quick to apply. Conjugate gradients solve them, with the mean of the `M_t` and the moment of the `f_t`
as preconditioner, which would be the answer if queries and what they look at were independent.

Shapes: `T` chosen queries, `D` head dimension, `I` features that a query is made of. Float32 or float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_RIDGE = 1e-3
_STEPS = 20


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoreForm:
    """The error of one head as a quadratic form of its queries before rotation: `q M q - 2 q b + v`, summed.

    Attributes:
        metric_TDD: `M` of each chosen query.
        target_TD: `b`.
        variance: `v`, summed.
        feature_TI: what a change of the query is made of.
        query_TD: the query as it is.
    """

    metric_TDD: torch.Tensor
    target_TD: torch.Tensor
    variance: float
    feature_TI: torch.Tensor
    query_TD: torch.Tensor

    def error(self, change_DI: torch.Tensor | None = None) -> float:
        """Return the error after `q <- q + change f`."""
        query_TD = self.query_TD if change_DI is None else self.query_TD + self.feature_TI @ change_DI.T
        form = (query_TD * (_applied(self.metric_TDD, query_TD) - 2 * self.target_TD)).sum(dtype=torch.float64)
        return self.variance + float(form)

    def solve(self) -> torch.Tensor:
        """Return the change `[D, I]` with the least error and ridge."""
        feature_TI, metric_TDD = self.feature_TI, self.metric_TDD
        count = len(feature_TI)
        features_II, metric_DD = feature_TI.T @ feature_TI / count, metric_TDD.mean(0)
        features_II.diagonal().add_(_positive(1e-2 * features_II.diagonal().mean()))
        metric_DD.diagonal().add_(_positive(1e-2 * metric_DD.diagonal().mean()))
        ridge = _RIDGE * count * float(features_II.diagonal().mean() * metric_DD.diagonal().mean())
        inverses = torch.linalg.inv(metric_DD), torch.linalg.inv(features_II)
        change_DI = feature_TI.new_zeros(len(metric_DD), feature_TI.shape[1])
        residual = (self.target_TD - _applied(metric_TDD, self.query_TD)).T @ feature_TI
        step = direction = inverses[0] @ residual @ inverses[1]
        energy = (residual * step).sum()
        for _ in range(_STEPS):
            image = _applied(metric_TDD, feature_TI @ direction.T).T @ feature_TI + ridge * direction
            length = energy / _positive((direction * image).sum())
            change_DI, residual = change_DI + length * direction, residual - length * image
            step = inverses[0] @ residual @ inverses[1]
            before, energy = energy, (residual * step).sum()
            direction = step + energy / _positive(before) * direction
        return change_DI


def _applied(metric_TDD: torch.Tensor, query_TD: torch.Tensor) -> torch.Tensor:
    return (metric_TDD @ query_TD.unsqueeze(2)).squeeze(2)


def _positive(value: torch.Tensor) -> torch.Tensor:
    """Return a divisor or floor that is never zero: where nothing varies there is nothing to fit."""
    return value.clamp(min=torch.finfo(value.dtype).tiny)

"""Candidates for the keys, or values, of one decoder layer: transforms, ranges and metric made from its statistics.

Shapes: `K` heads, `T` vectors, `D` head dimension, `C` candidate ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from optgptq.kv_cache.hadamard import block_hadamard
from optgptq.kv_cache.scheme import SideScheme
from optgptq.kv_cache.setup import SideParameters
from optgptq.kv_cache.transform import transform_vectors
from optgptq.kv_calibration.ranges import chosen_ranges, even_ranges
from optgptq.kv_calibration.scales import RangeProblem, fixed_point_scale
from optgptq.kv_calibration.settings import Rounding, Transform

PLAIN = "plain"
# Vectors per head that ranges are chosen on: more change the choice less than other text does.
_RANGE_VECTORS = 1024


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SideStatistics:
    """What is known of one side.

    Attributes:
        x_KTD: float32, the reservoir.
        mass_KT: what an error of each of its vectors costs.
        metric_KDD: what an error costs by direction.
        mean_KD: of all vectors.
        partner_D: the channel whose scale must be equal.
        can_shift: a shift changes no score and no output.
    """

    x_KTD: torch.Tensor
    mass_KT: torch.Tensor
    metric_KDD: torch.Tensor
    mean_KD: torch.Tensor
    partner_D: torch.Tensor
    can_shift: bool


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Candidate:
    """One way to store a side.

    Attributes:
        name: for the record.
        parameters: for `SideCodec` and `HeadTransform`.
    """

    name: str
    parameters: SideParameters


def plain_candidate() -> Candidate:
    """Return rounding to the nearest in the range of the numbers, without any transform."""
    return Candidate(name=PLAIN, parameters=SideParameters())


def side_candidates(
    statistics: SideStatistics, scheme: SideScheme, transform: Transform, *, rounding: Rounding, max_ranges: int
) -> list[Candidate]:
    """Return all candidates of a side that is not exact, the plain one first."""
    found = [plain_candidate()]
    if scheme.axis == "token":
        # A range per channel needs no transform, and a metric says nothing about a single channel.
        parameters = SideParameters(ranges_C2=even_ranges(scheme.bits).to(statistics.mean_KD.device))
        return [*found, Candidate(name="none, nearest", parameters=parameters)]
    transforms = side_transforms(statistics, scheme, transform)
    for name, parameters in transforms.items():
        found.append(_rounded(statistics, scheme, name, parameters, rounding=rounding, max_ranges=max_ranges))
    return found


def side_transforms(statistics: SideStatistics, scheme: SideScheme, transform: Transform) -> dict[str, SideParameters]:
    """Return the transforms to try by name."""
    if transform == "none":
        return {"none": SideParameters()}
    num_heads, head_dim = statistics.mean_KD.shape
    hadamard_KDD = block_hadamard(head_dim).expand(num_heads, -1, -1).contiguous().to(statistics.mean_KD.device)
    scale_KD = _scale(statistics, scheme, shift_KD=None) if transform in ("auto", "shift_scale") else None
    shift_KD = statistics.mean_KD if statistics.can_shift else None
    found: dict[str, SideParameters] = {}
    if transform == "auto":
        found |= {"none": SideParameters(), "scale": SideParameters(scale_KD=scale_KD)}
    if transform in ("auto", "hadamard"):
        found["hadamard"] = SideParameters(rotation_KDD=hadamard_KDD)
    if transform in ("auto", "covariance"):
        found["covariance"] = SideParameters(rotation_KDD=covariance_rotation(statistics.metric_KDD))
    if transform == "auto" and shift_KD is not None:
        found["shift+hadamard"] = SideParameters(shift_KD=shift_KD, rotation_KDD=hadamard_KDD)
    if transform in ("auto", "shift_scale"):
        if shift_KD is not None:
            scale_KD = _scale(statistics, scheme, shift_KD=shift_KD)
        found["shift_scale"] = SideParameters(shift_KD=shift_KD, scale_KD=scale_KD)
    return found


def covariance_rotation(metric_KDD: torch.Tensor) -> torch.Tensor:
    """Return float32 `[K, D, D]`: eigenvectors of the metric, in bit-reversed order, then a Hadamard matrix.

    Source: OSCAR, arXiv 2605.17757: every pair of the Hadamard matrix mixes a direction that matters with one that
    does not. Where `D` is no power of two the order is kept inside each block.
    """
    vectors_KDD = torch.linalg.eigh(metric_KDD.double()).eigenvectors
    head_dim = metric_KDD.shape[1]
    block = head_dim & -head_dim
    num_bits = block.bit_length() - 1
    reverse = [sum(((place >> bit) & 1) << (num_bits - 1 - bit) for bit in range(num_bits)) for place in range(block)]
    # Strided, so that every block gets directions of all strengths.
    num_blocks = head_dim // block
    order_D = torch.tensor([place * num_blocks + start for start in range(num_blocks) for place in reverse])
    hadamard_DD = block_hadamard(head_dim).double().to(metric_KDD.device)
    return torch.matmul(vectors_KDD[:, :, order_D.to(metric_KDD.device)], hadamard_DD).float()


def stored_metric(metric_KDD: torch.Tensor, parameters: SideParameters) -> torch.Tensor:
    """Return what an error of a stored vector costs: float32, symmetric to the last bit."""
    metric = metric_KDD.double()
    if parameters.scale_KD is not None:
        scale_KD = parameters.scale_KD.double()
        metric = scale_KD.unsqueeze(2) * metric * scale_KD.unsqueeze(1)
    if parameters.rotation_KDD is not None:
        rotation_KDD = parameters.rotation_KDD.double()
        metric = torch.matmul(rotation_KDD.transpose(1, 2), torch.matmul(metric, rotation_KDD))
    stored_KDD: torch.Tensor = ((metric + metric.transpose(1, 2)) / 2).float()
    return stored_KDD


def _scale(statistics: SideStatistics, scheme: SideScheme, *, shift_KD: torch.Tensor | None) -> torch.Tensor:
    x_KTD = statistics.x_KTD if shift_KD is None else statistics.x_KTD - shift_KD.unsqueeze(1)
    return fixed_point_scale(
        RangeProblem(
            x_KTD=x_KTD,
            weight_KD=statistics.metric_KDD.diagonal(dim1=1, dim2=2),
            mass_KT=statistics.mass_KT,
            group_size=scheme.group_size,
            partner_D=statistics.partner_D,
        )
    )


def _rounded(
    statistics: SideStatistics,
    scheme: SideScheme,
    name: str,
    parameters: SideParameters,
    *,
    rounding: Rounding,
    max_ranges: int,
) -> Candidate:
    metric_KDD = stored_metric(statistics.metric_KDD, parameters)
    chosen = _sample(statistics.x_KTD.shape[1])
    stored_TKD = transform_vectors(statistics.x_KTD[:, chosen].transpose(0, 1), parameters)
    ranges_C2 = chosen_ranges(stored_TKD, metric_KDD, scheme, max_ranges=max_ranges)
    if rounding == "fitted":
        parameters = replace(parameters, metric_KDD=metric_KDD)
    return Candidate(name=f"{name}, {rounding}", parameters=replace(parameters, ranges_C2=ranges_C2))


def _sample(num_vectors: int) -> Sequence[int]:
    return torch.linspace(0, num_vectors - 1, min(_RANGE_VECTORS, num_vectors)).long().tolist()

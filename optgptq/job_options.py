"""How a job runs, beside the recipe: nothing here decides a byte of its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optgptq.calibration.disk_states import Activations
from optgptq.calibration.spill import SPILL_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What the caller of a job chooses.

    Attributes:
        restart: what an interrupted job has kept is dropped.
        activations: where activations of the calibration windows are kept between two stages.
        record: file of the run record; None for none.
        plan: what the caller predicted, for the run record; None for nothing.
        spill_share: of the time of the job that may be spent on keeping activations for a job that goes on later.
    """

    restart: bool = False
    activations: Activations = "memory"
    record: Path | None = None
    plan: Mapping[str, Any] | None = None
    spill_share: float = SPILL_SHARE

"""What a job will take, from headers and a recipe alone: memory, disk and time by phase, and what will come of it."""

from __future__ import annotations

from optgptq.planning.job_plan import JobPlan, plan_job
from optgptq.planning.machine import MachineFile
from optgptq.planning.words import essence, require_fit

__all__ = ["JobPlan", "MachineFile", "essence", "plan_job", "require_fit"]

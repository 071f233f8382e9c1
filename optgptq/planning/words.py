"""A plan in words: two or three lines for people, and the error of a job that cannot fit."""

from __future__ import annotations

from optgptq.errors import CapacityError
from optgptq.planning.job_plan import JobPlan


def require_fit(plan: JobPlan) -> None:
    """Raise CapacityError for the first thing that does not fit."""
    for shortage in plan.shortages:
        raise CapacityError(
            f"plan: {shortage.what} in phase {shortage.phase}",
            expected=f"{shortage.needed_bytes / 1e9:,.2f} GB",
            found=f"{shortage.free_bytes / 1e9:,.2f} GB free",
            action=shortage.action,
        )


def essence(plan: JobPlan) -> tuple[str, ...]:
    """Return the plan in two or three lines."""
    work, peak = plan.work, plan.peak
    bits = f", {plan.bits_per_weight:.3f} bits per weight" if plan.bits_per_weight else ""
    on_disk = "; activations on disk" if plan.activations == "disk" else ""
    device = max(phase.device_bytes for phase in plan.phases)
    on_device = f", {device / 1e9:,.2f} GB on {work.device}" if device else ""
    lines = [
        f"about {duration(plan.seconds)}, {peak.cpu_bytes / 1e9:,.2f} GB of memory at most ({peak.name})"
        f"{on_device}{on_disk}",
        f"an output of {plan.disk.output_bytes / 1e9:,.3f} GB{bits}; at most "
        f"{plan.disk.peak_bytes / 1e9:,.3f} GB on disk",
    ]
    lines += [
        f"{shortage.what} will not do in phase {shortage.phase}: {shortage.needed_bytes / 1e9:,.2f} GB needed, "
        f"{shortage.free_bytes / 1e9:,.2f} GB free"
        for shortage in plan.shortages
    ]
    return tuple(lines)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"

"""A plan in words: two or three lines for people, and the error of a job that cannot fit."""

from __future__ import annotations

from optgptq.errors import CapacityError
from optgptq.planning.job_plan import JobPlan


def require_fit(plan: JobPlan) -> None:
    """Raise CapacityError for the first thing that does not fit."""
    for shortage in plan.shortages:
        raise CapacityError(
            f"plan: {shortage.what} in phase {shortage.phase}",
            expected=told_bytes(shortage.needed_bytes),
            found=f"{told_bytes(shortage.free_bytes)} free",
            action=shortage.action,
        )


def essence(plan: JobPlan) -> tuple[str, ...]:
    """Return the plan in two or three lines."""
    work, peak = plan.work, plan.peak
    bits = f", {plan.bits_per_weight:.3f} bits per weight" if plan.bits_per_weight else ""
    on_disk = "; activations on disk" if plan.activations == "disk" else ""
    device = max(phase.device_bytes for phase in plan.phases)
    on_device = f", {told_bytes(device)} on {work.device}" if device else ""
    lines = [
        f"about {duration(plan.seconds)}, {told_bytes(peak.cpu_bytes)} of memory at most ({peak.name})"
        f"{on_device}{on_disk}",
        f"an output of {told_bytes(plan.disk.output_bytes)}{bits}; at most {told_bytes(plan.disk.peak_bytes)} on disk",
    ]
    lines += [
        f"{shortage.what} will not do in phase {shortage.phase}: {told_bytes(shortage.needed_bytes)} needed, "
        f"{told_bytes(shortage.free_bytes)} free"
        for shortage in plan.shortages
    ]
    return tuple(lines)


def told_bytes(num_bytes: int) -> str:
    """Return a size in units of 1000: MB below a GB."""
    # What rounds to 1,000.00 MB is a GB.
    return f"{num_bytes / 1e6:,.2f} MB" if num_bytes < 999_995_000 else f"{num_bytes / 1e9:,.2f} GB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"

"""What can be said about the calibration before any text is read, and who hears what about the result."""

from __future__ import annotations

from optgptq.data.lint import ADVISED_TOKEN_RATIO
from optgptq.models.inventory import model_linears
from optgptq.planning.workload import Workload
from optgptq.target_subject import subject_of_plan
from optgptq.targets import TargetSubject


def calibration_checks(work: Workload) -> tuple[str, ...]:
    """Return warnings about the calibration that a recipe asks for, in plain sentences."""
    if not work.reads_text:
        return ()
    return (*_quantity(work), *_positions(work), *_held_out(work))


def job_warnings(work: Workload) -> tuple[str, ...]:
    """Return what the job itself will say before it computes: of the format, the source and the KV cache.

    Raises:
        TargetError: the format cannot hold the result.
    """
    told = () if work.keeps_weights else work.form.check(work.layouts, scale_dtype=work.scale_dtype)
    cache = () if work.cache_plan is None else work.cache_plan.notes
    return (*told, *work.source.warnings(), *cache)


def target_subject(work: Workload) -> TargetSubject:
    """Return what engines are asked about: the checkpoint that the recipe will make."""
    return subject_of_plan(
        work.spec,
        work.recipe,
        config=work.source.tensors.config,
        weight_dtype=work.weight_dtype(work.plans[0].info.name),
    )


def _quantity(work: Workload) -> list[str]:
    widest = max(linear.in_features for linear in model_linears(work.source.original_spec))
    measured = work.num_tokens - work.num_held_out * work.window_size
    asked = f"{work.num_windows} windows of {work.window_size} tokens"
    if work.num_held_out:
        asked += f", {work.num_held_out} of them held out,"
    if measured < widest:
        return [
            f"{asked} cannot fill the Hessian of the widest linear, which has {widest} inputs; "
            f"use at least {ADVISED_TOKEN_RATIO * widest} tokens."
        ]
    if measured < ADVISED_TOKEN_RATIO * widest:
        return [
            f"{asked} are few for the Hessian of the widest linear, which has {widest} inputs; "
            f"{ADVISED_TOKEN_RATIO * widest} tokens or more are advised."
        ]
    return []


def _positions(work: Workload) -> list[str]:
    limit = work.source.original_spec.max_position
    if limit is None or work.window_size <= limit:
        return []
    return [f"Windows of {work.window_size} tokens are longer than the {limit} positions the model allows."]


def _held_out(work: Workload) -> list[str]:
    asked = work.recipe.calibration.held_out_windows
    if not work.num_held_out or work.num_held_out == asked:
        return []
    return [f"{work.num_held_out} windows are held out, a quarter of all, and not the {asked} that are asked for."]

"""Gates as a step of a job: checked before any work, judged when the result is safe, with a sample of its text.

What fails here is kept and told: the checkpoint is published by then, and nothing may take it away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import CapacityError, Interrupted, OptGPTQError
from optgptq.evaluation.decoding import CacheOptions
from optgptq.evaluation.gate_checks import check_text, evaluation_settings, require_gates_possible, require_memory
from optgptq.evaluation.gates import Figure, GateOutcome, gates_of_recipe, judge, measured_figures, require_passed
from optgptq.evaluation.record_gates import recorded_figures, stored_linears
from optgptq.evaluation.report_record import evaluation_record
from optgptq.evaluation.run import evaluate_folders
from optgptq.evaluation.sample import Sample, write_sample
from optgptq.memory import available_memory_bytes, is_out_of_memory, total_memory_bytes
from optgptq.recipe.records import Recipe
from optgptq.reports import events
from optgptq.reports.events import ProgressListener, ignore_progress
from optgptq.runtime.device import require_device

logger = logging.getLogger(__name__)

# A long evaluation is told of in about so many lines.
_TOLD_PARTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What was found of a finished checkpoint.

    Attributes:
        outcomes: one for each gate that is set.
        evaluation: figures on the text of the recipe, as `evaluation_record` gives them, and `seconds`; None without a
            text, or where the evaluation failed.
        sample: what the checkpoint wrote; None without a prompt, or where it could not write.
        warnings: everything that a user must hear about.
        failure: what kept gates from being judged; None where all were.
    """

    outcomes: tuple[GateOutcome, ...] = ()
    evaluation: dict[str, Any] | None = None
    sample: Sample | None = None
    warnings: tuple[str, ...] = ()
    failure: Exception | None = None

    def record(self) -> dict[str, Any]:
        """Return the keys `gates`, `evaluation` and `sample` of a run record; numbers may be infinite or NaN."""
        return {
            "gates": [outcome.record() for outcome in self.outcomes],
            "evaluation": self.evaluation,
            "sample": None if self.sample is None else self.sample.record(),
        }

    def require_passed(self) -> None:
        """Raise where a gate was missed, or could not be judged.

        Raises:
            GateError: at least one figure is beyond its limit; gates without a figure are named too.
            Exception: `failure`, where no gate was missed.
        """
        if self.failure is not None and all(outcome.passed or outcome.problem for outcome in self.outcomes):
            raise self.failure
        require_passed(self.outcomes)


def check_gates(recipe: Recipe, source: Path | None = None, *, device: str = "cpu") -> None:
    """Check before any work that each gate of a recipe can be judged.

    Args:
        recipe: with or without gates.
        source: folder of the dense model; with it the text is read, and memory for the evaluation is looked at.
        device: where the evaluation will run.

    Raises:
        UsageError: a gate that the recipe's own settings leave without a figure.
        TextError, InputError: the text, or the model's tokenizer, cannot be used.
        CapacityError: this machine could never hold the two models of the evaluation.
    """
    require_gates_possible(recipe)
    if source is None or recipe.gates.is_empty:
        return
    check_text(recipe.gates, source)
    if recipe.gates.text is not None:
        require_memory(source, _memory(device, is_empty=True), what="The evaluation that gates ask for")


def run_gates(
    output: Path,
    source: Path,
    recipe: Recipe,
    record: Mapping[str, Any],
    *,
    device: str = "cpu",
    progress: ProgressListener = ignore_progress,
) -> GateReport:
    """Judge a published checkpoint by the gates of its recipe, and let it write a sample; never raises what they raise.

    A checkpoint with a quantized KV cache is scored through its cache, others in full forwards.

    Args:
        output: the checkpoint.
        source: the model that it was made from; measured gates compare with it.
        recipe: of the job.
        record: content of the checkpoint's manifest.
        device: where to compute.
        progress: told of the evaluation and of the sample as they begin.

    Raises:
        Interrupted, KeyboardInterrupt: stopped on request.
    """
    gates = gates_of_recipe(recipe.gates)
    work = _Work(output=output, source=source, recipe=recipe, device=device, progress=progress)
    figures, failure = work.recorded(record)
    evaluation, measured, failed = work.evaluate()
    figures.update(measured)
    failure = failure or failed
    outcomes = judge(gates, figures)
    sample, warnings = work.write_sample()
    if evaluation is not None:
        warnings = (*evaluation["warnings"], *warnings)
    for message in warnings:
        progress(events.WarningRaised(message=message))
    missing = [outcome for outcome in outcomes if outcome.problem is not None]
    return GateReport(
        outcomes=outcomes,
        evaluation=evaluation,
        sample=sample,
        warnings=warnings,
        failure=failure if missing or failed else None,
    )


_Found = dict[str, Figure | Exception]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The parts of `run_gates`, each of which gives what kept it from being done in place of raising it."""

    output: Path
    source: Path
    recipe: Recipe
    device: str
    progress: ProgressListener

    def recorded(self, record: Mapping[str, Any]) -> tuple[_Found, Exception | None]:
        """Return the figures of gates that need no model to run, and the first failure among them."""
        gates = [gate for gate in gates_of_recipe(self.recipe.gates) if not gate.kind.is_measured]
        if not gates:
            return {}, None
        try:
            figures: _Found = dict(recorded_figures(gates, record, stored_linears(CheckpointFolder.open(self.output))))
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - see BROAD_HANDLERS of tests/test_architecture.py
            return {gate.kind.name: _told(error) for gate in gates}, error
        return figures, next((figure for figure in figures.values() if isinstance(figure, Exception)), None)

    def evaluate(self) -> tuple[dict[str, Any] | None, _Found, Exception | None]:
        """Return the evaluation as a record, the figures of measured gates, and what kept it from being done."""
        wanted = self.recipe.gates
        if wanted.text is None:
            return None, {}, None
        self.progress(events.PhaseStarted(name="evaluation", detail=wanted.text))
        measured = [gate.kind.name for gate in gates_of_recipe(wanted) if gate.kind.is_measured]
        began = time.perf_counter()
        try:
            require_memory(self.source, _memory(self.device, is_empty=False), what="The evaluation that gates ask for")
            report = evaluate_folders(
                self.output,
                evaluation_settings(wanted, decoding=CacheOptions() if self.recipe.kv_cache.is_quantized else None),
                baseline=self.source,
                device=require_device(self.device),
                progress=self._window_listener(),
            )
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - see BROAD_HANDLERS of tests/test_architecture.py
            logger.warning("the evaluation of %s failed: %s", self.output.name, error)
            told = _told(error)
            return None, dict.fromkeys(measured, told), told
        seconds = time.perf_counter() - began
        figures: _Found = dict(measured_figures(report.result, seconds=seconds / max(len(measured), 1)))
        return {**evaluation_record(report), "seconds": seconds}, figures, None

    def _window_listener(self) -> Callable[[int, int], None]:
        """Return a listener to windows that tells of each tenth of them, once."""
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            part = done * _TOLD_PARTS // total
            if part > told:
                told = part
                self.progress(events.PhaseStarted(name="evaluation", detail=f"window {done}/{total}"))

        return tell

    def write_sample(self) -> tuple[Sample | None, tuple[str, ...]]:
        """Return what the checkpoint writes, and what a user must hear about it."""
        wanted = self.recipe.gates
        if wanted.sample_prompt is None:
            return None, ()
        self.progress(events.PhaseStarted(name="sample", detail=f"{wanted.sample_tokens} tokens"))
        try:
            sample = write_sample(self.output, wanted.sample_prompt, wanted.sample_tokens, device=self.device)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - see BROAD_HANDLERS of tests/test_architecture.py
            return None, (f"sample: the checkpoint wrote no text: {type(error).__name__}: {error}",)
        return sample, sample.warnings


def _told(error: Exception) -> Exception:
    """Return the error as a user is told of it: where memory ran out, that."""
    if isinstance(error, OptGPTQError) or not is_out_of_memory(error):
        return error
    return CapacityError(
        "evaluation of the finished checkpoint",
        expected="memory for the checkpoint and its source model, decoded",
        found=str(error).partition("\n")[0] or type(error).__name__,
        action="The checkpoint is complete: run `optgptq eval` with these gates on a machine with more memory.",
    )


def _memory(device: str, *, is_empty: bool) -> int | None:
    """Return the bytes that models may take on a device: all that it has, or what is left of them; None: unknown."""
    where = require_device(device)
    if where.type != "cpu":
        free, total = torch.cuda.mem_get_info(where)
        return int(total if is_empty else free)
    return total_memory_bytes() if is_empty else available_memory_bytes()

"""An evaluation as plain values: what `optgptq eval --json` prints and what a run record holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from optgptq.evaluation.run import EvaluationReport


def evaluation_record(report: EvaluationReport) -> dict[str, Any]:
    """Return everything of a report but its notes; perplexities may be infinite."""
    cache = report.cache
    return {
        **asdict(report.result),
        "window_size": report.window_size,
        "num_windows": report.num_windows,
        "remainder_tokens": report.remainder_tokens,
        "tokens_sha256": report.tokens_sha256,
        "warnings": list(report.warnings),
        **({} if cache is None else {"decode": True, "kv_cache": {"bits": cache.bits, **asdict(cache)}}),
    }

"""Binary codes beside uniform grids and beside GPTQT as published: bits, layer loss, mean KL and perplexity.

Trials are kept as they finish: a run that was killed goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.cases import EVALUATION_TOKENS, NUM_WINDOWS, REPOSITORY, Case, chosen_cases
from measure.machine import commit
from measure.process import BenchmarkError
from measure.report import Report, finish, new_parser
from measure.trials import HeldOutText, Trial, TrialStore, trial_key

from optgptq.recipe.loading import load_recipe

COLUMNS = (
    "model",
    "bits",
    "recipe",
    "bits per weight",
    "layer loss",
    "mean KL",
    "to plain uniform",
    "to best uniform",
    "perplexity",
    "seconds",
)
QUICK_WINDOWS = 8
QUICK_TOKENS = 4096
PUBLISHED, UNSHIFTED, ONE_SIDED = "GPTQT as published", "binary, no shift", "binary"
REFINED = {"weights.scale_refit": True, "weights.code_sweeps": 2}
SHIFTED = {"weights.target_shift": "exact"}
# Of the uniform grid's KL: what binary codes of as many bits must not exceed.
AIMS = {2: 0.6, 3: 0.8}
OFF = {"weights.target_shift": "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: a shipped recipe and what is changed in it."""

    name: str
    recipe: str
    settings: Mapping[str, Any]

    @property
    def is_shifted(self) -> bool:
        """Say whether targets make up for earlier errors: then the best uniform grid's do as well."""
        return load_recipe(self.recipe, _overrides(self.settings)).weights.target_shift != "off"


def compared(bits: int, case: Case) -> Iterator[Variant]:
    """Yield the rows that every model has. Uniform grids have 16-bit scales, whatever the model is stored in.

    Narrow groups of `down_proj` bring symmetric grids to the bits of the binary codes, or above.
    """
    by_row = case.name == "babyllama-105"
    uniform: dict[str, Any] = {"export.format": "gptq_v2", "weights.group_size": 32 if by_row else 64}
    for label, symmetric in (("symmetric", True), ("asymmetric", False)):
        grid = {**uniform, "weights.symmetric": symmetric}
        if symmetric and not by_row:
            grid["weights.rules"] = "[{match: down_proj, group_size: 32}]"
        yield Variant(name=f"uniform, {label}", recipe=f"gptq-w{bits}", settings=grid)
        yield Variant(name=f"uniform, {label}, refined", recipe=f"gptq-w{bits}", settings={**grid, **REFINED})
        yield Variant(
            name=f"uniform, {label}, refined, shifted", recipe=f"gptq-w{bits}", settings={**grid, **REFINED, **SHIFTED}
        )
    yield Variant(name=PUBLISHED, recipe=f"gptqt-w{bits}", settings={})
    groups: dict[str, Any] = {"weights.group_size": -1 if by_row else 128}
    if bits == 3 and not by_row:
        groups["weights.rules"] = "[{match: down_proj, group_size: -1}]"
    yield Variant(name=UNSHIFTED, recipe=f"binary-w{bits}", settings={**groups, **OFF})
    yield Variant(name=ONE_SIDED, recipe=f"binary-w{bits}", settings=groups)
    yield Variant(name="attention-aware binary", recipe=f"attention-aware-binary-w{bits}", settings=groups)


def steps(bits: int) -> Iterator[Variant]:
    """Yield from the plainest grid to the whole solver, one change at a time, all without a target shift."""
    for search in ("minmax", "mse", "pivot", "walk"):
        settings = {"weights.group_size": 128, "weights.grid_search": search}
        yield Variant(name=f"uniform g128, {search}", recipe=f"gptq-w{bits}", settings=settings)
    refined = {"weights.group_size": 64, "weights.scale_refit": True, "weights.code_sweeps": 2}
    yield Variant(name="uniform g64, walk, refined", recipe=f"gptq-w{bits}", settings=refined)
    binary = {**OFF, "binary.uniform_start": False, "binary.refits": 0, "binary.sweeps": 0}
    for weighting in ("none", "diagonal", "pivot"):
        changed = {**binary, "binary.coefficients": "float", "binary.weighting": weighting}
        yield Variant(name=f"search, weighting {weighting}", recipe=f"binary-w{bits}", settings=changed)
    grown: dict[str, Any] = {**binary, "binary.coefficients": "float"}
    for name, change in (
        ("+ refits", {"binary.refits": 3}),
        ("+ uniform start", {"binary.uniform_start": True}),
        ("+ sweeps", {"binary.sweeps": 2}),
        ("+ coefficients in bytes", {"binary.coefficients": "int8"}),
        ("one shape per row instead", {"binary.coefficients": "steps"}),
    ):
        grown |= change
        yield Variant(name=name, recipe=f"binary-w{bits}", settings=dict(grown))


def main() -> int:
    """Run the trials that the command line asks for, and show them."""
    parser = new_parser(__doc__)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="folder of further models")
    parser.add_argument("--models", nargs="+", help="names of models; default: all that are present")
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3), default=[2, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the choice of windows")
    parser.add_argument("--steps", action="store_true", help="the solver step by step, in place of the comparison")
    arguments = parser.parse_args()
    name = "binary-steps" if arguments.steps else "binary"
    report = Report(name=name, title="Binary codes", columns=COLUMNS)
    store = TrialStore(arguments.work / "binary-trials.jsonl")
    for case in chosen_cases(arguments, parser, report.notes):
        text = HeldOutText(case, max_tokens=QUICK_TOKENS if arguments.quick else EVALUATION_TOKENS)
        report.notes.append(f"Dense perplexity of {case.name}: {text.dense_perplexity:.4f}.")
        for bits in arguments.bits:
            variants = list(steps(bits) if arguments.steps else compared(bits, case))
            trials = {each.name: _run(text, bits, each, store, arguments) for each in variants}
            _fill(report, case, variants, trials, bits=bits)
    report.notes += [
        f"Seeds {', '.join(map(str, arguments.seeds))}; KL in nats per token: mean, and smallest to largest "
        "seed. Bits count codes, coefficients or scales of 16 bits, and the zero points of asymmetric grids.",
        "The plain uniform grid is the better of symmetric and asymmetric, its range searched; the best one may be "
        "refined as well, and shifted where the row is.",
        "Layer loss is the sum over linears of the share of its output's energy that each loses; it compares rows "
        "without a target shift only. Seconds are the median, on a machine that may have done other work.",
    ]
    return finish(report, arguments)


def _run(
    text: HeldOutText, bits: int, variant: Variant, store: TrialStore, arguments: argparse.Namespace
) -> list[Trial]:
    trials = []
    for seed in arguments.seeds:
        settings = {
            "calibration.source": text.case.calibration,
            "calibration.window_size": text.case.window_size,
            "calibration.num_windows": QUICK_WINDOWS if arguments.quick else NUM_WINDOWS,
            "calibration.seed": seed,
            **variant.settings,
        }
        recipe = load_recipe(variant.recipe, _overrides(settings))
        key = trial_key(recipe, text.sha256, text.case.name)
        trial = store.find(key)
        if trial is None:
            trial = text.run(recipe, key=key, commit=commit(), grid=f"W{bits}", variant=variant.name)
            store.add(trial)
            print(f"{text.case.name}, W{bits}, {variant.name}, seed {seed}: KL {trial.mean_kl:.5f}", file=sys.stderr)
        trials.append(trial)
    return trials


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
    return [f"{key}={text}" for key, text in texts.items()]


def _fill(
    report: Report, case: Case, variants: Sequence[Variant], trials: Mapping[str, list[Trial]], *, bits: int
) -> None:
    uniform = {each.name: _mean_kl(trials[each.name]) for each in variants if each.recipe.startswith("gptq-")}
    plain = (
        min(uniform[name] for name in ("uniform, symmetric", "uniform, asymmetric")) if PUBLISHED in trials else None
    )
    if plain is not None:
        _require_bits(f"{case.name}, {bits} bits", trials)
    for variant in variants:
        each = trials[variant.name]
        kl = _mean_kl(each)
        rivals = [uniform[rival.name] for rival in variants if rival.name in uniform]
        if not variant.is_shifted:
            rivals = [uniform[one.name] for one in variants if one.name in uniform and not one.is_shifted]
        ratios = () if plain is None else (kl / plain, kl / min(rivals))
        report.rows.append([case.name, str(bits), variant.name, *_cells(each, ratios)])
        report.details += [dataclasses.asdict(trial) for trial in each]
        if variant.name in (ONE_SIDED, UNSHIFTED):
            _judge(report, f"{case.name}, {bits} bits, {variant.name}", ratios, AIMS[bits])
    if PUBLISHED in trials and _mean_kl(trials[ONE_SIDED]) >= _mean_kl(trials[PUBLISHED]):
        report.missed.append(f"{case.name}, {bits} bits: not better than GPTQT as published.")


def _cells(trials: Sequence[Trial], ratios: Sequence[float]) -> list[str]:
    kls = [trial.mean_kl for trial in trials]
    spread = f" ({min(kls):.4f} to {max(kls):.4f})" if len(kls) > 1 else ""
    return [
        f"{trials[0].bits_per_weight:.3f}",
        f"{statistics.fmean(trial.layer_loss for trial in trials):.3f}",
        f"{statistics.fmean(kls):.4f}{spread}",
        *([f"{ratio:.3f}" for ratio in ratios] or ["", ""]),
        f"{statistics.fmean(trial.perplexity for trial in trials):.3f}",
        f"{statistics.median(trial.seconds for trial in trials):.1f}",
    ]


def _require_bits(where: str, trials: Mapping[str, list[Trial]]) -> None:
    """Raise where binary codes have more bits than the uniform grid with most."""
    most = max(each[0].bits_per_weight for name, each in trials.items() if name.startswith("uniform"))
    for name in (UNSHIFTED, ONE_SIDED):
        if trials[name][0].bits_per_weight > most:
            raise BenchmarkError(f"{where}: {name} has {trials[name][0].bits_per_weight} bits, uniform grids {most}")


def _judge(report: Report, where: str, ratios: Sequence[float], aim: float) -> None:
    for ratio, what in zip(ratios, ("the plain uniform grid's", "the best uniform grid's"), strict=True):
        if ratio > aim:
            report.missed.append(f"{where}: {ratio:.3f} times {what} KL; aim {aim}.")


def _mean_kl(trials: list[Trial]) -> float:
    return statistics.fmean(trial.mean_kl for trial in trials)


if __name__ == "__main__":
    sys.exit(main())

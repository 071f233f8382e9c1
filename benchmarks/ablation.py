"""Every part of the attention-aware recipes, alone and together: layer loss, mean KL, perplexity and seconds.

Rows of one model and grid store the same number of bits for the same weights, or there is no table. Trials are kept as
they finish: a run that was killed goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure.cases import EVALUATION_TOKENS, NUM_WINDOWS, REPOSITORY, Case, chosen_cases
from measure.machine import commit
from measure.parts import PARTS, PLAIN, STACK, Variant, variant_recipe, variants
from measure.process import BenchmarkError
from measure.report import Report, finish, markdown, new_parser
from measure.tools import Grid
from measure.trials import HeldOutText, Trial, TrialStore, trial_key

from optgptq.errors import OptGPTQError

COLUMNS = (
    "model",
    "grid",
    "bits per weight",
    "recipe",
    "layer loss",
    "mean KL",
    "to plain",
    "perplexity",
    "seconds",
    "seconds to plain",
)
QUICK_WINDOWS = 8
QUICK_TOKENS = 4096
# Of plain GPTQ's KL, by bits: what the whole stack must not exceed.
GROUPED_AIMS = {2: 0.5, 3: 0.55, 4: 0.65}
ROW_AIMS = {2: 0.4, 3: 0.5, 4: 0.6}
# Standard errors of the difference by seed that count as noise.
NOISE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The rows of one model and grid: `trials` by variant, one per seed."""

    case: Case
    grid: Grid
    trials: dict[str, tuple[Trial, ...]]


def main() -> int:
    """Run the trials that the command line asks for, and show them."""
    parser = new_parser(__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="folder of further models")
    parser.add_argument("--models", nargs="+", help="names of models; default: all that are present")
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[4, 3, 2])
    parser.add_argument("--groups", nargs="+", choices=("grouped", "row"), default=["grouped", "row"])
    parser.add_argument("--grids", nargs="+", choices=("symmetric", "asymmetric"), default=["symmetric"])
    parser.add_argument("--parts", nargs="*", choices=names, default=names, help="default: all; none: only the stack")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the choice of windows")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="settings", help="for all")
    parser.add_argument("--table-only", action="store_true", help="show what was run before; run nothing")
    arguments = parser.parse_args()
    report = Report(name="ablation", title="Parts of the attention-aware recipes", columns=COLUMNS)
    store = TrialStore(arguments.work / "ablation-trials.jsonl")
    for case in chosen_cases(arguments, parser, report.notes):
        text = HeldOutText(case, max_tokens=QUICK_TOKENS if arguments.quick else EVALUATION_TOKENS)
        report.notes.append(f"Dense perplexity of {case.name}: {text.dense_perplexity:.4f}.")
        for grid in _grids(case, arguments):
            _fill(report, _run_block(text, grid, store, arguments, report), arguments)
    _explain(report, arguments)
    status = finish(report, arguments)
    (arguments.work / "ablation.md").write_text(markdown(report), "utf-8")
    return status


def _grids(case: Case, arguments: argparse.Namespace) -> Iterator[Grid]:
    for bits, group_size in case.codes:
        for groups in arguments.groups if bits in arguments.bits else ():
            for kind in arguments.grids:
                size = -1 if groups == "row" else group_size
                yield Grid(bits=bits, group_size=size, symmetric=kind == "symmetric")


def _run_block(
    text: HeldOutText, grid: Grid, store: TrialStore, arguments: argparse.Namespace, report: Report
) -> Block:
    trials: dict[str, tuple[Trial, ...]] = {}
    for variant in variants(grid.bits, arguments.parts):
        found = [_run_trial(text, grid, variant, seed, store, arguments, report) for seed in arguments.seeds]
        finished = tuple(trial for trial in found if trial is not None)
        if len(finished) == len(found):
            trials[variant.name] = finished
    return Block(case=text.case, grid=grid, trials=trials)


def _run_trial(
    text: HeldOutText,
    grid: Grid,
    variant: Variant,
    seed: int,
    store: TrialStore,
    arguments: argparse.Namespace,
    report: Report,
) -> Trial | None:
    """Return the trial, run now or before; None where it was refused, or is not to be run."""
    settings = {
        "calibration.source": text.case.calibration,
        "calibration.window_size": text.case.window_size,
        "calibration.num_windows": QUICK_WINDOWS if arguments.quick else NUM_WINDOWS,
        "calibration.seed": seed,
        **dict(setting.split("=", 1) for setting in arguments.settings),
    }
    recipe = variant_recipe(variant, grid, settings)
    key = trial_key(recipe, text.sha256, text.case.name)
    trial = store.find(key)
    if trial is not None or arguments.table_only:
        return trial
    label = f"{text.case.name}, {_grid_label(grid)}, {variant.name}"
    try:
        trial = text.run(recipe, key=key, commit=commit(), grid=_grid_label(grid), variant=variant.name)
    except OptGPTQError as error:
        report.missed.append(f"{label}, seed {seed} was refused: {error}")
        return None
    store.add(trial)
    print(f"{label}, seed {seed}: KL {trial.mean_kl:.5f} in {trial.seconds:.1f} s", file=sys.stderr, flush=True)
    return trial


def _fill(report: Report, block: Block, arguments: argparse.Namespace) -> None:
    _require_equal_bits(block)
    plain = block.trials.get(PLAIN)
    for name, trials in block.trials.items():
        bits = f"{trials[0].bits_per_weight:.4f}"
        report.rows.append([block.case.name, _grid_label(block.grid), bits, *_cells(name, trials, plain)])
        report.details += [dataclasses.asdict(trial) for trial in trials]
        if plain is not None and not arguments.quick:
            differences = [ours.mean_kl - theirs.mean_kl for ours, theirs in zip(trials, plain, strict=True)]
            _judge(report, block, name, differences)


def _cells(name: str, trials: Sequence[Trial], plain: Sequence[Trial] | None) -> list[str]:
    kls = [trial.mean_kl for trial in trials]
    spread = f" ({min(kls):.5f} to {max(kls):.5f})" if len(kls) > 1 else ""
    seconds = statistics.median(trial.seconds for trial in trials)
    return [
        name,
        f"{statistics.fmean(trial.layer_loss for trial in trials):.4f}",
        f"{statistics.fmean(kls):.5f}{spread}",
        "" if plain is None else f"{statistics.fmean(kls) / _mean_kl(plain):.3f}",
        f"{statistics.fmean(trial.perplexity for trial in trials):.4f}",
        f"{seconds:.1f}",
        "" if plain is None else f"{seconds / statistics.median(trial.seconds for trial in plain):.1f}",
    ]


def _judge(report: Report, block: Block, name: str, differences: Sequence[float]) -> None:
    """Add what is missed: the stack's aim, or a part that alone makes the model worse by more than noise."""
    ratio = 1 + statistics.fmean(differences) / _mean_kl(block.trials[PLAIN])
    place = f"{block.case.name}, {_grid_label(block.grid)}"
    aim = (ROW_AIMS if block.grid.group_size == -1 else GROUPED_AIMS)[block.grid.bits]
    if name == STACK and ratio > aim:
        report.missed.append(f"{place}: the stack has {ratio:.3f} times plain GPTQ's KL; aim {aim:g}.")
    if not name.endswith(" alone") or len(differences) < 2:
        return
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if statistics.fmean(differences) > NOISE * error:
        report.missed.append(f"{place}: {name} makes it worse, {ratio:.3f} times plain GPTQ's KL.")


def _grid_label(grid: Grid) -> str:
    return grid.label.replace("g-1", "per row")


def _mean_kl(trials: Sequence[Trial]) -> float:
    return statistics.fmean(trial.mean_kl for trial in trials)


def _require_equal_bits(block: Block) -> None:
    found = {
        (trial.bits_per_weight, trial.num_quantized_weights) for trials in block.trials.values() for trial in trials
    }
    if len(found) > 1:
        raise BenchmarkError(
            f"{block.case.name}, {_grid_label(block.grid)}: bits and numbers of weights differ: {found}"
        )


def _explain(report: Report, arguments: argparse.Namespace) -> None:
    windows = QUICK_WINDOWS if arguments.quick else NUM_WINDOWS
    tokens = QUICK_TOKENS if arguments.quick else EVALUATION_TOKENS
    report.notes += [
        f"{windows} calibration windows (fewer where the text ends first), seeds "
        f"{', '.join(map(str, arguments.seeds))}; KL in nats per token over the first {tokens:,} tokens of "
        "bundled:story-evaluation: mean, and smallest to largest seed. Seconds are the median, on a machine that may "
        "have done other work.",
        "Layer loss is the sum over linears of the share of its output's energy that each loses, on the calibration "
        "text and against its own target: it compares recipes only where their targets and inputs are the same.",
        f"A part alone counts as worse where the mean difference by seed is over {NOISE:g} standard errors.",
    ]
    report.notes += [f"All ran with {setting}." for setting in arguments.settings]
    commits = sorted({detail["commit"] for detail in report.details})
    if len(commits) > 1:
        report.notes.append(f"Trials of more than one commit: {', '.join(commits)}.")


if __name__ == "__main__":
    sys.exit(main())

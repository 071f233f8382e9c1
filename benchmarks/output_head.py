"""The output head in codes beside the dense one, everything else equal: mean KL, perplexity, bytes read for a token.

Trials are kept as they finish: a run that was killed goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure.cases import EVALUATION_TOKENS, NUM_WINDOWS, REPOSITORY, Case, chosen_cases
from measure.machine import commit
from measure.report import Report, finish, new_parser
from measure.trials import HeldOutText, Trial, TrialStore, trial_key

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.models.registry import model_spec
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.records import Recipe

COLUMNS = (
    "model",
    "head",
    "mean KL",
    "to dense head",
    "perplexity",
    "head, bytes",
    "of all read for a token",
    "read, to dense head",
    "seconds",
)
QUICK_WINDOWS = 8
QUICK_TOKENS = 4096
# Of an 8-bit head: what it may add to the KL of the same model with a dense head.
MOST_ADDED_KL = 0.02


@dataclass(frozen=True, slots=True)
class Head:
    """How the head is quantized; None: not at all."""

    bits: int | None
    method: str = "gptq"
    group_size: int | None = None

    @property
    def label(self) -> str:
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return "dense" if self.bits is None else f"{self.bits} bits, {self.method}{groups}"


HEADS = (Head(None), Head(8, "rtn"), Head(8), Head(4, "rtn"), Head(4), Head(4, "gptq", 32))


def main() -> int:
    """Run the trials that the command line asks for, and show them."""
    parser = new_parser(__doc__)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="folder of further models")
    parser.add_argument("--models", nargs="+", help="names of models; default: all that are present")
    parser.add_argument("--recipe", default="gptq-w4", help="of everything but the head")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the choice of windows")
    arguments = parser.parse_args()
    report = Report(name="output-head", title="The output head in codes", columns=COLUMNS)
    store = TrialStore(arguments.work / "output-head-trials.jsonl")
    for case in chosen_cases(arguments, parser, report.notes):
        text = HeldOutText(case, max_tokens=QUICK_TOKENS if arguments.quick else EVALUATION_TOKENS)
        report.notes.append(f"Dense perplexity of {case.name}: {text.dense_perplexity:.4f}.")
        trials = {head: [_run(text, head, seed, store, arguments) for seed in arguments.seeds] for head in HEADS}
        _fill(report, case, trials, arguments)
    report.notes += [
        f"Recipe {arguments.recipe}, {len(arguments.seeds)} choices of windows: means, smallest to largest KL. Groups "
        "of the head are those of the other codes where none are named.",
        "Bytes are codes and scales of all linears of the decoder layers, and the head: what a token that is written "
        "reads of the weights. A head that shares the embedding's tensor becomes one more tensor of the file.",
    ]
    return finish(report, arguments)


def _recipe(case: Case, head: Head, seed: int, arguments: argparse.Namespace) -> Recipe:
    settings = {
        "calibration.source": case.calibration,
        "calibration.window_size": case.window_size,
        "calibration.num_windows": QUICK_WINDOWS if arguments.quick else NUM_WINDOWS,
        "calibration.seed": seed,
        "weights.group_size": case.codes[0][1],
    }
    if head.bits is not None:
        settings |= {"head.bits": head.bits, "head.method": head.method}
    if head.group_size is not None:
        settings["head.group_size"] = head.group_size
    return load_recipe(arguments.recipe, [f"{name}={value}" for name, value in settings.items()])


def _run(text: HeldOutText, head: Head, seed: int, store: TrialStore, arguments: argparse.Namespace) -> Trial:
    recipe = _recipe(text.case, head, seed, arguments)
    key = trial_key(recipe, text.sha256, text.case.name)
    trial = store.find(key)
    if trial is None:
        trial = text.run(recipe, key=key, commit=commit(), grid=arguments.recipe, variant=head.label)
        store.add(trial)
        told = f"{text.case.name}, head {head.label}, seed {seed}: KL {trial.mean_kl:.5f} in {trial.seconds:.1f} s"
        print(told, file=sys.stderr, flush=True)
    return trial


def _fill(report: Report, case: Case, trials: dict[Head, list[Trial]], arguments: argparse.Namespace) -> None:
    dense_head = _dense_bytes(case)
    plain = trials[Head(None)]
    linears = _code_bytes(plain[0])
    for head, found in trials.items():
        size = dense_head if head.bits is None else _code_bytes(found[0]) - linears
        ratio = _mean_kl(found) / _mean_kl(plain)
        kls = [trial.mean_kl for trial in found]
        read = linears + size
        report.rows.append(
            [
                case.name,
                head.label,
                f"{_mean_kl(found):.5f} ({min(kls):.5f} to {max(kls):.5f})",
                f"{ratio:.3f}",
                f"{statistics.fmean(trial.perplexity for trial in found):.4f}",
                f"{size:,.0f}",
                f"{100 * size / read:.0f} %",
                f"{read / (linears + dense_head):.3f}",
                f"{statistics.median(trial.seconds for trial in found):.1f}",
            ]
        )
        report.details += [dataclasses.asdict(trial) for trial in found]
        if head == Head(8) and ratio > 1 + MOST_ADDED_KL and not arguments.quick:
            report.missed.append(f"{case.name}: an 8-bit head has {ratio:.3f} times the KL; aim {1 + MOST_ADDED_KL:g}.")


def _dense_bytes(case: Case) -> float:
    """Return the bytes of the dense head as the model stores it."""
    folder = CheckpointFolder.open(case.model)
    spec = model_spec(folder)
    names = (f"{name}.weight" for name in (spec.names.head, spec.names.embedding))
    return next(folder.info(name).num_bytes for name in names if name in folder.tensors)


def _code_bytes(trial: Trial) -> float:
    return trial.bits_per_weight * trial.num_quantized_weights / 8


def _mean_kl(trials: Sequence[Trial]) -> float:
    return statistics.fmean(trial.mean_kl for trial in trials)


if __name__ == "__main__":
    sys.exit(main())

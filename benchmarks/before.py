"""Seconds of quantizing the bundled model, at this commit and at an earlier one, in turns."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from measure.cases import REPOSITORY
from measure.process import run_measured
from measure.report import Report, finish, median_and_spread, new_parser

# The last commit before products, leaves and attention of a running model were compiled.
BEFORE = "97dc6b6"
RECIPES = ("gptq-w4", "attention-aware-w4", "gptqt-w3", "binary-w3")
TEXTS = ("self", "bundled:story-calibration")
AIM = 2.0
PACKAGES = {"optgptq": "optgptq", "cli": "optgptq_cli", "configs": "optgptq_configs"}


def main() -> int:
    """Time both versions with the same recipes and texts."""
    parser = new_parser(__doc__)
    parser.add_argument("--commit", default=BEFORE, help="the earlier version; default: %(default)s")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    work = arguments.work / "before"
    trees = {"before": _earlier(arguments.commit, work / "tree"), "now": REPOSITORY}
    paths = {name: _packages(tree, work / f"packages-{name}") for name, tree in trees.items()}
    report = Report(
        name="before-and-now",
        title="Quantizing the bundled model, before and now",
        columns=("recipe", "calibration text", "before s", "now s", "times as fast"),
        notes=[
            f"`optgptq quantize bundled:story-llama` as a command, from its start to its end; before: commit "
            f"{arguments.commit}, built the same way. Median and spread over {arguments.rounds} rounds, in turns; the "
            f"quotient is the median of those of the rounds. Either has its bytecode, and from its second run on what "
            f"it measured of the machine. The aim is {AIM:g}."
        ],
    )
    recipes, rounds = (arguments.recipes[:1], 1) if arguments.quick else (arguments.recipes, arguments.rounds)
    for recipe in recipes:
        for text in arguments.texts:
            seconds = _in_turns(paths, recipe, text, rounds, work)
            gains = [before / now for before, now in zip(seconds["before"], seconds["now"], strict=True)]
            cells = [median_and_spread(seconds["before"], 1), median_and_spread(seconds["now"], 1)]
            report.rows.append([recipe, text, *cells, median_and_spread(gains)])
            report.details.append({"recipe": recipe, "text": text, **seconds})
            if statistics.median(gains) < AIM:
                report.missed.append(f"{recipe}, {text}: {statistics.median(gains):.2f} times; the aim is {AIM:g}.")
    return finish(report, arguments)


def _earlier(commit: str, tree: Path) -> Path:
    """Return a folder with that commit, its native library built."""
    shutil.rmtree(tree, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "checkout", "--quiet", commit], check=True)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, check=True)
    return tree


def _packages(tree: Path, folder: Path) -> Path:
    """Return a folder whose packages are those of a repository, under the names that they are installed by.

    Their bytecode is there, as an installation has it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for source, name in PACKAGES.items():
        shutil.copytree(tree / source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=True)
    return folder


def _in_turns(paths: dict[str, Path], recipe: str, text: str, rounds: int, work: Path) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds):
        for name, path in paths.items():
            words = ["quantize", "bundled:story-llama", "-r", recipe, "--set", f"calibration.source={text}"]
            command = [sys.executable, "-c", "from optgptq_cli.main import run; run()", *words]
            command += ["-o", str(work / f"{name}.out"), "--overwrite", "--quiet"]
            log = work / f"{name}-{recipe}-{number}.log"
            # Either keeps what it measured of this machine.
            environment = {"PYTHONPATH": str(path), "XDG_CACHE_HOME": str(work / f"cache-{name}")}
            seconds[name].append(run_measured(command, log, environment=environment).seconds)
    return seconds


if __name__ == "__main__":
    sys.exit(main())

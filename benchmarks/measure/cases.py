"""Models and texts that tools are compared on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optgptq.bundled import bundled_path

REPOSITORY = Path(__file__).resolve().parents[2]
EVALUATION_TOKENS = 20_000
NUM_WINDOWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, the text it is calibrated on, and the text it is scored on.

    Attributes:
        name: of the model.
        model: folder of the dense model.
        calibration, evaluation: texts as `calibration.source` and `--text` name them.
        window_size: tokens per window of both.
        codes: pairs of bits and group size.
    """

    name: str
    model: Path
    calibration: str
    evaluation: str
    window_size: int
    codes: tuple[tuple[int, int], ...]

    @property
    def is_present(self) -> bool:
        return (self.model / "config.json").is_file()


def quality_cases(shared: Path) -> tuple[Case, ...]:
    """Return the bundled model and two trained by others, which lie in `shared` and are not part of the project."""
    tiny_stories = str(shared / "text" / "tiny-stories.txt")
    return (
        story_llama(),
        Case(
            name="babyllama-105",
            model=shared / "models" / "babyllama-105",
            calibration=tiny_stories,
            evaluation="bundled:story-evaluation",
            window_size=256,
            # Its feed-forward of 352 divides by 32 and by nothing larger that is usual.
            codes=((4, 32), (3, 32), (2, 32)),
        ),
        Case(
            name="tinystories-656k",
            model=shared / "models" / "tinystories-656k",
            calibration=tiny_stories,
            evaluation="bundled:story-evaluation",
            window_size=512,
            codes=((4, 128), (3, 128), (2, 64)),
        ),
    )


def story_llama() -> Case:
    """Return the bundled model with the bundled texts."""
    return Case(
        name="story-llama",
        model=bundled_path("story-llama"),
        calibration="bundled:story-calibration",
        evaluation="bundled:story-evaluation",
        window_size=512,
        codes=((4, 128), (3, 128), (2, 64)),
    )


def chosen_cases(arguments: argparse.Namespace, parser: argparse.ArgumentParser, notes: list[str]) -> Iterator[Case]:
    """Yield the models that the command line names, all that are present by default; notes which are not."""
    cases = {case.name: case for case in quality_cases(arguments.shared)}
    unknown = sorted(set(arguments.models or ()) - set(cases))
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known are {', '.join(cases)}")
    for name in arguments.models or cases:
        if cases[name].is_present:
            yield cases[name]
        else:
            notes.append(f"{name} is left out: no such model in the folder given by --shared.")

"""Files that travel with the package: the small model and the two texts that make everything work offline."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from optgptq.errors import UsageError

PREFIX = "bundled:"
PLACES = {
    "story-llama": "bundled/story-llama",
    "story-calibration": "bundled/text/story-calibration.txt",
    "story-evaluation": "bundled/text/story-evaluation.txt",
}


def configs_folder() -> Path:
    """Return the folder of the installed package `optgptq_configs`; wheels are unpacked, so it exists."""
    return Path(str(files("optgptq_configs")))


def bundled_path(name: str) -> Path:
    """Return the folder or file behind `bundled:NAME`; the prefix may be left out.

    Raises:
        UsageError: nothing bundled has this name; the message lists what is.
    """
    short_name = name.removeprefix(PREFIX)
    if short_name not in PLACES:
        known = ", ".join(PREFIX + known_name for known_name in PLACES)
        raise UsageError(
            f"name {PREFIX}{short_name}",
            expected=f"one of {known}",
            found=f"{short_name!r}",
            action="Use one of these names, or give the path of a local file or folder.",
        )
    return configs_folder() / PLACES[short_name]

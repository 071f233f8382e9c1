"""Names of targets: `engine[-version][:platform]`, all of them made from the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from optgptq.errors import UsageError
from optgptq.targets import others, sglang, vllm
from optgptq.targets.records import LoadPath

RECORDS: tuple[LoadPath, ...] = (*vllm.PATHS, *sglang.PATHS, *others.PATHS)
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers", "gptqmodel": "GPTQModel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One engine, version and platform, with its records.

    Attributes:
        engine, version, platform: version and platform are empty where an engine has but one.
        paths: its records.
    """

    engine: str
    version: str
    platform: str
    paths: tuple[LoadPath, ...]

    @property
    def name(self) -> str:
        """Its name in full, such as `vllm-0.33:cuda`."""
        version = f"-{self.version}" if self.version else ""
        return f"{self.engine}{version}" + (f":{self.platform}" if self.platform else "")

    @property
    def title(self) -> str:
        """Its name for people, such as `vLLM 0.33 (cuda)`."""
        words = [TITLES.get(self.engine, self.engine), self.version, f"({self.platform})" if self.platform else ""]
        return " ".join(word for word in words if word)


def known_targets(records: Sequence[LoadPath] = RECORDS) -> tuple[Target, ...]:
    """Return every target, in the order of the records: the first of an engine and version is its default platform."""
    keys = dict.fromkeys((path.engine, path.version, path.platform) for path in records)
    return tuple(
        Target(
            engine=engine,
            version=version,
            platform=platform,
            paths=tuple(
                path for path in records if (path.engine, path.version, path.platform) == (engine, version, platform)
            ),
        )
        for engine, version, platform in keys
    )


def parse_target(text: str, records: Sequence[LoadPath] = RECORDS) -> Target:
    """Return the target called `text`: a bare engine is its newest version, without a platform its default one.

    Raises:
        UsageError: no such target; the known ones are listed, the closest first.
    """
    wanted = text.strip().lower()
    targets = known_targets(records)
    newest: dict[str, Target] = {}
    names: dict[str, Target] = {}
    for target in targets:
        versioned = target.name.partition(":")[0]
        names.setdefault(versioned, target)
        names.setdefault(target.name, target)
        old = newest.get(target.engine)
        if old is None or _numbers(target.version) > _numbers(old.version):
            newest[target.engine] = target
    for engine, target in newest.items():
        names[engine] = target
        for other in targets:
            if (other.engine, other.version) == (engine, target.version) and other.platform:
                names[f"{engine}:{other.platform}"] = other
    if wanted not in names:
        raise _unknown(text, [target.name for target in targets], list(names))
    return names[wanted]


def _unknown(text: str, full_names: Sequence[str], names: Sequence[str]) -> UsageError:
    close = get_close_matches(text.strip().lower(), names, n=3, cutoff=0.5)
    order = [*close, *(name for name in full_names if name not in close)]
    return UsageError(
        f"--target {text}",
        expected=f"one of {', '.join(order)}",
        found=repr(text),
        action=f"Did you mean {order[0]}?" if close else "Choose one of these; a bare engine is its newest version.",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())

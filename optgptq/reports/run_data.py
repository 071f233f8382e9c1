"""Everything that a report is made from, read once: the checkpoint, its manifest, its run record, an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optgptq.checkpoint.folder import CheckpointFolder, read_json_object
from optgptq.checkpoint.manifest import read_manifest
from optgptq.errors import FormatError, ModelError
from optgptq.reports.inspect import InspectReport, inspect_checkpoint
from optgptq.reports.run_record import read_run_record
from optgptq.reports.wording import clean, entries, number, table_of, texts
from optgptq.target_subject import subject_of_folder
from optgptq.targets.check import TargetAnswer, check_target
from optgptq.targets.known import known_targets

_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_FIGURES = ("perplexity", "num_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A quantized linear; what nobody tells is None or empty.

    Attributes:
        name: full module name.
        layer: decoder layer; None where the name has no number.
        module: its name inside the layer; numbers of experts are `*`.
        method: what quantized it.
        bits, group_size, out_features, in_features: its layout.
        loss, rtn_loss: share of its output's energy that is lost, and what rounding to nearest would lose.
        damp_ratio, damp_ratio_asked: damping that was used, and that the recipe asked for.
        clip_fraction: share of weights outside their grid.
        num_tokens: tokens behind its moment.
        notes: what the solver had to say.
    """

    name: str
    layer: int | None
    module: str
    method: str
    bits: int
    group_size: int
    out_features: int
    in_features: int
    loss: float | None
    rtn_loss: float | None
    damp_ratio: float | None
    damp_ratio_asked: float | None
    clip_fraction: float | None
    num_tokens: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What one engine says to the checkpoint.

    Attributes:
        engine, platform: as in `--target`; the platform is empty where an engine has but one.
        title: engine, version and platform for people.
        loads: whether it loads the checkpoint.
        told: what a user must know, or why it does not load and what would.
    """

    engine: str
    platform: str
    title: str
    loads: bool
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A checkpoint and what is known of how it came to be.

    Attributes:
        name: of its folder.
        checkpoint: what `inspect` tells.
        manifest: empty where there is none.
        record: the run record, empty where there is none.
        evaluation: as `optgptq eval --json` writes it; empty where there is none.
        notes: what a reader of the report must know of the report itself.
        config: `config.json` of the checkpoint.
        card: start of the source's model card; empty where there is none.
        loading: answers of all engines that are known.
    """

    name: str
    checkpoint: InspectReport
    manifest: Mapping[str, Any]
    record: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any]
    card: str = ""
    loading: tuple[Loading, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All quantized linears in the order of the checkpoint."""
        told = {
            entry["name"]: entry for entry in entries(self.manifest, "layers") if isinstance(entry.get("name"), str)
        }
        asked = number(table_of(table_of(self.manifest, "recipe"), "weights").get("damp_ratio"))
        return tuple(_linear(layer, told.get(layer.name, {}), asked) for layer in self.checkpoint.layers)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of the manifest and of the run, each once."""
        return tuple(dict.fromkeys([*texts(self.manifest, "warnings"), *texts(self.record, "warnings")]))

    @property
    def gates(self) -> list[dict[str, Any]]:
        """Outcomes of the run; without any, those of the evaluation."""
        return entries(self.record, "gates") or entries(self.evaluation, "gates")


def collect_run(folder: Path, *, record: Path | None = None, evaluation: Path | None = None) -> RunData:
    """Read a checkpoint folder; headers and JSON are read, weights are not.

    Args:
        record: its run record; None for the file beside it, where there is one.
        evaluation: what `optgptq eval --json` wrote; None for what the run record has.

    Raises:
        ModelError, FormatError: the checkpoint, or a file that is named, cannot be read.
    """
    opened = CheckpointFolder.open(folder)
    found = read_run_record(folder, record)
    manifest = read_manifest(folder) or {}
    notes = [found.problem] if found.problem else []
    if not manifest:
        notes.append("The checkpoint has no manifest: another tool made it, and nobody tells its losses.")
    elif not found.content and not found.problem:
        notes.append("There is no run record: time, memory, error maps and sessions of the job are not known.")
    figures = table_of(found.content, "evaluation") if evaluation is None else read_evaluation(evaluation)
    return RunData(
        name=clean(folder.absolute().name, limit=200),
        checkpoint=inspect_checkpoint(opened),
        manifest=manifest,
        record=found.content,
        evaluation=figures,
        notes=tuple(notes),
        config=opened.config,
        card=_read_card(folder),
        loading=_loading(opened),
    )


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return what `optgptq eval --json` wrote.

    Raises:
        FormatError: it is something else.
    """
    try:
        found = read_json_object(path.absolute().parent, path.name)
    except ModelError as error:
        raise _no_evaluation(path, error.found) from error
    if any(number(found.get(name)) is None for name in _FIGURES):
        raise _no_evaluation(path, f"an object without {' and '.join(_FIGURES)}")
    return found


def _no_evaluation(path: Path, found: str) -> FormatError:
    return FormatError(
        str(path),
        expected="the object that `optgptq eval --json` prints",
        found=found,
        action="Write it with `optgptq eval OUT --baseline MODEL --text TEXT --json > eval.json`.",
    )


def _loading(folder: CheckpointFolder) -> tuple[Loading, ...]:
    subject = subject_of_folder(folder)
    answers = [check_target(target, subject) for target in known_targets()]
    return tuple(
        Loading(
            engine=answer.target.engine,
            platform=answer.target.platform,
            title=answer.target.title,
            loads=answer.loads,
            told=clean(_told(answer)),
        )
        for answer in answers
    )


def _told(answer: TargetAnswer) -> str:
    if answer.loads:
        return "; ".join(answer.warnings)
    refusal = answer.refusals[0]
    others = f" and {len(answer.refusals) - 1} more reasons" if len(answer.refusals) > 1 else ""
    return f"{refusal.where}: expected {refusal.expected}, found {refusal.found}{others}. {answer.advice}"


def _linear(layer: Any, told: Mapping[str, Any], asked: float | None) -> Linear:
    index, module = split_name(layer.name)
    own = number(told.get("damp_ratio"))
    return Linear(
        name=clean(layer.name, limit=200),
        layer=index,
        module=clean(module, limit=200),
        method=clean(told.get("method") or "", limit=40),
        bits=layer.bits,
        group_size=layer.group_size,
        out_features=layer.out_features,
        in_features=layer.in_features,
        loss=number(layer.loss),
        rtn_loss=number(layer.rtn_loss),
        damp_ratio=number(layer.damp_ratio_used),
        damp_ratio_asked=asked if own is None else own,
        clip_fraction=number(told.get("clip_fraction")),
        num_tokens=number(told.get("num_tokens")),
        notes=tuple(clean(note) for note in layer.notes),
    )


def split_name(name: str) -> tuple[int | None, str]:
    """Return the decoder layer of a linear, and its name inside the layer with `*` for further numbers."""
    found = _LAYER_NUMBER.search(name)
    if found is None or len(found[1]) > 6:
        return None, name
    rest = ".".join("*" if part.isdigit() else part for part in name[found.end() :].split("."))
    return int(found[1]), rest


def _read_card(folder: Path) -> str:
    """Return the start of README.md; empty where there is none."""
    try:
        with (folder / "README.md").open("rb") as stream:
            return stream.read(65536).decode("utf-8", errors="replace")
    except OSError:
        return ""

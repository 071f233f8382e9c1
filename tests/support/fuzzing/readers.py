"""Boundaries of what commands make of a checkpoint: what they print, reports, answers of targets."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

from support.fuzzing.case import Boundary, CaseFolder
from support.fuzzing.checkpoints import MANIFEST, WEIGHTS, damaged_safetensors, joined_header, split_header
from support.fuzzing.mutate import CANARY, TEXTS, damaged_bytes, damaged_json

from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.checkpoint.manifest import sha256_file
from optgptq.reports.card import model_card
from optgptq.reports.page import report_page
from optgptq.reports.run_data import collect_run, read_evaluation
from optgptq.target_subject import subject_of_folder
from optgptq.targets import check_target, known_targets, parse_target
from optgptq_cli.main import main

RECORD = "out.run.json"
COMMANDS = (("inspect", "--json"), ("inspect",), ("verify", "--json"), ("verify",))
_SHOWN = 300


def reader_boundaries(home: Path, sources: dict[str, Path]) -> list[Boundary]:
    """Return the boundaries of commands that read a finished checkpoint."""

    def folder(name: str, source: str) -> CaseFolder:
        made = CaseFolder.of(home / name / "model", sources[source])
        (made.path.parent / CANARY).write_text("outside")
        return made

    commands, report, targets = folder("commands", "gptq"), folder("report", "gptq"), folder("targets", "gptq_v2")
    return [
        Boundary(name="commands", folder=commands, damage=lambda rng: _commands(rng, commands), share=0.5),
        Boundary(name="run record", folder=report, damage=_record_damage(report), share=0.05),
        Boundary(name="targets", folder=targets, damage=lambda rng: _targets(rng, targets)),
    ]


def _commands(rng: random.Random, folder: CaseFolder) -> Callable[[], object]:
    """Damage names, words and figures, which a command has to print."""
    for name in rng.sample(("config.json", MANIFEST, WEIGHTS), rng.choice((1, 2))):
        if name == WEIGHTS:
            header, tensors = split_header(folder.files[WEIGHTS])
            folder.put(name, joined_header(damaged_json(rng, header), tensors))
        else:
            folder.put(name, damaged_json(rng, json.loads(folder.files[name])))
    command = rng.choice(COMMANDS)
    return lambda: run_command(command[0], str(folder.path), *command[1:])


def run_command(*arguments: str) -> None:
    """Run a command in this process; AssertionError for an exit code that only a bug has, or for bad JSON."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(arguments)
    for stream in (stdout, stderr):
        stream.flush()
    if code not in (0, 3):
        told = stderr.buffer.getvalue().decode()
        raise AssertionError(f"{arguments[0]} ended with {code}: {told[-_SHOWN:]}")
    printed = stdout.buffer.getvalue()
    if "--json" in arguments and printed:
        json.loads(printed)


def _record_damage(folder: CaseFolder) -> Callable[[random.Random], Callable[[], object]]:
    manifest = json.loads(folder.files[MANIFEST])
    linear = manifest["layers"][0]["name"]
    grid = {
        "name": linear,
        "rows": 2,
        "columns": 2,
        "weight": [[1.0, 2.0], [3.0, 4.0]],
        "error": [[0.1, 0.2], [0.3, 0]],
    }
    evaluation = {
        "perplexity": 9.5,
        "mean_kl": 0.01,
        "top1_agreement": 0.9,
        "num_tokens": 512,
        "baseline_perplexity": 9,
    }
    facts = {
        "run_record": 1,
        "timings": {linear: 0.5, "verifying": 0.1},
        "seconds": 12.5,
        "peak_memory_bytes": 2**30,
        "sessions": [{"started": "2026-01-01T00:00:00Z", "seconds": 3.0, "ended": "finished", "first_layer": 0}],
        "phases": [{"name": "verifying", "detail": "", "seconds": 1.0, "resident_bytes": 1, "peak_bytes": 2}],
        "decoder_layer_costs": [
            {"index": 0, "seconds": 1.0, "resident_bytes": 1, "peak_bytes": 2, "windows_per_batch": 8}
        ],
        "error_maps": [grid],
        "plan": {"phases": [{"name": "decoder layers", "seconds": 3.0, "cpu_bytes": 5}], "fits": True},
        "gates": [{"gate": "max_kl", "value": 0.1, "limit": 0.2, "passed": True, "where": linear}],
        "evaluation": evaluation,
        "sample": {"prompt": "Once", "text": " upon"},
        "environment": {"python": "3.11", "torch": "2.13", "threads": 2, "device": "cpu"},
    }
    record = {**manifest, **facts, "manifest_sha256": sha256_file(folder.path / MANIFEST)}

    def damage(rng: random.Random) -> Callable[[], object]:
        place = folder.put(RECORD, damaged_json(rng, record if rng.random() < 0.5 else {**record, **_few(rng, facts)}))
        scores = folder.put("eval.json", damaged_json(rng, evaluation)) if rng.random() < 0.2 else None
        if rng.random() < 0.2:
            folder.put(MANIFEST, damaged_json(rng, manifest))
        return lambda: _report(folder.path, place, scores)

    return damage


def _few(rng: random.Random, facts: dict[str, object]) -> dict[str, object]:
    """Damage one of the parts that a report draws."""
    name = rng.choice(sorted(facts))
    with contextlib.suppress(ValueError, RecursionError):
        return {name: json.loads(damaged_json(rng, facts[name]))}
    return {name: None}


def _report(folder: Path, record: Path, evaluation: Path | None) -> None:
    if evaluation is not None:
        read_evaluation(evaluation)
    data = collect_run(folder, record=record, evaluation=evaluation)
    report_page(data).encode("utf-8", "backslashreplace")
    model_card(data).encode("utf-8", "backslashreplace")


def _targets(rng: random.Random, folder: CaseFolder) -> Callable[[], object]:
    """A name of a target that is damaged, or a checkpoint that is, asked of a known one."""
    names = [target.name for target in known_targets()]
    name = rng.choice(names)
    if rng.random() < 0.3:
        text = damaged_bytes(rng, rng.choice((*names, *TEXTS)).encode(errors="replace")).decode(errors="replace")
        return lambda: parse_target(text)
    if rng.random() < 0.5:
        folder.put("config.json", damaged_json(rng, json.loads(folder.files["config.json"])))
    else:
        folder.put(WEIGHTS, damaged_safetensors(rng, folder.files[WEIGHTS], ()))
    parallel = rng.choice((1, 1, 2, 3, 8, 10**9))

    def ask() -> None:
        check_target(parse_target(name), subject_of_folder(CheckpointFolder.open(folder.path)), parallel)

    return ask

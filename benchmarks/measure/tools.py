"""The tools that are compared, each as a command line for one job."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from measure.process import BenchmarkError, Measurement, run_measured

OURS = "optgptq"
PEER_DRIVERS = Path(__file__).resolve().parent.parent / "peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How weights are coded."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def label(self) -> str:
        return f"W{self.bits} g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One quantization, the same for every tool.

    Attributes:
        model: folder of the dense model.
        text: calibration text as our recipe names it.
        num_windows, window_size, seed: how our tool cuts its windows from the text.
        windows_file: the same windows as a .npy file, for the peers.
        windows_sha256: hash of the windows as our manifest states it.
        grid: how weights are coded.
    """

    model: Path
    text: str
    num_windows: int
    window_size: int
    seed: int
    windows_file: Path
    windows_sha256: str
    grid: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A tool that is compared with ours: its driver runs in an environment of its own."""

    name: str
    driver: str
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


PEERS = (
    Peer(name="llm-compressor", driver="run_llm_compressor.py"),
    # Without the limit its worker threads fight over few cores and a run takes several times as long.
    Peer(
        name="gptqmodel",
        driver="run_gptqmodel.py",
        environment=MappingProxyType({"GPTQMODEL_CPU_WORKERS": "2"}),
    ),
)
OFFLINE = MappingProxyType({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})


def tool_names(peers_folder: Path) -> list[str]:
    """Return ours and the peers that are installed in `peers_folder`."""
    return [OURS, *(peer.name for peer in PEERS if _python(peers_folder, peer.name).exists())]


def missing_peers(peers_folder: Path) -> list[str]:
    """Return the peers that are not installed."""
    return [peer.name for peer in PEERS if not _python(peers_folder, peer.name).exists()]


def quantize(tool: str, job: Job, output: Path, *, peers_folder: Path, settings: tuple[str, ...] = ()) -> Measurement:
    """Quantize with `tool` into `output`, which is removed first; the log lies beside it.

    `settings` are `--set` overrides for our tool only.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    if tool == OURS:
        return run_measured(_our_command(job, output, settings), log, environment=OFFLINE)
    peer = next(peer for peer in PEERS if peer.name == tool)
    python = _python(peers_folder, tool)
    if not python.exists():
        raise BenchmarkError(f"{tool} is not installed in {peers_folder}: run python benchmarks/peers/install.py")
    command = [str(python), str(PEER_DRIVERS / peer.driver), *_peer_arguments(job, output)]
    return run_measured(command, log, environment={**OFFLINE, **peer.environment})


def our_recipe(grid: Grid) -> dict[str, str]:
    """Return the overrides that make recipe gptq-w4 the one of `grid`; everything else stays as it is shipped.

    Asymmetric grids go to compressed-tensors, as in the shipped recipes: GPTQ files cannot hold a zero point of 0.
    """
    return {
        "weights.bits": str(grid.bits),
        "weights.group_size": str(grid.group_size),
        "weights.symmetric": str(grid.symmetric).lower(),
        "export.format": "gptq" if grid.symmetric else "compressed-tensors",
    }


def _our_command(job: Job, output: Path, settings: tuple[str, ...]) -> list[str]:
    overrides = {
        **our_recipe(job.grid),
        "calibration.source": job.text,
        "calibration.num_windows": str(job.num_windows),
        "calibration.window_size": str(job.window_size),
        "calibration.seed": str(job.seed),
    }
    command = [*optgptq_command(), "quantize", str(job.model), "--recipe", "gptq-w4", "--output", str(output)]
    for setting in (*(f"{key}={value}" for key, value in overrides.items()), *settings):
        command += ["--set", setting]
    return command


def optgptq_command() -> list[str]:
    """Return how our command line is started with the interpreter that runs the benchmark."""
    return [sys.executable, "-m", "optgptq_cli"]


def _peer_arguments(job: Job, output: Path) -> list[str]:
    grid = job.grid
    arguments = ["--model", str(job.model), "--windows", str(job.windows_file), "--output", str(output)]
    arguments += ["--bits", str(grid.bits), "--group-size", str(grid.group_size)]
    return arguments if grid.symmetric else [*arguments, "--asymmetric"]


def _python(peers_folder: Path, name: str) -> Path:
    return peers_folder.absolute() / name / "bin" / "python"

"""Makes one virtual environment per peer under benchmarks/peers-env: `python benchmarks/peers/install.py`.

The peers are other people's quantizers that ours is compared with. They are never dependencies of optgptq.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def peer_names() -> list[str]:
    """Return the names of the peers that a requirements file is there for."""
    return sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))


def install(name: str, folder: Path) -> None:
    """Make the environment of one peer in `folder`; an environment that is there is brought up to date."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    requirements = HERE / f"requirements-{name}.txt"
    torch_line = next(line for line in requirements.read_text("utf-8").splitlines() if line.startswith("torch=="))
    # torch first: GPTQModel comes as source code, and its build looks for the torch that it will run with.
    for packages in ([torch_line], ["-r", str(requirements)]):
        subprocess.run([python, "-m", "pip", "install", *packages], check=True)


def main() -> int:
    """Install the peers that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"peers to install, of {', '.join(peer_names())}; default: all")
    parser.add_argument("--peers", type=Path, default=HERE.parent / "peers-env", help="folder of the environments")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(peer_names()))
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; known are {', '.join(peer_names())}")
    for name in arguments.names or peer_names():
        print(f"{name}: installing into {arguments.peers / name}")
        install(name, arguments.peers / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

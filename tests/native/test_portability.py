"""Other compilers and other processors: the sources are accepted, and portable products have the same bits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.source_tree import ROOT

SOURCE = ROOT / "optgptq" / "native" / "source"
DRIVER = Path(__file__).with_name("portable_products.cpp")
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{SOURCE}")
# GCC 12 calls the undefined operands of its own AVX-512 intrinsics uninitialized (GCC bug 105593).
FLAGS_HERE = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
ARM = "aarch64-linux-gnu-g++"


def need(compiler: str) -> str:
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"{compiler} is not installed")
    return found


def build(compiler: str, to: Path, *flags: str) -> Path:
    """Build the products and the program that prints their hash."""
    sources = [*sorted(SOURCE.glob("products*.cpp")), SOURCE / "threads.cpp", DRIVER]
    command = [need(compiler), *FLAGS, *flags, "-static", "-pthread", *map(str, sources), "-o", str(to)]
    subprocess.run(command, check=True)
    return to


def hash_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["clang++", ARM])
def test_products_have_the_same_bits_elsewhere(compiler: str, tmp_path: Path) -> None:
    other = build(compiler, tmp_path / "other")
    command = (need("qemu-aarch64-static"), str(other)) if compiler == ARM else (str(other),)
    assert hash_of(*command) == hash_of(str(build("g++", tmp_path / "here", *FLAGS_HERE)))


@pytest.mark.nightly
@pytest.mark.parametrize("compiler", ["clang++", ARM])
def test_every_source_compiles(compiler: str, tmp_path: Path) -> None:
    for file in sorted(SOURCE.glob("*.cpp")):
        if file.name != "module.cpp":  # needs Python's headers for that processor
            options = ("-std=c++17", "-O1", "-fPIC", "-Wno-psabi", "-c", str(file), "-o", str(tmp_path / "object.o"))
            subprocess.run([need(compiler), *options], check=True)

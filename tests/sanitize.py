"""The tests of the native library with its memory, its arithmetic and its threads watched: `make sanitize`, for nights.

A copy of the package gets a library that is built with the sanitizers; the tests of `tests/native` run with it. The one
for threads takes the library's own threads, since it does not see what an OpenMP library does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"optgptq": "optgptq", "cli": "optgptq_cli", "configs": "optgptq_configs"}
WATCHED = {"address": ("address,undefined", "libasan.so"), "thread": ("thread", "libtsan.so")}
# Python keeps memory until it ends. Python's and torch's own code is not watched.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "die_after_fork=0:halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
}


def build(folder: Path, kind: str, compiler: str, jobs: int) -> None:
    """Copy the package and build its library in the copy."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, installed in PACKAGES.items():
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / installed, ignore=ignored)
    source, objects = folder / "optgptq/native/source", folder / "objects"
    objects.mkdir()
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer", "-Wno-psabi"]
    flags += ["-Wno-maybe-uninitialized", f"-fsanitize={WATCHED[kind][0]}", "-fno-sanitize-recover=undefined"]
    flags += [f"-I{sysconfig.get_paths()['include']}"]
    flags += ["-DOPTGPTQ_OWN_THREADS"] if kind == "thread" else []

    def compile_one(file: Path) -> Path:
        to = objects / f"{file.stem}.o"
        subprocess.run([compiler, *flags, "-c", str(file), "-o", str(to)], check=True)
        return to

    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_one, sorted(source.glob("*.cpp"))))
    library = source.parent / "_core.abi3.so"
    link = [compiler, "-shared", "-pthread", f"-fsanitize={WATCHED[kind][0]}", *map(str, compiled), "-o", str(library)]
    subprocess.run(link, check=True)


def run_tests(folder: Path, kind: str, compiler: str, tests: list[str]) -> int:
    """Run the tests with the library of the copy; return pytest's exit code."""
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": str(folder), "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1"}
    # The C++ library comes along, or the sanitizer does not see exceptions.
    preloaded = [[compiler, f"-print-file-name={name}"] for name in (WATCHED[kind][1], "libstdc++.so")]
    environment["LD_PRELOAD"] = ":".join(subprocess.check_output(words, text=True).strip() for words in preloaded)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=3600", "-p", "no:cacheprovider", *tests]
    command += ["--ignore=tests/native/test_portability.py"]  # compilers need not be watched
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(WATCHED), help="one of the two; default: both")
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--tests", nargs="*", default=["tests/native"])
    options = parser.parse_args()
    failed = []
    for kind in [options.only] if options.only else list(WATCHED):
        folder = options.build.resolve() / kind
        build(folder, kind, options.compiler, options.jobs)
        if run_tests(folder, kind, options.compiler, options.tests):
            failed.append(kind)
    sys.stdout.write(f"sanitizers that found something: {', '.join(failed) or 'none'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

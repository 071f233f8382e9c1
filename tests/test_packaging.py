"""What is installed is what is in the tree: packages, recipes, the bundled model and texts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support.source_tree import PACKAGES, ROOT

COPIED = ("optgptq", "cli", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Names of the files in a wheel that is built from a copy of the tree, without a network."""
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        pytest.skip("setuptools is not installed: the test extra has it")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is too old to build this project (77 or later)")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


def installed_name(path: Path) -> str:
    """Return where a file of the tree is in a wheel: `cli/main.py` is `optgptq_cli/main.py`."""
    first, *rest = path.relative_to(ROOT).parts
    return "/".join([PACKAGES[first], *rest])


def test_the_package_list_is_the_folders_on_disk(project: dict[str, Any]) -> None:
    folders = {path.parent for base in PACKAGES for path in (ROOT / base).rglob("*.py")}
    found = {installed_name(folder).replace("/", ".") for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_every_package_folder_has_an_init_file() -> None:
    folders = {path.parent for base in PACKAGES for path in (ROOT / base).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_module(wheel_names: frozenset[str]) -> None:
    modules = {installed_name(path) for base in PACKAGES for path in (ROOT / base).rglob("*.py")}
    assert modules - wheel_names == set()
    assert "optgptq/py.typed" in wheel_names
    templates = {installed_name(path) for path in (ROOT / "optgptq/reports/templates").iterdir()}
    assert templates - wheel_names == set()


def test_the_wheel_holds_recipes_model_and_texts(wheel_names: frozenset[str]) -> None:
    data = {installed_name(path) for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".json", ".txt")}
    assert "optgptq_configs/recipes/gptq-w4.yaml" in data
    assert data - wheel_names == set()
    assert "optgptq_configs/bundled/story-llama/model.safetensors" in wheel_names


def test_the_wheel_holds_nothing_else(wheel_names: frozenset[str]) -> None:
    top_level = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(PACKAGES.values())


def test_every_source_of_the_native_library_is_listed(project: dict[str, Any]) -> None:
    (module,) = project["tool"]["setuptools"]["ext-modules"]
    folder = ROOT / "optgptq" / "native" / "source"
    assert sorted(ROOT / name for name in module["sources"]) == sorted(folder.glob("*.cpp"))
    assert sorted(ROOT / name for name in module["depends"]) == sorted(folder.glob("*.hpp"))


def test_every_direct_dependency_is_pinned_once(project: dict[str, Any]) -> None:
    """`constraints.txt` decides what a clean clone gets: a dependency without a line there would drift."""
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["test"], *extras["check"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")]
    assert sorted(pinned) == sorted(re.split(r"[<>=!~ \[;]", item)[0].lower() for item in wanted)


def test_every_dependency_has_its_reason(project: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "decisions" / "0002-dependencies.md").read_text(encoding="utf-8")
    extras = project["project"]["optional-dependencies"]
    for item in [*project["project"]["dependencies"], *extras["test"], *extras["check"]]:
        name = re.split(r"[<>=!~ \[;]", item)[0]
        assert f"| {name} |" in page, f"{name} has no line in docs/decisions/0002-dependencies.md"

"""The project's own Python files as parsed trees, for the tests that look at how they are written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folder on disk to the name it is installed under.
PACKAGES = {"optgptq": "optgptq", "cli": "optgptq_cli", "configs": "optgptq_configs"}


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file; `module` is its import name, `path` is relative to the repository."""

    path: str
    module: str
    is_package: bool
    num_lines: int
    tree: ast.Module


def read_source(path: Path) -> Source:
    """Parse a file of this repository."""
    relative = path.relative_to(ROOT)
    parts = [PACKAGES.get(relative.parts[0], relative.parts[0]), *relative.with_suffix("").parts[1:]]
    is_package = parts[-1] == "__init__"
    text = path.read_text(encoding="utf-8")
    return Source(
        path=relative.as_posix(),
        module=".".join(parts[:-1] if is_package else parts),
        is_package=is_package,
        num_lines=len(text.splitlines()),
        tree=ast.parse(text, filename=str(path)),
    )


# What benchmarks leave behind: other people's code, and copies of older versions.
_LEFT_BEHIND = (ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "peers-env")


def sources(*folders: str) -> list[Source]:
    """Return every Python file of these top-level folders, sorted by path."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [read_source(path) for path in paths if not any(path.is_relative_to(left) for left in _LEFT_BEHIND)]


def load_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported: not the bodies of functions, not `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from load_time_nodes(node)


def imported_names(source: Source) -> Iterator[str]:
    """Yield the full dotted names that the module imports when it is loaded; `from a import b` gives `a.b`."""
    for node in load_time_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = source.module.split(".")
    package = parts[: len(parts) - node.level + (1 if source.is_package else 0)]
    return ".".join([*package, node.module] if node.module else package)

"""What may be on a disk after its power was cut: everything that was synchronized, and any part of the rest.

Bytes of a file last from the next fsync of that file, names in a folder from the next fsync of that folder. Of what was
not synchronized, any part can be there: this is the promise of POSIX, weaker than that of every common file system.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from support.faults.operations import Change, Operation

# Content by relative path; None for a folder.
Tree = dict[str, bytes | None]


class Kept(StrEnum):
    """How much of what was not synchronized is there after the cut."""

    NONE = "none"
    ALL = "all"
    FIRST = "first"
    SOME = "some"


@dataclass(slots=True, eq=False)
class _Node:
    """A file or a folder: as it lasts, and what may be lost."""

    is_folder: bool
    content: bytes = b""
    pending: list[Operation] = field(default_factory=list)
    names: dict[str, _Node] = field(default_factory=dict)
    live: dict[str, _Node] = field(default_factory=dict)


# One change of names, whole or not at all: (folder, name, what stands there or None).
_Names = list[tuple[_Node, str, "_Node | None"]]


class DiskModel:
    """A disk that begins with `tree`, all of it synchronized."""

    def __init__(self, tree: Mapping[str, bytes | None]) -> None:
        self._root = _Node(is_folder=True)
        self._pending: list[_Names] = []
        for path in sorted(tree):
            content = tree[path]
            folder, name = self._parent(path)
            folder.live[name] = folder.names[name] = _Node(content is None, content or b"")

    def do(self, operation: Operation) -> None:
        """Take one operation in."""
        match operation.change:
            case Change.CREATE | Change.MKDIR:
                folder, name = self._parent(operation.path)
                self._rename([(folder, name, _Node(is_folder=operation.change is Change.MKDIR))])
            case Change.UNLINK | Change.RMDIR:
                folder, name = self._parent(operation.path)
                self._rename([(folder, name, None)])
            case Change.WRITE | Change.TRUNCATE:
                self._node(operation.path).pending.append(operation)
            case Change.FSYNC:
                self._sync(self._node(operation.path))
            case _:
                self._rename(self._two_names(operation))

    def lasting(self, *, names: Kept, data: Kept, seed: int = 0) -> Tree:
        """Return what is there after a cut now. It may be asked once: the rest is lost."""
        generator = random.Random(seed)
        for change in _kept(self._pending, names, generator):
            _apply(change)
        tree: Tree = {}
        _collect(self._root, "", tree, data, generator)
        return tree

    def _two_names(self, operation: Operation) -> _Names:
        (first, old), (second, new) = self._parent(operation.path), self._parent(operation.other)
        moved = first.live[old]
        if operation.change is Change.LINK:
            return [(second, new, moved)]
        left = second.live[new] if operation.change is Change.EXCHANGE else None
        return [(first, old, left), (second, new, moved)]

    def _rename(self, change: _Names) -> None:
        self._pending.append(change)
        for folder, name, node in change:
            if node is None:
                folder.live.pop(name)
            else:
                folder.live[name] = node

    def _sync(self, node: _Node) -> None:
        if not node.is_folder:
            node.content = _written(node.content, node.pending)
            node.pending = []
            return
        touching = [change for change in self._pending if any(folder is node for folder, _, _ in change)]
        for change in touching:
            _apply(change)
        self._pending = [change for change in self._pending if change not in touching]

    def _parent(self, path: str) -> tuple[_Node, str]:
        *folders, name = path.split("/")
        node = self._root
        for folder in folders:
            node = node.live[folder]
        return node, name

    def _node(self, path: str) -> _Node:
        if not path:
            return self._root
        folder, name = self._parent(path)
        return folder.live[name]


def read_tree(root: Path) -> Tree:
    """Return what is in a folder."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Mapping[str, bytes | None]) -> None:
    """Write `tree` into a new folder."""
    root.mkdir()
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def _apply(change: _Names) -> None:
    for folder, name, node in change:
        if node is None:
            folder.names.pop(name, None)
        else:
            folder.names[name] = node


def _kept(items: list, kept: Kept, generator: random.Random) -> list:  # type: ignore[type-arg]
    match kept:
        case Kept.NONE:
            return []
        case Kept.ALL:
            return items
        case Kept.FIRST:
            return items[: generator.randint(0, len(items))]
        case Kept.SOME:
            return [item for item in items if generator.random() < 0.5]


def _written(content: bytes, operations: Sequence[Operation]) -> bytes:
    data = bytearray(content)
    for operation in operations:
        end = operation.offset + len(operation.data)
        data.extend(bytes(max(end - len(data), 0)))
        if operation.change is Change.TRUNCATE:
            del data[operation.offset :]
        data[operation.offset : end] = operation.data
    return bytes(data)


def _collect(node: _Node, path: str, tree: Tree, data: Kept, generator: random.Random) -> None:
    for name, child in sorted(node.names.items()):
        inner = f"{path}/{name}" if path else name
        if child.is_folder:
            tree[inner] = None
            _collect(child, inner, tree, data, generator)
            continue
        kept = _kept(child.pending, data, generator)
        if data in (Kept.FIRST, Kept.SOME) and kept and generator.random() < 0.5:
            last = kept[-1]
            half = Operation(last.change, last.path, offset=last.offset, data=last.data[: len(last.data) // 2])
            kept = [*kept[:-1], half]
        tree[inner] = _written(child.content, kept)

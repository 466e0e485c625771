"""The plan of the house as a check: which file may import which, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# From the top down: a file imports its own room and those below it. Not even an import for typing goes up.
ROOMS = (
    "cli", "inference", "training", "evaluation", "datasets", "synthesis", "pretrained", "networks", "functional",
    "ops", "reference", "data", "runtime", "errors", "kernels",
)  # fmt: skip
# What speaks for the whole package stands above all rooms.
ENTRANCES = ("__init__", "__main__")
MOST_LINES = 450


def modules(root: Path) -> dict[str, Path]:
    """Every Python file of the package at ``root`` by its dotted name below the package, ``cli.predict`` say."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], package: str) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    inside = [package, *name.split(".")]
    here = inside if path.name == "__init__.py" and name != "__init__" else inside[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            targets = [
                f"{module}.{alias.name}" if f"{module}.{alias.name}".removeprefix(f"{package}.") in known else module
                for alias in node.names
            ]
        else:
            continue
        for target in targets:
            if target == package:
                yield "__init__"
            elif target.startswith(f"{package}."):
                yield target.removeprefix(f"{package}.")


def problems(root: Path) -> list[str]:
    """What is wrong with the imports of the package at ``root``: a line each, empty if nothing is."""
    known = modules(root)
    graph = {name: set(imports(name, path, known, root.name)) - {name} for name, path in known.items()}
    found = []
    for name, targets in graph.items():
        room = name.split(".")[0]
        if room not in ROOMS + ENTRANCES:
            found.append(f"{name}: expected one of the rooms {', '.join(ROOMS)}")
            continue
        for target in sorted(targets):
            other = target.split(".")[0]
            if name in ENTRANCES or other not in ROOMS + ENTRANCES:
                continue
            if other in ENTRANCES or ROOMS.index(other) < ROOMS.index(room):
                found.append(f"{name} imports {target}: an arrow upwards")
            if room == "networks" and other == "ops":
                found.append(f"{name} imports {target}: networks know functional alone")
            if other == "reference" and room not in ("reference", "functional", "ops"):
                found.append(f"{name} imports {target}: the oracle is a backend, no box of utilities")
    return found + [f"a circle: {' -> '.join(circle)}" for circle in _circles(graph)]


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A path from a file back to itself, one for each place where a walk meets one; empty where there is none."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                walk(target, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def too_long(folder: Path, folders: tuple[str, ...]) -> list[str]:
    """Python files of these folders with more lines than a file may have."""
    found = []
    for path in sorted(path for name in folders for path in (folder / name).rglob("*.py")):
        lines = path.read_text().count("\n")
        name = path.relative_to(folder).as_posix()
        if lines > MOST_LINES:
            found.append(f"{name}: {lines} lines, expected at most {MOST_LINES}")
    return found


def imports_between_tests(folder: Path) -> list[str]:
    """Test files that import another one: what they share belongs to ``tests/helpers``."""
    names = {path.stem for path in folder.rglob("test_*.py")}
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            given = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            given += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name} imports {one}" for one in given if one.rpartition(".")[2] in names]
    return found

"""The import contract: which room may import which. Read from the source, since a lazy import counts too."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = ("plan", "prepare", "pretrain", "finetune", "mixed", "evaluate", "compare", "register", "finish")
FILES = sorted((*ROOT.glob("components/**/*.py"), *ROOT.glob("pipelines/**/*.py")))
MODULES = {
    f"mixtune.{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}".removesuffix(".__init__") for file in FILES
}
BASE = frozenset(
    f"shared.{name}" for name in ("errors", "config", "artifacts", "task_name", "outcome", "startup", "code_digest")
)
"""Modules at the top of `shared/` that every room may import."""
ROOMS: dict[str, set[str]] = {
    "shared.data": set(),
    "shared.model": set(),
    "shared.tracking": set(),
    "shared.running": {"shared.tracking", "shared.model"},
    "shared.checkpoints": {"shared.model", "shared.running"},
    "shared.training": {"shared.checkpoints", "shared.data", "shared.model", "shared.running"},
    "shared.runtime": {"shared.model", "shared.running", "shared.tracking"},
}
"""For each room of `components/shared` the rooms that it imports. The order is from the bottom to the top."""


def module_of(file: Path) -> str:
    return f"mixtune.{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}".removesuffix(".__init__")


def imports(file: Path) -> Iterator[tuple[str, ast.stmt, bool]]:
    """Yields each imported module with its statement, and whether it is relative."""
    module = module_of(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node, False
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            for name in node.names:
                inner = f"{source}.{name.name}"
                yield (inner if inner in MODULES else source), node, bool(node.level)


def room_of(module: str) -> str:
    """`shared.training` for `mixtune.components.shared.training.loop`; a module at the top of `shared/` is its own room."""
    return ".".join(module.removeprefix("mixtune.components.").split(".")[:2])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_of(file: Path) -> None:
    parts = file.relative_to(ROOT).parts
    for module, node, relative in imports(file):
        where = f"{file.relative_to(ROOT)}:{node.lineno} imports {module}"
        if parts[0] == "components":
            assert not module.startswith("mixtune.pipelines"), f"{where}: components/ never imports pipelines/"
            if len(parts) > 2 and parts[1] in STEPS:
                others = tuple(f"mixtune.components.{step}" for step in STEPS if step != parts[1])
                assert not (f"{module}.").startswith(tuple(f"{other}." for other in others)), f"{where}: another step"
            if parts[1] == "shared":
                known = ("mixtune.components.shared",)
                assert not module.startswith("mixtune") or module.startswith(known), f"{where}: a step"
        is_component = parts[-1] == "component.py"
        if module.startswith("mixtune") and not is_component:
            same = module.startswith(f"mixtune.{parts[0]}")
            assert relative == same, f"{where}: relative inside {parts[0]}/, absolute from outside"
        if module.partition(".")[0] == "mlflow":
            assert parts[:3] == ("components", "shared", "tracking"), f"{where}: only shared/tracking imports mlflow"
        if is_component and node.col_offset == 0:
            top = module.partition(".")[0]
            assert top == "kfp" or top in sys.stdlib_module_names, f"{where}: stdlib and kfp only at module level"


def test_rooms_of_shared_import_downwards_only() -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        room = room_of(module_of(file))
        for module, _, _ in imports(file):
            target = room_of(module)
            if room.startswith("shared.") and target.startswith("shared.") and target != room and target not in BASE:
                arrows[room].add(target)
    assert {room: targets for room, targets in arrows.items() if targets} == {
        room: targets for room, targets in ROOMS.items() if targets
    }
    order = list(ROOMS)
    for room, targets in ROOMS.items():
        assert all(order.index(target) < order.index(room) for target in targets), room


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        graph[module_of(file)] |= {module for module, _, _ in imports(file) if module in MODULES}
    pairs = [(one, other) for one, targets in graph.items() for other in targets if one < other and one in graph[other]]
    assert pairs == []


def test_no_file_is_long() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}

"""The import contract: which room may import which. Read from the source, since a lazy import counts too."""

from __future__ import annotations

import ast
import functools
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
    {
        "shared.errors",
        "shared.config",
        "shared.section",
        "shared.artifacts",
        "shared.task_name",
        "shared.outcome",
        "shared.startup",
        "shared.ascii_text",
        "shared.code_digest",
        "shared.task_kinds",
        "shared.third_party",
        "shared.value_problems",
        "shared.value_text",
    }
)
"""Modules at the top of `shared/` that every room may import, and the private names of other libraries."""
UNDOCUMENTED = ("kfp.compiler.compiler_utils", "kfp.local.")
"""Modules of other libraries without documentation and without a leading underscore."""
ROOMS: dict[str, set[str]] = {
    "shared.data": set(),
    "shared.serving": set(),
    "shared.model": {"shared.serving"},
    "shared.tracking": {"shared.serving"},
    "shared.running": {"shared.tracking", "shared.model"},
    "shared.checkpoints": {"shared.model", "shared.running"},
    "shared.nodes": {"shared.checkpoints", "shared.model", "shared.running"},
    "shared.training": {"shared.checkpoints", "shared.data", "shared.model", "shared.running"},
    "shared.runtime": {"shared.model", "shared.nodes", "shared.running", "shared.tracking"},
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
        is_component = parts[-1].endswith("component.py")
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


def private_uses(file: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and text of each use of another library's private name, and of each change of its attributes.

    A private attribute is ours if the file itself defines it, or if it belongs to `self` and any of our files defines it.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ours, ours_of_self = own_private_names(file), set().union(*map(own_private_names, FILES))
    imported: set[str] = set()  # names that imports of other libraries bind
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            source = (getattr(node, "module", None) or "").split(".")
            for alias in node.names:
                path = [*filter(None, source), *alias.name.split(".")]
                if path[0] in sys.stdlib_module_names or path[0] == "mixtune":
                    continue
                imported.add(alias.asname or alias.name.split(".")[0])
                if any(is_private(part) for part in path) or ".".join(path).startswith(UNDOCUMENTED):
                    yield node.lineno, ".".join(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_stdlib = isinstance(node.value, ast.Name) and node.value.id in sys.stdlib_module_names
            if not of_stdlib and node.attr not in (ours_of_self if of_self else ours):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in ours:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target).partition(".")[0] in imported:
                    yield node.lineno, ast.unparse(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def own_private_names(file: Path) -> set[str]:
    """Returns the private functions, fields and attributes of `self` that a file defines."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return {name for name in names if is_private(name)}


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.parent.name != "third_party"],
    ids=lambda file: file.relative_to(ROOT).as_posix(),
)
def test_only_third_party_uses_private_names_of_libraries_in(file: Path) -> None:
    found = [f"{file.relative_to(ROOT)}:{line}: {text}" for line, text in private_uses(file)]
    assert found == [], "use a public name, or move this to a module in third_party"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo.config",
        "from transformers.utils import _LazyModule",
        "from kfp.local import docker_task_handler",
        "model._modules['lm'] = other",
        "self.metric._compute_score_from_stats([1])",
        "getattr(task, '_metric_fn_list', {})",
        "import lm_eval.api.task\nlm_eval.api.task.tqdm = print",
        "import evaluate as metrics\nmetrics.load = print",
    ],
)
def test_a_private_use_is_found(line: str, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(line, encoding="utf-8")
    assert len(list(private_uses(file))) == 1


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_is_long() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}

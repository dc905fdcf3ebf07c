"""Names in the source files of transformers, which importing would bring torch with it."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def auto_classes(mapping: str) -> dict[str, str] | None:
    """Returns the class of each model type in a mapping such as `MODEL_FOR_MASKED_LM_MAPPING_NAMES`.

    None if transformers is not installed or has no such mapping.
    """
    return _literal_mapping("models/auto/modeling_auto.py", mapping)


@cache
def base_prefixes(model_type: str) -> dict[str, str]:
    """Returns the `base_model_prefix` that classes of a model type set themselves, by class; empty if there is no such type."""
    modules = _literal_mapping("models/auto/configuration_auto.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME") or {}
    module = modules.get(model_type, model_type.replace("-", "_"))
    tree = _parsed(f"models/{module}/modeling_{module}.py")
    found = {}
    for node in tree.body if tree is not None else []:
        for line in node.body if isinstance(node, ast.ClassDef) else []:
            name = _assigned(line)
            if name is not None and name[0] == "base_model_prefix" and isinstance(name[1], ast.Constant):
                found[node.name] = str(name[1].value)  # type: ignore[attr-defined]
    return found


def _literal_mapping(file: str, name: str) -> dict[str, str] | None:
    tree = _parsed(file)
    for node in tree.body if tree is not None else []:
        assigned = _assigned(node)
        if assigned is not None and assigned[0] == name and isinstance(assigned[1], ast.Call):
            pairs = ast.literal_eval(assigned[1].args[0])
            return {key: value if isinstance(value, str) else value[0] for key, value in dict(pairs).items()}
    return None


def _assigned(node: ast.stmt) -> tuple[str, ast.expr] | None:
    """Returns the name and the value of an assignment to one name."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    value = getattr(node, "value", None)
    return (target.id, value) if isinstance(target, ast.Name) and isinstance(value, ast.expr) else None


@cache
def _parsed(file: str) -> ast.Module | None:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None

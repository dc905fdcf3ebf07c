"""Imports: the garbage collector is as it was afterwards, and a step loads no package before it needs it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest

from mixtune.components.shared.startup import quick_imports
from tests.entries import STEPS, Entries, is_useful
from tests.stores import new_store

HEAVY = frozenset(
    {
        "accelerate", "datasets", "huggingface_hub", "kubernetes", "kfp_server_api", "matplotlib", "numpy", "pandas", "peft",
        "PIL", "pyarrow", "rouge_score", "sacrebleu", "safetensors", "scipy", "sklearn", "tokenizers", "torch", "transformers",
    }
)  # fmt: skip
OF_MLFLOW = frozenset({"numpy", "pandas", "pyarrow", "scipy"})
"""What MLflow's client imports where it is installed: 0.3 s of CPU with bytecode."""


class Node:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_inside_and_garbage_is_found_afterwards() -> None:
    assert gc.isenabled()
    with contextlib.suppress(ValueError), quick_imports():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    with quick_imports():
        gone = weakref.ref(Node())
        assert gone() is not None
    gc.collect()
    assert gone() is None, "frozen a second time"


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[set[str]]]:
    """For each step without torch the packages that it imported before its first useful line, and those after it."""
    folder = tmp_path_factory.mktemp("entries")
    entries = Entries(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MIXTUNE_"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": new_store(folder / "mlflow.db"),
        "MIXTUNE_RUN_ID": "run-1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPROFILEIMPORTTIME": "1",  # a line for each import, in between the step's own
    }
    imported: dict[str, list[set[str]]] = {}
    for step in STEPS:
        before, after = Counter[str](), Counter[str]()
        useful = ""
        for line in entries.run(step, environment).stdout.splitlines():
            if line.startswith("import time:"):
                package, dot, _ = line.rpartition("|")[2].strip().partition(".")
                (after if useful else before)[package] += bool(dot)
            elif is_useful(line):
                useful = useful or line
        assert useful, step
        assert not useful.startswith("Traceback"), step
        # The interpreter also tells of a package or a part of it that was only looked for; all of these have many parts.
        imported[step] = [{name for name, parts in seen.items() if parts > 2} for seen in (before, after)]
    return imported


@pytest.mark.parametrize("step", STEPS)
def test_no_heavy_package_is_loaded_before_the_first_line(imports: dict[str, list[set[str]]], step: str) -> None:
    before, _ = imports[step]
    assert {"kfp", "mlflow", "mixtune"} <= before, "the step ran, and its run in MLflow was open"
    assert before & HEAVY <= OF_MLFLOW


def test_a_step_imports_later_what_its_work_needs(imports: dict[str, list[set[str]]]) -> None:
    assert {step: imports[step][1] & {"transformers", "matplotlib", "torch"} for step in STEPS} == {
        "plan": set(),
        "prepare": {"transformers"},
        "compare": {"matplotlib"},
        "register": set(),  # the folder holds no model, which is refused before anything of weight is imported
        "finish": set(),
    }

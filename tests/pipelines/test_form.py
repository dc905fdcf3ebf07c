"""What a user sees of the compiled package in Kubeflow's UI: the form of a run, the graph, the artifacts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from mixtune.components.form import ADVANCED, FIELDS, PLACEMENT, field_defaults, field_meaning, field_type
from mixtune.components.placement import GpuNodes
from mixtune.components.shared.task_kinds import TASK_KINDS
from mixtune.pipelines.cli.commands import compile_pipeline
from mixtune.pipelines.cluster import rerun
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.pipeline import make_pipeline
from mixtune.pipelines.placement import Placer
from mixtune.pipelines.third_party.kfp import compile_to

from .test_compiled import COMPILED, dags, tasks


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """The whole pipeline, without the platform part."""
    return dict(next(yaml.safe_load_all((COMPILED / "mixtune.yaml").read_text(encoding="utf-8"))))


KINDS = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE", list[float]: "LIST"}


def test_the_form_is_short_and_typed_and_has_the_schemas_defaults(package: dict[str, Any]) -> None:
    fields = package["root"]["inputDefinitions"]["parameters"]
    assert set(fields) == {*FIELDS, ADVANCED, PLACEMENT}
    assert len(FIELDS) <= 15
    for name in FIELDS:
        assert fields[name]["parameterType"] == KINDS[field_type(name)], name
        assert fields[name]["description"] == field_meaning(name), name
        assert len(field_meaning(name)) > 15, name
    # The UI offers them in a list, and KFP refuses other values.
    assert {name: one["literals"] for name, one in fields.items() if "literals" in one} == {
        "data_task": list(TASK_KINDS)
    }
    defaults = {name: one["defaultValue"] for name, one in fields.items() if "defaultValue" in one}
    assert defaults.pop(PLACEMENT) == GpuNodes().model_dump()
    assert defaults == field_defaults()
    assert fields[ADVANCED]["parameterType"] == fields[PLACEMENT]["parameterType"] == "STRUCT"


@pytest.mark.parametrize("file", sorted(COMPILED.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_default_is_json_as_text(file: Path) -> None:
    package = next(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    for name, one in package["root"]["inputDefinitions"]["parameters"].items():
        if one["parameterType"] == "STRING":
            assert not str(one.get("defaultValue", "")).lstrip().startswith(("{", "[")), name


def test_a_package_of_a_configuration_has_its_values_in_the_form(tmp_path: Path) -> None:
    options = ["finetune.batch_size=5", "mixed.lambdas=[0.2]", "name=other", "gate.max_forgetting_share=null"]
    compile_pipeline(None, options, tmp_path / "p.yaml", None, "ir")
    package = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text(encoding="utf-8")))
    fields = package["root"]["inputDefinitions"]["parameters"]
    assert (fields["mix_lambdas"]["defaultValue"], fields["name"]["defaultValue"]) == ([0.2], "other")
    assert fields[ADVANCED]["defaultValue"]["finetune"]["batch_size"] == 5


def test_what_people_look_at_is_on_the_steps_that_make_it(package: dict[str, Any]) -> None:
    wanted = {
        "prepare": {"data_report": "system.HTML"},
        "mixed": {"metrics": "system.Metrics"},
        "evaluate": {"metrics": "system.Metrics", "classification": "system.ClassificationMetrics"},
        "compare": {"comparison_report": "system.HTML", "summary": "system.Markdown", "metrics": "system.Metrics"},
    }
    for step, artifacts in wanted.items():
        outputs = package["components"][f"comp-{step}"]["outputDefinitions"]["artifacts"]
        assert {name: outputs[name]["artifactType"]["schemaTitle"] for name in artifacts} == artifacts, step


def waits_for(dag: dict[str, Any]) -> dict[str, set[str]]:
    """The tasks that each task of a DAG waits for, as KFP's backend reads them: directly, or through others."""
    direct = {name: rerun._before(task) for name, task in dag["tasks"].items()}

    def all_of(name: str) -> set[str]:
        return direct[name].union(*map(all_of, direct[name]))

    return {name: all_of(name) for name in direct}


@pytest.mark.parametrize("start", ["pretrained", "finetuned"])
def test_edges_of_the_graph_are_outputs_that_a_task_reads(start: str, tmp_path: Path) -> None:
    config = read_config(None, [f"mixed.start={start}"])
    made = make_pipeline(config, Placer.cluster(config))
    before = json_format.MessageToDict(made.pipeline_spec)
    compile_to(made, tmp_path / "p.yaml")
    after = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text(encoding="utf-8")))
    named: dict[str, list[str]] = {}
    whole = dict(dags(before))
    for name, new in dags(after):
        assert waits_for(whole[name]["dag"]) == waits_for(new["dag"]), name
        named |= {task: one["dependentTasks"] for task, one in new["dag"]["tasks"].items() if "dependentTasks" in one}
    # Labels are checked before any training; the exit task names the group that it closes.
    assert named == {"pretrain": ["prepare-2"], "finish": ["exit-handler-1"]}


def test_tasks_and_groups_have_words(package: dict[str, Any]) -> None:
    names = {task["taskInfo"]["name"] for name, task, _ in tasks(package) if "importer" not in name}
    assert {"all steps", "candidates", "register if the gate is met"} <= names
    assert {"prepare pretraining stream", "prepare fine-tuning stream"} <= names
    assert {"evaluate pretrained", "evaluate fine-tuned", "evaluate interpolated"} <= names
    for name in names:
        assert not re.search(r"-\d+$", name), name

"""The form of a run: fields, and everything else in one dict."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixtune.components import form
from mixtune.components.config import Config, load
from mixtune.components.form import ADVANCED, FIELDS, PLACEMENT, parameters, read_form
from mixtune.components.placement import GpuNodes
from mixtune.components.plan.component import plan
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.section import option_paths
from mixtune.pipelines.configuration import ready_made


def values(**sections: Any) -> dict[str, Any]:
    """A small valid configuration with sections laid over it."""
    base: dict[str, Any] = {
        "model": {"base": "scratch"},
        "data": {"pretrain": {"source": "embedded"}, "finetune": {"source": "embedded"}},
        "pretrain": {"steps": 5},
    }
    return base | sections


def through_kfp(value: Any) -> Any:
    """Whole numbers inside lists and dicts arrive as floats."""
    if isinstance(value, dict):
        return {name: through_kfp(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [through_kfp(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_run(config: Config) -> dict[str, Any]:
    """What a run on a cluster can set of a configuration."""
    left_out: Any = {"placement": True, "run": True, "tracking": {"uri", "experiment", "offline_when_unreachable"}}
    return config.model_dump(exclude=left_out)


SEVERAL = values(
    data={"pretrain": {"sources": [{"path": "/a.txt"}, {"path": "/b.txt"}]}, "finetune": {"source": "embedded"}}
)
OTHERS = values(
    name="other",
    mixed={
        "lambdas": [0.25, 1],
        "lambda_schedules": [{"values": [0.5, 0.1]}],
        "seeds": [3],
        "controls": {"lora_ranks": [4], "lambdas": [0.2]},
    },
    gate={"max_forgetting": 0.25, "max_forgetting_share": None, "resamples": 300},
    evaluate={"lm_eval": {"tasks": ["a"], "limit": 7}, "max_tokens": None},
)


@pytest.mark.parametrize(
    "given", [ready_made("demo"), ready_made("replay"), ready_made("start"), values(), SEVERAL, OTHERS]
)
def test_the_form_and_back_is_the_same_configuration(given: dict[str, Any]) -> None:
    config = load(given)
    made = parameters(config)
    assert as_run(read_form(through_kfp(made))) == as_run(config)
    assert set(made) == {*FIELDS, ADVANCED}
    assert json.loads(json.dumps(made)) == made


def test_advanced_has_what_no_field_has_and_no_defaults() -> None:
    assert parameters(load(values()))[ADVANCED] == {}
    config = load(values(mixed={"lambdas": [0.2], "batch_size": 4}, gate={"max_forgetting_share": None}))
    made = parameters(config)
    assert made["mix_lambdas"] == [0.2]
    # A field cannot be empty, so null is in `advanced`.
    assert made[ADVANCED] == {"mixed": {"batch_size": 4}, "gate": {"max_forgetting_share": "null"}}
    assert made["gate_max_forgetting_share"] == 0.5
    assert read_form(made).gate.max_forgetting_share is None
    made[ADVANCED] = {"gate": {"max_forgetting_share": None}}
    assert read_form(made).gate.max_forgetting_share is None


def test_an_option_is_set_in_one_place() -> None:
    given = parameters(load(values())) | {ADVANCED: {"mixed": {"lambdas": [0.9]}, "name": "other", "seed": None}}
    with pytest.raises(RefusedError) as refused:
        read_form(given)
    assert refused.value.problems == [
        "advanced.mixed.lambdas: has the field mix_lambdas in the form; set it there and remove it here",
        "advanced.name: has the field name in the form; set it there and remove it here",
        "seed: must be a whole number, found null",
    ]


@pytest.mark.parametrize(
    ("advanced", "problem"),
    [
        ({"placement": {"gpus": 1}}, "advanced.placement: is fixed in the compiled pipeline"),
        ({"mixed": {"start": "finetuned"}}, "advanced.mixed.start: is fixed in the compiled pipeline"),
        ({"run": {"parallel": 2}}, "advanced.run: is for runs on one machine; remove it"),
        ({"tracking": {"uri": "x"}}, "advanced.tracking.uri: comes from a Kubernetes secret; remove it"),
        ({"mixed": {"lamdas": [1]}}, "mixed.lamdas: there is no such option; did you mean mixed.lambdas?"),
        ({"batch_size": 3}, "batch_size: there is no such option; did you mean pretrain.batch_size or "),
        ({"colour": 3}, "colour: there is no such option; remove it or correct its name"),
        ({"finetune": {"batch_size": "many"}}, 'finetune.batch_size: must be a whole number'),
        ({"finetune": 3}, "finetune: must be a section with options, found 3"),
        ({"mixed": 3}, "mixed: must be a section with options, found 3"),
        ([1], "advanced: must be a section with options, found [1]"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_advanced_is_told_as_the_command_tells_it(advanced: Any, problem: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read_form(parameters(load(values())) | {ADVANCED: advanced})
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(problem)


def test_a_field_that_was_not_filled_in_is_told() -> None:
    with pytest.raises(RefusedError) as refused:
        read_form(form.field_defaults() | {"model_base": ""})
    assert [one.split(":")[0] for one in refused.value.problems] == [
        "model.base", "data.pretrain", "data.finetune",
    ]  # fmt: skip


def test_the_examples_in_the_documentation_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "kubeflow.md").read_text(encoding="utf-8")
    found = [json.loads(one) for one in re.findall(r"`(\{[^`]+\})`", text)]
    assert len(found) == 4
    for advanced in found:
        source = {"data_text": ""} if "data" in advanced else {}
        read_form(parameters(load(values())) | {ADVANCED: advanced} | source)
    to_try = {"data_labelled": "embedded", "data_text": "embedded", "model_base": "scratch", "pretrain_steps": 200}
    to_try |= {"mix_steps": 100, "model_max_length": 128, ADVANCED: found[-1]}
    assert read_form(form.field_defaults() | to_try).finetune.steps == 100


def test_what_is_compiled_in_is_part_of_the_configuration() -> None:
    given = parameters(load(values(mixed={"start": "finetuned"})))
    assert ADVANCED not in json.dumps(given[ADVANCED])
    assert read_form(given, '{"mixed": {"start": "finetuned"}}').mixed.start == "finetuned"


def test_the_fields_are_options_of_the_schema() -> None:
    assert set(FIELDS.values()) <= set(option_paths(Config))
    assert list(FIELDS) == sorted(FIELDS)
    defaults = form.field_defaults()
    required = {"model_base"}
    assert set(defaults) == {*FIELDS, ADVANCED} - required
    # KFP has no null.
    assert None not in defaults.values()
    for name in FIELDS:
        kind = form.field_type(name)
        assert kind in (str, int, float, list[float]), name
        assert name in required or isinstance(defaults[name], list if kind == list[float] else kind), name


def test_plan_takes_the_form() -> None:
    taken = inspect.signature(plan.python_func).parameters
    inputs = {name: one.annotation for name, one in taken.items() if name in plan.component_spec.inputs}
    fields = {name: form.field_type(name) for name in FIELDS}
    assert inputs == fields | {ADVANCED: dict, PLACEMENT: dict}
    assert set(GpuNodes.model_fields) <= set(plan.component_spec.outputs)

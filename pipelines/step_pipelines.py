"""Pipelines of single steps, which read artifacts of an earlier run by URI, so that one step can be rerun."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from kfp import dsl

from mixtune.components.compare.component import compare
from mixtune.components.config import Config
from mixtune.components.evaluate.component import evaluate
from mixtune.components.finetune.component import finetune
from mixtune.components.mixed.component import mixed
from mixtune.components.prepare.component import prepare
from mixtune.components.pretrain.component import pretrain
from mixtune.components.register.component import register
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.task_name import TaskName

from .pipeline import NAME
from .placement import Placer
from .third_party.kfp import inputs_of

# `plan` and `finish` are only meaningful within a whole run.
STEPS = {
    "prepare": prepare,
    "pretrain": pretrain,
    "finetune": finetune,
    "mixed": mixed,
    "evaluate": evaluate,
    "compare": compare,
    "register": register,
}
# An importer must import something, so optional inputs of the component are omitted unless requested.
URI_NAMES = {
    "prepare": {"tokenizer_in": "tokenizer_uri", "pretraining_data": "text_train_uri"},
    "pretrain": {"data": "text_train_uri", "tokenizer": "tokenizer_uri"},
    "finetune": {"start": "start_model_uri", "data": "labelled_train_uri"},
    "mixed": {
        "start": "start_model_uri", "pretrain_data": "text_train_uri", "finetune_data": "labelled_train_uri",
        "pretrained": "pretrained_model_uri",
    },
    "evaluate": {
        "model": "model_uri", "pretrain_heldout": "text_heldout_uri", "finetune_heldout": "labelled_heldout_uri",
        "other": "finetuned_model_uri", "pretrained": "pretrained_model_uri",
    },
    "compare": {
        "pretrained": "pretrained_evaluation_uri", "finetuned": "finetuned_evaluation_uri",
        "interpolated": "interpolated_evaluation_uri", "mixed": "mixed_evaluation_uris",
    },
    "register": {
        "selected": "selected_model_uri", "other": "finetuned_model_uri", "comparison": "comparison_uri",
    },
}  # fmt: skip
"""The parameters for the artifacts of each step, by the step's own names for them."""
_OPTIONAL = {
    "prepare": ("tokenizer_in", "pretraining_data", "portions"),
    "evaluate": ("other", "pretrained"),
    "mixed": ("pretrained",),
}


def make_step_pipeline(step: str, config: Config, place: Placer, optional: Collection[str] = ()) -> Callable[..., Any]:
    """Creates a pipeline of one step. Its artifacts are parameters with their URIs, see `URI_NAMES`.

    Args:
        step: name of the step.
        config: values of the placement's defaults; the step's configuration is a parameter.
        place: sets the placement of the step.
        optional: optional artifacts that the step gets.

    Raises:
        RefusedError: if the step cannot run alone.
    """
    if step not in STEPS:
        raise RefusedError(f"--step: must be one of {', '.join(STEPS)}, found {step}")
    place.alone = True
    component = STEPS[step]
    inputs = inputs_of(component)
    place_parameters, uri_of = place.parameters(step), URI_NAMES[step]
    artifacts = {
        name: one
        for name, one in inputs.items()
        if one.type.startswith("system.") and (name in optional or name not in _OPTIONAL.get(step, ()))
    }
    plain = [name for name, one in inputs.items() if not one.type.startswith("system.")]
    types: dict[str, Any] = dict.fromkeys(plain, str)
    types |= {uri_of[name]: list[str] if one.is_artifact_list else str for name, one in artifacts.items()}

    def pipeline(*values: Any) -> None:
        given = dict(zip([*types, *place_parameters], values, strict=True))
        place.place_gpu_tasks({name: given[name] for name in place_parameters})
        arguments: dict[str, Any] = {name: given[name] for name in plain}
        for name, one in artifacts.items():
            kind = getattr(dsl, one.type.split("@")[0].removeprefix("system."))
            if one.is_artifact_list:
                with dsl.ParallelFor(given[uri_of[name]], name=f"import {name}") as uri:
                    item = dsl.importer(artifact_uri=uri, artifact_class=kind, reimport=False)
                arguments[name] = dsl.Collected(item.outputs["artifact"])
            else:
                uri = given[uri_of[name]]
                arguments[name] = dsl.importer(artifact_uri=uri, artifact_class=kind, reimport=False).outputs[
                    "artifact"
                ]
        place(component(**arguments), TaskName(step))

    defaults = {name: default for name, (_, default, _) in place_parameters.items()}
    types_with_placement = types | {name: kind for name, (kind, _, _) in place_parameters.items()}
    pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=defaults.get(name, inspect.Parameter.empty),
                annotation=kind,
            )
            for name, kind in types_with_placement.items()
        ]
    )
    lines = [f"The {step} step of mixtune, run alone on artifacts of an earlier run.", "", "Args:"]
    lines += [f"    {name}: {inputs[name].description}" for name in plain]
    lines += [f"    {uri_of[name]}: URI. {one.description}" for name, one in artifacts.items()]
    lines += [f"    {name}: {text}" for name, (_, _, text) in place_parameters.items()]
    pipeline.__doc__ = "\n".join(lines)
    decorate = dsl.pipeline(name=f"{NAME}-{step}", description=lines[0], pipeline_config=place.run_settings())
    return decorate(pipeline)

"""The DAG only. `placement.py` determines where its tasks run, `components/` what they do.

    plan ──> prepare (pretraining stream) ──> pretrain ─┬─> finetune ─────────────┬─> evaluate (pretrained, finetuned,
       └──────────> prepare (fine-tuning stream) ───────┴─> mixed (one per λ) ────┘   each mixed, all interpolated)
                                                                                            │
        finish  (always: closes the run)  <── register (behind the gate) <── compare <──────┘

Steps that compute (prepare, pretrain, finetune, mixed, evaluate) are cached. Administrative steps (plan, compare, register,
finish) run every time and take seconds, so that every run checks its sources and has its own report and verdict.
"""

from __future__ import annotations

import inspect
from typing import Any

from kfp import dsl

from mixtune.components.compare.component import compare
from mixtune.components.config import HEADLINE, SECTIONS, Config, describe, parameters
from mixtune.components.evaluate.component import evaluate
from mixtune.components.finetune.component import finetune
from mixtune.components.finish.component import finish
from mixtune.components.mixed.component import mixed
from mixtune.components.plan.component import plan
from mixtune.components.prepare.component import prepare
from mixtune.components.pretrain.component import pretrain
from mixtune.components.register.component import register
from mixtune.components.shared.task_name import TaskName

from .placement import Placer

# KFP's cache keys contain this name.
NAME = "mixtune"


def make_pipeline(config: Config, place: Placer) -> Any:
    """Creates the pipeline with a configuration's values as defaults.

    Args:
        config: values of the parameters' defaults. The DAG depends on it only in where mixed training starts.
        place: sets the placement and the image of each task.

    Returns:
        The pipeline, for the KFP compiler or the local runner.
    """

    place_parameters = place.parameters()
    defaults = parameters(config) | {name: default for name, (_, default, _) in place_parameters.items()}
    types: dict[str, Any] = {name: type(value) for name, value in parameters(config).items()}
    types |= {"mixed_lambdas": list[float]} | {name: kind for name, (kind, _, _) in place_parameters.items()}

    def mixtune(*values: Any) -> None:
        given = dict(zip(defaults, values, strict=True))
        run_time = {name: given.pop(name) for name in place_parameters}
        place.with_parameters(run_time)
        closing = place(finish(), TaskName("finish"))
        with dsl.ExitHandler(closing, name="run"):
            _steps(config, place, given)

    mixtune.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=types[name])
            for name, value in defaults.items()
        ]
    )
    mixtune.__doc__ = _describe_parameters(place)
    return dsl.pipeline(name=NAME, description=_describe_parameters(place).splitlines()[0])(mixtune)


def _steps(config: Config, place: Placer, given: dict[str, Any]) -> None:
    planned = place(plan(**given, **place.gpu_nodes()), TaskName("plan"))
    part = planned.outputs

    text = place(prepare(config=part["prepare_pretrain"]), TaskName("prepare", stream="pretrain"))
    labelled = place(
        prepare(
            config=part["prepare_finetune"],
            tokenizer_in=text.outputs["tokenizer"],
            pretraining_data=text.outputs["train"],
        ),
        TaskName("prepare", stream="finetune"),
    )
    pretrained = place(
        pretrain(config=part["pretrain"], data=text.outputs["train"], tokenizer=text.outputs["tokenizer"]),
        TaskName("pretrain"),
        # Without training it needs no GPU, which only `plan` knows.
        at={name: part[f"pretrain_{name}"] for name in ("gpus", "node_selector", "tolerations", "affinity")},
    )
    # Prepare finds invalid labels before any training starts. Only the order is set, so that changed labels keep the cache.
    pretrained.after(labelled)
    finetuned = place(
        finetune(config=part["finetune"], start=pretrained.outputs["model"], data=labelled.outputs["train"]),
        TaskName("finetune"),
    )
    heldout = {"pretrain_heldout": text.outputs["heldout"], "finetune_heldout": labelled.outputs["heldout"]}

    start, also = pretrained, {}
    if config.mixed.start == "finetuned":
        # A forgetting budget is measured against the pretrained model, regardless of the start model.
        start, also = finetuned, {"pretrained": pretrained.outputs["model"]}
    with dsl.ParallelFor(planned.outputs["Output"], name="for each λ", parallelism=place.parallelism) as item:
        trained = place(
            mixed(
                config=item.mixed,
                candidate=item.candidate,
                start=start.outputs["model"],
                pretrain_data=text.outputs["train"],
                finetune_data=labelled.outputs["train"],
                **also,
            ),
            TaskName("mixed"),
        )
        measured = place(
            evaluate(
                config=item.evaluate,
                model=trained.outputs["model"],
                pretrained=pretrained.outputs["model"],
                **heldout,
            ),
            TaskName("evaluate"),
        )

    of_pretrained = place(
        evaluate(config=part["evaluate_pretrained"], model=pretrained.outputs["model"], **heldout),
        TaskName("evaluate", candidate="pretrained"),
    )
    of_finetuned = place(
        evaluate(config=part["evaluate"], model=finetuned.outputs["model"], **heldout),
        TaskName("evaluate", candidate="finetuned"),
    )
    of_interpolated = place(
        evaluate(
            config=part["interpolate"], model=pretrained.outputs["model"], other=finetuned.outputs["model"], **heldout
        ),
        TaskName("evaluate", candidate="interpolated"),
    )

    compared = place(
        compare(
            config=part["compare"],
            pretrained=of_pretrained.outputs["evaluation"],
            finetuned=of_finetuned.outputs["evaluation"],
            interpolated=of_interpolated.outputs["evaluation"],
            mixed=dsl.Collected(measured.outputs["evaluation"]),
        ),
        TaskName("compare"),
    )
    # The verdict is the unnamed output: KFP evaluates a condition on a named output to false without an error.
    with dsl.If(compared.outputs["Output"] == True, name="gate"):  # noqa: E712 - builds a condition
        place(
            register(
                config=part["register"],
                selected=_model_at(compared.outputs["selected_uri"]),
                other=_model_at(compared.outputs["other_uri"]),
                comparison=compared.outputs["comparison"],
            ),
            TaskName("register"),
        )


def _model_at(uri: Any) -> Any:
    """Imports an artifact of any run by its URI."""
    return dsl.importer(artifact_uri=uri, artifact_class=dsl.Model, reimport=False).output


def _describe_parameters(place: Placer) -> str:
    lines = ["Fine-tune a language model on a labelled task without letting it forget what it knew.", "", "Args:"]
    lines += [f"    {name}: {describe(path)}" for name, path in HEADLINE.items()]
    lines += [f"    {name}: {describe(path)} The section's other options, as JSON." for name, path in SECTIONS.items()]
    lines += [f"    {name}: {text}" for name, (_, _, text) in place.parameters().items()]
    return "\n".join(lines)

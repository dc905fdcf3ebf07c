"""The DAG only. `placement.py` determines where its tasks run, `components/` what they do.

    plan ──> prepare (pretraining stream) ──> pretrain ─┬─> finetune ─────────────┬─> evaluate (pretrained, finetuned,
       └──────────> prepare (fine-tuning stream) ───────┴─> mixed (one per λ) ────┘   each mixed, all interpolated)
                                                                                            │
        finish  (always: closes the run)  <── register (behind the gate) <── compare <──────┘

With `placement.prepare_workers`, each `prepare` puts together what tasks in a loop have read of its stream's files.

Steps that compute (prepare, pretrain, finetune, mixed, evaluate) are cached. Administrative steps (plan, compare, register,
finish) run every time and take seconds, so that every run checks its sources and has its own report and verdict.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfp import dsl

from mixtune.components.compare.component import compare
from mixtune.components.config import Config
from mixtune.components.evaluate.component import evaluate
from mixtune.components.finetune.component import finetune
from mixtune.components.finish.component import finish
from mixtune.components.form import (
    ADVANCED,
    ADVANCED_MEANING,
    FIELDS,
    PLACEMENT,
    field_choices,
    field_meaning,
    field_type,
    parameters,
)
from mixtune.components.mixed.component import mixed
from mixtune.components.placement import GpuNodes
from mixtune.components.plan.component import plan
from mixtune.components.prepare.component import prepare
from mixtune.components.prepare.portions_component import prepare_portion, prepare_portions
from mixtune.components.pretrain.component import pretrain
from mixtune.components.register.component import register
from mixtune.components.shared.task_name import PORTIONS, TaskName

from .placement import Placer
from .third_party.kfp import offer_choices

# KFP's cache keys contain this name.
NAME = "mixtune"
DESCRIPTION = "Fine-tune a language model on a labelled task without letting it forget what it knew."
REQUIRED = object()
"""The default of a field that must be filled in."""


@dataclass(frozen=True)
class FormField:
    """A field of the form: a parameter of the pipeline."""

    type: Any
    default: Any
    meaning: str
    choices: tuple[str, ...] = ()


def make_pipeline(config: Config, place: Placer, values: Mapping[str, Any] | None = None) -> Any:
    """Creates the pipeline. Its parameters are the form of a run: the fields of `form.py`, and on a cluster the placement.

    Args:
        config: the DAG depends on it only in where mixed training starts, and in `placement.prepare_workers`.
        place: sets the placement and the image of each task.
        values: defaults of the fields; those of the configuration if not given. A field without a default must be filled in.

    Returns:
        The pipeline, for the KFP compiler or the local runner.
    """
    fields = form_fields(place, parameters(config) if values is None else values)
    # Python wants parameters without a default first. KFP sorts them by name.
    fields = dict(sorted(fields.items(), key=lambda item: item[1].default is not REQUIRED))
    place.mixed_start = config.mixed.start

    def mixtune(*given: Any) -> None:
        closing = place(finish(), TaskName("finish"))
        with dsl.ExitHandler(closing, name="all steps"):
            _steps(config, place, {PLACEMENT: {}} | dict(zip(fields, given, strict=True)))

    mixtune.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if field.default is REQUIRED else field.default,
                annotation=field.type,
            )
            for name, field in fields.items()
        ]
    )
    lines = [DESCRIPTION, "", "Args:", *(f"    {name}: {field.meaning}" for name, field in fields.items())]
    mixtune.__doc__ = "\n".join(lines)
    made = dsl.pipeline(name=NAME, description=DESCRIPTION, pipeline_config=place.run_settings())(mixtune)
    offer_choices(made, {name: field.choices for name, field in fields.items()})
    return made


def form_fields(place: Placer, values: Mapping[str, Any]) -> dict[str, FormField]:
    """Returns the fields of the form in the order of their names, in which KFP shows them.

    Args:
        values: defaults of the fields.
    """
    fields = {
        name: FormField(field_type(name), values.get(name, REQUIRED), field_meaning(name), field_choices(name))
        for name in FIELDS
    }
    fields[ADVANCED] = FormField(dict, values[ADVANCED], ADVANCED_MEANING)
    fields |= {name: FormField(*one) for name, one in place.parameters().items()}
    return dict(sorted(fields.items()))


def _steps(config: Config, place: Placer, given: dict[str, Any]) -> None:
    planned = place(plan(**given), TaskName("plan"))
    part = planned.outputs
    place.place_gpu_tasks({name: part[name] for name in GpuNodes.model_fields})

    workers = config.placement.prepare_workers
    text = _prepared("pretrain", part["prepare_pretrain"], workers, place)
    labelled = _prepared(
        "finetune",
        part["prepare_finetune"],
        workers,
        place,
        tokenizer_in=text.outputs["tokenizer"],
        pretraining_data=text.outputs["train"],
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
    with dsl.ParallelFor(planned.outputs["Output"], name="candidates", parallelism=place.parallelism) as item:
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
        evaluate(
            config=part["evaluate"],
            model=finetuned.outputs["model"],
            pretrained=pretrained.outputs["model"],
            **heldout,
        ),
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
    with dsl.If(compared.outputs["Output"] == True, name="register if the gate is met"):  # noqa: E712 - builds a condition
        place(
            register(
                config=part["register"],
                selected=_model_at(compared.outputs["selected_uri"]),
                other=_model_at(compared.outputs["other_uri"]),
                comparison=compared.outputs["comparison"],
            ),
            TaskName("register"),
        )


def _prepared(stream: str, options: Any, workers: int, place: Placer, **inputs: Any) -> dsl.PipelineTask:
    """Prepares a stream: in one task, or from portions of its files that several tasks have read."""
    if workers > 1:
        cut = place(prepare_portions(config=options, workers=workers), TaskName("prepare", stream, portion=PORTIONS))
        with dsl.ParallelFor(cut.outputs["Output"], name=f"portions, {stream}") as item:
            # The local runner puts the item in place of every parameter of a task, so the item has the options too.
            tokenizer = {name: one for name, one in inputs.items() if name == "tokenizer_in"}
            read = place(
                prepare_portion(config=item.config, portion=item.portion, **tokenizer),
                TaskName("prepare", stream, portion="portion"),
            )
        inputs["portions"] = dsl.Collected(read.outputs["rows"])
    return place(prepare(config=options, **inputs), TaskName("prepare", stream=stream))


def _model_at(uri: Any) -> Any:
    """Imports an artifact of any run by its URI."""
    return dsl.importer(artifact_uri=uri, artifact_class=dsl.Model, reimport=False).output

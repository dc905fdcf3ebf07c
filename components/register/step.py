"""Registers the selected model in the MLflow model registry. Runs only if the gate is met, and fetches only that model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..shared.artifacts import ArtifactLike, ModelCard, Utilisation, read_json
from ..shared.errors import UnreachableError
from ..shared.running.context import Context
from ..shared.task_kinds import TASK_KINDS
from ..shared.tracking.connection import offline_allowed
from ..shared.tracking.kubeflow_registry import register_in_kubeflow
from ..shared.tracking.logged_model import Measurement
from ..shared.tracking.registered import REGISTERED, registered_version
from .config import RegisterStep
from .model_card import model_card

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""File in a pod with the name of its namespace."""
NOT_REGISTERED = "nothing was registered: MLflow does not answer; deliver with `mixtune sync`, then run again"


def run(
    config: RegisterStep,
    *,
    context: Context,
    selected: ArtifactLike,
    other: ArtifactLike,
    comparison: ArtifactLike,
    model: ArtifactLike,
) -> None:
    """Registers one version of the model, or finds the version with the same weights.

    Args:
        selected: the selected candidate's model; for an interpolated candidate the pretrained model.
        other: for an interpolated candidate the fine-tuned model; not read otherwise.
        comparison: the comparison, whose report is logged with the model.
        model: output. An interpolated model is written here; other models stay in their folders.
    """
    report = read_json(Path(comparison.path) / "report.json", "a comparison made by mixtune")
    candidate = next(entry for entry in report["candidates"] if entry["id"] == report["selected"])
    folder = Path(selected.path)
    if candidate["kind"] == "interpolated":
        folder = Path(model.path)
        write_interpolated(
            float(candidate["params"]["alpha"]), candidate["id"], selected.path, other.path, Path(model.path)
        )

    tags, source = _lineage(report, candidate, context), _source(context)
    card = model_card(report, candidate, config.registered_model)
    context.say(f"registering {candidate['id']} as {config.registered_model}")
    model.metadata.update({"candidate": candidate["id"], "registered_model": config.registered_model})
    try:
        version = context.tracker.register_model(
            folder,
            name=config.registered_model,
            alias=config.alias,
            kind=report["task"]["kind"],
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
            card=card,
            tags=tags,
            source=source,
            measurements=_measurements(report, candidate),
            files=[Path(comparison.path) / name for name in ("report.html", "report.md", "report.json")],
        )
    except UnreachableError:
        if not offline_allowed():
            raise
        context.facts["not_registered"] = NOT_REGISTERED
        context.say(NOT_REGISTERED)
        return
    if version is None:
        context.say("nothing was registered: MLFLOW_TRACKING_URI is not set")
        return
    model.metadata["version"] = version
    context.facts["registered"] = f"{config.registered_model} version {version}, alias {config.alias}"
    uri = f"models:/{config.registered_model}/{version}"
    of_run = {
        "mixtune.registered": context.facts["registered"],
        REGISTERED: uri,
    }
    context.tracker.set_tags(of_run, parent=True)
    context.say(f"registered {context.facts['registered']}")
    if config.kubeflow_registry:
        location = registered_version(context.tracker.reach(), uri).location
        register_in_kubeflow(
            config.kubeflow_registry,
            name=config.registered_model,
            version=version,
            uri=location,
            tags=tags,
            source=source,
            card=card,
        )
        context.say(f"Kubeflow's model registry has {config.registered_model} version {version}")


def write_interpolated(alpha: float, candidate_id: str, pretrained: str, finetuned: str, folder: Path) -> None:
    """Writes the model folder of an interpolated candidate, with the weights that `evaluate` made in memory.

    Args:
        alpha: weight of the fine-tuned model.
        candidate_id: id of the candidate.
        pretrained: model folder of the pretrained model.
        finetuned: model folder of the fine-tuned model.
        folder: folder to write to. What is in it is deleted.
    """
    from ..shared.model.loading import interpolate
    from ..shared.model.tokenizer import load_tokenizer

    model = interpolate(pretrained, finetuned, alpha)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save(folder, load_tokenizer(finetuned))
    card = ModelCard.load(finetuned)
    card.model_copy(
        update={
            "id": candidate_id,
            "kind": "interpolated",
            "start": "pretrained",
            "name": "",
            "mix_weight": None,
            "forgetting_budget": None,
            "pull_back": None,
            "tried": [],
            "stopped": None,
            "realised_mix_weight": None,
            "params": {"alpha": alpha},
            "steps": 0,
            "seconds": 0.0,
            "utilisation": Utilisation(),
            "tokens": {},
        }
    ).save(folder)


def _lineage(report: dict[str, Any], candidate: dict[str, Any], context: Context) -> dict[str, str]:
    """Returns the lineage of a version as tags: candidate, scores, data, run, commit and image."""
    score = candidate.get("task_score") or {}
    tags = {
        "mixtune.candidate": candidate["id"],
        "mixtune.kind": candidate["kind"],
        "mixtune.lambda": candidate.get("lambda"),
        "mixtune.base": candidate.get("base"),
        "mixtune.task": report["task"]["kind"],
        "mixtune.task_metric": report["task"]["metric"],
        "mixtune.task_score": score.get("value"),
        "mixtune.delta_bpb": candidate["delta_bpb"]["value"],
        "mixtune.kfp_run": context.run_id,
        "mixtune.mlflow_run": context.tracker.parent_id,
        "mixtune.report": f"runs:/{context.tracker.parent_id}/report/report.html"
        if context.tracker.parent_id
        else None,
        "mixtune.git_commit": os.environ.get("MIXTUNE_GIT_COMMIT"),
        "mixtune.image": os.environ.get("MIXTUNE_IMAGE"),
        **{f"mixtune.data.{stream}": digest for stream, digest in (candidate.get("data") or {}).items()},
    }
    if TASK_KINDS[report["task"]["kind"]].pipeline is None:
        # transformers has no pipeline for the task, so MLflow's plain load_model and predict do not work.
        tags["mixtune.load"] = 'mlflow.transformers.load_model(uri, return_type="components")'
    return {name: str(value) for name, value in tags.items() if value not in (None, "")}


def _source(context: Context) -> dict[str, str]:
    """Returns the run that made the model, by the names that Kubeflow's model registry has for it."""
    in_pod = NAMESPACE.is_file()
    source = {
        "model_source_kind": "kfp" if in_pod else "local",
        "model_source_class": "pipelinerun",
        "model_source_group": NAMESPACE.read_text(encoding="utf-8").strip() if in_pod else "",
        "model_source_id": context.run_id or "",
        "model_source_name": os.environ.get("MIXTUNE_RUN_NAME", context.run_id or ""),
    }
    return {name: value for name, value in source.items() if value}


def _measurements(report: dict[str, Any], candidate: dict[str, Any]) -> list[Measurement]:
    """Returns what was measured of the candidate on the test split, with the data: held-out examples and held-out text."""
    names = {
        "task_score": "finetune",
        "task_score_vs_finetuned": "finetune",
        "bpb": "pretrain",
        "delta_bpb": "pretrain",
    }
    found = []
    for name, stream in names.items():
        data, value = (report.get("data") or {}).get(stream), (candidate.get(name) or {}).get("value")
        if data and value is not None:
            found.append(Measurement(f"test.{name}", value, f"{stream}-heldout", data["digest"], data["source"]))
    return found

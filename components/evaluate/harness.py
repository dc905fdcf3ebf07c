"""Runs tasks of lm-evaluation-harness on a loaded candidate: values of all metrics, and the contribution of each example.

The harness writes the prompts, requests log-likelihoods or generated text, and computes the metrics. It samples few-shot
examples with its own fixed seeds, so that all candidates get the same prompts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..shared.errors import RefusedError, UnreachableError, first_line
from ..shared.measures import Measure
from ..shared.model.mixed_model import MixedModel
from ..shared.model.precision import pick_precision
from ..shared.running.context import Context
from ..shared.third_party.lm_eval import loading_metrics_with, missing_metrics, without_progress_bars
from .config import LmEvalStep
from .harness_tasks import known_tasks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "few_shot": 1234}
"""The harness's defaults, with which published results were computed."""
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
NETWORK = ("aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3")
"""Packages whose errors mean that data could not be downloaded, not that the configuration is wrong."""


class Harness:
    """The configured tasks, all known to the harness.

    Args:
        settings: tasks and their options.
        batch_size: requests per forward pass.

    Raises:
        RefusedError: if the harness is not installed or does not know a task.
    """

    def __init__(self, settings: LmEvalStep, batch_size: int) -> None:
        self._settings, self._batch_size = settings, batch_size
        self._tasks: TaskManager = known_tasks(settings)

    def measure(self, model: MixedModel, words: PreTrainedTokenizerBase, context: Context, title: str) -> list[Measure]:
        """Evaluates a candidate on every task.

        Args:
            title: name of the work in progress lines.

        Raises:
            RefusedError: if a task cannot be loaded or needs an unsupported feature.
            UnreachableError: if a task's data cannot be downloaded.
        """
        from lm_eval.models.huggingface import HFLM

        wrapped: Any = HFLM(
            pretrained=model.lm,
            tokenizer=words,
            backend="causal",
            batch_size=self._batch_size,
            trust_remote_code=False,
            mixed_precision_dtype="bfloat16" if pick_precision(model.precision) == "bf16" else None,
            softmax_dtype="float32",
        )
        for name in REQUESTS:
            setattr(wrapped, name, functools.partial(getattr(wrapped, name), disable_tqdm=True))
        rows: list[Measure] = []
        with context.progress(len(self._settings.tasks), "tasks", title) as progress:
            for name in self._settings.tasks:
                rows += self._measure(name, wrapped)
                progress.advance()
        return rows

    def _measure(self, name: str, wrapped: Any) -> list[Measure]:
        from lm_eval.evaluator import evaluate

        settings = self._settings
        # Paths of data files in a task file are relative to the task's folder.
        with contextlib.chdir(settings.tasks_folder or "."), _quiet_and_on_its_own():
            loaded = self._load(name)
            for task in loaded["tasks"].values():
                _set_few_shot(task, settings.few_shot)
            random.seed(SEEDS["python"])
            np.random.seed(SEEDS["numpy"])
            torch.manual_seed(SEEDS["torch"])
            found = evaluate(lm=wrapped, task_dict=loaded, limit=settings.limit, bootstrap_iters=0, log_samples=True)
        return list(_rows(loaded, found))

    def _load(self, name: str) -> Any:
        """Reads the task files and downloads the data.

        Both the user's files and the hub can cause any kind of error.
        """
        try:
            loaded = self._tasks.load([name])
        except Exception as error:
            if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in NETWORK:
                raise UnreachableError(
                    f"evaluate.lm_eval.tasks: the data of {name} cannot be fetched ({first_line(error)})"
                ) from None
            if isinstance(error, KeyError) and error.args == (None,):  # the harness did not find a function
                raise RefusedError(_other_metric(name, "a metric")) from None
            kind = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
            raise RefusedError(f"evaluate.lm_eval.tasks: {name} cannot be loaded ({kind}{first_line(error)})") from None
        problems = [problem for task in loaded["tasks"].values() for problem in _cannot_be_done(task)]
        if problems:
            raise RefusedError(*problems)
        return loaded


@contextlib.contextmanager
def _quiet_and_on_its_own() -> Iterator[None]:
    """Disables the harness's progress bars, which would add a log line for each update in a pod, and code from the hub.

    The package `evaluate` loads such code, also from its cache, if a task uses a metric that the harness does not have.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with without_progress_bars(), loading_metrics_with(_refuse_metric):
            yield
    finally:
        if not before:
            enable_progress_bars()


def _refuse_metric(path: str, *_: Any, **__: Any) -> Any:
    raise RefusedError(f"it loads the metric {path} from the hub, whose code mixtune does not run")


def _set_few_shot(task: Any, few_shot: int | None) -> None:
    """Sets the few-shot count like `lm_eval.simple_evaluate`. A task's own 0 is kept: its prompt has no room for examples."""
    said = task.get_config("num_fewshot")
    if few_shot is None or said == 0:
        task.set_config(key="num_fewshot", value=said or 0)
    else:
        task.set_config(key="num_fewshot", value=few_shot)
    task.set_fewshot_seed(seed=SEEDS["few_shot"])


def _cannot_be_done(task: Any) -> list[str]:
    name = f"evaluate.lm_eval.tasks: {task.task_name}"
    problems = []
    if getattr(task, "UNSAFE_CODE", False):
        problems.append(f"{name} runs code that the model wrote, which mixtune does not do; leave it out")
    if getattr(task, "MULTIMODAL", False):
        problems.append(f"{name} asks about pictures or sound, and the model reads text; leave it out")
    if missing := missing_metrics(task):
        problems.append(_other_metric(task.task_name, f"the metric {', '.join(missing)}"))
    return problems


def _other_metric(task: str, metric: str) -> str:
    return (
        f"evaluate.lm_eval.tasks: {task} asks for {metric} that lm-evaluation-harness does not have; it would be code from the "
        "hub, which mixtune does not run"
    )


def _rows(loaded: Any, found: Any) -> Iterator[Measure]:
    for name, members in _shown(loaded):
        few_shot = found["n-shot"].get(name)
        better = found["higher_is_better"].get(name) or {}
        for key, value in found["results"][name].items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            samples = [
                (member, sample)
                for member in members
                for sample in found["samples"][member]
                if sample["filter"] == filtered and metric in sample
            ]
            values = _of_examples([sample[metric] for _, sample in samples], float(value))
            identity = [(member, sample["doc_hash"], sample["prompt_hash"]) for member, sample in samples]
            yield Measure(
                task=name,
                metric=metric,
                filter=filtered,
                value=float(value) if math.isfinite(value) else None,
                stderr=_standard_error(values),
                examples=len(samples),
                higher_is_better=better.get(metric),
                few_shot=few_shot,
                digest=hashlib.sha256(repr(identity).encode()).hexdigest(),
                values=values,
            )


def _shown(loaded: Any) -> Iterator[tuple[str, list[str]]]:
    """Yields the rows to report with their tasks: groups that have a value of their own, and tasks outside of such groups."""
    groups = {name: group for name, group in loaded.get("groups", {}).items() if group.has_aggregation}
    inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    inside |= {inner.name for group in groups.values() for inner in group.get_all_groups()}
    for name, group in groups.items():
        if name not in inside:
            yield name, [task.task_name for task in group.get_all_tasks()]
    for name in loaded["tasks"]:
        if name not in inside:
            yield name, [name]


def _of_examples(values: Iterable[Any], whole: float) -> list[float] | None:
    """Returns the values of the examples if their mean is the whole value; else None, as for perplexity, F1 or BLEU."""
    values = list(values)
    if not values or not all(_is_number(value) and math.isfinite(value) for value in values):
        return None
    numbers = [float(value) for value in values]
    return numbers if math.isclose(math.fsum(numbers) / len(numbers), whole, rel_tol=1e-9, abs_tol=1e-12) else None


def _standard_error(values: list[float] | None) -> float | None:
    """Returns the standard error of the mean with Bessel's correction, as the harness does."""
    if values is None or len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number)

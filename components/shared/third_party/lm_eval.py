"""Private names of lm-evaluation-harness and of the package `evaluate`, from which it loads metrics.

Importing this module imports neither.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disables the progress bars of the harness that no option disables."""
    import lm_eval.api.task

    bars = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(bars, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bars


@contextlib.contextmanager
def loading_metrics_with(load: Callable[..., Any]) -> Iterator[None]:
    """Replaces the function that loads metrics which the harness does not have, as code from the hub or from its cache."""
    import evaluate

    before = evaluate.load
    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = before


def missing_metrics(task: Any) -> list[str]:
    """Returns the metrics of a loaded task for which the harness found no function."""
    return [metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None]

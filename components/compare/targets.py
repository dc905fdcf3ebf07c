"""How the report shows references and predictions, by what a task predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shared.task_kinds import TASK_KINDS, Target, Task


def _text(given: Any) -> str:
    return str(given).strip() or "(nothing)"


def _labels(given: Any) -> str:
    return ", ".join(given) or "no label"


def _number(given: Any) -> str:
    return f"{given:.4g}"


def _answers(given: Any) -> str:
    texts = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    return " / ".join(text for text in texts if text) or "no answer"


def _differ(one: Any, other: Any) -> float:
    return float(one != other)


@dataclass(frozen=True)
class Shown:
    """The format of one target.

    Attributes:
        answer: formats a reference or a prediction.
        score: formats the score of an example.
        disagreement: returns how far two predictions are apart.
        has_classes: whether one class can be taken for another, so that the report counts confusions.
    """

    answer: Callable[[Any], str] = _text
    score: Callable[[float], str] = "{:.2g}".format
    disagreement: Callable[[Any, Any], float] = _differ
    has_classes: bool = False


_SHOWN: dict[Target, Shown] = {
    "label": Shown(has_classes=True),
    "labels": Shown(_labels),
    "number": Shown(_number, lambda score: f"off by {-score:.3g}", lambda one, other: float(abs(one - other))),
    "answers": Shown(_answers),
    "text": Shown(),
}


def shown(kind: Task) -> Shown:
    """Returns the format of a task's references and predictions."""
    return _SHOWN[TASK_KINDS[kind].target]

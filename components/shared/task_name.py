"""The name of a task: a step and its subject. The only place that builds titles and takes them apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

STEPS = ("plan", "prepare", "pretrain", "finetune", "mixed", "evaluate", "compare", "register", "finish")
LOOP_PREFIXES = ("mixed-", "finetuned-")
"""Beginnings of the ids of the candidates that are trained in a loop: mixed ones, and fine-tuning alone with further seeds."""
_TRAINING = frozenset({"pretrain", "finetune", "mixed"})
_IN_WORDS = {"pretrain": "pretraining stream", "finetune": "fine-tuning stream", "finetuned": "fine-tuned"}
PORTIONS = "portions"
"""The part of `prepare` that cuts the files of a stream into portions. Others read one portion each."""
_PARTS = {"prepare-portions": "prepare", "prepare-portion": "prepare"}
"""Step of each component that does a part of a step."""
_PACKAGE_TASK = re.compile(rf"({'|'.join([*STEPS, *_PARTS])})(?:-(\d+))?")


@dataclass(frozen=True)
class TaskName:
    """Identifies a task of a run. `str()` returns its title, which outcome records, MLflow runs and log lines carry.

    Attributes:
        step: name of the step.
        stream: `pretrain` or `finetune`; only `prepare` has one.
        candidate: id of the candidate; only `mixed` and `evaluate` have one.
        portion: part of `prepare` that reads files for it: `portions` cuts them into portions, `portion 2` reads one of these.
    """

    step: str
    stream: str | None = None
    candidate: str | None = None
    portion: str | None = None

    def __str__(self) -> str:
        """Returns the title, such as `prepare finetune`, `prepare finetune portion 2`, `mixed-0.3` or `evaluate mixed-0.3`."""
        if self.step == "mixed" and self.candidate:
            return self.candidate
        return " ".join(part for part in (self.step, self.stream, self.candidate, self.portion) if part)

    @property
    def words(self) -> str:
        """Returns the display name in KFP's user interface, such as `prepare fine-tuning stream`."""
        subject = self.stream or self.candidate
        words = f"{self.step} {_IN_WORDS.get(subject, subject)}" if subject else self.step
        return f"{words}, {self.portion}" if self.portion else words

    @property
    def file_name(self) -> str:
        """Returns the name of the task's files, without a suffix."""
        return file_name(str(self))

    @property
    def trains(self) -> bool:
        """Tells whether the task trains a model."""
        return self.step in _TRAINING

    @classmethod
    def parse(cls, title: str) -> TaskName | None:
        """Returns the name with this title; None if it is not the title of a task."""
        if title.startswith(LOOP_PREFIXES):
            return cls("mixed", candidate=title)
        step, _, subject = title.partition(" ")
        if step not in STEPS:
            return None
        if step == "prepare":
            stream, _, portion = subject.partition(" ")
            return cls(step, stream=stream or None, portion=portion or None)
        return cls(step, candidate=subject or None)

    @classmethod
    def of_package_task(cls, task: str, candidate: str | None = None, iteration: int | None = None) -> TaskName | None:
        """Returns the name of a task of a compiled package; None for drivers, importers and groups.

        Args:
            task: name of the task in the package, such as `evaluate-2`.
            candidate: id of the candidate, for a task of the loop over candidates.
            iteration: number of the iteration, from 0, for a task of any loop.
        """
        found = _PACKAGE_TASK.fullmatch(task)
        if found is None:
            return None
        step, number = found.groups()
        if step in _PARTS:
            stream = "pretrain" if number is None else "finetune"
            one = "portion" if iteration is None else f"portion {iteration + 1}"
            return cls(_PARTS[step], stream=stream, portion=PORTIONS if step.endswith(PORTIONS) else one)
        return cls(step, candidate=candidate) if candidate else _OF_PACKAGE.get(task, cls(step, candidate=number))

    @classmethod
    def step_of_component(cls, component: str) -> str:
        """Returns the step of a component of a package, such as `prepare` of `prepare-portion`."""
        return _PARTS.get(component, component)


# KFP numbers the tasks of a component in the order of the calls in `pipeline.py`.
_OF_PACKAGE = {
    "prepare": TaskName("prepare", stream="pretrain"),
    "prepare-2": TaskName("prepare", stream="finetune"),
    "evaluate": TaskName("evaluate", candidate="(mixed)"),  # a candidate of the loop, if it is not known which
    "evaluate-2": TaskName("evaluate", candidate="pretrained"),
    "evaluate-3": TaskName("evaluate", candidate="finetuned"),
    "evaluate-4": TaskName("evaluate", candidate="interpolated"),
}


def file_name(title: str) -> str:
    """Returns the name of a task's files, without a suffix, for the title in an outcome record."""
    return re.sub(r"[^\w.+()-]", "-", title)

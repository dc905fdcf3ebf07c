"""Options of the `register` step."""

from __future__ import annotations

from ..shared.section import Section


class RegisterStep(Section):
    """The configuration of the `register` task, which `plan` creates."""

    registered_model: str
    alias: str
    kubeflow_registry: str | None = None
    max_length: int
    """Maximum length of an input, in tokens."""
    max_new_tokens: int | None = None
    """Generation: maximum length of an answer, in tokens; None for tasks with a head."""

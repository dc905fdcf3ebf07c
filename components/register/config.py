"""Options of the `register` step."""

from __future__ import annotations

from ..shared.config import Section


class RegisterStep(Section):
    """The configuration of the `register` task, which `plan` creates."""

    registered_model: str
    alias: str

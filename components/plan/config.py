"""Options of the `plan` step: the whole configuration, not yet checked."""

from __future__ import annotations

from typing import Any

from ..shared.section import Section


class PlanStep(Section):
    """The values of the form, not yet checked."""

    form: dict[str, Any]

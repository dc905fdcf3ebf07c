"""Options of the `plan` step: the whole configuration, not yet checked."""

from __future__ import annotations

from typing import Any

from ..shared.section import Section


class PlanStep(Section):
    """The values of a submission: headline values and sections, not yet checked."""

    configuration: dict[str, Any]

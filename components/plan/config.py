"""Options of the `plan` step: the whole configuration, as text."""

from __future__ import annotations

from typing import Any

from ..shared.config import Section


class PlanStep(Section):
    """What a submission gives: the headline values and the sections, not yet checked."""

    configuration: dict[str, Any]

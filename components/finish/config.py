"""Options of the `finish` step: none. It reads the run's outcome from the tracking server and the outcome records."""

from __future__ import annotations

from ..shared.section import Section


class FinishStep(Section):
    """Nothing: `finish` runs also when `plan` has failed, so no step can hand it anything."""

"""Options of the `register` step."""

from __future__ import annotations

from ..shared.config import Section


class RegisterStep(Section):
    """All that the `register` step reads, as `plan` hands it over."""

    registered_model: str
    alias: str

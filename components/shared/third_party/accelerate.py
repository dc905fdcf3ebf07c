"""Private names of accelerate."""

from __future__ import annotations

from accelerate.state import AcceleratorState


def reset_state() -> None:
    """Forgets the mixed precision of earlier accelerators in this process. A new one must otherwise use the same."""
    AcceleratorState._reset_state()

"""What several tests of the engine need."""

from __future__ import annotations

import pytest

from mixtune.components.shared.training import loop as training

from .compared import gradient_descent


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains by plain gradient descent, after which weights can be compared."""
    monkeypatch.setattr(training, "make_optimizer", gradient_descent)

"""When the weights of a model are sharded over processes. What sharded trainings compute is in `test_distributed.py`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mixtune.components.finetune.config import Finetune
from mixtune.components.shared.model.sharding import fits

from .tiny import tiny_model


def test_a_model_fits_where_its_training_takes_70_percent() -> None:
    trained, read = tiny_model(seed=0), tiny_model(seed=1).requires_grad_(False)
    count = sum(weight.numel() for weight in trained.parameters())
    needed = (16 + 4) * count
    assert fits([trained, read], round(needed / 0.69))
    assert not fits([trained, read], round(needed / 0.71))


def test_a_compiled_training_is_not_sharded() -> None:
    with pytest.raises(ValidationError, match="compile does not work with parallelism: fsdp"):
        Finetune(compile=True, parallelism="fsdp")

"""Orthogonal subspace fine-tuning: what the largest singular values belong to stays, and what comes out is a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.training.lora import merge_adapters
from mixtune.components.shared.training.optimizer import is_task_head
from mixtune.components.shared.training.osf import split_by_singular_values
from mixtune.components.shared.training.variant import TrainingVariant

from .compared import weights_of
from .tiny import ARCHITECTURES, ENCODERS, tiny_model
from .trained import run, write_both

pytestmark = pytest.mark.numeric
PLAIN = ("llama", "qwen2", "bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("data"), "classification")


@pytest.mark.parametrize("architecture", [*sorted(set(ARCHITECTURES) - {"gpt2"}), *ENCODERS])
def test_the_split_alone_changes_nothing(architecture: str) -> None:
    model, plain = (tiny_model(architecture, task="classification") for _ in range(2))
    split_by_singular_values(model, 0.5)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any("osf_svd_params" in name for name in trained)
    assert all("osf_svd_params" in name or is_task_head(name) for name in trained)
    merge_adapters(model)
    after = dict(model.named_parameters())
    assert after.keys() == dict(plain.named_parameters()).keys(), "no trace of the split"
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(after[name], weight)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(RefusedError, match="a model of type gpt2 has none"):
        split_by_singular_values(tiny_model("gpt2"), 0.5)


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("architecture", PLAIN)
def test_a_step_does_not_touch_the_directions_that_are_kept(folder: Path, architecture: str) -> None:
    start = weights_of(tiny_model(architecture, task="classification"))
    variant = TrainingVariant(osf_share=0.5)
    model, _ = run(folder, architecture=architecture, variant=variant, steps=1, learning_rate=0.5)
    moved = {name: weight - start[name] for name, weight in weights_of(model).items()}
    matrices = [name for name in moved if "layer" in name and moved[name].dim() == 2]
    assert matrices
    for name in matrices:
        U, _, V = torch.linalg.svd(start[name], full_matrices=False)
        kept = min(start[name].shape) // 2
        change = moved[name].norm()
        assert change > 0, name
        assert (U[:, :kept].T @ moved[name]).norm() < 1e-4 * change, name
        assert (moved[name] @ V[:kept].T).norm() < 1e-4 * change, name
    untouched = [name for name in moved if name not in matrices and not is_task_head(name) and "pooler" not in name]
    assert all(not moved[name].any() for name in untouched)

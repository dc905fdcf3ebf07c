"""Training steps as a container would run them, in one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.mixed.config import MixedCandidate, MixedStep, MixedTraining
from mixtune.components.pretrain.config import Pretrain, PretrainStep
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Budget, Model, Task, Watch, Watching
from mixtune.components.shared.runtime import launch
from mixtune.components.shared.section import Section
from tests.components.stages import SCRATCH, Stages

OPTIONS: dict[str, Any] = {
    "steps": 3, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 0.1, "precision": "float32",
    "log_every_steps": 1, "max_grad_norm": 1e3,  # no clipping, which would hide a wrong factor
}  # fmt: skip
WATCHED = 2
"""Steps between two measurements on the watched sample."""
PROCESSES = "MIXTUNE_PROCESSES"


class Steps:
    """Training steps as a container would run them."""

    def __init__(self, folder: Path, task: Task, objective: Any = "causal_lm") -> None:
        self.folder, self.objective = folder, objective
        Stages(folder, task, objective).pretrain(steps=2)

    def order(
        self, step: str, name: str, candidate: MixedCandidate | None, **options: Any
    ) -> tuple[str, dict[str, str], dict[str, str]]:
        """Configuration, artifacts and parameters."""
        folder, options = self.folder, OPTIONS | options
        artifacts = {"model": str(folder / name), "metrics": str(folder / f"{name}-metrics.json")}
        config: Section
        if step == "pretrain":
            model = Model(base="scratch", max_length=32, scratch=SCRATCH, objective=self.objective)
            config = PretrainStep(seed=0, model=model, pretrain=Pretrain(**options), fingerprint="x")
            return config.to_json(), artifacts | self.inputs("data=text", "tokenizer"), {}
        if candidate is None:
            watch = Watching(every_steps=WATCHED)
            config = FinetuneStep(seed=0, max_length=32, finetune=Finetune(**options), watch=watch)
            return config.to_json(), artifacts | self.inputs("start=pretrained", "data=labels"), {}
        watching = Watch(every_steps=WATCHED)
        config = MixedStep(seed=0, max_length=32, mixed=MixedTraining(**options), watch=watching)
        inputs = self.inputs("start=pretrained", "pretrain_data=text", "finetune_data=labels")
        return config.to_json(), artifacts | inputs, {"candidate": candidate.to_json()}

    def inputs(self, *names: str) -> dict[str, str]:
        pairs = [name.split("=") for name in names]
        return {pair[0]: str(self.folder / pair[-1]) for pair in pairs}

    def run(self, step: str, name: str, candidate: MixedCandidate | None = None, **options: Any) -> dict[str, Artifact]:
        config, paths, parameters = self.order(step, name, candidate, **options)
        artifacts = {key: Artifact(path) for key, path in paths.items()}
        launch(step, config, artifacts, **parameters)
        return artifacts


def mixed_at(weight: float, **options: Any) -> MixedCandidate:
    return MixedCandidate(id=f"mixed-{weight:g}", mix_weight=weight, **options)


UNCONTROLLED = Budget(start_lambda=0, max_lambda=0, max_trainings=1)
"""λ cannot keep to a budget, so that the model is pulled back to it."""
CASES: dict[str, tuple[str, Task, str, MixedCandidate | None]] = {
    "pretrain": ("causal_lm", "generation", "pretrain", None),
    "finetune-generation": ("causal_lm", "generation", "finetune", None),
    "finetune-classification": ("causal_lm", "classification", "finetune", None),
    "finetune-answers": ("masked_lm", "question_answering", "finetune", None),
    "mixed-generation": ("causal_lm", "generation", "mixed", mixed_at(0.3)),
    "mixed-classification": ("causal_lm", "classification", "mixed", mixed_at(0.3)),
    "mixed-numbers": ("causal_lm", "regression", "mixed", mixed_at(0.3)),
    "mixed-labels": ("masked_lm", "multi_label", "mixed", mixed_at(0.3)),
    "more-pretraining": ("masked_lm", "classification", "mixed", mixed_at(1.0)),
    "recomputed": ("causal_lm", "classification", "mixed", mixed_at(0.3)),
    "gradient-scale": ("causal_lm", "classification", "mixed", mixed_at(0.3)),
    "experts": ("causal_lm", "classification", "mixed", mixed_at(0.3)),
    "lora-experts": ("causal_lm", "generation", "mixed", mixed_at(0.3, lora_rank=2)),
    "lora-budget": (
        "causal_lm", "classification", "mixed",
        MixedCandidate(id="mixed-budget-0.0008", forgetting_budget=0.0008, budget=UNCONTROLLED, lora_rank=2),
    ),
    "adapters-budget": (
        "causal_lm", "classification", "mixed",
        MixedCandidate(id="mixed-budget-0.0008", forgetting_budget=0.0008, budget=UNCONTROLLED, lora_rank=2, lora_merge=False),
    ),
    "penalties": ("causal_lm", "classification", "mixed", mixed_at(0.0, kl_weight=0.5, l2sp_weight=0.1)),
    "flow": ("causal_lm", "generation", "mixed", mixed_at(0.3, flow=True)),
    "sampled": ("causal_lm", "classification", "mixed", mixed_at(0.3, sampled=True)),
    "budget": (
        "causal_lm", "classification", "mixed",
        MixedCandidate(id="mixed-budget-0.001", forgetting_budget=0.001, budget=Budget(max_trainings=2)),
    ),
}  # fmt: skip


QUICK = {
    "pretrain", "finetune-generation", "finetune-answers", "mixed-generation", "mixed-classification", "gradient-scale",
    "lora-experts", "penalties", "budget",
}  # fmt: skip
"""Each objective, head and way to train once. `make test` runs these, `make test-slow` the others."""
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "gradient-scale": {"scale": "gradient"},
    "recomputed": {"gradient_checkpointing": True},
    "budget": {"learning_rate": 0.35},
    "lora-budget": {"learning_rate": 1.0},
    "adapters-budget": {"learning_rate": 1.0},
}

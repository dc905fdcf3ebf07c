"""The three training stages on a few random documents, in a second each."""

from __future__ import annotations

from pathlib import Path

from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.finetune.step import run as run_finetune
from mixtune.components.mixed.config import MixedCandidate, MixedStep, MixedTraining
from mixtune.components.mixed.step import run as run_mixed
from mixtune.components.pretrain.config import Pretrain, PretrainStep
from mixtune.components.pretrain.step import run as run_pretrain
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Model, Objective, Scratch, Task, Watch, Watching
from mixtune.components.shared.running.context import Context
from tests.components.shared.tiny import tiny_tokenizer, write_watched

OPTIONS = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32", "log_every_steps": 2}
SCRATCH = Scratch(vocabulary_size=300, hidden_size=16, layers=1, heads=2)


class Stages:
    """Data, tokenizer and model folders below one folder.

    Args:
        objective: what a model from scratch is trained for.
    """

    watch = Watch()

    def __init__(self, folder: Path, task: Task = "classification", objective: Objective = "causal_lm") -> None:
        self.folder, self.objective = folder, objective
        write_watched(folder, task)
        tiny_tokenizer(ends=objective == "masked_lm").save_pretrained(folder / "tokenizer")
        self.context = Context.for_tests()

    def artifact(self, name: str) -> Artifact:
        return Artifact(str(self.folder / name))

    def pretrain(self, base: str = "scratch", name: str = "pretrained", **options: object) -> Path:
        objective = self.objective if base == "scratch" else None
        model = Model(base=base, max_length=32, scratch=SCRATCH, objective=objective)
        config = PretrainStep(seed=0, model=model, pretrain=Pretrain.model_validate(OPTIONS | options), fingerprint="x")
        run_pretrain(
            config, context=self.context, data=self.artifact("text"), tokenizer=self.artifact("tokenizer"),
            model=self.artifact(name), metrics=self.artifact("metrics"),
        )  # fmt: skip
        return self.folder / name

    def finetune(self, start: str = "pretrained", name: str = "finetuned", **options: object) -> Path:
        watch = Watching.model_validate(self.watch.model_dump(include=set(Watching.model_fields)))
        config = FinetuneStep(seed=0, max_length=32, finetune=Finetune.model_validate(OPTIONS | options), watch=watch)
        run_finetune(
            config, context=self.context, start=self.artifact(start), data=self.artifact("labels"),
            model=self.artifact(name), metrics=self.artifact("metrics"),
        )  # fmt: skip
        return self.folder / name

    def mixed(
        self,
        weight: float | MixedCandidate,
        start: str = "pretrained",
        folder: str = "pretrained",
        pretrained: str | None = None,
        **options: object,
    ) -> Path:
        """Trains a candidate.

        Args:
            weight: λ, or a candidate that says otherwise.
            start: the model that the configuration says to start from.
            folder: the one that is given.
            pretrained: the model that forgetting is measured against.
        """
        candidate = (
            weight if isinstance(weight, MixedCandidate) else MixedCandidate(id=f"mixed-{weight:g}", mix_weight=weight)
        )
        training = MixedTraining.model_validate(OPTIONS | {"start": start} | options)
        config = MixedStep(seed=0, max_length=32, mixed=training, watch=self.watch)
        run_mixed(
            config, context=self.context, candidate=candidate.to_json(),
            start=self.artifact(folder), pretrain_data=self.artifact("text"), finetune_data=self.artifact("labels"),
            pretrained=self.artifact(pretrained) if pretrained else None,
            model=self.artifact("mixed"), metrics=self.artifact("metrics"),
        )  # fmt: skip
        return self.folder / "mixed"

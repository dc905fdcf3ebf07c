"""The three training stages on a few random documents, in a second each."""

from __future__ import annotations

from pathlib import Path

from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.finetune.step import run as run_finetune
from mixtune.components.mixed.config import Candidate, MixedStep, MixedTraining
from mixtune.components.mixed.step import run as run_mixed
from mixtune.components.pretrain.config import Pretrain, PretrainStep
from mixtune.components.pretrain.step import run as run_pretrain
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Model, Scratch
from mixtune.components.shared.context import Context
from tests.components.shared.tiny import tiny_tokenizer, write_data

OPTIONS = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32", "log_every_steps": 2}
SCRATCH = Scratch(vocabulary_size=300, hidden_size=16, layers=1, heads=2)


class Stages:
    """Data, tokenizer and model folders below one folder."""

    def __init__(self, folder: Path, task: str = "classification") -> None:
        self.folder = folder
        write_data(folder / "text", "pretrain", None)
        write_data(folder / "labels", "finetune", task)
        tiny_tokenizer().save_pretrained(folder / "tokenizer")
        self.context = Context.for_tests()

    def artifact(self, name: str) -> Artifact:
        return Artifact(str(self.folder / name))

    def pretrain(self, base: str = "scratch", name: str = "pretrained", **options: object) -> Path:
        model = Model(base=base, max_length=32, scratch=SCRATCH)
        config = PretrainStep(seed=0, model=model, pretrain=Pretrain.model_validate(OPTIONS | options), fingerprint="x")
        run_pretrain(
            config, context=self.context, data=self.artifact("text"), tokenizer=self.artifact("tokenizer"),
            model=self.artifact(name), metrics=self.artifact("metrics"),
        )  # fmt: skip
        return self.folder / name

    def finetune(self, **options: object) -> Path:
        config = FinetuneStep(seed=0, max_length=32, finetune=Finetune.model_validate(OPTIONS | options))
        run_finetune(
            config, context=self.context, start=self.artifact("pretrained"), data=self.artifact("labels"),
            model=self.artifact("finetuned"), metrics=self.artifact("metrics"),
        )  # fmt: skip
        return self.folder / "finetuned"

    def mixed(self, weight: float, start: str = "pretrained", folder: str = "pretrained") -> Path:
        options = MixedTraining.model_validate(OPTIONS | {"start": start})
        config = MixedStep(seed=0, max_length=32, mixed=options)
        run_mixed(
            config, context=self.context, candidate=Candidate(id=f"mixed-{weight:g}", mix_weight=weight).to_json(),
            start=self.artifact(folder), pretrain_data=self.artifact("text"), finetune_data=self.artifact("labels"),
            model=self.artifact("mixed"), metrics=self.artifact("metrics"),
        )  # fmt: skip
        return self.folder / "mixed"

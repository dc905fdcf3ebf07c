"""A whole comparison on a bare GPU machine without a network.

It pretrains a model of some 110 million parameters from nothing on a folder of text, fine-tunes it, trains a mixed candidate
for each λ, interpolates, and evaluates all of them. It writes the report, tokens/s, MFU and peak memory.

    python -m tests.benchmarks.gpu_evidence --text FOLDER --labelled FILE --task TASK --output FOLDER [--set mixed.steps=500]...
    python -m tests.benchmarks.gpu_evidence ... --tiny                to see that everything runs, also on a CPU

The steps are those of the pipeline, one after another in this process, without KFP and MLflow. A step whose output is there is
not run again, and a training goes on from its checkpoint. MFU counts the matrix products of the weights only, not of attention.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from transformers import AutoConfig

from mixtune.components.shared.artifacts import Artifact, ModelCard, read_jsonl
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.runtime import launch
from mixtune.pipelines.cli.plan import CANDIDATES, plan_and_write

from .gpu_engine import peak_flops, say

FULL: dict[str, Any] = {
    "name": "gpu-evidence",
    "model": {
        "base": "scratch",
        "max_length": 1024,
        "scratch": {"vocabulary_size": 32_000, "hidden_size": 768, "layers": 12, "heads": 12},
    },
    "pretrain": {"steps": 1500, "batch_size": 32, "micro_batch_size": 32, "learning_rate": 6e-4, "warmup_steps": 100},
    "finetune": {"steps": 300, "batch_size": 64, "micro_batch_size": 32, "learning_rate": 5e-5, "warmup_steps": 30},
    "mixed": {
        "steps": 300, "batch_size": 64, "micro_batch_size": 32, "learning_rate": 5e-5, "warmup_steps": 30,
        "lambdas": [0.05, 0.1, 0.3, 0.5],
    },
}  # fmt: skip
"""Everything but the data. Some 49 million tokens of pretraining text are read."""
TINY: dict[str, Any] = {
    "name": "gpu-evidence",
    "model": {
        "base": "scratch",
        "max_length": 64,
        "scratch": {"vocabulary_size": 400, "hidden_size": 32, "layers": 2, "heads": 2},
    },
    "pretrain": {"steps": 4, "batch_size": 4, "log_every_steps": 1},
    "finetune": {"steps": 4, "batch_size": 4, "log_every_steps": 1},
    "mixed": {"steps": 4, "batch_size": 4, "log_every_steps": 1, "lambdas": [0.3]},
}


OPTIONAL = {"prepare": ("tokenizer_in", "pretraining_data"), "evaluate": ("other", "pretrained")}
"""Inputs that a step can do without."""


class Evidence:
    """One comparison below one folder.

    Args:
        output: folder of all results; what is there already is kept.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.peaks: dict[str, int | None] = {}

    def step(self, step: str, part: str, artifacts: dict[str, Any], made: str, **parameters: str) -> None:
        """Runs one step.

        Args:
            part: file with its part of the configuration, without the ending.
            artifacts: name of each input and output, relative to the output folder; lists of names for several.
            made: its main output, by whose existence a finished step is known.
        """
        if (self.output / made).exists():
            say(f"{made} is there")
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        given: dict[str, Any] = {
            name: [self._at(each) for each in one] if isinstance(one, list) else self._at(one)
            for name, one in artifacts.items()
        }
        given |= {name: None for name in OPTIONAL.get(step, ()) if name not in artifacts}
        launch(step, (self.output / "parts" / f"{part}.json").read_text(encoding="utf-8"), given, **parameters)
        self.peaks[made] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    def _at(self, name: str) -> Artifact:
        return Artifact(str(self.output / name), uri=str(self.output / name))

    def run(self) -> None:
        """Runs all steps."""
        heldout = {"pretrain_heldout": "text-heldout", "finetune_heldout": "labelled-heldout"}
        text = {"train": "text", "heldout": "text-heldout", "tokenizer": "tokenizer", "report": "text.html"}
        self.step("prepare", "prepare_pretrain", text, "text")
        labelled = {"train": "labelled", "heldout": "labelled-heldout", "tokenizer": "tokenizer-2"}
        labelled |= {"tokenizer_in": "tokenizer", "pretraining_data": "text", "report": "labelled.html"}
        self.step("prepare", "prepare_finetune", labelled, "labelled")
        pretrained = {"data": "text", "tokenizer": "tokenizer", "model": "pretrained", "metrics": "pretrained.json"}
        self.step("pretrain", "pretrain", pretrained, "pretrained")
        finetuned = {"start": "pretrained", "data": "labelled", "model": "finetuned", "metrics": "finetuned.json"}
        self.step("finetune", "finetune", finetuned, "finetuned")
        candidates = sorted((self.output / "parts" / CANDIDATES).glob("*.json"))
        both = {"start": "pretrained", "pretrain_data": "text", "finetune_data": "labelled"}
        for file in candidates:
            outputs = {"model": file.stem, "metrics": f"{file.stem}.json"}
            self.step("mixed", "mixed", both | outputs, file.stem, candidate=file.read_text(encoding="utf-8"))

        def evaluated(part: str, name: str, **models: str) -> str:
            outputs = {
                "evaluation": f"of-{name}",
                "metrics": f"of-{name}.json",
                "classification": f"of-{name}-matrix.json",
            }
            self.step("evaluate", part, models | heldout | outputs, f"of-{name}")
            return f"of-{name}"

        evaluations: dict[str, Any] = {
            "pretrained": evaluated("evaluate_pretrained", "pretrained", model="pretrained"),
            "finetuned": evaluated("evaluate", "finetuned", model="finetuned"),
            "interpolated": evaluated("interpolate", "interpolated", model="pretrained", other="finetuned"),
            "mixed": [
                evaluated("evaluate_mixed", file.stem, model=file.stem, pretrained="pretrained") for file in candidates
            ],
        }
        outputs = {
            "report": "report.html",
            "summary": "report.md",
            "metrics": "compare.json",
            "comparison": "comparison",
        }
        uris = {name: str(self.output / name) for name in ("selected_uri", "other_uri")}
        self.step("compare", "compare", evaluations | outputs, "comparison", **uris)
        shutil.copyfile(self.output / "comparison" / "report.json", self.output / "report.json")

    def figures(self) -> dict[str, Any]:
        """Returns tokens/s, MFU and peak memory of each training."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        peak, trainings = peak_flops(name), []
        for card_file in sorted(self.output.glob("*/mixtune.json")):
            card, curve = ModelCard.load(card_file.parent), list(read_jsonl(card_file.parent / "training.jsonl"))
            if not curve:
                continue
            flops = needed_flops(AutoConfig.from_pretrained(card_file.parent), curve)
            rate = flops / max(card.seconds or 0.0, 1e-9)
            trainings.append(
                {
                    "candidate": card.id,
                    "steps": card.steps,
                    "tokens": sum(card.tokens.values()),
                    "seconds": card.seconds,
                    "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in curve),
                    "mfu": rate / peak if peak else None,
                    "peak_bytes": self.peaks.get(card_file.parent.name),
                    "device": card.device,
                    "precision": card.precision,
                }
            )
        return {"device": name, "torch": torch.__version__, "peak_bf16": peak, "trainings": trainings}


def needed_flops(config: Any, curve: Sequence[dict[str, Any]]) -> float:
    """FLOPs of the weights' matrix products, forward and backward, of a Llama: 6 for each weight and token."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    tokens = sum(entry["tokens_pretrain"] + entry["tokens_finetune"] for entry in curve)
    supervised = sum(entry["supervised_pretrain"] + entry["supervised_finetune"] for entry in curve)
    return float(
        6 * config.num_hidden_layers * layer * tokens + 6 * config.vocab_size * config.hidden_size * supervised
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="folder or file with the pretraining text")
    parser.add_argument("--labelled", type=Path, required=True, help="file with the labelled examples")
    parser.add_argument("--task", required=True, help="kind of the task, as in data.finetune.task")
    parser.add_argument("--output", type=Path, required=True, help="folder for all results")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="changes an option, as in mixtune run"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    data = {
        "pretrain": {"source": str(given.text.resolve())},
        "finetune": {"source": str(given.labelled.resolve()), "task": given.task},
    }
    config = given.output / "config.yaml"
    config.write_text(yaml.safe_dump((TINY if given.tiny else FULL) | {"data": data}), encoding="utf-8")
    os.environ.setdefault(CHECKPOINT_DIR, str(given.output / "checkpoints"))
    plan_and_write(config, given.set, given.output / "parts")
    evidence = Evidence(given.output)
    evidence.run()
    figures = evidence.figures()
    (given.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for one in figures["trainings"]:
        mfu = f", MFU {one['mfu']:.1%}" if one["mfu"] else ""
        memory = f", {one['peak_bytes'] / 1e9:.1f} GB" if one["peak_bytes"] else ""
        say(f"{one['candidate']}: {one['tokens_per_second']:,.0f} tokens/s{mfu}{memory}")
    say((given.output / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
